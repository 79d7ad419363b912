"""How tokens are cut so that the last wave of programs is full."""

import itertools

import pytest
import torch

from koffkernels._triton.shared.launch import Rows, cdiv
from koffkernels._triton.shared.stretch import stretches
from koffkernels._triton.shared.waves import fullness, piece_length


@pytest.mark.parametrize(
    "programs, at_once, expected", [(1, 4, 0.25), (4, 4, 1.0), (5, 4, 0.625), (9, 4, 0.75)]
)
def test_fullness(programs, at_once, expected):
    assert fullness(programs, at_once) == expected


@pytest.mark.parametrize(
    "wanted, programs, at_once, tile, length",
    [
        (8, 186, 396, 32, 1024),  # 3.76 waves: what is wanted is full enough
        (8, 106, 396, 32, 1184),  # 2.14 waves of 8 pieces, 1.87 of 7
        (8, 152, 396, 32, 832),  # 3.07 of 8, 2.69 of 7, 3.45 of 9, 3.84 of 10
        (1, 1, 396, 32, 4096),  # never full: as many pieces as may be
        (0.1, 5000, 396, 32, 8192),  # more than one wave in one piece
        (12, 32, 396, 64, 704),  # whole tiles of 64
    ],
)
def test_piece_length(wanted, programs, at_once, tile, length):
    assert piece_length(8192, wanted, programs, at_once, tile) == length


def test_piece_length_is_near_what_is_wanted():
    """And in whole tiles, for all sizes: never fewer than half or more than twice the pieces."""
    sizes = itertools.product((1, 31, 100, 1000, 8192), (1, 7, 200), (1, 66, 528), (16, 32))
    for tokens, programs, at_once, tile in sizes:
        for wanted in (1, 2, 5.5, 30):
            length = piece_length(tokens, wanted, programs, at_once, tile)
            assert length >= tile and length % tile == 0
            assert cdiv(tokens, length) <= 2 * wanted
            assert length < 2 * tokens / wanted + 1 + tile


@pytest.mark.parametrize("tokens", [1, 31, 256, 1000])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("at_once", [0, 1, 792])
def test_stretches_cover_every_row(tokens, count, at_once):
    """Each token of each row lies in one stretch, and none is empty."""
    rows = Rows(torch.zeros(count, dtype=torch.int64), tokens)
    cut = stretches(rows, tokens * count, 256, 7, at_once)
    assert cut.tokens == tokens and cut.count == cut.per_row * count
    assert (cut.per_row - 1) * cut.length < tokens <= cut.per_row * cut.length


def test_stretches_of_less_than_a_wave_are_as_long_as_wanted():
    """More of them would only write more partial sums."""
    for strips, per_row in ((6, 2), (198, 2), (199, 3)):
        assert stretches(Rows(None, 512), 512, 256, strips, 396).per_row == per_row


def test_stretches_of_nothing():
    assert stretches(Rows(None, 0), 0, 256, 7, 792).count == 0
    assert stretches(Rows(torch.zeros(0, dtype=torch.int64), 5), 0, 256, 7, 792).count == 0
