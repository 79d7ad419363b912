"""Batched LoRA algebra over rows that each have their own memory.

Rows are sequences: x is [B, T, K], and row b uses memory ids[b] (-1: none). Where one memory is
that of all rows, they are one long row. Otherwise every product is a batched matmul, whatever the
mix: of the memories, with the rows of each laid side by side (``add_delta_by_memory``), or of the
rows, each with its own copy of its matrices (``add_delta``). Which is cheaper depends on what is
larger, a row's tokens or its matrices.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..group_rows import group_rows
from ..types import RowGroups

Update = tuple[Tensor, Tensor, Tensor]  # a, b, scaling of a ``LoRA``


def known_rows(memory_ids: Tensor | RowGroups | None, memories: int) -> RowGroups | None:
    """Return the rows of each memory, which the caller may know already."""
    if memory_ids is None:
        return None
    if isinstance(memory_ids, RowGroups):
        eager_cpu = memory_ids.ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if memory_ids.counts is not None or not eager_cpu:
            return memory_ids
        memory_ids = memory_ids.ids  # out of a traced part of the model, into one that is not
    return group_rows(memory_ids, memories)


def as_rows(x: Tensor, one_memory: bool) -> Tensor:
    """Return x [B, T, K] or [M, K] as rows [B, T, K]: one long row if all have one memory."""
    if one_memory:
        return x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])  # -1 fails where K is 0
    return x if x.dim() == 3 else x[:, None, :]


def _scaled(s: Tensor, scaling: Tensor) -> Tensor:
    """Return s times an fp32 scaling, multiplied in fp32 also where s has 16 bits."""
    return (s * scaling).to(s.dtype)


def row_matrices(
    lora: Update, rows: RowGroups | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a [B, r, K], b [B, N, r] in the compute dtype and scaling [B, 1, 1] of each row, zero
    where the row has no memory."""
    a, b, scaling = lora
    a, b, scaling = a.to(dtype), b.to(dtype), scaling.view(-1, 1, 1)
    if rows is None:
        return a, b, scaling
    if rows.counts is not None and len(rows.order) == len(rows.ids):
        return tuple(part.index_select(0, rows.ids) for part in (a, b, scaling))
    # masked_fill rather than a factor 0: an inf or NaN of another memory must not reach rows that
    # do not use it.
    index, none = rows.ids.clamp(min=0), (rows.ids < 0)[:, None, None]
    return tuple(part.index_select(0, index).masked_fill_(none, 0.0) for part in (a, b, scaling))


def add_delta(y: Tensor, x: Tensor, lora: Update, rows: RowGroups | None) -> Tensor:
    """Add scaling (x a^T) b^T to y, in place, and return s = x a^T [B, T, r]. y [B, T, N], x
    [B, T, K]."""
    a_rows, b_rows, scaling = row_matrices(lora, rows, x.dtype)
    s = torch.bmm(x, a_rows.transpose(1, 2))
    y.baddbmm_(_scaled(s, scaling), b_rows.transpose(1, 2))
    return s


def add_delta_by_memory(y: Tensor, x: Tensor, lora: Update, rows: RowGroups | None) -> None:
    """Add the same to y, in place, where nobody has need of s: whichever way is cheaper.

    A mix of n memories, of which none has more than G rows, is n products of G T tokens. They take
    copies of n G T tokens, and each memory's matrices are read once, where they are. Copies of each
    row's matrices are B r of such vectors; each is read, written and read again.
    """
    if rows is not None and rows.counts is not None:
        (count, tokens, _), memories, rank = x.shape, len(rows.counts), lora[0].shape[1]
        if not len(rows.order):
            return
        if len(rows.slots) * tokens <= count * rank and memories <= 3 * count:
            a, b, scaling = row_matrices(lora, None, x.dtype)
            mine, out = x, y
            if not rows.aligned:
                mine, out = x.index_select(0, rows.slots), y.index_select(0, rows.slots)
            s = torch.bmm(mine.reshape(memories, -1, x.shape[2]), a.transpose(1, 2))
            out.view(memories, -1, y.shape[2]).baddbmm_(_scaled(s, scaling), b.transpose(1, 2))
            if not rows.aligned:
                if len(rows.order) < len(rows.slots):
                    out = out.index_select(0, rows.places)
                y.index_copy_(0, rows.order, out)
            return
    add_delta(y, x, lora, rows)


