"""Backward of attention over a learned prefix: dK and dV of the learned keys and values.

A program holds a tile of one memory's keys and goes through the rows that use this memory, and all
query heads that share the key-value head. Rows and queries are cut into splits, so that short
prefixes too fill the GPU; each split writes fp32 sums of its own, added in order by a second pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..shared.config import Config, choose_config
from ..shared.launch import cdiv, launch, multiprocessors
from ..shared.operands import per_head
from ..shared.reduce import sum_partials
from .call import LOG2E, Call, memory_length
from .dkv import FP32, key_tiles
from .dq import Upstream

EXPECTS = {"_prefix_attention_prefix_grad_kernel": "dot"}

# The loop over rows takes registers of its own, so tiles are smaller than for own keys.
CONFIGS = {
    "32x64": Config(32, 64, warps=8, stages=2),
    "32x128": Config(32, 128, warps=8, stages=2, archs=(90,)),
}
_PROGRAMS = 2  # of a multiprocessor
_TILES_PER_PROGRAM = 4  # of queries, at least: a pipeline has to fill first


@triton.jit(do_not_specialize=["T", "rows", "row_splits", "rows_per_split", "queries_per_split"])
def _prefix_attention_prefix_grad_kernel(
    q,
    prefix,
    ids_ptr,
    do,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    scale,
    heads,
    group,
    T,
    rows,
    row_splits,
    rows_per_split,
    queries_per_split,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_N learned keys of one kv head of one memory, one split of the rows and
    queries. dk and dv are [splits, n, Hkv, P, D], or None where they are not wanted."""
    blocks = tl.cdiv(prefix.P, BLOCK_N)
    kv_heads = heads // group
    pid = tl.program_id(0)
    block = pid % blocks
    kv = (pid // blocks % kv_heads).to(tl.int64)
    memory = (pid // blocks // kv_heads).to(tl.int64)
    split = tl.program_id(1)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D)[None, :]
    length = memory_length(prefix, memory)
    seen = (offs_n < length)[:, None]
    # k, v, dk and dv [BLOCK_N, D]
    at = ((memory * kv_heads + kv) * prefix.P + offs_n[:, None]) * D + offs_d
    k = tl.load(prefix.k + at, mask=seen, other=0.0)
    v = tl.load(prefix.v + at, mask=seen, other=0.0)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    scale_log2 = scale * LOG2E
    begin = split // row_splits * queries_per_split
    end = tl.minimum(begin + queries_per_split, T)
    first_row = (split % row_splits * rows_per_split).to(tl.int64)
    count = tl.minimum(rows_per_split, rows - first_row)
    tiles = tl.where(length > block * BLOCK_N, tl.maximum(tl.cdiv(end - begin, BLOCK_M), 0), 0)
    for i in range(0, count):
        b = first_row + i
        if ids_ptr is not None:
            # A row of another memory has no tiles: its turn in this loop costs one load.
            mine = tl.where(tl.load(ids_ptr + b).to(tl.int64) == memory, tiles, 0)
        else:
            mine = tiles
        dk, dv = key_tiles(
            dk, dv, k, v, q, do, lse_ptr, delta_ptr, b, begin, end, mine, offs_n, kv * group,
            heads, group, T, scale_log2, dk_ptr is not None, dv_ptr is not None, BLOCK_M, False,
            PRECISION,
        )  # fmt: skip
    at += split.to(tl.int64) * prefix.memories * kv_heads * prefix.P * D
    inside = (offs_n < prefix.P)[:, None]
    if dk_ptr is not None:
        dk = tl.where(seen, dk * scale, 0.0)
        tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    if dv_ptr is not None:
        tl.store(dv_ptr + at, tl.where(seen, dv, 0.0).to(dv_ptr.dtype.element_ty), mask=inside)


def _splits(call: Call, config: Config) -> tuple[int, int]:
    """Return in how many parts to cut rows and queries, so that one memory alone, used by every
    row, fills the GPU."""
    rows, _, queries, _ = call.q.shape
    _, kv_heads, length, _ = call.prefix.k.shape
    programs = _PROGRAMS * multiprocessors(call.q.device)
    wanted = cdiv(programs, max(1, kv_heads * cdiv(length, config.block_n)))
    row_splits = max(1, min(rows, wanted))
    tiles = cdiv(queries, config.block_m) * call.group // _TILES_PER_PROGRAM
    return row_splits, max(1, min(cdiv(wanted, row_splits), tiles))


def prefix_grads(
    call: Call,
    up: Upstream,
    needs: tuple[bool, bool],
    config: Config | None = None,
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return dK and dV of the learned keys and values, in ``dtypes`` (None: theirs), 0 for a memory
    that no row used; None where ``needs`` has False."""
    if not any(needs):
        return None, None
    k, v, _ = call.prefix
    dtypes = dtypes or (k.dtype, v.dtype)
    call = call.ready(call.q.dtype)
    config = choose_config(config, CONFIGS, FP32, call.q)
    n, kv_heads, length, _ = k.shape
    rows, _, queries, _ = call.q.shape
    row_splits, query_splits = _splits(call, config)
    rows_per_split = cdiv(rows, row_splits)
    row_splits = max(1, cdiv(rows, max(1, rows_per_split)))
    tiles = cdiv(cdiv(queries, config.block_m), query_splits)
    splits = row_splits * query_splits
    part = [
        k.new_empty(splits, *k.shape, dtype=torch.float32 if splits > 1 else dtype)
        if need
        else None
        for dtype, need in zip(dtypes, needs, strict=True)
    ]
    launch(
        _prefix_attention_prefix_grad_kernel,
        (cdiv(length, config.block_n) * kv_heads * n, splits),
        q=per_head(call.q),
        **call.prefix_args(),
        dk_ptr=part[0],
        dv_ptr=part[1],
        rows=rows,
        row_splits=row_splits,
        rows_per_split=rows_per_split,
        queries_per_split=tiles * config.block_m,
        **up.args(),
        **call.sizes(),
        **config.args(),
    )
    dk, dv = (
        p if p is None else p[0] if splits == 1 else sum_partials(p, dtype)
        for p, dtype in zip(part, dtypes, strict=True)
    )
    return dk, dv
