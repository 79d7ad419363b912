"""How the streaming kernels cut their tokens: into stretches, each of one memory.

A stretch is a piece of one row of the batch, so its memory is a single number. A program takes a
strip of columns and a stretch: it loads the strip of that memory's matrix once, reads the tokens
tile after tile in a pipelined loop, selects nothing, and cannot touch another memory's values. With
the memory of each token in a tile instead, the same kernels needed twice the registers and ran at a
quarter to a third of the bandwidth (H200, docs/gpu.md).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .launch import Rows, cdiv, dot


class Stretches(NamedTuple):
    """The stretches of a call.

    Args:
        tokens: of a row; without ids the whole batch counts as one row.
        length: tokens of a stretch; the last one of a row may be shorter.
        per_row: stretches of a row.
        count: of all rows.
    """

    tokens: int
    length: int
    per_row: int
    count: int

    def args(self) -> dict[str, int]:
        """Return what ``stretch_of`` needs in a kernel."""
        return {"tokens": self.tokens, "length": self.length, "per_row": self.per_row}


def stretches(rows: Rows, m: int, length: int) -> Stretches:
    """Cut m tokens into stretches of at most ``length``."""
    tokens = m if rows.ids is None else rows.tokens
    length = min(length, max(tokens, 1))
    per_row = cdiv(tokens, length)
    return Stretches(tokens, length, per_row, per_row * (m // max(tokens, 1)))


@triton.jit
def stretch_of(index, ids_ptr, memories, tokens, length, per_row):
    """(memory or -1, first token, last + 1) of a stretch."""
    row = index // per_row
    begin = row * tokens + (index % per_row) * length
    end = tl.minimum(begin + length, (row + 1) * tokens)
    memory = tl.full((), 0, tl.int32)
    if ids_ptr is not None:
        # An id that is none of the memories means none: it must not become an address.
        id = tl.load(ids_ptr + row)
        memory = tl.where((id >= 0) & (id < memories), id, -1).to(tl.int32)
    return memory, begin, end


@triton.jit
def _strip(delta, memory, start, offs_i, mask_i, BLOCK_R: tl.constexpr, dtype: tl.constexpr):
    """scaling b^T [BLOCK_R, BLOCK_I] of one memory, ranks from ``start`` on; zeros for none."""
    offs_r = start + tl.arange(0, BLOCK_R)
    offs = memory.to(tl.int64) * delta.stride_memory + offs_r[:, None] * delta.stride_rank
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
    """base + scaling s b^T [BLOCK_M, BLOCK_I] of some tokens, in fp32.

    ``b`` is that of ``memory_part``; with MORE the ranks behind the first BLOCK_R are read here,
    tile by tile.
    """
    s = _narrow(delta, rows, mask_m, 0, BLOCK_R, b.dtype)
    total = dot(s, b, base, PRECISION)
    if MORE:
        for start in tl.range(BLOCK_R, delta.rank, BLOCK_R, num_stages=1):
            s_more = _narrow(delta, rows, mask_m, start, BLOCK_R, b.dtype)
            b_more = _strip(delta, memory, start, offs_i, mask_i, BLOCK_R, b.dtype)
            total = dot(s_more, b_more, total, PRECISION)
    return total
