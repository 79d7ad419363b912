"""save_pretrained and push_to_hub, transformers' own, never drop a memory or a mask silently."""

import copy

import pytest
import torch
from support.models import attached, tiny, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

import koff
from koff.model.memory_argument import write_backbone

pytestmark = pytest.mark.usefixtures("no_real_fsync")


def gates_open():
    return attached("llama", target_sparsity=0.4)


def mask_fixed():
    model = gates_open()
    koff.binarize(model, multiple_of=8)
    return model


def gates_alone():
    return attached("llama", memories=(), target_sparsity=0.4)


def compacted():
    return koff.compact(mask_fixed())


def never_pruned():
    return attached("llama", target_sparsity=0)


def loaded(folder):
    return koff.load(koff.save(compacted(), folder))


COMPACT = r"koff.save\(koff.compact\(model\), folder\)"
SAVE = r"koff.save\(model, folder\)"


@pytest.mark.parametrize(
    ("make", "got", "call"),
    [
        (gates_open, "memories en, keys, es and gates", COMPACT),
        (mask_fixed, "memories en, keys, es and a mask", COMPACT),
        (gates_alone, "gates", COMPACT),
        (compacted, "memories en, keys, es", SAVE),
        (never_pruned, "memories en, keys, es", SAVE),
    ],
)
def test_what_would_lose_something_is_refused_before_anything_is_written(make, got, call, tmp_path):
    model = make()
    message = (
        f"^save_pretrained: the model must be its backbone alone, got {got}, which transformers "
        rf"would leave out; call {call}, or koff.detach\(model\) first for the base alone$"
    )
    for kwargs in ({}, {"state_dict": model.state_dict()}, {"push_to_hub": True}):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "out", **kwargs)
    assert not (tmp_path / "out").exists()


def test_a_loaded_model_and_a_copy_refuse_too(tmp_path):
    model = loaded(tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=SAVE):
            one.save_pretrained(tmp_path / "out")
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}


def test_push_to_hub_is_refused_before_a_repository_is_made(monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", lambda *_, **__: pytest.fail("it is sent"))
    with pytest.raises(ValueError, match=r"^push_to_hub: .* memories en, .*koff.push_to_hub\("):
        gates_open().push_to_hub("someone/model")
    with pytest.raises(ValueError, match=r"call koff.push_to_hub\(model, repo_id\), or koff"):
        compacted().push_to_hub("someone/model", private=True)
    sent = []
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", lambda model, *a, **k: sent.append((a, k)))
    bare = without_memories(compacted())
    bare.push_to_hub("someone/model", private=True)
    koff.detach(bare).push_to_hub(repo_id="someone/model")
    assert sent == [(("someone/model",), {"private": True}), ((), {"repo_id": "someone/model"})]


def without_memories(model):
    for name in model.koff.memory_names:
        koff.remove_memory(model, name)
    return model


@pytest.mark.parametrize("make", [gates_open, mask_fixed, compacted, never_pruned])
def test_after_detach_it_writes_as_always(make, tmp_path):
    model, ids = koff.detach(make()), tokens()
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(ids).logits, model(ids).logits)
    if make in (gates_open, mask_fixed):  # the mask is gone with koff
        assert torch.equal(again(ids).logits, tiny("llama")(ids).logits)


@pytest.mark.parametrize("make", [compacted, never_pruned])
def test_a_model_without_memories_and_gates_is_its_backbone_and_is_written(make, tmp_path):
    model, ids = without_memories(make()), tokens()
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not [name for name in again.state_dict() if "koff" in name]


def test_gates_without_memories_are_still_refused(tmp_path):
    with pytest.raises(ValueError, match=f"got a mask, which .* call {COMPACT}"):
        without_memories(mask_fixed()).save_pretrained(tmp_path / "out")


def test_the_backbone_alone_is_written_for_those_who_write_the_rest(tmp_path):
    model = compacted()
    write_backbone(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not [name for name in again.state_dict() if "koff" in name]
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
