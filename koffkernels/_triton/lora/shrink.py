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
from ..shared.reduce import sum_partials

EXPECTS = {"_shrink_fwd_kernel": "dot"}
_PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100 or H200


@triton.jit(do_not_specialize=["M", "tokens", "blocks"])
def _shrink_fwd_kernel(
    x_ptr,
    a0_ptr,
    a1_ptr,
    s_ptr,
    ids_ptr,
    M,
    K,
    R0,
    R1,
    tokens,
    blocks,
    stride_xm,
    stride_a0n,
    stride_a0r,
    stride_a0k,
    stride_a1n,
    stride_a1r,
    stride_a1k,
    HAS_IDS: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M tokens, BLOCK_R ranks, one split of K. s is [splits, M, R0 + R1]."""
    pid_m, pid_r, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    memory = token_memory(ids_ptr, offs_m, mask_m, tokens, HAS_IDS)
    first, last = memory_range(memory)
    # A multiple of a constant, so the compiler knows that rows stay aligned.
    begin = split * blocks * BLOCK_K
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    s0 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    s1 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for m in range(first, last):
        mine = memory == m
        a0_rows = a0_ptr + m * stride_a0n + offs_r[None, :] * stride_a0r
        a1_rows = a1_ptr + m * stride_a1n + offs_r[None, :] * stride_a1r
        part0 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        part1 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        used = tl.max(mine.to(tl.int32), 0)  # a tile can hold memories 0 and 39 and none between
        for k in range(begin, begin + blocks * used * BLOCK_K, BLOCK_K):
            mask_k = k + offs_k < K
            mask_x = mine[:, None] & mask_k[None, :]
            x = tl.load(x_rows + (k + offs_k)[None, :], mask=mask_x, other=0.0)
            mask0 = mask_k[:, None] & (offs_r < R0)[None, :]
            a0 = tl.load(a0_rows + (k + offs_k)[:, None] * stride_a0k, mask=mask0, other=0.0)
            part0 = dot(x, a0.to(x.dtype), part0, PRECISION)
            if TWO:
                mask1 = mask_k[:, None] & (offs_r < R1)[None, :]
                a1 = tl.load(a1_rows + (k + offs_k)[:, None] * stride_a1k, mask=mask1, other=0.0)
                part1 = dot(x, a1.to(x.dtype), part1, PRECISION)
        # Selected, not multiplied by 0: a NaN of another memory must not reach these tokens.
        s0 = tl.where(mine[:, None], part0, s0)
        s1 = tl.where(mine[:, None], part1, s1)
    s_rows = s_ptr + (split.to(tl.int64) * M + offs_m[:, None]) * (R0 + R1)
    mask0 = mask_m[:, None] & (offs_r < R0)[None, :]
    tl.store(s_rows + offs_r[None, :], s0.to(s_ptr.dtype.element_ty), mask=mask0)
    if TWO:
        mask1 = mask_m[:, None] & (offs_r < R1)[None, :]
        tl.store(s_rows + R0 + offs_r[None, :], s1.to(s_ptr.dtype.element_ty), mask=mask1)


def _splits(programs: int, blocks: int) -> int:
    """In how many parts to cut K (``blocks`` tiles), so that every multiprocessor has work."""
    return max(1, min(blocks // 4, cdiv(_PROGRAMS, max(programs, 1))))


def shrink(x: Tensor, a0: Tensor, a1: Tensor | None, rows: Rows) -> Tensor:
    """s0 = x a0_m^T and, beside it, s1 = x a1_m^T.

    Args:
        x: [M, K], last stride 1.
        a0, a1: [n, r, K], any strides and floating dtype (rounded to x's); a1 may be None.
        rows: memory of each token; 0 where it has none.

    Returns:
        [M, r0 + r1] in x's dtype.
    """
    (m, k), r0, r1 = x.shape, a0.shape[1], 0 if a1 is None else a1.shape[1]
    block_m, block_k = 64, 64
    block_r = rank_block(max(r0, r1), 64 if a1 is None else 32)  # two of 64 spill on sm_80
    tiles = cdiv(m, block_m), cdiv(max(r0, r1), block_r)
    splits = _splits(tiles[0] * tiles[1], cdiv(k, block_k))
    blocks = cdiv(cdiv(k, block_k), splits)
    splits = cdiv(k, blocks * block_k)
    dtype = x.dtype if splits == 1 else torch.float32
    second = a0 if a1 is None else a1
    s = x.new_empty(splits, m, r0 + r1, dtype=dtype)
    launch(
        _shrink_fwd_kernel,
        (*tiles, splits),
        x_ptr=x,
        a0_ptr=a0,
        a1_ptr=second,
        s_ptr=s,
        M=m,
        K=k,
        R0=r0,
        R1=r1,
        blocks=blocks,
        stride_xm=x.stride(0),
        stride_a0n=a0.stride(0),
        stride_a0r=a0.stride(1),
        stride_a0k=a0.stride(2),
        stride_a1n=second.stride(0),
        stride_a1r=second.stride(1),
        stride_a1k=second.stride(2),
        TWO=a1 is not None,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        PRECISION=precision(x.dtype),
        num_warps=8 if block_r == 64 else 4,
        num_stages=3,
        **rows.args(),
    )
    return s[0] if splits == 1 else sum_partials(s, x.dtype)
