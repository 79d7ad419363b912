"""What the published traffic table says of every kernel, held to."""

import pytest

from bench.gate.kernel_traffic import OPS, measure, share_of_least


@pytest.mark.slow
@pytest.mark.parametrize("ops", OPS, ids=lambda f: f.__name__)
def test_kernel_traffic(ops):
    """Each weight is read, at decode once; each result element is written once; what moves is at
    most 15 % above the least that the operation needs."""
    for op in ops():
        row = measure(op)
        assert row["weights_touched"] in (None, 1.0), op.name
        assert row["most_stores"] == 1, op.name
        assert share_of_least(row) <= 1.15, op.name
        if "decode" in op.name:
            assert row["reads_per_weight"] == 1.0, op.name
