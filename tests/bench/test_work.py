"""A slow path that creeps in shows in the counts, on however busy a machine."""

import json

import pytest
import torch

from bench import timing, work

BASELINE = json.loads(work.BASELINE.read_text())
# What transformers does alone is taken off, but its versions differ in how they call koff.
SAME = all(
    timing.version_of(name) == BASELINE["environment"][name] for name in ("torch", "transformers")
)


@pytest.fixture(scope="module")
def measured():
    return work.measure()


def test_work_has_a_baseline_for_every_case(measured):
    assert list(measured) == list(BASELINE["work"])


@pytest.mark.parametrize("case", BASELINE["work"])
@pytest.mark.parametrize("what", work.Work._fields)
def test_work_is_not_more_than_it_was(measured, case, what):
    """Where it is meant to be more: ``python -m bench.work --write``, and say why in the commit."""
    was, now = BASELINE["work"][case][what], measured[case][what]
    assert now <= was + (0 if SAME else abs(was) // 10)


def test_work_counts_operators_and_results_that_are_no_views():
    x = torch.zeros(4, 8)
    found = work.work_of(lambda: (x + 1).view(-1))
    assert found == work.Work(operators=2, allocated=4 * 8 * 4, python=0)


def test_work_counts_calls_inside_koff_alone():
    from koffkernels import hard_concrete

    once = work.work_of(lambda: hard_concrete(torch.zeros(3), sample=False)).python
    twice = work.work_of(
        lambda: [hard_concrete(torch.zeros(3), sample=False) for _ in range(2)]
    ).python
    assert once > 0 and twice == 2 * once
