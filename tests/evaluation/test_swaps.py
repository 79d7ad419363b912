"""Halves of memories swapped: against models whose memories were swapped by hand."""

import pytest
import torch
from support.models import redraw
from support.trainings import DOMAINS, fresh

import koff
from koff.evaluation.swaps import evaluate_swaps


def model_of(**config):
    """Two memories that differ in everything."""
    config = {"memories": ("en", "es"), "kv": koff.KVConfig(5, "normal", 0.3), **config}
    return redraw(fresh(**config))


def test_swapped_halves_give_what_a_memory_made_of_both_gives():
    model, texts = model_of(), {name: DOMAINS[name][:3] for name in ("en", "es")}
    before = {name: t.clone() for name, t in model.koff.state_dict().items()}
    rows = evaluate_swaps(model, None, texts, block_size=16)
    found = {(row.lora, row.kv, row.domain): row.perplexity for row in rows}
    assert len(rows) == len(found) == 18 and len(set(found.values())) == 18
    after = model.koff.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    plain = koff.evaluate(model, None, texts, block_size=16)
    for row in plain:
        assert found[row.memory, row.memory, row.domain] == pytest.approx(row.perplexity, rel=1e-6)
    with torch.no_grad():  # by hand: the cache of es under the LoRA of en
        for own, other in zip(*(m.kv.parameters() for m in model.koff.memories), strict=True):
            own.copy_(other)
        for own, other in zip(*(m.kv.buffers() for m in model.koff.memories), strict=True):
            own.copy_(other)
    for row in koff.evaluate(model, None, texts, memories=["en"], block_size=16):
        assert found["en", "es", row.domain] == pytest.approx(row.perplexity, rel=1e-6)
    with torch.no_grad():
        for parameter in model.koff.memories["en"].lora.parameters():
            parameter.zero_()
    for row in koff.evaluate(model, None, texts, memories=["en"], block_size=16):
        assert found[None, "es", row.domain] == pytest.approx(row.perplexity, rel=1e-6)


@pytest.mark.parametrize(
    "config", [dict(memories=("en",)), dict(kv=None), dict(lora=None), dict(memories=())]
)
def test_memories_without_two_halves_are_not_swapped(config):
    model = model_of(**config)
    with pytest.raises(ValueError, match="at least two memories, each of LoRA and KV, got "):
        evaluate_swaps(model, None, {"en": DOMAINS["en"]}, block_size=16)
