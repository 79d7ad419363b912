"""The wide half of a low-rank update, added to an output that is already there: y += scaling s B^T.

Bound by memory: y is read and written once, in stretches of one memory each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..shared.launch import Rows, cdiv, launch, precision, rank_block
from ..shared.operands import Delta, largest_rank, operand
from ..shared.stretch import add_update, memory_part, stretch_of, stretches

EXPECTS = {"_expand_fwd_kernel": "dot16"}

# The tile of y: 128 columns are 256 bytes in 16 bits. 32 warps fit a multiprocessor. On an H200
# (M = 8192, N = 4096, r = 16) stretches of 64 or 256 tokens took 35 us, 92 % of what a copy
# reaches; short ones also fill the chip where y is narrow.
_BLOCK_M, _BLOCK_N, _STAGES, _LENGTH = 32, 128, 3, 64


@triton.jit(do_not_specialize=["memories", "tokens", "length", "per_row"])
def _expand_fwd_kernel(
    y_ptr,
    stride_y,
    first,
    second,
    ids_ptr,
    memories,
    tokens,
    length,
    per_row,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MORE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: a strip of columns and a stretch of tokens, whose sums with one or two updates
    are written over y."""
    strips = tl.cdiv(N, BLOCK_N)
    offs_n = (tl.program_id(0) % strips) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    memory, begin, end = stretch_of(
        tl.program_id(0) // strips, ids_ptr, memories, tokens, length, per_row
    )
    if memory < 0:
        return  # y is neither read nor written
    dtype = y_ptr.dtype.element_ty
    b_first = memory_part(first, memory, offs_n, mask_n, BLOCK_R, dtype)
    if second is not None:
        b_second = memory_part(second, memory, offs_n, mask_n, BLOCK_R, dtype)
    for start in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = (offs_m < end)[:, None]
        rows = offs_m.to(tl.int64)[:, None]
        # y [BLOCK_M, BLOCK_N], s [BLOCK_M, BLOCK_R]
        y_ptrs = y_ptr + rows * stride_y + offs_n[None, :]
        mask = mask_m & mask_n[None, :]
        total = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
        total = add_update(
            total, first, b_first, memory, rows, mask_m, offs_n, mask_n,
            BLOCK_R, MORE, PRECISION,
        )  # fmt: skip
        if second is not None:
            total = add_update(
                total, second, b_second, memory, rows, mask_m, offs_n, mask_n,
                BLOCK_R, MORE, PRECISION,
            )  # fmt: skip
        tl.store(y_ptrs, total.to(dtype), mask=mask)


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
    cut, rank = stretches(rows, m, _LENGTH), largest_rank(*deltas)
    launch(
        _expand_fwd_kernel,
        (cdiv(n, _BLOCK_N) * cut.count,),
        y_ptr=y,
        stride_y=y.stride(0),
        first=operand(first),
        second=operand(second),
        ids_ptr=rows.ids,
        memories=first.b.shape[0],
        **cut.args(),
        N=n,
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
        BLOCK_R=rank_block(rank),
        MORE=rank > rank_block(rank),
        PRECISION=precision(y.dtype),
        STAGES=_STAGES,
        num_warps=8,
        num_stages=_STAGES,
        most_registers=None,
    )
    return y
