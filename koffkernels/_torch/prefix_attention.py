"""Attention over a learned prefix.

On the CPU: the flash kernel once for the row's own keys, once per memory for the prefix (all its
rows and query heads folded into one sequence of queries, a few rows at a time, so that neither the
prefix is repeated nor the batch copied; in a step of decoding once for all memories), merged by
log-sum-exp. Backward feeds the merged output
and log-sum-exp to the flash kernel's backward for each part, which is exact: the softmax weights of
a part are exp(score - merged lse), and the row term sum(dO * O) needs the merged O. See
docs/math.md.

On other devices, in fp64, and under torch.compile: one concatenated scaled_dot_product_attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import without_autocast
from ..reference import visible_keys
from ..types import Prefix, RowBounds, RowGroups
from .rows import known_rows

_aten = torch.ops.aten
# The kernel's backward in bf16 took twice the time of fp32 on rows of 128 tokens (25 and 15 ms), as
# long on 256, and less on 512 (36 and 40); one core of a Xeon with AMX, torch 2.13.
_SHORT = 256
_FOLDED = 1 << 20  # elements of q that one prefix pass folds: enough for all cores, little to copy


def flash(q, k, v, causal, mask, scale):
    """Return (o, lse) of the CPU's flash kernel, which reads garbage where the last stride is not
    1."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )


def flash_backward(do, q, k, v, o, lse, causal, mask, scale):
    """Return (dq, dk, dv) given the whole softmax's o and lse; same remark about strides."""
    if q.dtype != torch.float32 and max(q.shape[2], k.shape[2]) <= _SHORT:
        do, q, k, v, o = (x.float() for x in (do, q, k, v, o))
    do, q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (do, q, k, v))
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, o, lse, 0.0, causal, attn_mask=mask, scale=scale
    )


def _crop(k: Tensor, v: Tensor, bounds: RowBounds | None) -> tuple[Tensor, Tensor]:
    """Drop keys past every row's end (the unwritten part of a static cache)."""
    if bounds is None or bounds.key_end.numel() == 0:
        return k, v
    end = min(max(int(bounds.key_end.max()), 0), k.shape[2])
    return k[:, :, :end], v[:, :, :end]


def _simplify(bounds: RowBounds | None, queries: int, keys: int) -> RowBounds | None:
    """Return None where the bounds say the same as None: the causal kernel then needs no mask."""
    if bounds is None:
        return None
    plain = (bounds.key_start <= 0) & (bounds.key_end >= keys)
    plain &= bounds.query_start == keys - queries
    return None if bool(plain.all()) else bounds


def _own_mask(
    q: Tensor, k: Tensor, bounds: RowBounds | None
) -> tuple[bool, Tensor | None, Tensor | None]:
    """Return (is_causal, additive mask, rows of queries that see none of their own keys [B, T]) for
    the flash kernel."""
    queries, keys = q.shape[2], k.shape[2]
    if bounds is None:
        if queries == keys:
            return True, None, None
        if queries == 1:
            return False, None, None
    visible = visible_keys(q.shape[0], queries, keys, bounds, q.device)
    if bool(visible.all()):
        return False, None, None
    mask = torch.zeros((), dtype=q.dtype).expand(visible.shape).masked_fill(~visible, -math.inf)
    return False, mask[:, None], ~visible.any(-1)


def _groups(
    groups: RowGroups | None, rows: int, lengths: Tensor
) -> list[tuple[int, Tensor | slice, int]]:
    """Return (memory, its rows, its length) for each memory in the batch."""
    lengths = lengths.tolist()
    if groups is None:
        return [(0, slice(None), lengths[0])] if lengths[0] > 0 else []
    return [
        (m, slice(None) if len(own) == rows else own, lengths[m])
        for m, own in enumerate(groups.order.split(groups.counts))
        if len(own) and lengths[m] > 0
    ]


