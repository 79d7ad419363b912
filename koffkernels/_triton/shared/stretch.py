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

from .launch import Rows, cdiv
from .waves import piece_length

_TILE = 32  # tokens, or 16: a tile that the end of a stretch cuts takes as long as a whole one


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


def stretches(rows: Rows, m: int, length: int, strips: int = 1, at_once: int = 0) -> Stretches:
    """Cut m tokens into stretches.

    Args:
        rows: memory of each token.
        m: tokens.
        length: of a stretch at most; of several waves about that, so that the last one is full.
        strips: of columns: programs for each stretch.
        at_once: programs that the GPU runs side by side; 0: waves do not count.
    """
    tokens = m if rows.ids is None else rows.tokens
    count = m // max(tokens, 1)
    length = min(length, max(tokens, 1))
    if 0 < at_once < strips * count * cdiv(tokens, length):
        length = piece_length(tokens, tokens / length, strips * count, at_once, _TILE)
    per_row = cdiv(tokens, length)
    return Stretches(tokens, length, per_row, per_row * count)


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
