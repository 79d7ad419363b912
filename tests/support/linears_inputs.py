"""Random arguments of lora_linears, awkward shapes included, and functions that call it.

Results are set side by side, so that they are one tensor, as ``oracle`` takes it.
"""

import torch
from support.kernel_inputs import lora_from, lora_tensors, master, normal

from koffkernels import lora_linears

# x's leading shape, K, (N, rank or None) of each weight, memories: q, k and v of grouped heads,
# one without an update, ones, one weight, two, no rows, no tokens, no outputs, no inputs.
SHAPES = [
    ((3, 7), 40, ((48, 4), (16, 4), (16, 4)), 2),
    ((2, 5), 37, ((70, 5), (33, None), (9, 17)), 3),
    ((1, 1), 1, ((1, 1), (1, 1), (1, 1)), 1),
    ((19,), 13, ((11, 3),), 4),
    ((4, 9), 31, ((64, None), (7, 33)), 40),
    ((0, 4), 8, ((6, 2), (3, 2), (3, 2)), 2),
    ((4, 0), 8, ((6, 2), (3, None), (3, 2)), 2),
    ((2, 3), 8, ((6, 2), (0, 2), (3, 2)), 2),
    ((2, 3), 0, ((6, 2), (3, None), (3, 2)), 1),
]


def make(shape, dtype):
    """Tensors that train, and the weights."""
    lead, k, layers, memories = shape
    tensors = {"x": normal(*lead, k, dtype=dtype)}
    for i, (n, rank) in enumerate(layers):
        if rank is not None:
            tensors |= lora_tensors(f"lora{i}", memories, rank, k, n, master(dtype))
    return tensors, [normal(n, k, dtype=dtype, scale=max(k, 1) ** -0.5) for n, _ in layers]


def separate(weights, ids, biases=None, layout=lambda x: x):
    def call(t):
        x = layout(t["x"])
        ws = [w.to(x.dtype) for w in weights]
        bs = biases and [None if b is None else b.to(x.dtype) for b in biases]
        lora = [lora_from(t, f"lora{i}") for i in range(len(ws))]
        return lora_linears(x, ws, bs, lora=lora, memory_ids=ids)

    return call


def caller(*args, **kwargs):
    call = separate(*args, **kwargs)
    return lambda t: torch.cat(call(t), -1)
