"""The benchmark of data, on a little text; and that memory does not grow with it."""

import pytest

from bench.data import WAYS, measure


@pytest.mark.slow
def test_memory_is_constant_where_blocks_are_cached(tmp_path):
    ways = WAYS[:2]
    small, large = (measure(tmp_path, size, ways=ways) for size in (6, 20))
    assert [row["way"] for row in small] == list(ways)
    grown = {
        one["way"]: other["anonymous"] - one["anonymous"]
        for one, other in zip(small, large, strict=True)
    }
    # 14 MB of text in memory are, as texts and as 9 bytes for each of their tokens, at least twice
    # as much. What waits to be written is a few chunks of documents, and they are there at 6 MB.
    assert grown["in memory"] > 28
    assert grown["first run"] < 16
