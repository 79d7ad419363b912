"""What counts as another continuation than koff's, and what as rounding."""

import dataclasses

import pytest

from koff_vllm.samples import Sample

KOFF = Sample(
    [5], ids=[7, 8, 9], logprobs=[-1.0, -2.0, -3.0], margins=[1.0, 0.1, 1.0], dtype="float32"
)


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


def test_the_coarser_dtype_says_what_rounding_is():
    half = dataclasses.replace(KOFF, dtype="bfloat16")
    assert KOFF.close("float32") < KOFF.close("float16") < KOFF.close("bfloat16")
    assert half.close("float32") == half.close("bfloat16") == KOFF.close("bfloat16")


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
