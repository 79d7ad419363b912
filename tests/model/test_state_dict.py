"""A state dict brings what its tensors mean: whether the mask is fixed, whether a cache is filled,
the LoRA's alpha, and of which neurons a narrow backbone is."""

import pytest
import torch
from safetensors.torch import load_model, save_model
from support.models import attached, perturb, same, tokens
from support.widths import spread

import koff

pytestmark = pytest.mark.usefixtures("no_real_fsync")


def soft(seed=0, **config):
    return spread(attached("llama", target_sparsity=0.4, seed=seed, **config))


def masked(**config):
    model = soft(**config)
    koff.binarize(model, multiple_of=1)
    return model


def other(model):
    """The model with other gates and memories."""
    with torch.no_grad():
        for p in model.koff.parameters():
            p.neg_()
    return model


def logits(model):
    return model(tokens(), memory=["es", None, "en"]).logits


def through_a_file(source, target, folder):
    save_model(source, folder / "model.safetensors")
    load_model(target, folder / "model.safetensors")


def in_memory(source, target, folder):
    target.load_state_dict(source.state_dict())


WAYS = [in_memory, through_a_file]


@pytest.mark.parametrize("way", WAYS)
def test_a_mask_stays_fixed(way, tmp_path):
    source, target = masked(), other(soft(seed=1))
    way(source, target, tmp_path)
    assert target.koff.gates.fixed and target.koff.gates.kept_first
    assert not any(p.requires_grad for p in target.koff.gates.parameters())
    assert torch.equal(logits(target), logits(source))
    assert koff.sparsity(target) == koff.sparsity(source)


@pytest.mark.parametrize("way", WAYS)
def test_gates_stay_open(way, tmp_path):
    source, target = soft(), other(soft(seed=1))
    koff.binarize(target, multiple_of=1)
    way(source, target, tmp_path)
    assert not target.koff.gates.fixed and not target.koff.gates.kept_first
    assert all(p.requires_grad for p in target.koff.gates.parameters())
    assert torch.equal(logits(target), logits(source))
    assert koff.sparsity(target) == koff.sparsity(source)


def test_a_filled_cache_is_not_filled_again():
    kv = koff.KVConfig(num_tokens=5)
    source, target = (attached("qwen3", target_sparsity=0, kv=kv) for _ in range(2))
    source.koff.memories["en"].kv_filled = True
    target.load_state_dict(source.state_dict())
    assert [memory.kv_filled for memory in target.koff.memories] == [True, False, False]
    target.koff.memories["es"].load_state_dict(source.koff.memories["en"].state_dict())
    assert target.koff.memories["es"].kv_filled


def test_a_lora_keeps_its_alpha():
    """Two LoRAs of one shape and other alphas compute something else."""
    source = attached("llama", target_sparsity=0)
    lora = koff.LoRAConfig(r=4, alpha=1, target_modules="all-linear")
    target = attached("llama", target_sparsity=0, lora=lora)
    target.load_state_dict(source.state_dict())
    assert torch.equal(logits(target), logits(source))
    assert target.koff.memories["en"].lora_config == source.koff.memories["en"].lora_config


def test_narrow_weights_keep_the_numbers_of_their_neurons(tmp_path):
    source, target = soft(), soft()
    with torch.no_grad():
        for p in target.koff.gates.log_alpha:
            p.copy_(p.flip(0))  # equal widths, other neurons
    source, target = koff.compact(source), koff.compact(target)
    assert not same_neurons(source, target)
    target.load_state_dict(source.state_dict())
    assert same_neurons(source, target) and torch.equal(logits(target), logits(source))
    folders = [koff.save(m, tmp_path / name) for name, m in (("a", source), ("b", target))]
    assert same_neurons(*map(koff.load, folders))


def same_neurons(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.koff.kept, b.koff.kept, strict=True))


def test_neurons_of_another_dense_model_are_refused():
    source, target = koff.compact(masked()), koff.compact(masked())
    target.koff.dense_widths = [width + 1 for width in target.koff.dense_widths]
    with pytest.raises(ValueError, match=r"pruned from the widths \[97, 97, 97\] to \["):
        target.load_state_dict(source.state_dict())


def test_tensors_that_do_not_say_what_they_mean_are_refused():
    model = masked()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = other(masked()).state_dict()
    for name in list(state):
        if name.endswith("gates._extra_state"):
            del state[name]
    with pytest.raises(ValueError, match="gates must come with koff.gates._extra_state"):
        model.load_state_dict(state, strict=False)
    state = {name: t for name, t in state.items() if ".kv." in name}
    with pytest.raises(ValueError, match=r"must come with koff\.memories\.memory_en\._extra_state"):
        model.load_state_dict(state, strict=False)
    assert model.koff.gates.fixed and same(model.koff.state_dict(), _koff(before))
    model.load_state_dict({k: t for k, t in before.items() if ".lora." in k}, strict=False)


def _koff(tensors):
    return {n.removeprefix("koff."): t for n, t in tensors.items() if n.startswith("koff.")}


def test_a_mask_alone_goes_into_the_whole_model():
    """A part of the model cannot put the base's neurons into another order."""
    source, model = masked(), other(soft(seed=1))
    koff.binarize(model, multiple_of=1)
    state = source.koff.state_dict()
    with pytest.raises(ValueError, match=r"got a call on a part of it; put 'koff\.' in front"):
        model.koff.load_state_dict(state)
    model.load_state_dict({f"koff.{name}": t for name, t in state.items()}, strict=False)
    assert torch.equal(logits(model), logits(source))
    fresh = other(soft(seed=1))  # where no order stands against it
    fresh.koff.load_state_dict(state)
    assert (logits(fresh) - logits(source)).abs().max() < 1e-5  # the same sums in another order


def test_a_nested_model_brings_it_too():
    source, target = (torch.nn.ModuleDict({"inner": m}) for m in (masked(), other(soft(seed=1))))
    target.load_state_dict(source.state_dict())
    assert torch.equal(logits(target["inner"]), logits(source["inner"]))


def test_everything_in_a_state_dict_is_a_tensor():
    state = perturb(masked()).state_dict()
    assert all(isinstance(t, torch.Tensor) and t.numel() for t in state.values())
