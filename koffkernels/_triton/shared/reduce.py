"""Sums of partial results in a fixed order: the second pass of every split reduction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, rank_block
from .operands import up_to_three

EXPECTS = {"_sum_partials_kernel": None, "_sum_matrix_kernel": None}
_TILE = 1024  # elements of a matrix that one program adds up


@triton.jit(do_not_specialize=["splits"])
def _sum_partials_kernel(part_ptr, out_ptr, splits, size, BLOCK: tl.constexpr):
    """One program: BLOCK elements of out, added over splits 0, 1, 2, ..."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    total = tl.zeros((BLOCK,), tl.float32)
    part_ptrs = part_ptr + offs
    for _ in range(splits):
        total += tl.load(part_ptrs, mask=mask, other=0.0)
        part_ptrs += size
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over the first dimension, in order, in fp32.

    Args:
        partials: fp32 [splits, ...], contiguous.
        dtype: of the result.
    """
    out = partials.new_empty(partials.shape[1:], dtype=dtype)
    launch(
        _sum_partials_kernel,
        (cdiv(out.numel(), 1024),),
        part_ptr=partials,
        out_ptr=out,
        splits=partials.shape[0],
        size=out.numel(),
        BLOCK=1024,
    )
    return out


@triton.jit
def _sum_matrix_tile(
    part_ptr,
    stride_split,
    stride_memory,
    out_ptr,
    scaling_ptr,
    RANK,
    WIDE,
    block,
    ids_ptr,
    splits,
    per_row,
    TRANSPOSED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """A tile [BLOCK_R, BLOCK_W] of one memory's matrix, added over its splits in their order, times
    its scaling."""
    m = tl.program_id(2).to(tl.int64)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    offs_w = block * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    mask = (offs_r < RANK) & (offs_w < WIDE)
    offs = offs_r * WIDE + offs_w
    total = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    part_ptr += m * stride_memory
    for split in range(splits):
        mine = mask
        if ids_ptr is not None:
            # Masked, not multiplied: other memories' parts are not even read.
            mine = mask & (tl.load(ids_ptr + split // per_row) == m)
        total += tl.load(part_ptr + offs, mask=mine, other=0.0)
        part_ptr += stride_split
    if scaling_ptr is not None:
        total *= tl.load(scaling_ptr + m).to(tl.float32)
    if TRANSPOSED:
        offs = offs_w * RANK + offs_r
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + m * RANK * WIDE + offs, out, mask=mask)


@triton.jit(do_not_specialize=["splits", "per_row"])
def _sum_matrix_kernel(
    part_ptr,
    stride_split,
    stride_memory,
    out_ptr,
    scaling_ptr,
    second,
    third,
    ids_ptr,
    splits,
    per_row,
    RANK,
    WIDE,
    TRANSPOSED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One program: a tile of one of up to three matrices, of one memory. out is [n, RANK, WIDE], or
    TRANSPOSED [n, WIDE, RANK]."""
    block = tl.program_id(0)
    if second is None:
        _sum_matrix_tile(
            part_ptr, stride_split, stride_memory, out_ptr, scaling_ptr, RANK, WIDE, block,
            ids_ptr, splits, per_row, TRANSPOSED, BLOCK_R, BLOCK_W,
        )  # fmt: skip
    else:
        blocks0 = tl.cdiv(WIDE, BLOCK_W)
        blocks1 = blocks0 + tl.cdiv(second.wide, BLOCK_W)
        if block < blocks0:
            _sum_matrix_tile(
                part_ptr, stride_split, stride_memory, out_ptr, scaling_ptr, RANK, WIDE, block,
                ids_ptr, splits, per_row, TRANSPOSED, BLOCK_R, BLOCK_W,
            )  # fmt: skip
        if (block >= blocks0) & (block < blocks1):
            _sum_matrix_tile(
                second.part, second.stride_split, second.stride_memory, second.out, second.scaling,
                second.rank, second.wide, block - blocks0, ids_ptr, splits, per_row,
                TRANSPOSED, BLOCK_R, BLOCK_W,
            )  # fmt: skip
        if third is not None:
            if block >= blocks1:
                _sum_matrix_tile(
                    third.part, third.stride_split, third.stride_memory, third.out, third.scaling,
                    third.rank, third.wide, block - blocks1, ids_ptr, splits, per_row,
                    TRANSPOSED, BLOCK_R, BLOCK_W,
                )  # fmt: skip


class SumOperand(NamedTuple):
    """A second or third matrix of ``_sum_matrix_kernel``: its partial sums, where they go to, and
    the scaling [n]."""

    part: Tensor
    out: Tensor
    scaling: Tensor
    stride_split: int
    stride_memory: int
    rank: int
    wide: int


class MatrixSum(NamedTuple):
    """A sum over tokens for every memory, [n, r, W], which is not added up yet.

    Args:
        parts: fp32 [splits, n, r, W], partial sums of all memories; or [splits, 1, r, W], each of
            one memory. Ranks lie W elements apart.
        memories: n.
        ids: int64 [splits / per_row], whose memory a split's is; None: every memory has its own.
        per_row: consecutive splits that share one id.
    """

    parts: Tensor
    memories: int
    ids: Tensor | None = None
    per_row: int = 1

    def total(self, dtype: torch.dtype, scaling: Tensor | None, transposed: bool) -> Tensor:
        """Return the sums times ``scaling`` [n], or as they are for None: [n, r, W], 0 for a memory
        that no token uses; [n, W, r] where ``transposed``."""
        _, _, rank, width = self.parts.shape
        sides = (width, rank) if transposed else (rank, width)
        out = self.parts.new_empty((self.memories, *sides), dtype=dtype)
        totals([self], [out], [scaling], transposed)
        return out

    def by_rank(self, ranks: Sequence[int]) -> list[MatrixSum]:
        """Return the sums of updates whose ranks lie side by side in this one."""
        return [self._replace(parts=part) for part in self.parts.split(list(ranks), 2)]


def totals(
    sums: Sequence[MatrixSum],
    outs: Sequence[Tensor],
    scalings: Sequence[Tensor | None],
    transposed: bool,
) -> None:
    """Write ``MatrixSum.total`` of up to three sums over the same tokens, cut alike, into ``outs``,
    contiguous; of several, each needs a scaling."""
    operands = []
    for each, out, scaling in zip(sums, outs, scalings, strict=True):
        _, memories, rank, width = each.parts.shape
        strides = each.parts.stride(0), each.parts.stride(1) if memories > 1 else 0
        operands.append(SumOperand(each.parts, out, scaling, *strides, rank, width))
    first, second, third = up_to_three(operands)
    rank = max(operand.rank for operand in operands)
    block_r = rank_block(rank)
    block_w = _TILE // block_r
    blocks = sum(cdiv(operand.wide, block_w) for operand in operands)
    launch(
        _sum_matrix_kernel,
        (blocks, cdiv(rank, block_r), sums[0].memories),
        part_ptr=first.part,
        stride_split=first.stride_split,
        stride_memory=first.stride_memory,
        out_ptr=first.out,
        scaling_ptr=first.scaling,
        second=second,
        third=third,
        ids_ptr=sums[0].ids,
        splits=sums[0].parts.shape[0],
        per_row=sums[0].per_row,
        RANK=first.rank,
        WIDE=first.wide,
        TRANSPOSED=transposed,
        BLOCK_R=block_r,
        BLOCK_W=block_w,
    )
