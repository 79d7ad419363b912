"""Whatever writes a model's tensors gets all of them: accelerate and safetensors leave out, or
refuse, what they take for tied."""

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, load_model, save_model
from support.models import attached, same, tokens
from support.widths import spread

import koff
from koff.training.checkpoint import check_state, read_checkpoint, write_checkpoint

pytestmark = pytest.mark.usefixtures("no_real_fsync")


def soft(frozen=1):
    """Gates still open. Its base has tied embeddings, which savers rightly write once."""
    kv = koff.KVConfig(num_tokens=5, num_frozen_tokens=frozen, init="tokens")
    return spread(attached("llama", target_sparsity=0.4, kv=kv))


def masked(frozen=1):
    model = soft(frozen)
    koff.binarize(model, multiple_of=1)
    return model


STAGES = {
    "soft": soft,
    "masked": masked,
    "compacted": lambda: koff.compact(masked()),
    "compacted in place": lambda: koff.compact(masked(), inplace=True),
    "no frozen tokens": lambda: masked(frozen=0),
    "detached": lambda: koff.detach(soft()),
    "detached from a mask": lambda: koff.detach(masked()),
    "detached from a narrow one": lambda: koff.detach(koff.compact(masked())),
}


def scrambled(model):
    """The model with other values everywhere, as a fresh one would have."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    return model


def outputs(model):
    arguments = [{"memory": "en"}, {"memory": None}] if hasattr(model, "koff") else [{}]
    return [model(tokens(), **argument).logits for argument in arguments]


@pytest.mark.parametrize("stage", STAGES)
def test_every_tensor_has_memory_of_its_own(stage):
    model = STAGES[stage]()
    tensors = list(model.parameters())  # tied ones are one parameter
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


@pytest.mark.parametrize("stage", STAGES)
def test_accelerate_writes_and_reads_every_tensor(stage, tmp_path):
    model = STAGES[stage]()
    names = model.state_dict().keys() - {"lm_head.weight"}
    wanted = outputs(model)
    accelerator = Accelerator(cpu=True)
    accelerator.save_model(model, tmp_path / "model")
    assert load_file(tmp_path / "model/model.safetensors").keys() == names
    accelerator.prepare(model)
    accelerator.save_state(tmp_path / "state")
    assert load_file(tmp_path / "state/model.safetensors").keys() == names
    scrambled(model)
    accelerator.load_state(tmp_path / "state")
    accelerator.free_memory()
    for got, want in zip(outputs(model), wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("stage", STAGES)
def test_safetensors_writes_and_reads_every_tensor(stage, tmp_path):
    model = STAGES[stage]()
    wanted = outputs(model)
    save_model(model, tmp_path / "model.safetensors")
    load_model(scrambled(model), tmp_path / "model.safetensors")
    for got, want in zip(outputs(model), wanted, strict=True):
        assert torch.equal(got, want)


def test_a_loaded_folder_is_written_whole(tmp_path):
    model = koff.load(koff.save(koff.compact(masked()), tmp_path / "saved"))
    Accelerator(cpu=True).save_model(model, tmp_path / "model")
    found = load_file(tmp_path / "model/model.safetensors")
    assert found.keys() == model.state_dict().keys() - {"lm_head.weight"}


def test_a_checkpoint_without_frozen_tokens_can_be_resumed(tmp_path):
    state = soft(frozen=0).koff
    write_checkpoint(state, tmp_path)
    before = {name: t.clone() for name, t in state.state_dict().items()}
    scrambled(state)
    check_state(state, tmp_path)
    read_checkpoint(state, tmp_path)
    assert same(state.state_dict(), before)
