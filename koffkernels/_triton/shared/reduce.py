"""Sums of partial results in a fixed order: the second pass of every split reduction."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, rank_block

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


@triton.jit(do_not_specialize=["splits", "per_row"])
def _sum_matrix_kernel(
    part_ptr,
    stride_split,
    stride_memory,
    out_ptr,
    scaling_ptr,
    ids_ptr,
    splits,
    per_row,
    RANK,
    WIDE,
    TRANSPOSED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One program: a tile [BLOCK_R, BLOCK_W] of one memory's matrix, added over its splits in their
    order, times its scaling. out is [n, RANK, WIDE], or TRANSPOSED [n, WIDE, RANK]."""
    m = tl.program_id(2).to(tl.int64)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    offs_w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
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


class MatrixSum(NamedTuple):
    """A sum over tokens for every memory, [n, r, W], which is not added up yet.

    Args:
        parts: fp32 [splits, n, r, W], partial sums of all memories; or [splits, 1, r, W], each of
            one memory. The last two dimensions are dense.
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
        splits, each, rank, wide = self.parts.shape
        n, block_r = self.memories, rank_block(rank)
        shape = (n, wide, rank) if transposed else (n, rank, wide)
        out = self.parts.new_empty(shape, dtype=dtype)
        launch(
            _sum_matrix_kernel,
            (cdiv(wide, _TILE // block_r), cdiv(rank, block_r), n),
            part_ptr=self.parts,
            stride_split=self.parts.stride(0),
            stride_memory=self.parts.stride(1) if each > 1 else 0,
            out_ptr=out,
            scaling_ptr=scaling,
            ids_ptr=self.ids,
            splits=splits,
            per_row=self.per_row,
            RANK=rank,
            WIDE=wide,
            TRANSPOSED=transposed,
            BLOCK_R=block_r,
            BLOCK_W=_TILE // block_r,
        )
        return out
