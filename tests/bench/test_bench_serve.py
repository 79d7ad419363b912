"""The throughput benchmark: its folders, its loads and its peer; vLLM's half needs vLLM."""

import json
from types import SimpleNamespace

import pytest

import koff
from bench import serve
from koff_vllm.saved import SavedModel

SMALL = SimpleNamespace(requests=9, clients=3, prompt=5, new=2)


@pytest.mark.parametrize("per_layer", serve.BACKBONES.values(), ids=serve.BACKBONES)
def test_a_backbone_has_memories_of_both_kinds(root, tmp_path, per_layer):
    serve.make(str(root / "model"), per_layer, tmp_path / "out", keys=3, multiple=16)
    saved = SavedModel(tmp_path / "out")
    wanted = {f"{kind}{i}" for kind in ("both", "lora") for i in range(serve.MEMORIES)}
    assert set(saved.memories) == wanted
    widths = json.loads((saved.path / "koff.json").read_text())
    assert (widths["widths"] == widths["dense_widths"]) == (per_layer is None)


def test_generate_runs_every_load(root, tmp_path):
    serve.make(str(root / "model"), "global", tmp_path / "out", keys=3, multiple=16)
    vocab = koff.load(tmp_path / "out").config.vocab_size
    found = serve.measure_generate(tmp_path / "out", SMALL, vocab)
    assert found.keys() == serve.LOADS.keys()
    for row in found.values():
        assert row["tokens_per_s"] == pytest.approx(2 * row["requests_per_s"]) and len(row) == 2


def test_memories_take_turns():
    load = serve.jobs(("a", None), SMALL, vocab=50)
    assert [memory for memory, _ in load] == ["a", None, "a", None, "a", None, "a", None, "a"]
    assert all(len(prompt) == 5 and max(prompt) < 50 for _, prompt in load)
    row = serve.row_of(2.0, [0.4, 0.1, 0.2], SMALL)
    assert row["requests_per_s"] == 4.5 and row["first_token_median_s"] == 0.2
