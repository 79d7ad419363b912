"""What the benchmark of the loss promises, at a size that takes no time."""

import pytest
import torch

from bench.loss import difference, sides
from bench.memory import peak_bytes
from bench.peers import loss_of_all_logits
from koff.data import losses

FULL = 8 * 1024 * 128_256  # logits of a step, as the issue of memory is usually told
ROWS, TOKENS, VOCABULARY, WIDTH = 4, 64, 2048, 16


@pytest.fixture(autouse=True)
def in_proportion(monkeypatch):
    """Pieces that are as small a part of this step as they are of a full one."""
    share = ROWS * TOKENS * VOCABULARY / FULL
    monkeypatch.setattr(losses, "AT_ONCE", round(losses.AT_ONCE * share))
    monkeypatch.setattr(losses, "PIECE_CPU", VOCABULARY)
    monkeypatch.setattr(loss_of_all_logits, "PIECE", VOCABULARY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_takes_an_eighth_of_the_memory_at_most(dtype):
    calls = sides(ROWS, TOKENS, VOCABULARY, WIDTH, dtype)
    peaks = {name: peak_bytes(call) for name, call in calls.items()}
    tensor = ROWS * TOKENS * VOCABULARY * dtype.itemsize
    assert (
        2.9 * tensor < peaks["all logits"] < 3.3 * tensor
    )  # the model's, the teacher's, a gradient
    assert peaks["in pieces"] <= peaks["all logits"] / 8


def test_both_sides_compute_the_same():
    loss, gradient = difference(sides(ROWS, TOKENS, VOCABULARY, WIDTH, torch.float32))
    assert loss < 1e-6 and gradient < 1e-5


def test_peak_bytes_counts_what_is_held_at_once():
    def call():
        torch.zeros(1000)  # freed again
        kept = torch.zeros(500)
        return kept + torch.zeros(500)

    assert peak_bytes(call) == 3 * 500 * 4
