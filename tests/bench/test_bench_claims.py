"""The plots of the claims say what the answers say."""

import json

import pytest

from bench.claims import FILES, ROOT, Answers, costs, won_back

RESULTS = ROOT / "bench" / "results"


@pytest.mark.parametrize("name", FILES)
def test_gains_are_those_of_the_answers(name):
    path = RESULTS / f"quality-{name}-test.json"
    (at,) = json.loads(path.read_text("utf-8"))["sparsities"]
    (gain,) = [row for row in costs(Answers(path)) if row.name.endswith("gain of offloading")]
    assert gain.value == pytest.approx(at["offloading_gain_nats"]["mean"]["mean"], abs=1e-6)


def test_no_share_where_adaptation_is_more_than_the_loss():
    rows = {name: list(won_back(Answers(RESULTS / f"quality-{name}-test.json"))) for name in FILES}
    assert [len(rows[name]) for name in FILES] == [3, 3, 0, 3]
