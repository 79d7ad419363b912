"""Batched LoRA algebra over rows that each have their own memory.

Rows are sequences: x is [B, T, K], and row b uses memory ids[b] (-1: none). Each row gets its own
copy of its (small) matrices, so that every product is one batched matmul whatever the mix, and
nothing is read back to the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def known_ids(ids: Tensor | None, memories: int) -> Tensor | None:
    """Return ids with -1, no memory, in place of each that is none of the memories."""
    return None if ids is None else torch.where((ids >= 0) & (ids < memories), ids, -1)


def row_matrices(
    lora: tuple[Tensor, Tensor, Tensor], ids: Tensor | None, rows: int, dtype: torch.dtype
):
    """Return a [B, r, K] and scaling * b [B, N, r] of each row, in the compute dtype; zero where
    the row has no memory."""
    a, b, scaling = lora
    if ids is None:
        b = b * scaling[:, None, None]  # in fp32 also where b has 16 bits
        return a.to(dtype).expand(rows, -1, -1), b.to(dtype).expand(rows, -1, -1)
    index = ids.clamp(min=0)
    none = (ids < 0)[:, None, None]
    a_rows = a.to(dtype)[index]
    b_rows = (b * scaling[:, None, None]).to(dtype)[index]
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(none.any()):
        return a_rows, b_rows
    # masked_fill rather than a factor 0: an inf or NaN of another memory must not reach rows that
    # do not use it.
    return a_rows.masked_fill_(none, 0.0), b_rows.masked_fill_(none, 0.0)


def add_delta(y: Tensor, x: Tensor, a_rows: Tensor, b_rows: Tensor) -> Tensor:
    """Add (x a^T) b^T to y, in place, and return s = x a^T [B, T, r]. y [B, T, N], x [B, T, K]."""
    s = torch.bmm(x, a_rows.transpose(1, 2))
    y.baddbmm_(s, b_rows.transpose(1, 2))
    return s


def traced_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor, Tensor] | None,
    ids: Tensor | None,
) -> Tensor:
    """Return the same linear layer by autograd, for torch.compile: it decides by itself what to
    save for backward, and torch 2.11 drops the in-place steps of a custom autograd.Function."""
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if lora is None:
        return y
    a_rows, b_rows = row_matrices(lora, ids, x.shape[0], x.dtype)
    return torch.baddbmm(y, torch.bmm(x, a_rows.transpose(1, 2)), b_rows.transpose(1, 2))


def sum_by_memory(per_row: Tensor, ids: Tensor | None, memories: int) -> Tensor:
    """Add each row's gradient [B, ...] to its memory's: [n, ...], in fp32 or wider.

    Rows without a memory go to a slot that is cut off. Nothing is multiplied by 0, so a NaN in one
    row stays in that row's memory, and nothing is added atomically, so the result is the same from
    run to run (on a GPU accumulating index_put_ sorts first).
    """
    per_row = per_row.to(torch.promote_types(per_row.dtype, torch.float32))
    if ids is None:
        return per_row.sum(0, keepdim=True)
    total = per_row.new_zeros(memories + 1, *per_row.shape[1:])
    slot = torch.where(ids < 0, memories, ids)
    if per_row.device.type == "cpu":
        return total.index_add_(0, slot, per_row)[:memories]
    return total.index_put_((slot,), per_row, accumulate=True)[:memories]


def lora_gradients(
    lora: tuple[Tensor, Tensor, Tensor], ids: Tensor | None, da_rows: Tensor, db_rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the stacked a, b and scaling from the rows' da [B, r, K] and (not yet
    scaled) db [B, N, r]."""
    a, b, scaling = lora
    da = sum_by_memory(da_rows, ids, a.shape[0])
    db = sum_by_memory(db_rows, ids, a.shape[0])
    dscaling = (db * b.to(db.dtype)).sum((1, 2))
    db = db * scaling.to(db.dtype)[:, None, None]
    return da.to(a.dtype), db.to(b.dtype), dscaling.to(scaling.dtype)
