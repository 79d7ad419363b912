"""Shapes, prefix lengths, bounds and memory layouts of prefix attention."""

import torch
from support.kernel_inputs import padded

from koffkernels import RowBounds

# Rows, query heads, kv heads, queries, keys, head dim, memories, longest prefix.
NAMES = ("B", "Hq", "Hkv", "T", "S", "D", "n", "P")


def shape_of(*sizes: int) -> dict:
    """Sizes by name; without the last two there is no prefix."""
    return dict(zip(NAMES, sizes, strict=False))


def lengths_of(shape: dict) -> torch.Tensor:
    """P, then ever fewer, and 0 for the last of three or more."""
    n, length = shape.get("n", 1), shape.get("P", 1)
    lengths = [max(1, length - m * max(1, length // 3)) for m in range(n)]
    return torch.tensor(lengths[: n - 1] + [0] if n > 2 else lengths)


# Bounds of a shape's rows.
BOUNDS = {
    "left padding": lambda s: padded(s["B"], s["T"], s["S"]),
    "unwritten": lambda s: padded(s["B"], s["T"], s["S"], s["S"] - s["T"]),
    "some rows see nothing": lambda s: RowBounds(
        torch.tensor([0, s["S"], 2, s["S"] + 5, 0])[: s["B"]],
        torch.full((s["B"],), s["S"]),
        torch.tensor([s["S"] - s["T"], 0, -s["T"] - 1, 3, -2])[: s["B"]],
    ),
    "nobody sees anything": lambda s: RowBounds(
        *(torch.zeros(s["B"], dtype=torch.int64) for _ in range(3))
    ),
    "every row another": lambda s: RowBounds(
        torch.arange(s["B"]), s["S"] - torch.arange(s["B"]), torch.arange(s["B"]) % s["T"]
    ),
    "past the end": lambda s: RowBounds(
        torch.full((s["B"],), -3), torch.full((s["B"],), s["S"] + 9), torch.full((s["B"],), s["S"])
    ),
    "like none": lambda s: RowBounds(
        torch.zeros(s["B"], dtype=torch.int64),
        torch.full((s["B"],), s["S"]),
        torch.full((s["B"],), s["S"] - s["T"]),
    ),
    "int32": lambda s: RowBounds(*(b.int() for b in padded(s["B"], s["T"], s["S"], 2))),
}


# The same values (but "rows expanded", which repeats row 0) with other strides.
LAYOUTS = {
    "[B, T, H, D]": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last stride 2": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "column-major": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "rows expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "strided tokens": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
}
