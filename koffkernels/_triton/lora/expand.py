"""The wide half of a low-rank update, added to an output that is already there: y += scaling s B^T.

Bound by memory: y is read and written once, in stretches of one memory each. Up to three updates
are added to one y (the gradient of what q, k and v share), or each to its own (q, k and v).
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..shared.launch import Rows, cdiv, launch, precision, rank_block
from ..shared.operands import Delta, largest_rank, up_to_three, wide
from ..shared.stretch import stretch_of, stretches
from ..shared.update import add_update, memory_part

EXPECTS = {"_expand_fwd_kernel": "dot16"}

# The tile of y: 128 columns are 256 bytes in 16 bits. 32 warps fit a multiprocessor. On an H200
# (M = 8192, N = 4096, r = 16) stretches of 64 or 256 tokens took 35 us, 92 % of what a copy
# reaches; short ones also fill the chip where y is narrow.
_BLOCK_M, _BLOCK_N, _STAGES, _LENGTH = 32, 128, 3, 64


@triton.jit
def _expand_strip(
    y_ptr,
    stride_y,
    N,
    first,
    second,
    third,
    strip,
    memory,
    begin,
    end,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MORE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A strip of BLOCK_N columns of y, whose sums with one to three updates are written over it."""
    offs_n = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    dtype = y_ptr.dtype.element_ty
    b_first = memory_part(first, memory, offs_n, mask_n, BLOCK_R, dtype)
    if second is not None:
        b_second = memory_part(second, memory, offs_n, mask_n, BLOCK_R, dtype)
    if third is not None:
        b_third = memory_part(third, memory, offs_n, mask_n, BLOCK_R, dtype)
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
        if third is not None:
            total = add_update(
                total, third, b_third, memory, rows, mask_m, offs_n, mask_n,
                BLOCK_R, MORE, PRECISION,
            )  # fmt: skip
        tl.store(y_ptrs, total.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["memories", "tokens", "length", "per_row"])
def _expand_fwd_kernel(
    y_ptr,
    stride_y,
    y1,
    y2,
    first,
    second,
    third,
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
    """One program: a strip of columns and a stretch of tokens. Every update is added to y or, where
    there are several (y, y1, y2), each to its own."""
    strips0 = tl.cdiv(N, BLOCK_N)
    strips = strips0
    if y1 is not None:
        strips1 = strips0 + tl.cdiv(y1.width, BLOCK_N)
        strips = strips1
        if y2 is not None:
            strips += tl.cdiv(y2.width, BLOCK_N)
    strip = tl.program_id(0) % strips
    memory, begin, end = stretch_of(
        tl.program_id(0) // strips, ids_ptr, memories, tokens, length, per_row
    )
    if memory < 0:
        return  # y is neither read nor written
    if y1 is None:
        _expand_strip(
            y_ptr, stride_y, N, first, second, third, strip, memory, begin, end,
            BLOCK_M, BLOCK_N, BLOCK_R, MORE, PRECISION, STAGES,
        )  # fmt: skip
    else:
        if strip < strips0:
            _expand_strip(
                y_ptr, stride_y, N, first, None, None, strip, memory, begin, end,
                BLOCK_M, BLOCK_N, BLOCK_R, MORE, PRECISION, STAGES,
            )  # fmt: skip
        if (strip >= strips0) & (strip < strips1):  # no elif: see shrink
            _expand_strip(
                y1.ptr, y1.stride_token, y1.width, second, None, None, strip - strips0,
                memory, begin, end, BLOCK_M, BLOCK_N, BLOCK_R, MORE, PRECISION, STAGES,
            )  # fmt: skip
        if y2 is not None:
            if strip >= strips1:
                _expand_strip(
                    y2.ptr, y2.stride_token, y2.width, third, None, None, strip - strips1,
                    memory, begin, end, BLOCK_M, BLOCK_N, BLOCK_R, MORE, PRECISION, STAGES,
                )  # fmt: skip


def expand_(y: Tensor, deltas: Sequence[Delta], rows: Rows) -> Tensor:
    """Add one to three low-rank updates to y, in place.

    Args:
        y: [M, N], last stride 1.
        deltas: the updates.
        rows: memory of each token; tokens without one are not touched.

    Returns:
        y.
    """
    _expand((y,), deltas, rows)
    return y


def expand_each_(ys: Sequence[Tensor], deltas: Sequence[Delta], rows: Rows) -> None:
    """Add to each of up to three y [M, N] its own low-rank update, in place; the N may differ."""
    _expand(ys, deltas, rows)


def _expand(ys: Sequence[Tensor], deltas: Sequence[Delta], rows: Rows) -> None:
    y, y1, y2 = up_to_three(ys)
    first, second, third = up_to_three([delta.operand() for delta in deltas])
    cut, rank = stretches(rows, y.shape[0], _LENGTH), largest_rank(*deltas)
    launch(
        _expand_fwd_kernel,
        (sum(cdiv(y.shape[1], _BLOCK_N) for y in ys) * cut.count,),
        y_ptr=y,
        stride_y=y.stride(0),
        y1=wide(y1),
        y2=wide(y2),
        first=first,
        second=second,
        third=third,
        ids_ptr=rows.ids,
        memories=deltas[0].b.shape[0],
        **cut.args(),
        N=y.shape[1],
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
