"""Adapters and hooks of other libraries on an attached model: they work as on the base, or are
refused; none is passed over."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from support.models import attached, tiny, tokens
from support.widths import spread

import koff

pytestmark = pytest.mark.usefixtures("no_real_fsync")

FP32 = 1e-5  # the same sums in another order
MLP = ("gate_proj", "up_proj", "down_proj")


def soft():
    return spread(attached("llama", target_sparsity=0.4))


def masked():
    model = soft()
    koff.binarize(model, multiple_of=1)
    return model


def compacted():
    return koff.compact(masked())


def loaded():
    with tempfile.TemporaryDirectory() as folder:
        return koff.load(koff.save(compacted(), Path(folder, "out")))


STAGES = {"soft": soft, "masked": masked, "compacted": compacted, "loaded": loaded}


def adapted(model, *targets, seed=1):
    """The model under a PEFT LoRA that is not zero."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
    return get_peft_model(model, config)


def logits(model, memory="en"):
    return model(tokens(), memory=memory).logits


@pytest.mark.parametrize("target", [*MLP, "q_proj"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_adapter_counts_before_it_is_merged_and_after(stage, target):
    model, memory = STAGES[stage](), ["es", None, "keys"]
    bare = logits(model, memory)
    wrapped = adapted(model, target)
    under = logits(wrapped, memory)
    assert (under - bare).abs().max() > 1e-3
    with wrapped.disable_adapter():
        assert (logits(wrapped, memory) - bare).abs().max() < FP32
    merged = wrapped.merge_and_unload()
    assert (logits(merged, memory) - under).abs().max() < FP32


@pytest.mark.parametrize("stage", STAGES)
def test_an_adapter_trains_beside_gates_and_memories(stage):
    wrapped = adapted(STAGES[stage](), *MLP).train()
    state = wrapped.base_model.model.koff
    state.requires_grad_(True)  # PEFT froze all but its own
    if state.gates is not None and state.gates.fixed:
        state.gates.requires_grad_(False)
    logits(wrapped).square().mean().backward()
    own = [p for name, p in wrapped.named_parameters() if "lora_A.default" in name]
    assert len(own) == 9 and all(p.grad is not None and p.grad.any() for p in own)
    assert all(p.grad.any() for p in state.memories["en"].lora.parameters())
    if stage == "soft":
        assert all(p.grad.any() for p in state.gates.log_alpha)


@pytest.mark.parametrize("stage", STAGES)
def test_the_stock_operations_compute_what_the_fused_one_does(stage):
    model = STAGES[stage]()
    fused, ids = [logits(model, m) for m in ("en", None, ["es", None, "keys"])], tokens()
    handles = [
        model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None),
        model.model.layers[2].mlp.gate_proj.register_forward_pre_hook(lambda *_: None),
    ]
    for memory, want in zip(("en", None, ["es", None, "keys"]), fused, strict=True):
        assert (model(ids, memory=memory).logits - want).abs().max() < FP32
    for handle in handles:
        handle.remove()
    for memory, want in zip(("en", None, ["es", None, "keys"]), fused, strict=True):
        assert (model(ids, memory=memory).logits - want).abs().max() < FP32


def test_a_trained_adapter_of_the_base_fits_a_masked_model(tmp_path):
    """Its neurons are counted in the original order, whether it is merged before a forward or
    not."""
    adapted(tiny("llama"), *MLP).save_pretrained(tmp_path)
    base = PeftModel.from_pretrained(tiny("llama"), tmp_path).merge_and_unload()
    expected = koff.attach(base, masked().koff.config)
    model = masked()
    with torch.no_grad():
        for own, new in zip(model.koff.gates.log_alpha, soft().koff.gates.log_alpha, strict=True):
            own.copy_(new)
    expected.koff.load_state_dict(soft().koff.state_dict())
    koff.binarize(expected, multiple_of=1)
    want = logits(expected.eval())
    assert model.koff.gates.kept_first
    wrapped = PeftModel.from_pretrained(model, tmp_path)
    assert not model.koff.gates.kept_first
    merged = copy.deepcopy(wrapped).merge_and_unload()
    assert (logits(merged) - want).abs().max() < FP32
    assert (logits(wrapped) - want).abs().max() < FP32


def test_an_adapter_on_one_layer_leaves_the_others_narrow():
    model = masked()
    want = logits(model)
    config = LoraConfig(r=2, target_modules=["up_proj"], layers_to_transform=[1])
    wrapped = get_peft_model(model, config)
    widths = model.koff.gates.widths
    assert widths[1] is None and None not in (widths[0], widths[2])
    assert (logits(wrapped) - want).abs().max() < FP32
    koff.binarize(model, target=0.2, multiple_of=1)  # and once more, beside the adapter
    assert model.koff.gates.widths[1] is None and model.koff.gates.widths[0] is not None
    again = soft()
    koff.binarize(again, target=0.2, multiple_of=1)
    assert (logits(wrapped) - logits(again)).abs().max() < FP32
    assert (logits(koff.compact(wrapped.unload())) - logits(again)).abs().max() < FP32


def test_other_kinds_of_adapters_count_too():
    model = masked()
    want = logits(model)
    config = IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    )
    torch.manual_seed(0)
    assert (logits(get_peft_model(model, config)) - want).abs().max() > 1e-3


def test_hooks_see_the_neurons_by_their_own_numbers():
    seen = {}
    for name, model in {"masked": masked(), "soft": soft()}.items():
        up = model.model.layers[0].mlp.up_proj
        up.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
        logits(model)
    assert (seen["masked"] - seen["soft"]).abs().max() < FP32


def test_gradients_reach_hooks():
    model, seen = koff.compact(masked()), []
    model.model.layers[0].mlp.down_proj.register_full_backward_hook(lambda *_: seen.append(1))
    logits(model).sum().backward()
    assert seen == [1]


def as_liger(model):
    """Liger's patch of one layer: a forward in the instance's dictionary."""
    mlp = model.model.layers[1].mlp

    def forward(self, x):
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    mlp.__dict__["forward"] = forward.__get__(mlp, type(mlp))


@pytest.mark.parametrize("stage", STAGES)
def test_a_patch_after_attach_is_refused_at_the_next_forward(stage):
    model = STAGES[stage]()
    as_liger(model)
    with pytest.raises(ValueError, match=r"forward: layers, .* got another in \['LlamaMLP'\]"):
        logits(model)


def test_a_copy_looks_at_its_own_modules():
    model = masked()
    copied = copy.deepcopy(model)
    as_liger(copied)
    logits(model)
    with pytest.raises(ValueError, match="LlamaMLP"):
        logits(copied)


def test_what_an_adapter_would_spoil_is_refused(tmp_path):
    model = masked()
    wrapped = adapted(model, "up_proj")
    with pytest.raises(TypeError, match=r"compact: the linear layers .* got a peft\..*Linear"):
        koff.compact(model)
    with pytest.raises(TypeError, match=r"detach: the linear layers .* merge_and_unload"):
        koff.detach(model)
    narrow = koff.compact(wrapped.unload())
    for target in ("q_proj", "lm_head"):
        wrapped = adapted(narrow, target)
        with pytest.raises(ValueError, match="koff.save: the backbone's tensors must be those of"):
            koff.save(narrow, tmp_path / "out")
        with pytest.raises(ValueError, match="koff.export_merged: the backbone's tensors"):
            koff.export_merged(narrow, "en", tmp_path / "out")
        wrapped.unload()
    assert not (tmp_path / "out").exists()
    koff.save(narrow, tmp_path / "out")
