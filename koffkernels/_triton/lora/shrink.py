"""s = x A_m^T, m the memory of each token: the narrow half of a low-rank update.

x is read once for one or two updates (gate and up share it). Where tokens are few, K is split over
programs that write fp32 partials, and ``sum_partials`` adds these in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..shared.launch import (
    Rows,
    cdiv,
    dot,
    launch,
    memory_range,
    precision,
    rank_block,
    token_memory,
)
from ..shared.operands import LowRank
from ..shared.reduce import sum_partials

EXPECTS = {"_shrink_fwd_kernel": "dot"}
_PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100 or H200
_BLOCK_M, _BLOCK_K = 64, 64  # 64 tokens: the least that wgmma takes
_TILES_PER_SPLIT = 4  # of K, at least: a pipeline of three stages has to fill first


@triton.jit(do_not_specialize=["M", "memories", "tokens", "blocks"])
def _shrink_fwd_kernel(
    x_ptr,
    stride_x,
    first,
    second,
    s_ptr,
    ids_ptr,
    memories,
    tokens,
    M,
    K,
    blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M tokens, BLOCK_R ranks, one split of K.

    s is [splits, M, ranks of the first and, beside them, of the second].
    """
    pid_m, pid_r, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    memory = token_memory(ids_ptr, memories, offs_m, mask_m, tokens)
    lowest, last = memory_range(memory)
    # A multiple of a constant, so the compiler knows that rows stay aligned.
    begin = split * blocks * BLOCK_K
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_x
    s0 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    s1 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for m in range(lowest, last):
        mine = memory == m
        at = tl.cast(m, tl.int64)
        a0_cols = first.ptr + at * first.stride_memory + offs_r[None, :] * first.stride_rank
        if second is not None:
            a1_cols = second.ptr + at * second.stride_memory + offs_r[None, :] * second.stride_rank
        part0 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        part1 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        # A tile can hold memories 0 and 39 and none between: these take no turn in the inner loop.
        used = tl.max(mine.to(tl.int32), 0)
        for k in range(begin, begin + blocks * used * BLOCK_K, BLOCK_K):
            mask_k = k + offs_k < K
            # x [BLOCK_M, BLOCK_K], A^T of either update [BLOCK_K, BLOCK_R]
            mask_x = mine[:, None] & mask_k[None, :]
            x = tl.load(x_rows + (k + offs_k)[None, :], mask=mask_x, other=0.0)
            mask0 = mask_k[:, None] & (offs_r < first.rank)[None, :]
            a0_ptrs = a0_cols + (k + offs_k)[:, None] * first.stride_wide
            a0 = tl.load(a0_ptrs, mask=mask0, other=0.0)
            part0 = dot(x, a0.to(x.dtype), part0, PRECISION)
            if second is not None:
                mask1 = mask_k[:, None] & (offs_r < second.rank)[None, :]
                a1_ptrs = a1_cols + (k + offs_k)[:, None] * second.stride_wide
                a1 = tl.load(a1_ptrs, mask=mask1, other=0.0)
                part1 = dot(x, a1.to(x.dtype), part1, PRECISION)
        # Selected, not multiplied by 0: a NaN of another memory must not reach these tokens.
        s0 = tl.where(mine[:, None], part0, s0)
        s1 = tl.where(mine[:, None], part1, s1)
    width = first.rank
    if second is not None:
        width += second.rank
    s_rows = s_ptr + (split.to(tl.int64) * M + offs_m[:, None]) * width
    mask0 = mask_m[:, None] & (offs_r < first.rank)[None, :]
    tl.store(s_rows + offs_r[None, :], s0.to(s_ptr.dtype.element_ty), mask=mask0)
    if second is not None:
        mask1 = mask_m[:, None] & (offs_r < second.rank)[None, :]
        s1_ptrs = s_rows + first.rank + offs_r[None, :]
        tl.store(s1_ptrs, s1.to(s_ptr.dtype.element_ty), mask=mask1)


def _splits(programs: int, blocks: int) -> int:
    """Return in how many parts to cut K (``blocks`` tiles), so that every multiprocessor has
    work."""
    return max(1, min(blocks // _TILES_PER_SPLIT, cdiv(_PROGRAMS, max(programs, 1))))


def _low_rank(a: Tensor) -> LowRank:
    """Return a [n, r, K] as an operand."""
    memory, rank, wide = a.stride()
    return LowRank(a, a.shape[1], memory, rank, wide)


def shrink(x: Tensor, a0: Tensor, a1: Tensor | None, rows: Rows) -> Tensor:
    """Return s0 = x a0_m^T and, beside it, s1 = x a1_m^T.

    Args:
        x: [M, K], last stride 1.
        a0, a1: [n, r, K], any strides and floating dtype (rounded to x's); a1 may be None.
        rows: memory of each token; 0 where it has none.

    Returns:
        [M, r0 + r1] in x's dtype.
    """
    (m, k), r0, r1 = x.shape, a0.shape[1], 0 if a1 is None else a1.shape[1]
    block_r = rank_block(max(r0, r1), 64 if a1 is None else 32)  # two of 64 spill on sm_80
    tiles = cdiv(m, _BLOCK_M), cdiv(max(r0, r1), block_r)
    splits = _splits(tiles[0] * tiles[1], cdiv(k, _BLOCK_K))
    blocks = cdiv(cdiv(k, _BLOCK_K), splits)
    splits = cdiv(k, blocks * _BLOCK_K)  # none is empty
    dtype = x.dtype if splits == 1 else torch.float32
    shape = (m, r0 + r1) if splits == 1 else (splits, m, r0 + r1)
    s = x.new_empty(shape, dtype=dtype)
    launch(
        _shrink_fwd_kernel,
        (*tiles, splits),
        x_ptr=x,
        stride_x=x.stride(0),
        first=_low_rank(a0),
        second=None if a1 is None else _low_rank(a1),
        s_ptr=s,
        ids_ptr=rows.ids,
        memories=a0.shape[0],
        tokens=rows.tokens,
        M=m,
        K=k,
        blocks=blocks,
        BLOCK_M=_BLOCK_M,
        BLOCK_K=_BLOCK_K,
        BLOCK_R=block_r,
        PRECISION=precision(x.dtype),
        num_warps=8 if block_r == 64 else 4,
        num_stages=3,
    )
    return s if splits == 1 else sum_partials(s, x.dtype)