def delta_backward(dy: Tensor, lora: Update, rows: RowGroups | None, dx: Tensor | None) -> Tensor:
    """Return t = scaling dy b [B, T, r], and add t a to dx, in place, unless it is None."""
    a_rows, b_rows, scaling = row_matrices(lora, rows, dy.dtype)
    t = _scaled(torch.bmm(dy, b_rows), scaling)
    if dx is not None:
        dx.baddbmm_(t, a_rows)
    return t


def linear_backward(
    dy: Tensor,
    weight: Tensor,
    lora: Update | None,
    rows: RowGroups | None,
    needs_input: bool = True,
    onto: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return dx = dy W + t A (None if nobody needs it) with t = scaling dy B [B, T, r]; added in
    place to ``onto`` where that is given."""
    dx = None
    if needs_input and onto is None:
        dx = dy @ weight.to(dy.dtype)
    elif needs_input:
        dx = onto
        dx.flatten(0, 1).addmm_(dy.flatten(0, 1), weight.to(dy.dtype))
    return dx, None if lora is None else delta_backward(dy, lora, rows, dx)


def traced_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: Update | None, rows: RowGroups | None
) -> Tensor:
    """Return the same linear layer by autograd, for torch.compile: it decides by itself what to
    save for backward, and torch 2.11 drops the in-place steps of a custom autograd.Function."""
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y if lora is None else plus_delta(y, x, lora, rows)


def plus_delta(y: Tensor, x: Tensor, lora: Update, rows: RowGroups | None) -> Tensor:
    """Return y + scaling (x a^T) b^T [B, T, N] by autograd. y [B, T, N], x [B, T, K]."""
    a_rows, b_rows, scaling = row_matrices(lora, rows, x.dtype)
    s = _scaled(torch.bmm(x, a_rows.transpose(1, 2)), scaling)
    return torch.baddbmm(y, s, b_rows.transpose(1, 2))


def sum_by_memory(per_row: Tensor, rows: RowGroups | None, memories: int) -> Tensor:
    """Add each row's gradient [B, ...] to its memory's: [n, ...], in fp32 or wider.

    Rows without a memory go to a slot that is cut off. Nothing is multiplied by 0, so a NaN in one
    row stays in that row's memory, and nothing is added atomically, so the result is the same from
    run to run (on a GPU accumulating index_put_ sorts first).
    """
    per_row = per_row.to(torch.promote_types(per_row.dtype, torch.float32))
    if rows is None:
        return per_row
    total = per_row.new_zeros(memories + 1, *per_row.shape[1:])
    slot = torch.where(rows.ids < 0, memories, rows.ids)
    if per_row.device.type == "cpu":
        return total.index_add_(0, slot, per_row)[:memories]
    return total.index_put_((slot,), per_row, accumulate=True)[:memories]


def lora_gradients(
    lora: Update, rows: RowGroups | None, da_rows: Tensor, db_rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the stacked a, b and scaling from the rows' da [B, r, K] and (not yet
    scaled) db [B, N, r]."""
    a, b, scaling = lora
    da = sum_by_memory(da_rows, rows, a.shape[0])
    db = sum_by_memory(db_rows, rows, a.shape[0])
    dscaling = (db * b.to(db.dtype)).sum((1, 2))
    db = db * scaling.to(db.dtype)[:, None, None]
    return da.to(a.dtype), db.to(b.dtype), dscaling.to(scaling.dtype)
