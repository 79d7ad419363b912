"""A fixed mask costs only the kept neurons, and changes neither the function nor the base."""

import copy

import pytest
import torch
from support.mapped import mapped_from
from support.models import ARCHITECTURES, attached, tiny, tokens
from support.widths import spread
from transformers import AutoModelForCausalLM

import koff
from koff.model import arch
from koff.model.forward_context import BASE
from koff.model.memory_argument import write_backbone
from koff.model.neuron_order import move_kept_first, positions, restore_order

MEMORIES = ("en", None, ["es", None, "keys"])
FP32 = 1e-5  # the same sums in another order


def binarised(architecture="llama", **config):
    model = spread(attached(architecture, target_sparsity=0.4, **config))
    koff.binarize(model, multiple_of=1)
    return model


def raw(model):
    """Copies of the weights as they lie in memory."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def up_of(state):
    return state["model.layers.0.mlp.up_proj.weight"]


def gradients(model, memory):
    model.zero_grad()
    model(tokens(), memory=memory).logits.square().mean().backward()
    return {n: p.grad.clone() for n, p in model.koff.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("memory", MEMORIES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reordered_equals_the_mask_multiplied_in(architecture, memory):
    """Logits and the gradients of every memory, against gates times h."""
    model, ids = binarised(architecture), tokens()
    assert model.koff.gates.kept_first
    got = model(ids, memory=memory).logits
    grads = gradients(model, memory) if memory else {}
    restore_order(model)
    assert not model.koff.gates.kept_first
    assert (model(ids, memory=memory).logits - got).abs().max() < FP32
    want = gradients(model, memory) if memory else {}
    assert set(grads) == set(want) and (want or not memory)
    for name, grad in grads.items():
        assert (grad - want[name]).abs().max() < FP32 * (1 + want[name].abs().max()), name


def test_reordered_computes_only_the_kept_neurons(monkeypatch):
    model, seen = binarised(), []
    real = koff.attach.__globals__["gated_mlp"]

    def spy(x, w_gate, w_up, w_down, **kwargs):
        seen.append((w_gate.shape[0], w_up.shape[0], w_down.shape[1], kwargs["gates"]))
        return real(x, w_gate, w_up, w_down, **kwargs)

    monkeypatch.setitem(koff.attach.__globals__, "gated_mlp", spy)
    model(tokens(), memory="en")
    widths = koff.sparsity(model).widths
    assert seen == [(w, w, w, None) for w in widths] and max(widths) < 96


def test_detach_after_reordering_gives_the_base_back_bit_for_bit():
    base, ids = tiny("qwen2"), tokens()
    model = koff.detach(binarised("qwen2"))
    wanted = base.state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(ids).logits, base(ids).logits)


def test_binarise_again_starts_from_the_original_order():
    model, ids = binarised(), tokens()
    other = spread(attached("llama", target_sparsity=0.4))
    koff.binarize(model, target=0.2, multiple_of=1)
    koff.binarize(other, target=0.2, multiple_of=1)
    assert torch.equal(model(ids, memory="en").logits, other(ids, memory="en").logits)
    wanted = raw(other)
    assert all(torch.equal(t, wanted[name]) for name, t in raw(model).items())


def test_reordered_weights_leave_the_file_that_they_were_mapped_from(tmp_path):
    """What is written to a mapped file's pages stays in memory until all tensors of it are gone: a
    model that is compacted in place would hold each MLP twice."""
    tiny("llama").save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = spread(koff.attach(base, koff.KoffConfig(memories=["en"], target_sparsity=0.4)))
    before = arch.mlp_weights(arch.mlps(model)[0])
    assert all(mapped_from(w) == str(tmp_path / "model.safetensors") for w in before)
    koff.binarize(model, multiple_of=1)
    after = arch.mlp_weights(arch.mlps(model)[0])
    assert all(now is then for now, then in zip(after, before, strict=True))
    assert [mapped_from(w) for w in after] == [None] * 3


def test_reordering_twice_changes_nothing():
    model = binarised()
    before = raw(model)
    move_kept_first(model)
    assert all(torch.equal(t, before[name]) for name, t in raw(model).items())


def test_a_state_dict_is_in_the_original_order_and_goes_into_any_model():
    base, model, ids = tiny("qwen3").state_dict(), binarised("qwen3"), tokens()
    state, wanted = model.state_dict(), model(ids, memory="en").logits
    assert all(torch.equal(t, state[name]) for name, t in base.items())
    assert not torch.equal(up_of(raw(model)), up_of(base))
    fresh = attached("qwen3", target_sparsity=0.4)
    fresh.load_state_dict(state)
    koff.binarize(fresh, multiple_of=1)
    assert torch.equal(fresh(ids, memory="en").logits, wanted)
    other = spread(attached("qwen3", target_sparsity=0.4, seed=7))
    with torch.no_grad():
        for p in other.koff.gates.log_alpha:
            p.neg_()  # another mask, so another order
    koff.binarize(other, multiple_of=1)
    assert not torch.equal(other(ids, memory="en").logits, wanted)
    other.load_state_dict(state)
    assert other.koff.gates.kept_first
    assert torch.equal(other(ids, memory="en").logits, wanted)
    nested = torch.nn.ModuleDict({"inner": model}).state_dict()
    assert torch.equal(nested["inner.model.layers.0.mlp.up_proj.weight"], up_of(base))


def test_a_written_backbone_is_in_its_own_order(tmp_path):
    from transformers import AutoModelForCausalLM

    model = binarised()
    write_backbone(model, tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    assert torch.equal(up_of(again), up_of(tiny("llama").state_dict()))


def test_reordered_teacher_and_copy():
    """Gates open is still the whole model; a copy is reordered too."""
    base, model, ids = tiny("qwen3"), binarised("qwen3"), tokens()
    assert (model(ids, memory=BASE).logits - base(ids).logits).abs().max() < FP32
    again = copy.deepcopy(model)
    assert torch.equal(again(ids, memory="es").logits, model(ids, memory="es").logits)
    for index, module in enumerate(arch.mlps(model)):
        rows = torch.arange(module.up_proj.weight.shape[0])
        now = positions(model, index, rows)
        same = module.up_proj.weight[now] == arch.mlps(base)[index].up_proj.weight
        assert same.all()
