"""bench.e2e: which cases there are, what a row says, and that a wrong result gets no time."""

import pytest
import torch

from bench import e2e
from bench.gpu.context import TINY

LIMITS = {"copy_bytes_per_second": 1e10, "gemm_operations_per_second": 1e12}


@pytest.fixture(scope="module")
def models():
    base = e2e.random_llama(TINY, torch.device("cpu"), torch.float32)
    return e2e.Models(base, e2e.DRY)


def test_e2e_cases_say_all_that_is_compared():
    found = e2e.cases(e2e.Sizes(), cuda=True)
    assert len(found) == len(set(found))
    assert {case.backbone for case in found} == {*e2e.BACKBONES, "gated"}
    assert {case.rows for case in found if case.phase == "decode"} == {1, 8, 64}
    for way in ("transformers", "peft", "koff"):
        assert {case.phase for case in found if case.way == way} >= {"prefill", "decode"}
    assert {case.way for case in found} - {case.way for case in e2e.cases(e2e.SMALL, False)} == {
        "compiled",
        "koff-dynamic",
        "koff-pdl",
    }


def test_e2e_rows_hold_bytes_and_the_ideal(models):
    case = e2e.Case("decode", 8, "koff", "25-different", 8, keys=True)
    row = models.row(case, [2e-3, 1e-3, 4e-3], LIMITS)
    token = 2 * TINY.layers * TINY.kv_heads * TINY.head_dim * 4  # bytes of one token's cache
    assert row["tokens_per_second"] == pytest.approx(8 / 2e-3) and row["us"] == 2000.0
    assert row["kv_bytes"] == 8 * (e2e.DRY.prompt + e2e.DRY.new // 2) * token
    lora = sum(p.numel() for _, p in models._lora_of("25-different")) * 4
    assert row["memory_bytes"] == 8 * (lora + e2e.DRY.keys * token)
    moved = row["weight_bytes"] + row["memory_bytes"] + row["kv_bytes"]
    assert row["least_seconds"] == pytest.approx(moved / 1e10)
    dense = models.facts(case._replace(backbone="dense"), LIMITS)
    share = 1 - row["weight_bytes"] / dense["weight_bytes"]
    # Widths are multiples of 8, so 25 % is met within half of one in one layer.
    assert share == pytest.approx(0.25, abs=4 * 3 * TINY.hidden * 4 / dense["weight_bytes"])
    assert row["widths"][0] < row["widths"][1] < TINY.intermediate


def test_e2e_trees_share_their_weights(models):
    base = {p.data_ptr() for p in models.base.parameters()}
    narrow = {p.data_ptr() for p in models.transformers("25-different").parameters()}
    ours = {p.data_ptr() for p in models.koff("25-different", False).parameters()}
    assert len(base - narrow) == 3 * TINY.layers and narrow <= ours
    dense = models.peft("dense", 8)
    assert base <= {p.data_ptr() for p in dense.parameters()}


@pytest.mark.parametrize(
    "case",
    [
        e2e.Case("prefill", 2, "koff", "dense", 1),
        e2e.Case("decode", 8, "koff", "25-equal", 8, keys=True),
        e2e.Case("train", 2, "koff", "12-different", 1),
    ],
    ids=lambda case: case.name,
)
def test_e2e_a_wrong_result_gets_no_time(models, case, monkeypatch):
    """koff runs a batch with the memories of other rows."""
    models.prepare(case)
    choice = models.choice

    def wrong(case, rows):
        found = choice(case, rows)
        if "memory" in found:
            found["memory"] = "m1" if case.memories == 1 else found["memory"][::-1]
        return found

    monkeypatch.setattr(models, "choice", wrong)
    with pytest.raises(e2e.Wrong, match="no time"):
        models.prepare(case)


def test_e2e_takes_turns_and_an_error_costs_one_row(models, monkeypatch):
    order = []

    def prepare(case, check=True):
        if case.way == "peft":
            raise e2e.Wrong("off; no time")
        return lambda: order.append(case.way) or 1.0

    monkeypatch.setattr(models, "prepare", prepare)
    chosen = [e2e.Case("prefill", 2, way, "dense", 0) for way in ("transformers", "peft", "koff")]
    rows = {row["way"]: row for row in e2e.run(models, chosen, LIMITS, 2)}
    assert order == ["transformers", "koff", "koff", "transformers"]
    assert rows["peft"]["error"] == "off; no time" and "us" not in rows["peft"]
    assert rows["koff"]["readings"] == [1.0, 1.0]
