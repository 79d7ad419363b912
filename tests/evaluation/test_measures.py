"""What perplexities say together, on numbers worked out by hand."""

import math

import pytest

from koff.commands.reproduce.collect import over_languages
from koff.evaluation.measures import (
    Spread,
    Undefined,
    cells,
    offloading_gain,
    perplexity,
    share_won_back,
    spread,
)


def test_spread_is_mean_and_sample_deviation():
    found = spread([1.0, 2.0, 6.0])  # squares of deviations: 4 + 1 + 9 = 14, by n - 1 = 2: 7
    assert (found.mean, found.count) == (3.0, 3) and found.sd == pytest.approx(math.sqrt(7))
    assert found.text() == "3.00 ± 2.65" and found.text(0, 100, " %") == "300 ± 265 %"
    assert spread([4.0]) == Spread(4.0, None, 1) and spread([4.0]).text(1) == "4.0"
    with pytest.raises(ValueError, match="values must not be empty"):
        spread([])
    with pytest.raises(ValueError, match="must be a finite number, got nan"):
        spread([1.0, math.nan])


def test_share_won_back_by_hand():
    assert share_won_back(20.0, 24.0, 21.0) == 0.75  # 3 of the 4 that were lost
    assert share_won_back(20.0, 24.0, 24.0) == 0.0
    assert share_won_back(20.0, 24.0, 25.0) == -0.25
    assert share_won_back(20.0, 24.0, 19.0) == 1.25
    e = math.e  # ln: 1, 3, 1.5
    logs = [math.log(value) for value in (e, e**3, e**1.5)]
    assert share_won_back(*logs) == pytest.approx(0.75)


@pytest.mark.parametrize("gates", [20.0, 19.0])
def test_share_won_back_of_nothing_is_refused(gates):
    with pytest.raises(Undefined, match=f"gates only must be above the dense 20, got {gates:g}"):
        share_won_back(20.0, gates, 18.0)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_share_won_back_of_no_number_is_refused(bad, at):
    values = [20.0, 24.0, 21.0]
    values[at] = bad
    name = ("dense", "gates only", "own memory")[at]
    with pytest.raises(ValueError, match=f"{name} must be a finite number, got {bad}") as caught:
        share_won_back(*values)
    assert caught.type is ValueError  # and not "undefined", which a table would only mention


def test_offloading_gain_by_hand():
    e = math.e
    # on the dense model the memory gains 3 - 2.9 = 0.1 nats, on the pruned one 3.5 - 3.1 = 0.4
    assert offloading_gain(e**3, e**2.9, e**3.5, e**3.1) == pytest.approx(0.3)
    assert offloading_gain(20.0, 18.0, 40.0, 36.0) == pytest.approx(0.0)  # mere adaptation
    assert offloading_gain(20.0, 10.0, 40.0, 30.0) == pytest.approx(math.log(2 / 3))


def test_over_languages_takes_the_mean_of_each_seed_first():
    found = over_languages({"en": [0.2, 0.4], "fr": [0.6, 0.2]})
    assert found["mean"]["mean"] == pytest.approx(0.35)  # of 0.4 and 0.3
    assert found["mean"]["sd"] == pytest.approx(0.1 / math.sqrt(2))
    assert found["languages"]["en"]["mean"] == pytest.approx(0.3)
    assert found["languages"]["fr"]["sd"] == pytest.approx(0.4 / math.sqrt(2))
    with pytest.raises(ValueError, match="zip"):
        over_languages({"en": [0.2, 0.4], "fr": [0.6]})


def test_cells_are_read_by_name_or_refused():
    rows = [
        {"variant": "base", "memory": None, "domain": "en", "perplexity": 20.0},
        {"variant": "koff", "memory": None, "domain": "en", "perplexity": 22.0},
        {"variant": "koff", "memory": "en", "domain": "en", "perplexity": 21.0},
        {"variant": "koff", "memory": "fr", "domain": "en", "perplexity": None},
        {"variant": "koff", "memory": "es", "domain": "en", "perplexity": 0.5},
    ]
    found = cells(rows, "koff")
    assert perplexity(found, "en", None, "a") == 22.0 and perplexity(found, "en", "en", "a") == 21
    assert cells(rows, "base") == {("en", None): 20.0}
    named = "koff-0.2-seed1: the perplexity of en with memory"
    with pytest.raises(ValueError, match=f"{named} fr must be a finite number, got None"):
        perplexity(found, "en", "fr", "koff-0.2-seed1")
    with pytest.raises(ValueError, match=f"{named} de must have been measured, got no such row"):
        perplexity(found, "en", "de", "koff-0.2-seed1")
    with pytest.raises(ValueError, match=f"{named} es must be at least 1, got 0.5"):
        perplexity(found, "en", "es", "koff-0.2-seed1")
    with pytest.raises(ValueError, match="of fr with no memory must have been measured"):
        perplexity(found, "fr", None, "a")
