"""Into how many pieces tokens are cut, so that no multiprocessor of the GPU idles at the end.

A GPU runs so many programs side by side, and begins the next where one ends: it works in waves.
With 2.1 times as many programs as it takes at once it is nearly empty during the last third.
"""

from __future__ import annotations

import functools
import math

from .launch import cdiv

_FULL = 0.9  # of the last wave


def fullness(programs: int, at_once: int) -> float:
    """Return programs / (waves * at_once): 1 if the last wave is full, too."""
    return programs / (cdiv(programs, at_once) * at_once)


@functools.cache
def piece_length(tokens: int, wanted: float, programs: int, at_once: int, tile: int) -> int:
    """Return how many tokens, in whole tiles, a piece has, so that the last wave is full.

    Of the numbers of pieces from half to twice of what is wanted, it takes the nearest at which the
    waves are 90 % full; where there is none, the one at which they are fullest.

    Args:
        tokens: at least 1.
        wanted: pieces that ran fastest, or that would be one wave.
        programs: of each piece, at least 1.
        at_once: programs that the GPU runs side by side.
        tile: tokens that a program takes at a time.
    """

    def length(pieces: int) -> int:
        return cdiv(cdiv(tokens, pieces), tile) * tile

    def full(pieces: int) -> float:
        return fullness(programs * cdiv(tokens, length(pieces)), at_once)

    near = range(max(1, math.ceil(wanted / 2)), max(1, int(2 * wanted)) + 1)
    nearest = sorted(near, key=lambda pieces: abs(pieces - wanted))
    return length(next((n for n in nearest if full(n) >= _FULL), max(nearest, key=full)))
