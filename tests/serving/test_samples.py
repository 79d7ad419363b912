"""What counts as another continuation than koff's, and what as rounding."""

import pytest

from koff_vllm.samples import Sample

KOFF = Sample(prompt=[5], ids=[7, 8, 9], logprobs=[-1.0, -2.0, -3.0], margins=[1.0, 0.1, 1.0])


@pytest.mark.parametrize(
    ("ids", "logprobs"),
    [
        ([7, 8, 9], [-1.0, -2.0, -3.0]),
        ([7, 8, 9], [-1.09, -1.91, -3.05]),
        ([7, 4, 3], [-1.0, -2.05, -9.0]),  # the second was a tie; what follows another text is free
    ],
)
def test_rounding_is_no_difference(ids, logprobs):
    assert KOFF.difference(ids, logprobs, 0.1) is None


@pytest.mark.parametrize(
    ("ids", "logprobs", "message"),
    [
        ([7, 8, 9], [-1.0, -2.2, -3.0], "token 1 has log-probability -2.2000 instead of -2.0000"),
        ([7, 8, 9], [float("nan"), -2.0, -3.0], "token 0 has log-probability nan"),
        ([6, 8, 9], [-1.0, -2.0, -3.0], "token 0 is 6 instead of 7"),
    ],
)
def test_a_difference_is_said(ids, logprobs, message):
    assert message in KOFF.difference(ids, logprobs, 0.1)