def _pieces(rows: Tensor | slice, q: Tensor) -> Iterator[Tensor | slice]:
    """Yield the rows of a group, a few at a time; slices stay slices, for indexing to make
    views."""
    size = max(1, _FOLDED // max(1, q[0].numel()))
    if isinstance(rows, Tensor):
        yield from rows.split(size)
    else:
        yield from (slice(i, min(i + size, len(q))) for i in range(0, len(q), size))


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """Fold [R, Hq, T, ...] to [1, Hkv, R G T, ...]: all queries of one kv head become one
    sequence."""
    r, heads, t = x.shape[:3]
    tail = x.shape[3:]
    return (
        x.reshape(r, kv_heads, heads // kv_heads, t, *tail)
        .transpose(0, 1)
        .reshape(1, kv_heads, -1, *tail)
    )


def _unfold(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Undo ``_fold``; shape is (R, Hq, T)."""
    r, heads, t = shape
    kv_heads, tail = x.shape[1], x.shape[3:]
    return (
        x.reshape(kv_heads, r, heads // kv_heads, t, *tail)
        .transpose(0, 1)
        .reshape(r, heads, t, *tail)
    )


def _attend_own(q: Tensor, k: Tensor, v: Tensor, bounds: RowBounds | None, scale: float):
    """Return attention of each row over its own keys: (o, lse with -inf where nothing is seen)."""
    if k.shape[2] == 0:
        return torch.zeros_like(q), q.new_full(
            q.shape[:3], -math.inf, dtype=torch.promote_types(q.dtype, torch.float32)
        )
    causal, mask, nothing = _own_mask(q, k, bounds)
    o, lse = flash(q, k, v, causal, mask, scale)
    if nothing is not None:  # the kernel reports lse 0 there, and o NaN where the query is NaN
        lse = lse.masked_fill(nothing[:, None], -math.inf)
        o = o.masked_fill(nothing[:, None, :, None], 0.0)
    return o, lse


def _merge_(o: Tensor, lse: Tensor, rows: Tensor | slice, o_p: Tensor, lse_p: Tensor) -> None:
    """Merge attention over a prefix into that of some rows over their own keys, in place."""
    own = lse[rows]
    share = torch.sigmoid(lse_p - own)[..., None]
    o[rows] = torch.lerp(o[rows].float(), o_p.float(), share).to(o.dtype)
    lse[rows] = torch.logaddexp(own, lse_p)


def _at_once(q: Tensor, prefix: Prefix, groups: RowGroups | None) -> bool:
    """Whether one pass over the prefixes of all memories is best: so few queries that the calls
    would cost more than what they do, and no prefix that is shorter than the others."""
    return (
        groups is not None
        and len(groups.order) > 0
        and len(groups.slots) * q[0].numel() <= _FOLDED
        and min(prefix.lengths.tolist()) == prefix.k.shape[2]
    )


def _add_prefixes_(
    o: Tensor, lse: Tensor, q: Tensor, prefix: Prefix, groups: RowGroups, scale: float
) -> None:
    """Merge attention over the prefixes of all memories into that over the own keys, in place: the
    rows of each memory are one sequence of queries, and the memories a batch."""
    (memories, kv_heads), (_, heads, queries, width) = prefix.k.shape[:2], q.shape
    folded = (memories, -1, kv_heads, heads // kv_heads, queries)
    q = q if groups.aligned else q.index_select(0, groups.slots)
    q = q.reshape(*folded, width).transpose(1, 2).reshape(memories, kv_heads, -1, width)
    o_p, lse_p = flash(q, prefix.k.to(q.dtype), prefix.v.to(q.dtype), False, None, scale)
    shape = (memories, kv_heads, -1, heads // kv_heads, queries)
    o_p = o_p.reshape(*shape, width).transpose(1, 2).reshape(-1, heads, queries, width)
    lse_p = lse_p.reshape(shape).transpose(1, 2).reshape(-1, heads, queries)
    rows: Tensor | slice = slice(None)
    if not groups.aligned:
        rows = groups.order
        o_p, lse_p = (x.index_select(0, groups.places) for x in (o_p, lse_p))
    _merge_(o, lse, rows, o_p, lse_p)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: Prefix,
    groups: RowGroups | None,
    scale: float,
    bounds: RowBounds | None,
) -> tuple[Tensor, Tensor]:
    """Return (o, lse), lse 0 where nothing is seen."""
    o, lse = _attend_own(q, k, v, bounds, scale)
    if _at_once(q, prefix, groups):
        _add_prefixes_(o, lse, q, prefix, groups, scale)
    else:
        for m, rows, length in _groups(groups, q.shape[0], prefix.lengths):
            k_m, v_m = (x[m : m + 1, :, :length].to(q.dtype) for x in (prefix.k, prefix.v))
            for piece in _pieces(rows, q):
                q_m = _fold(q[piece], k.shape[1])
                o_m, lse_m = flash(q_m, k_m, v_m, False, None, scale)
                shape = lse[piece].shape
                _merge_(o, lse, piece, _unfold(o_m, shape), _unfold(lse_m, shape))
    return o, lse.masked_fill_(lse == -math.inf, 0.0)


class _PrefixAttention(torch.autograd.Function):
    """CPU only; see the module's docstring."""

    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, lengths, groups, scale, *bounds):
        prefix, seen = Prefix(prefix_k, prefix_v, lengths), RowBounds(*bounds) if bounds else None
        o, lse = _forward(q, k, v, prefix, groups, scale, seen)
        ctx.save_for_backward(q, k, v, o, lse, prefix_k, prefix_v, lengths, *bounds)
        ctx.groups, ctx.scale = groups, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse, prefix_k, prefix_v, lengths, *bounds = ctx.saved_tensors
        dpk, dpv = torch.zeros_like(prefix_k), torch.zeros_like(prefix_v)
        if k.shape[2] == 0:
            dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        else:
            causal, mask, _ = _own_mask(q, k, RowBounds(*bounds) if bounds else None)
            dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
            for piece in _pieces(slice(None), q):  # the kernel's own fp32 copies are as small then
                seen = mask if mask is None or len(mask) == 1 else mask[piece]
                args = (x[piece] for x in (do, q, k, v, o, lse))
                part = flash_backward(*args, causal, seen, ctx.scale)
                dq[piece], dk[piece], dv[piece] = part
        for m, rows, length in _groups(ctx.groups, q.shape[0], lengths):
            k_m, v_m = (x[m : m + 1, :, :length].to(q.dtype) for x in (prefix_k, prefix_v))
            dk_m, dv_m = (torch.zeros_like(x, dtype=torch.float32) for x in (k_m, v_m))
            for piece in _pieces(rows, q):
                do_m, q_m, o_m = (_fold(x[piece], k.shape[1]) for x in (do, q, o))
                own = lse[piece]
                dq_m, *d_m = flash_backward(
                    do_m, q_m, k_m, v_m, o_m, _fold(own, k.shape[1]), False, None, ctx.scale
                )
                dq[piece] += _unfold(dq_m, own.shape)
                dk_m += d_m[0]
                dv_m += d_m[1]
            dpk[m, :, :length], dpv[m, :, :length] = dk_m[0], dv_m[0]
        return dq, dk, dv, dpk, dpv, None, None, None, *(None for _ in bounds)


def _seen(k: Tensor, v: Tensor, queries: int, bounds: RowBounds | None) -> tuple[Tensor, Tensor]:
    """Return K and V with zeros where no query may look, so that unwritten or padded memory (NaN
    even) cannot leak."""
    if bounds is None:
        return k, v
    j = torch.arange(k.shape[2], device=k.device)
    end = torch.minimum(bounds.key_end, bounds.query_start + queries)
    outside = (j < bounds.key_start[:, None]) | (j >= end[:, None])
    if k.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(outside.any()):
        return k, v
    outside = outside[:, None, :, None]
    return k.masked_fill(outside, 0.0), v.masked_fill(outside, 0.0)


def _concatenated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: Prefix,
    ids: Tensor | None,
    bounds: RowBounds | None,
    scale: float,
) -> Tensor:
    """Return one scaled_dot_product_attention over [prefix of each row; own keys]."""
    rows, heads, queries, _ = q.shape
    if ids is None:
        ids = torch.zeros(rows, dtype=torch.int64, device=q.device)
    index = ids.clamp(min=0)
    inside = torch.arange(prefix.k.shape[2], device=q.device) < prefix.lengths[index][:, None]
    inside = (inside & (ids >= 0)[:, None])[:, None, :]
    visible = visible_keys(rows, queries, k.shape[2], bounds, q.device)
    visible = torch.cat([inside.expand(-1, queries, -1), visible], dim=2)
    own = inside[:, 0, :][:, None, :, None]
    keys = torch.cat([prefix.k[index].to(q.dtype).where(own, 0.0), k], dim=2)
    values = torch.cat([prefix.v[index].to(q.dtype).where(own, 0.0), v], dim=2)
    # A query that sees nothing looks at everything and is then zeroed: softmax over an empty row
    # would be NaN.
    nothing = ~visible.any(-1, keepdim=True)
    group = heads // k.shape[1]
    o = F.scaled_dot_product_attention(
        q,
        keys.repeat_interleave(group, 1),
        values.repeat_interleave(group, 1),
        attn_mask=(visible | nothing)[:, None],
        scale=scale,
    )
    return o.masked_fill(nothing[:, None], 0.0)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: Prefix | None,
    memory_ids: Tensor | RowGroups | None,
    bounds: RowBounds | None,
    scale: float | None,
) -> Tensor:
    """See ``koffkernels.prefix_attention``."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if prefix is None:
        empty = q.new_zeros(1, k.shape[1], 1, q.shape[-1])
        prefix = Prefix(empty, empty, torch.zeros(1, dtype=torch.int64, device=q.device))
        memory_ids = None
    groups = known_rows(memory_ids, prefix.k.shape[0])
    eager_cpu = q.device.type == "cpu" and not torch.compiler.is_compiling()
    with without_autocast(q.device):
        if not eager_cpu or q.dtype == torch.float64 or 0 in q.shape:
            ids = None if groups is None else groups.ids
            return _concatenated(q, *_seen(k, v, q.shape[2], bounds), prefix, ids, bounds, scale)
        k, v = _crop(k, v, bounds)
        bounds = _simplify(bounds, q.shape[2], k.shape[2])
        k, v = _seen(k, v, q.shape[2], bounds)
        if not torch.is_grad_enabled():
            return _forward(q, k, v, prefix, groups, scale, bounds)[0]
        return _PrefixAttention.apply(q, k, v, *prefix, groups, scale, *(bounds or ()))
