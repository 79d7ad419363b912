"""Attention over a learned prefix for a few queries a row: decoding, speculative steps.

Two launches or three. The first reads each memory's keys once for all rows that use it: a tile
packs (rows of one memory) x (query heads of one kv head) x (queries) as its rows. Which rows these
are is found inside the kernel from the ids, without a sort, without a plan and without the host:
counting ids gives each tile its memory, a running count gives each of the tile's rows its index.
The second cuts every row's own keys into splits of equal length; the length is the row's, read on
the device, so that the unwritten part of a static cache costs nothing. Where the rows alone fill
the GPU a row has one split, and its program goes on with the first launch's fp32 partial results
and writes the output. Else the third launch merges all partial results. The order is fixed either
way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..shared.config import Config
from ..shared.launch import (
    SMALLEST_TILE,
    cdiv,
    launch,
    multiprocessors,
    pdl,
    power_of_2,
    start_dependent,
    wait_for_primary,
)
from ..shared.operands import per_head
from .call import LN2, LOG2E, Call, attend, memory_length, row_bounds, row_prefix
from .fwd import empty_output

# Where a memory has many rows the group kernel's tiles have 64 or 128, and wgmma or tcgen05 then.
EXPECTS = {
    "_prefix_attention_group_kernel": "dot16",
    "_prefix_attention_own_kernel": "dot16",
    "_prefix_attention_merge_kernel": None,
}
# Beyond these the queries fill a tile of the one-pass kernel, which needs no merge.
MOST_QUERIES = 16  # of one row
MOST_PACKED = 64  # query heads of a kv head x queries of one row
_WARPS = 8  # that fit a multiprocessor, of the 255 registers that a thread of the tiles' may use
_SPLIT = 128  # a split has at least as many keys: two to four tiles
_IDS = 64  # ids read at a time: one load for each memory, in a batch of up to 64 rows
_MERGED = 16  # splits merged at a time

# block_m is the largest tile; fewer rows take smaller ones. Learned keys, fp32 as a rule, are
# rounded in registers: their tiles are twice as large.
GROUP_CONFIGS = {
    "128x32": Config(128, 32, warps=8, stages=3),
    "128x32s2": Config(128, 32, warps=8, stages=2, archs=(90, 100)),
    "64x32": Config(64, 32, warps=4, stages=3),
}
OWN_CONFIGS = {
    "64": Config(MOST_PACKED, 64, warps=4, stages=3),
    "64s2": Config(MOST_PACKED, 64, warps=4, stages=2),
    "32": Config(MOST_PACKED, 32, warps=4, stages=4),
}
FP32 = Config(MOST_PACKED, 32, warps=4, stages=2)


@triton.jit
def _members(ids_ptr, rows, memory, IDS: tl.constexpr):
    """How many rows use a memory."""
    count = tl.zeros((), tl.int32)
    offs = tl.arange(0, IDS)
    for r in range(0, rows, IDS):
        ids = tl.load(ids_ptr + r + offs, mask=r + offs < rows, other=-1)
        count += tl.sum((ids == memory).to(tl.int32), 0)
    return count


@triton.jit
def _tile_memory(ids_ptr, memories, rows, tile, slots, IDS: tl.constexpr):
    """(memory, index of the tile among this memory's), memory -1 for a tile past the last. Memories
    get as many consecutive tiles of ``slots`` rows as they need."""
    if ids_ptr is not None:
        memory = tl.full((), -1, tl.int32)
        index = tl.zeros((), tl.int32)
        before = tl.zeros((), tl.int32)
        for m in range(0, memories):
            after = before + tl.cdiv(_members(ids_ptr, rows, m, IDS), slots)
            here = (tile >= before) & (tile < after)
            memory = tl.where(here, m, memory)
            index = tl.where(here, tile - before, index)
            before = after
        return memory, index
    return tl.zeros((), tl.int32), tile


@triton.jit
def _slot_rows(ids_ptr, rows, memory, slot, IDS: tl.constexpr):
    """(row, does it exist) of the slot-th row that uses a memory: as many rows stand before it as
    there are with at most ``slot`` members of the memory up to and including themselves."""
    if ids_ptr is not None:
        row = tl.zeros_like(slot)
        count = tl.zeros((), tl.int32)
        offs = tl.arange(0, IDS)
        for r in range(0, rows, IDS):
            ids = tl.load(ids_ptr + r + offs, mask=r + offs < rows, other=-1)
            mine = ((ids == memory) & (memory >= 0)).to(tl.int32)
            upto = count + tl.cumsum(mine, 0)
            earlier = (upto[None, :] <= slot[:, None]) & (r + offs < rows)[None, :]
            row += tl.sum(earlier.to(tl.int32), 1)
            count += tl.sum(mine, 0)
        return row, slot < count
    return slot, slot < rows


@triton.jit
def _store_part(acc, total, peak, o_ptr, lse_ptr, split, out_rows, at, mask, D: tl.constexpr):
    """Write o / total and its lse (log2) to o [splits, out_rows, D] and lse [splits, out_rows]."""
    at += split.to(tl.int64) * out_rows
    o = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(o_ptr + at[:, None] * D + tl.arange(0, D)[None, :], o, mask=mask[:, None])
    tl.store(lse_ptr + at, peak + tl.log2(total), mask=mask)


@triton.jit(do_not_specialize=["T", "rows", "splits"])
def _prefix_attention_group_kernel(
    q,
    prefix,
    ids_ptr,
    o_ptr,
    lse_ptr,
    scale,
    heads,
    group,
    T,
    rows,
    splits,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IDS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: some rows of one memory, one kv head, one split of the learned keys."""
    start_dependent(PDL)
    kv = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    slots = BLOCK_M // (group * T)
    memory, index = _tile_memory(ids_ptr, prefix.memories, rows, tl.program_id(0), slots, IDS)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)[None, :]
    slot = offs_m // (group * T)
    row, found = _slot_rows(ids_ptr, rows, memory, index * slots + slot, IDS)
    mask = found & (slot < slots)
    row = row.to(tl.int64)
    head = kv * group + offs_m % (group * T) // T
    t = offs_m % T
    # q [BLOCK_M, D]: rows x query heads of the kv head x queries
    q_rows = q.ptr + (row * q.stride_row + head * q.stride_head + t * q.stride_token)[:, None]
    q_tile = tl.load(q_rows + offs_d, mask=mask[:, None], other=0.0)

    length = memory_length(prefix, memory)
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    begin = tl.minimum(split * share, length)
    end = tl.minimum(begin + share, length)
    full = begin + (end - begin) // BLOCK_N * BLOCK_N
    at = ((tl.maximum(memory, 0) * (heads // group) + kv) * prefix.P + begin) * D
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    acc, total, peak = attend(
        acc, total, peak, q_tile, prefix.k + at, prefix.v + at, D, D, begin, full, end, end,
        scale * LOG2E, BLOCK_N, PRECISION,
    )  # fmt: skip
    out = (row * heads + head) * T + t
    out_rows = rows.to(tl.int64) * heads * T
    _store_part(acc, total, peak, o_ptr, lse_ptr, split, out_rows, out, mask, D)


@triton.jit(do_not_specialize=["T", "S", "rows", "splits", "first_split"])
def _prefix_attention_own_kernel(
    q,
    k,
    v,
    bounds,
    o_ptr,
    lse_ptr,
    prefix,
    ids_ptr,
    merged,
    merged_lse_ptr,
    scale,
    heads,
    group,
    T,
    S,
    rows,
    splits,
    first_split,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: all queries of one kv head of one row, one split of the row's own keys.

    Where there is only one split, ``merged`` takes the output: with the partial results of the
    prefix, which are those before ``first_split``.
    """
    wait_for_primary(PDL)
    if merged is None:
        start_dependent(PDL)
    kv_heads = heads // group
    kv = (tl.program_id(0) % kv_heads).to(tl.int64)
    b = (tl.program_id(0) // kv_heads).to(tl.int64)
    split = tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    mask = offs_m < group * T
    head = kv * group + offs_m // T
    t = offs_m % T
    # q [BLOCK_M, D]: query heads of the kv head x queries
    q_rows = q.ptr + b * q.stride_row + (head * q.stride_head + t * q.stride_token)[:, None]
    q_tile = tl.load(q_rows + tl.arange(0, D)[None, :], mask=mask[:, None], other=0.0)

    start, end, first = row_bounds(bounds, b, T, S)
    length = tl.maximum(end - start, 0)
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    begin = start + tl.minimum(split * share, length)
    end = start + tl.minimum((split + 1) * share, length)
    # Keys that the first query sees, all queries see.
    common = tl.maximum(tl.minimum(end, first + 1) - begin, 0)
    full = begin + common // BLOCK_N * BLOCK_N
    limit = tl.minimum(end, first + t + 1)[:, None]
    k_row = k.ptr + b * k.stride_row + kv * k.stride_head
    v_row = v.ptr + b * v.stride_row + kv * v.stride_head
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    acc, total, peak = attend(
        acc, total, peak, q_tile, k_row + begin.to(tl.int64) * k.stride_token,
        v_row + begin.to(tl.int64) * v.stride_token, k.stride_token, v.stride_token,
        begin, full, end, limit, scale * LOG2E, BLOCK_N, PRECISION,
    )  # fmt: skip
    out = (b * heads + head) * T + t
    out_rows = rows.to(tl.int64) * heads * T
    if merged is None:
        _store_part(acc, total, peak, o_ptr, lse_ptr, split + first_split, out_rows, out, mask, D)
    else:
        _, length = row_prefix(prefix, ids_ptr, b)
        for s in tl.range(0, tl.where(length > 0, first_split, 0), loop_unroll_factor=4):
            # lse [BLOCK_M], part [BLOCK_M, D]
            at = s * out_rows + out  # int64
            lse = tl.load(lse_ptr + at, mask=mask, other=float("-inf"))
            part_ptrs = o_ptr + at[:, None] * D + tl.arange(0, D)[None, :]
            part = tl.load(part_ptrs, mask=mask[:, None], other=0.0)
            top = tl.maximum(peak, lse)
            shift = tl.where(top == float("-inf"), 0.0, top)
            weight = tl.exp2(lse - shift)
            shrink = tl.exp2(peak - shift)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + weight[:, None] * part
            peak = top
        mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # 0 where nothing was seen
        o_rows = b * merged.stride_row + head * merged.stride_head + t * merged.stride_token
        o_ptrs = merged.ptr + o_rows[:, None] + tl.arange(0, D)[None, :]
        tl.store(o_ptrs, mean.to(merged.ptr.dtype.element_ty), mask=mask[:, None])
        tl.store(merged_lse_ptr + out, (peak + tl.log2(total)) * LN2, mask=mask)


@triton.jit(do_not_specialize=["T", "rows", "prefix_splits", "splits"])
def _prefix_attention_merge_kernel(
    part_ptr,
    part_lse_ptr,
    o,
    lse_ptr,
    prefix,
    ids_ptr,
    heads,
    T,
    rows,
    prefix_splits,
    splits,
    D: tl.constexpr,
    MERGED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: one query of one head. A row without a prefix has no prefix splits."""
    wait_for_primary(PDL)
    out = tl.program_id(0).to(tl.int64)
    b = out // (heads * T)
    out_rows = rows.to(tl.int64) * heads * T
    _, length = row_prefix(prefix, ids_ptr, b)
    begin = tl.where(length > 0, 0, prefix_splits)
    offs = tl.arange(0, MERGED)
    offs_d = tl.arange(0, D)
    acc = tl.zeros((D,), tl.float32)
    total = tl.zeros((), tl.float32)
    peak = tl.full((), float("-inf"), tl.float32)
    for s in range(begin, splits, MERGED):
        # lse [MERGED], part [MERGED, D]
        inside = s + offs < splits
        at = (s + offs).to(tl.int64) * out_rows + out
        lse = tl.load(part_lse_ptr + at, mask=inside, other=float("-inf"))
        part = tl.load(part_ptr + at[:, None] * D + offs_d, mask=inside[:, None], other=0.0)
        top = tl.maximum(peak, tl.max(lse, 0))
        shift = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(lse - shift)
        shrink = tl.exp2(peak - shift)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(weight[:, None] * part, 0)
        peak = top
    mean = acc / tl.where(total == 0.0, 1.0, total)  # 0 where nothing was seen
    o_row = o.ptr + b * o.stride_row + out // T % heads * o.stride_head + out % T * o.stride_token
    tl.store(o_row + offs_d, mean.to(o.ptr.dtype.element_ty))
    tl.store(lse_ptr + out, (peak + tl.log2(total)) * LN2)


def fits(q: Tensor, k: Tensor) -> bool:
    """Return whether the queries are few enough."""
    packed = q.shape[2] * (q.shape[1] // k.shape[1])
    return q.shape[2] <= MOST_QUERIES and packed <= MOST_PACKED


def _block(rows: int, limit: int) -> int:
    return min(limit, max(SMALLEST_TILE, power_of_2(rows)))


def _splits(programs: int, keys: int, warps: int, device: torch.device) -> int:
    """Return in how many parts to cut ``keys`` keys: ``programs`` of so many warps a part, and all
    parts together fit the GPU at once."""
    at_once = multiprocessors(device) * max(1, _WARPS // warps)
    return max(1, min(at_once // max(1, programs), cdiv(keys, _SPLIT)))


def _group_tiles(call: Call, config: Config) -> tuple[Config, int, int]:
    """Return the tile for this call, how many of them any ids could need, and how many they need
    that are spread evenly."""
    rows, _, queries, _ = call.q.shape
    packed = max(1, call.group * queries)
    users = min(call.prefix.k.shape[0], rows)  # memories that can be in use
    block_m = _block(cdiv(rows, max(1, users)) * packed, config.block_m)
    block_m = max(block_m, _block(packed, MOST_PACKED))
    block_m = 64 if block_m == 32 else block_m  # three variants are enough
    # One warp for each 16 rows of a tile, the height of a tensor core's; four at least.
    warps = min(config.warps, max(4, block_m // 16))
    slots = block_m // packed
    tiles = (rows + users * (slots - 1)) // slots
    return config._replace(block_m=block_m, warps=warps), tiles, max(users, cdiv(rows, slots))


def decode(
    call: Call, group: Config | None = None, own: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Return o and lse as ``one_pass`` gives them, where ``fits`` holds."""
    call = call.ready(None)
    wide = call.q.dtype == torch.float32
    group = group or (FP32 if wide else GROUP_CONFIGS["128x32"])
    own = own or (FP32 if wide else OWN_CONFIGS["64"])
    rows, heads, queries, width = call.q.shape
    kv_heads, keys = call.k.shape[1:3]
    device, tiles, prefix_splits = call.q.device, 0, 0
    if call.prefix is not None:
        group, tiles, busy = _group_tiles(call, group)
        prefix_splits = _splits(busy * kv_heads, call.prefix.k.shape[2], group.warps, device)
    own_splits = _splits(rows * kv_heads, keys, own.warps, device)
    merges = own_splits > 1
    splits, out_rows = prefix_splits + own_splits, rows * heads * queries
    parts = splits if merges else prefix_splits
    part = call.q.new_empty(parts, out_rows, width, dtype=torch.float32)
    part_lse = call.q.new_empty(parts, out_rows, dtype=torch.float32)
    o, lse = empty_output(call.q)
    common = {"q": per_head(call.q), "o_ptr": part, "lse_ptr": part_lse, "rows": rows}
    common |= call.sizes()
    prefix, overlaps = call.prefix_args(), pdl(device)
    if call.prefix is not None:
        launch(
            _prefix_attention_group_kernel,
            (tiles, kv_heads, prefix_splits),
            **prefix,
            splits=prefix_splits,
            IDS=_IDS,
            PDL=overlaps,
            **common,
            **group.args(),
        )
    launch(
        _prefix_attention_own_kernel,
        (rows * kv_heads, own_splits),
        k=per_head(call.k),
        v=per_head(call.v),
        bounds=call.bounds,
        **(prefix if not merges else {"prefix": None, "ids_ptr": None}),
        merged=None if merges else per_head(o),
        merged_lse_ptr=None if merges else lse,
        S=keys,
        splits=own_splits,
        first_split=prefix_splits,
        PDL=overlaps and (merges or tiles > 0),
        dependent=overlaps and tiles > 0,
        **common,
        **own._replace(block_m=_block(call.group * queries, MOST_PACKED)).args(),
    )
    if merges:
        launch(
            _prefix_attention_merge_kernel,
            (out_rows,),
            part_ptr=part,
            part_lse_ptr=part_lse,
            o=per_head(o),
            lse_ptr=lse,
            **prefix,
            heads=heads,
            T=queries,
            rows=rows,
            prefix_splits=prefix_splits,
            splits=splits,
            D=width,
            MERGED=_MERGED,
            PDL=overlaps,
            dependent=overlaps,
            num_warps=4,
        )
    return o, lse
