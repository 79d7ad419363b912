"""The wide half of a low-rank update, added to an output that is already there: y += scaling s B^T.

``delta_tile`` is the part that every kernel with an update in its epilogue shares.
"""

from __future__ import annotations

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
from ..shared.operands import Delta, largest_rank, matrix, operand

EXPECTS = {"_expand_fwd_kernel": "dot16"}

# The tile of y, 128 elements or 256 bytes wide in 16 bits. There is no loop over K to hide the
# loads behind, so tiles are low and programs many.
_BLOCK_M, _BLOCK_N = 32, 128


@triton.jit
def delta_tile(
    delta,
    offs_m,
    offs_i,
    mask_i,
    memory,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scaling_m s b_m^T of one tile [BLOCK_M, BLOCK_I] in fp32; 0 where a token has no memory."""
    total = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    first, last = memory_range(memory)
    for m in tl.range(first, last, num_stages=1):
        mine = memory == m
        part = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
        # m and stride_memory are int32: their product fits as long as a stack of matrices has
        # fewer than 2^31 elements.
        b_rows = delta.b + offs_i.to(tl.int64)[None, :] * delta.stride_wide
        b_rows += m * delta.stride_memory
        # A tile can hold memories 0 and 39 and none between: these take no turn in the inner loop.
        used = tl.max(mine.to(tl.int32), 0)
        for start in tl.range(0, delta.rank * used, BLOCK_R, num_stages=1):
            offs_r = start + tl.arange(0, BLOCK_R)
            mask_r = offs_r < delta.rank
            # s [BLOCK_M, BLOCK_R], b [BLOCK_R, BLOCK_I]
            s = tl.load(
                delta.s + offs_m.to(tl.int64)[:, None] * delta.stride_token + offs_r[None, :],
                mask=mine[:, None] & mask_r[None, :],
                other=0.0,
            )
            b = tl.load(
                b_rows + offs_r[:, None] * delta.stride_rank,
                mask=mask_r[:, None] & mask_i[None, :],
                other=0.0,
            )
            part = dot(s, b.to(s.dtype), part, PRECISION)
        # Selected, not multiplied by 0: a NaN of another memory must not reach these tokens.
        total = tl.where(mine[:, None], part * tl.load(delta.scaling + m), total)
    return total


@triton.jit(do_not_specialize=["M", "tokens"])
def _expand_fwd_kernel(
    y,
    first,
    second,
    ids_ptr,
    tokens,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one tile of y, over which its sum with one or two updates is written."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    memory = token_memory(ids_ptr, offs_m, mask_m, tokens)
    delta = delta_tile(first, offs_m, offs_n, mask_n, memory, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION)
    if second is not None:
        delta += delta_tile(
            second, offs_m, offs_n, mask_n, memory, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION
        )
    # y [BLOCK_M, BLOCK_N]; tokens without a memory are neither read nor written.
    y_ptrs = y.ptr + offs_m.to(tl.int64)[:, None] * y.stride + offs_n[None, :]
    mask = (memory >= 0)[:, None] & mask_n[None, :]
    base = tl.load(y_ptrs, mask=mask, other=0.0)
    tl.store(y_ptrs, (base.to(tl.float32) + delta).to(base.dtype), mask=mask)


def expand_(y: Tensor, deltas: tuple[Delta, ...], rows: Rows) -> Tensor:
    """Add one or two low-rank updates to y, in place.

    Args:
        y: [M, N], last stride 1.
        deltas: one or two updates.
        rows: memory of each token; tokens without one are not touched.

    Returns:
        y.
    """
    (m, n), (first, second) = y.shape, (*deltas, None)[:2]
    launch(
        _expand_fwd_kernel,
        (cdiv(m, _BLOCK_M), cdiv(n, _BLOCK_N)),
        y=matrix(y),
        first=operand(first),
        second=operand(second),
        ids_ptr=rows.ids,
        tokens=rows.tokens,
        M=m,
        N=n,
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
        BLOCK_R=rank_block(largest_rank(*deltas)),
        PRECISION=precision(y.dtype),
        num_warps=8,
        num_stages=2,
    )
    return y
