"""Multiples of the kept widths that suit a target, and those that do not."""

import pytest
from support.models import tiny

import koff
from koff.pruning.binarize import MISSED_WARNING, check_multiple


@pytest.mark.parametrize(
    ("full", "target", "multiple"),
    [
        ([256] * 2, 0.5, 64),
        ([256] * 2, 0.2, 64),  # 25 % go: a warning
        ([8192] * 16, 0.2, 64),
        ([8192] * 16, 0.001, 1),
        ([96] * 3, 0.33, 64),
        ([80, 96], 0.2, 64),
        ([256] * 2, 0.0, 300),
    ],
    ids=str,
)
def test_a_multiple_that_suits_the_target(full, target, multiple):
    check_multiple(full, target, multiple)


@pytest.mark.parametrize(
    ("full", "target", "multiple", "widths"),
    [
        ([256] * 2, 0.5, 300, "256"),
        ([256] * 2, 0.5, 256, "256"),
        ([256] * 2, 0.05, 200, "200, 256"),  # 9 of 10 stay nearest where all do
        ([256] * 2, 0.5, 200, "200, 256"),  # 22 % go at most
        ([256] * 2, 0.05, 100, "100, 200, 256"),
        ([80, 96], 0.5, 64, "64, 80, 96"),
        ([8192] * 16, 0.0001, 64, r"\.\.\., 7936, 8000, 8064, 8128, 8192"),
    ],
    ids=str,
)
def test_a_multiple_that_keeps_the_target_out_of_reach(full, target, multiple, widths):
    with pytest.raises(
        ValueError,
        match=rf"width_multiple_of must let {100 * target:g} % of the MLP neurons go, got "
        rf"{multiple}, by which a layer can only keep {widths}; lower it",
    ):
        check_multiple(full, target, multiple)


@pytest.mark.parametrize("multiple", [1, 16, 24, 32, 48, 64, 90, 96, 100])
@pytest.mark.parametrize("target", [0.02, 0.1, 0.3, 0.5, 0.9])
def test_what_is_let_through_is_what_binarize_reaches(target, multiple):
    """Of 96 neurons a layer. At random scores, of layers that differ: something is removed."""
    model = koff.attach(tiny("llama"), koff.KoffConfig(target_sparsity=target, kv=None))
    try:
        check_multiple(model.koff.dense_widths, target, multiple)
    except ValueError:
        return
    reached = koff.binarize(model, multiple_of=multiple).sparsity.mlp
    assert reached > 0
    assert reached >= target - max(MISSED_WARNING, multiple / 2 / sum(model.koff.dense_widths))
