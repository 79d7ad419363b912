"""Sums of partial results in a fixed order: the second pass of every split reduction."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch

EXPECTS = {"_sum_partials_kernel": None, "_sum_by_memory_kernel": None}


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


@triton.jit(do_not_specialize=["stretches", "per_row"])
def _sum_by_memory_kernel(
    part_ptr, out_ptr, ids_ptr, stretches, per_row, size, BLOCK: tl.constexpr
):
    """One program: BLOCK elements of one memory's sum, over its stretches in their order."""
    m = tl.program_id(1)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    total = tl.zeros((BLOCK,), tl.float32)
    part_ptrs = part_ptr + offs
    for stretch in range(stretches):
        mine = m == 0
        if ids_ptr is not None:
            mine = tl.load(ids_ptr + stretch // per_row) == m
        # Masked, not multiplied: other memories' parts are not even read.
        total += tl.load(part_ptrs, mask=mask & mine, other=0.0)
        part_ptrs += size
    tl.store(out_ptr + m.to(tl.int64) * size + offs, total, mask=mask)


def sum_by_memory(partials: Tensor, ids: Tensor | None, per_row: int, memories: int) -> Tensor:
    """Return each memory's sum of the partial results of its stretches, in their order.

    Args:
        partials: fp32 [stretches, ...], contiguous.
        ids: int64 [rows], the memory of each row; None: memory 0.
        per_row: stretches of a row.
        memories: n.

    Returns:
        fp32 [n, ...]; 0 for a memory that no row uses.
    """
    out = partials.new_empty(memories, *partials.shape[1:])
    size = out[0].numel()
    launch(
        _sum_by_memory_kernel,
        (cdiv(size, 1024), memories),
        part_ptr=partials,
        out_ptr=out,
        ids_ptr=ids,
        stretches=partials.shape[0],
        per_row=per_row,
        size=size,
        BLOCK=1024,
    )
    return out
