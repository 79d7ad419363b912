"""s = x A_m^T, m the memory of each token: the narrow half of a low-rank update.

x is read once for up to three updates (q, k and v share it, as gate and up do). The gradients of
their outputs, which give t, are an x of its own for each update. Where tokens are few, K is split
over programs that write fp32 partials, and ``sum_partials`` adds these in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..shared.launch import (
    SMALLEST_TILE,
    Rows,
    cdiv,
    dot,
    launch,
    memory_range,
    multiprocessors,
    precision,
    rank_block,
    token_memory,
)
from ..shared.operands import LowRank, up_to_three, wide
from ..shared.reduce import sum_partials

EXPECTS = {"_shrink_fwd_kernel": "dot"}
_PROGRAMS = 2  # of a multiprocessor, at least
_BLOCK_M, _BLOCK_K = 64, 64  # 64 tokens: the least that wgmma takes
_TILES_PER_SPLIT = 4  # of K, at least: a pipeline of three stages has to fill first


@triton.jit
def _shrink_tile(
    x_ptr,
    stride_x,
    K,
    first,
    second,
    third,
    s_ptr,
    width,
    memory,
    offs_r,
    begin,
    blocks,
    M,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """s [M, width] of BLOCK_M tokens and BLOCK_R ranks of up to three updates, over ``blocks``
    tiles of K from ``begin`` on."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    lowest, last = memory_range(memory)
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_x
    s0 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    s1 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    s2 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for m in range(lowest, last):
        mine = memory == m
        at = tl.cast(m, tl.int64)
        a0_cols = first.ptr + at * first.stride_memory + offs_r[None, :] * first.stride_rank
        if second is not None:
            a1_cols = second.ptr + at * second.stride_memory + offs_r[None, :] * second.stride_rank
        if third is not None:
            a2_cols = third.ptr + at * third.stride_memory + offs_r[None, :] * third.stride_rank
        # A tile can hold memories 0 and 39 and none between: these take no turn in the inner loop.
        used = tl.max(mine.to(tl.int32), 0)
        for k in range(begin, begin + blocks * used * BLOCK_K, BLOCK_K):
            mask_k = k + offs_k < K
            # x [BLOCK_M, BLOCK_K], 0 for tokens of other memories, whose sums it does not change;
            # A^T of each update [BLOCK_K, BLOCK_R]
            mask_x = mine[:, None] & mask_k[None, :]
            x = tl.load(x_rows + (k + offs_k)[None, :], mask=mask_x, other=0.0)
            mask0 = mask_k[:, None] & (offs_r < first.rank)[None, :]
            a0_ptrs = a0_cols + (k + offs_k)[:, None] * first.stride_wide
            a0 = tl.load(a0_ptrs, mask=mask0, other=0.0)
            s0 = dot(x, a0.to(x.dtype), s0, PRECISION)
            if second is not None:
                mask1 = mask_k[:, None] & (offs_r < second.rank)[None, :]
                a1_ptrs = a1_cols + (k + offs_k)[:, None] * second.stride_wide
                a1 = tl.load(a1_ptrs, mask=mask1, other=0.0)
                s1 = dot(x, a1.to(x.dtype), s1, PRECISION)
            if third is not None:
                mask2 = mask_k[:, None] & (offs_r < third.rank)[None, :]
                a2_ptrs = a2_cols + (k + offs_k)[:, None] * third.stride_wide
                a2 = tl.load(a2_ptrs, mask=mask2, other=0.0)
                s2 = dot(x, a2.to(x.dtype), s2, PRECISION)
    s_rows = s_ptr + offs_m.to(tl.int64)[:, None] * width
    mask0 = mask_m[:, None] & (offs_r < first.rank)[None, :]
    tl.store(s_rows + offs_r[None, :], s0.to(s_ptr.dtype.element_ty), mask=mask0)
    if second is not None:
        mask1 = mask_m[:, None] & (offs_r < second.rank)[None, :]
        s1_ptrs = s_rows + first.rank + offs_r[None, :]
        tl.store(s1_ptrs, s1.to(s_ptr.dtype.element_ty), mask=mask1)
    if third is not None:
        mask2 = mask_m[:, None] & (offs_r < third.rank)[None, :]
        s2_ptrs = s_rows + first.rank + second.rank + offs_r[None, :]
        tl.store(s2_ptrs, s2.to(s_ptr.dtype.element_ty), mask=mask2)


