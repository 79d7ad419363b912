"""The low-rank update that a tile [tokens, outputs] receives while it is in registers: acc +
scaling_m s b_m^T, m the memory of each token.

Streaming kernels have one memory in a program (``add_update``, see ``stretch``), fused GEMMs
several in a tile (``add_updates``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import dot


@triton.jit
def _strip(delta, memory, start, offs_i, mask_i, BLOCK_R: tl.constexpr, dtype: tl.constexpr):
    """scaling b^T [BLOCK_R, BLOCK_I] of one memory, ranks from ``start`` on; zeros for none."""
    offs_r = start + tl.arange(0, BLOCK_R)
    offs = tl.cast(memory, tl.int64) * delta.stride_memory + offs_r[:, None] * delta.stride_rank
    offs += offs_i.to(tl.int64)[None, :] * delta.stride_wide
    mask = (offs_r < delta.rank)[:, None] & mask_i[None, :] & (memory >= 0)
    b = tl.load(delta.b + offs, mask=mask, other=0.0).to(tl.float32)
    # Scaled here, once a strip, so that products are added straight onto what is there.
    scaling = tl.load(delta.scaling + memory, mask=memory >= 0, other=0.0).to(tl.float32)
    return (b * scaling).to(dtype)


@triton.jit
def _narrow(delta, rows, mask_m, start, BLOCK_R: tl.constexpr, dtype: tl.constexpr):
    """s [BLOCK_M, BLOCK_R] of some tokens, ranks from ``start`` on."""
    offs_r = start + tl.arange(0, BLOCK_R)
    s_ptrs = delta.s + rows * delta.stride_token + offs_r[None, :]
    return tl.load(s_ptrs, mask=mask_m & (offs_r < delta.rank)[None, :], other=0.0).to(dtype)


@triton.jit
def narrow_transposed(delta, rows, mask_m, BLOCK_R: tl.constexpr, dtype: tl.constexpr):
    """s^T [BLOCK_R, BLOCK_M], the first BLOCK_R ranks of some tokens, read as such.

    A tile that is also needed as s [BLOCK_M, BLOCK_R] is better read twice: Triton's pipeline fills
    only tiles that have one layout in shared memory, and reads others when they are needed.
    """
    offs_r = tl.arange(0, BLOCK_R)
    s_ptrs = delta.s + tl.trans(rows) * delta.stride_token + offs_r[:, None]
    mask = tl.trans(mask_m) & (offs_r < delta.rank)[:, None]
    return tl.load(s_ptrs, mask=mask, other=0.0).to(dtype)


@triton.jit
def memory_part(delta, memory, offs_i, mask_i, BLOCK_R: tl.constexpr, dtype: tl.constexpr):
    """scaling b^T [BLOCK_R, BLOCK_I] of one memory, its first BLOCK_R ranks, which a program keeps
    for its whole stretch; zeros for no memory."""
    return _strip(delta, memory, 0, offs_i, mask_i, BLOCK_R, dtype)


@triton.jit
def _add_ranks(
    acc,
    delta,
    memory,
    begin,
    rows,
    mask_m,
    offs_i,
    mask_i,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc plus the update of one memory, its ranks from ``begin`` on, read tile by tile."""
    dtype = delta.s.dtype.element_ty
    for start in tl.range(begin, delta.rank, BLOCK_R, num_stages=1):
        s = _narrow(delta, rows, mask_m, start, BLOCK_R, dtype)
        b = _strip(delta, memory, start, offs_i, mask_i, BLOCK_R, dtype)
        acc = dot(s, b, acc, PRECISION)
    return acc


@triton.jit
def add_update(
    base,
    delta,
    b,
    memory,
    rows,
    mask_m,
    offs_i,
    mask_i,
    BLOCK_R: tl.constexpr,
    MORE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """base + scaling s b^T [BLOCK_M, BLOCK_I] of some tokens, all of one memory, in fp32.

    ``b`` is that of ``memory_part``; with MORE the ranks behind the first BLOCK_R are read here.
    """
    s = _narrow(delta, rows, mask_m, 0, BLOCK_R, b.dtype)
    total = dot(s, b, base, PRECISION)
    if MORE:
        total = _add_ranks(
            total, delta, memory, BLOCK_R, rows, mask_m, offs_i, mask_i, BLOCK_R, PRECISION
        )
    return total


@triton.jit
def add_updates(
    acc,
    delta,
    memory,
    first,
    last,
    rows,
    offs_i,
    mask_i,
    ids_ptr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc plus the update of each token's own memory, one from ``first`` to ``last`` - 1; without
    ids all tokens use memory 0.

    A memory is multiplied into the accumulator of all tokens of the tile, with s = 0 for those that
    do not use it: a second accumulator to select from would not fit in registers. 0 times a finite
    number adds nothing, so memories must be finite.
    """
    if ids_ptr is not None:
        for m in tl.range(first, last, num_stages=1):
            mine = memory == m
            # A tile at a border can hold memories 0 and 39 and none between.
            if tl.max(mine.to(tl.int32), 0) > 0:
                acc = _add_ranks(
                    acc, delta, m, 0, rows, mine[:, None], offs_i, mask_i, BLOCK_R, PRECISION
                )
    else:
        zero, everyone = tl.zeros((), tl.int32), tl.full(rows.shape, 1, tl.int1)
        acc = _add_ranks(acc, delta, zero, 0, rows, everyone, offs_i, mask_i, BLOCK_R, PRECISION)
    return acc
