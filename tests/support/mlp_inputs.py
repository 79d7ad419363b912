"""Random arguments of gated_mlp, awkward shapes included, and functions that call it."""

import torch
from support.kernel_inputs import eager_mlp, lora_tensors, master, mlp_lora_from, normal

from koffkernels import gated_mlp

PARTS = ("gate", "up", "down")
# x's leading shape, H, I, memories, rank: ones, primes, an empty batch, no tokens, T = 1, a rank
# above every width, many memories, x with two dimensions, and no neurons.
SHAPES = [
    ((1, 1), 1, 1, 1, 1),
    ((3, 7), 13, 29, 2, 1),
    ((2, 1), 7, 11, 3, 33),
    ((0, 4), 8, 12, 2, 4),
    ((4, 0), 8, 12, 2, 4),
    ((50, 3), 16, 24, 40, 2),
    ((19,), 12, 20, 4, 3),
    ((1,), 3, 5, 1, 2),
    ((0,), 8, 12, 2, 4),
    ((2, 3), 8, 0, 2, 4),
]


def gates_of(kind: str, width: int, dtype) -> dict:
    if kind == "none":
        return {}
    gates = torch.zeros(width) if kind == "zeros" else torch.ones(width)
    if kind == "mixed":
        gates = (torch.rand(width) * 2 - 0.5).clamp(0, 1)
    return {"gates": gates.to(master(dtype))}


def make(shape, dtype, parts=PARTS, gates="mixed"):
    lead, hidden, width, memories, rank = shape
    tensors = {"x": normal(*lead, hidden, dtype=dtype)} | gates_of(gates, width, dtype)
    for name in parts:
        k, n = (width, hidden) if name == "down" else (hidden, width)
        tensors |= lora_tensors(name, memories, rank, k, n, master(dtype))
    scale = hidden**-0.5
    weights = [normal(width, hidden, dtype=dtype, scale=scale) for _ in range(2)]
    return tensors, [*weights, normal(hidden, width, dtype=dtype, scale=max(width, 1) ** -0.5)]


def caller(weights, ids, activation="silu", layout=lambda x: x):
    def call(t):
        x, lora = layout(t["x"]), mlp_lora_from(t)
        extra = {"gates": t.get("gates"), "lora": lora, "activation": activation}
        return gated_mlp(x, *(w.to(x.dtype) for w in weights), memory_ids=ids, **extra)

    return call


def eager_caller(weights, ids, activation="silu"):
    def call(t):
        return eager_mlp(t["x"], weights, t.get("gates"), mlp_lora_from(t), ids, activation)

    return call