@triton.jit(do_not_specialize=["M", "memories", "tokens", "blocks"])
def _shrink_fwd_kernel(
    x_ptr,
    stride_x,
    x1,
    x2,
    first,
    second,
    third,
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
    """One program: BLOCK_M tokens, BLOCK_R ranks, one split of K; of every update of x or, where
    each has an x of its own (x, x1, x2), of one.

    s is [splits, M, ranks of the first and, beside them, of the second and the third].
    """
    pid_r, split = tl.program_id(1), tl.program_id(2)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    memory = token_memory(ids_ptr, memories, offs_m, offs_m < M, tokens)
    # A multiple of a constant, so the compiler knows that rows stay aligned.
    begin = split * blocks * BLOCK_K
    width = first.rank
    if second is not None:
        width += second.rank
    if third is not None:
        width += third.rank
    s_ptr += split.to(tl.int64) * M * width
    which = 0
    if x1 is not None:
        each = tl.num_programs(1) // 2
        if x2 is not None:
            each = tl.num_programs(1) // 3
        which = pid_r // each
        pid_r = pid_r % each
    offs_r = pid_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    if x1 is None:
        _shrink_tile(
            x_ptr, stride_x, K, first, second, third, s_ptr, width, memory, offs_r, begin, blocks,
            M, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
        )  # fmt: skip
    else:
        # K is split for the widest x. Where a narrower one ends before, 0 is what is to be added.
        # No elif: Triton gives branches that lie inside of an else more registers, and in the
        # decode kernels shared memory of their own.
        if which == 0:
            _shrink_tile(
                x_ptr, stride_x, K, first, None, None, s_ptr, width, memory, offs_r, begin,
                tl.where(begin < K, blocks, 0), M, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
            )  # fmt: skip
        if which == 1:
            _shrink_tile(
                x1.ptr, x1.stride_token, x1.width, second, None, None, s_ptr + first.rank, width,
                memory, offs_r, begin, tl.where(begin < x1.width, blocks, 0), M,
                BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
            )  # fmt: skip
        if x2 is not None:
            if which == 2:
                _shrink_tile(
                    x2.ptr, x2.stride_token, x2.width, third, None, None,
                    s_ptr + first.rank + second.rank, width, memory, offs_r, begin,
                    tl.where(begin < x2.width, blocks, 0), M, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
                )  # fmt: skip


def _low_rank(a: Tensor) -> LowRank:
    """Return a [n, r, K] as an operand."""
    memory, rank, wide = a.stride()
    return LowRank(a, a.shape[1], memory, rank, wide)


def shrink(x: Tensor, matrices: Sequence[Tensor], rows: Rows) -> Tensor:
    """Return s = x a_m^T of up to three updates, side by side.

    Args:
        x: [M, K], last stride 1.
        matrices: one to three a [n, r, K], any strides and floating dtype (rounded to x's).
        rows: memory of each token; 0 where it has none.

    Returns:
        [M, sum of the ranks] in x's dtype.
    """
    return _shrink((x,), matrices, rows)


def shrink_each(xs: Sequence[Tensor], matrices: Sequence[Tensor], rows: Rows) -> Tensor:
    """Return the same of up to three updates with an x [M, K] of its own for each; the K may
    differ."""
    return _shrink(xs, matrices, rows)


def _shrink(xs: Sequence[Tensor], matrices: Sequence[Tensor], rows: Rows) -> Tensor:
    ranks = [a.shape[1] for a in matrices]
    together = len(matrices) if len(xs) == 1 else 1  # updates that a program computes
    x, x1, x2 = up_to_three(xs)
    first, second, third = up_to_three([_low_rank(a) for a in matrices])
    m, k = x.shape[0], max(x.shape[1] for x in xs)
    # Two of 64 spill on sm_80.
    block_r = rank_block(max(ranks), 64 if together == 1 else 32)
    tiles = cdiv(m, _BLOCK_M), cdiv(max(ranks), block_r)
    # K is cut so that every multiprocessor has work.
    wanted = cdiv(_PROGRAMS * multiprocessors(x.device), max(tiles[0] * tiles[1], 1))
    splits = max(1, min(cdiv(k, _BLOCK_K) // _TILES_PER_SPLIT, wanted))
    blocks = cdiv(cdiv(k, _BLOCK_K), splits)
    splits = cdiv(k, blocks * _BLOCK_K)  # none is empty
    dtype = x.dtype if splits == 1 else torch.float32
    width = sum(ranks)
    s = x.new_empty((m, width) if splits == 1 else (splits, m, width), dtype=dtype)
    launch(
        _shrink_fwd_kernel,
        (tiles[0], tiles[1] * len(xs), splits),
        x_ptr=x,
        stride_x=x.stride(0),
        x1=wide(x1),
        x2=wide(x2),
        first=first,
        second=second,
        third=third,
        s_ptr=s,
        ids_ptr=rows.ids,
        memories=matrices[0].shape[0],
        tokens=rows.tokens,
        M=m,
        K=x.shape[1],
        blocks=blocks,
        BLOCK_M=_BLOCK_M,
        BLOCK_K=_BLOCK_K,
        BLOCK_R=block_r,
        PRECISION=precision(x.dtype),
        num_warps=8 if block_r == 64 else 4,
        num_stages=3,
        # For four blocks on a multiprocessor; of one x three, since with 128 some variants spill.
        most_registers=255 if block_r > SMALLEST_TILE else 128 if len(xs) > 1 else 160,
    )
    return s if splits == 1 else sum_partials(s, x.dtype)
