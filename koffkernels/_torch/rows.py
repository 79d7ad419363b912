"""Batched LoRA algebra over rows that each have their own memory.

Rows are sequences: x is [B, T, K], and row b uses memory ids[b] (-1: none). Each row gets its own
copy of its (small) matrices, so that every product is one batched matmul whatever the mix, and
nothing is read back to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_matrices(
    lora: tuple[Tensor, Tensor, Tensor], ids: Tensor | None, rows: int, dtype: torch.dtype
):
    """a [B, r, K] and scaling * b [B, N, r] of each row, in the compute dtype; zero where the row
    has no memory."""
    a, b, scaling = lora
    if ids is None:
        b = b * scaling.to(b.dtype)[:, None, None]
        return a.to(dtype).expand(rows, -1, -1), b.to(dtype).expand(rows, -1, -1)
    index = ids.clamp(min=0)
    none = (ids < 0)[:, None, None]
    # masked_fill rather than a factor 0: an inf or NaN of another memory must not reach rows that
    # do not use it.
    a_rows = a.to(dtype)[index].masked_fill_(none, 0.0)
    b_rows = (
        (b[index] * scaling[index].to(b.dtype)[:, None, None]).masked_fill_(none, 0.0).to(dtype)
    )
    return a_rows, b_rows


def add_delta(y: Tensor, x: Tensor, a_rows: Tensor, b_rows: Tensor) -> Tensor:
    """y += (x a^T) b^T in place; returns s = x a^T [B, T, r]. y [B, T, N], x [B, T, K]."""
    s = torch.bmm(x, a_rows.transpose(1, 2))
    y.baddbmm_(s, b_rows.transpose(1, 2))
    return s


def sum_by_memory(per_row: Tensor, ids: Tensor | None, like: Tensor) -> Tensor:
    """Add each row's gradient [B, ...] to its memory's: [n, ...] in ``like``'s dtype.

    A product with a 0/1 matrix instead of a scatter: no atomics, so the result is the same from run
    to run.
    """
    flat = per_row.to(like.dtype).flatten(1)
    if ids is None:
        return flat.sum(0).view(like.shape)
    members = (torch.arange(like.shape[0], device=ids.device)[:, None] == ids).to(like.dtype)
    return (members @ flat).view(like.shape)


def lora_gradients(
    lora: tuple[Tensor, Tensor, Tensor], ids: Tensor | None, da_rows: Tensor, db_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the stacked a and b from the rows' da [B, r, K] and (not yet scaled) db [B, N,
    r]."""
    a, b, scaling = lora
    da = sum_by_memory(da_rows, ids, a)
    db = sum_by_memory(db_rows, ids, b) * scaling.to(b.dtype)[:, None, None]
    return da, db
