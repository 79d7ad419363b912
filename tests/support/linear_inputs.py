"""Random arguments of lora_linear, awkward shapes included, and functions that call it."""

from support.kernel_inputs import lora_from, lora_tensors, master, normal

from koffkernels import lora_linear

# x's leading shape, K, N, memories, rank: ones, primes, an empty batch, no tokens, T = 1, a rank
# above every width, many memories, and x with two dimensions.
SHAPES = [
    ((1, 1), 1, 1, 1, 1),
    ((3, 7), 13, 11, 2, 1),
    ((2, 1), 17, 5, 3, 33),
    ((0, 4), 8, 6, 2, 4),
    ((4, 0), 8, 6, 2, 4),
    ((50, 3), 31, 64, 40, 2),
    ((19,), 12, 10, 4, 3),
    ((1,), 3, 2, 1, 2),
    ((0,), 8, 6, 2, 4),
]


def make(shape, dtype, **extra):
    lead, k, n_out, memories, rank = shape
    tensors = {"x": normal(*lead, k, dtype=dtype)}
    tensors |= lora_tensors("lora", memories, rank, k, n_out, master(dtype))
    return tensors, {"w": normal(n_out, k, dtype=dtype, scale=k**-0.5)} | extra


def caller(weights, ids, bias=None, layout=lambda x: x):
    def call(t):
        w = weights["w"].to(t["x"].dtype)
        b = None if bias is None else bias.to(t["x"].dtype)
        return lora_linear(layout(t["x"]), w, b, lora=lora_from(t, "lora"), memory_ids=ids)

    return call
