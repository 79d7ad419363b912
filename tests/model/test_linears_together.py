"""q, k and v of an attached model are one operation, though transformers calls three modules."""

import copy

import pytest
import torch
from support import activation_checkpointing
from support.models import ARCHITECTURES, HYBRID, attached, same, tiny, tokens

import koff
from koff.model import attach as home

MIXED = ["es", None, "en"]


def with_lora(architecture="llama", targets="all-linear", **config):
    lora = koff.LoRAConfig(r=4, target_modules=targets)
    return attached(architecture, target_sparsity=0, lora=lora, **config)


@pytest.fixture
def calls(monkeypatch):
    """How many weights each call of ``lora_linears`` has."""
    seen, real = [], home.lora_linears

    def spy(x, weights, *args, **kwargs):
        seen.append(len(weights))
        return real(x, weights, *args, **kwargs)

    monkeypatch.setattr(home, "lora_linears", spy)
    return seen


def hooked(model, *names):
    """The model with a hook on these linear layers, which are then computed one by one; and what
    the hooks saw."""
    seen = []
    for layer in model.model.layers:
        for name in names:
            linear = getattr(layer.self_attn, name)
            linear.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    return model, seen


def step(model):
    """Logits and gradients of a training step."""
    logits = model(tokens(), memory=MIXED, use_cache=False).logits
    logits.square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "olmo2", HYBRID])
def test_q_k_and_v_are_one_operation(architecture, calls):
    model = with_lora(architecture)
    model(tokens(), memory=MIXED)
    attentions = sum(hasattr(layer, "self_attn") for layer in model.model.layers)
    assert calls.count(3) == attentions and 2 not in calls
    # o, and every linear layer of a recurrent layer, is on its own.
    recurrent = len(model.model.layers) - attentions
    assert calls.count(1) == attentions + 5 * recurrent
    assert model.koff.running.ahead is None


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_together_is_one_by_one(name, calls):
    """A hook on one of the three parts them. Results are bit-equal, and gradients but for the order
    in which x's are added."""
    want, want_grads = step(hooked(with_lora(), name)[0])
    assert 3 not in calls
    got, grads = step(with_lora())
    assert calls.count(3) == 3
    assert torch.equal(got, want) and grads.keys() == want_grads.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[key], msg=key)


def test_hooks_see_the_input_and_the_output_of_their_layer():
    names = "q_proj", "k_proj", "v_proj"
    model, seen = hooked(with_lora(), *names)
    with torch.no_grad():
        model(tokens(), memory=MIXED)
    q, k, v = seen[:3]
    assert q[0] is k[0] is v[0] and [y.shape[-1] for _, y in (q, k, v)] == [64, 32, 32]


@pytest.mark.parametrize("targets", [["v_proj"], ["q_proj", "v_proj"], ["k_proj"]], ids=str)
def test_some_of_the_three_without_lora(targets, calls):
    want, want_grads = step(hooked(with_lora(targets=targets), "k_proj")[0])
    got, grads = step(with_lora(targets=targets))
    assert calls.count(3) == 3
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, want_grads)


def test_without_lora_on_attention_nothing_is_computed_ahead(calls):
    model = with_lora(targets=["down_proj"])
    model(tokens(), memory=MIXED)
    assert calls == []


def test_an_output_is_for_the_very_input_and_nothing_is_kept():
    model = with_lora()
    attention, found = model.model.layers[1].self_attn, {}
    x, other = torch.randn(3, 5, 64), torch.randn(3, 5, 64)

    def inside(module, args, kwargs):
        module.q_proj(x)
        found["others"] = module.k_proj(other), module.v_proj(x.clone())
        found["again"] = module.k_proj(x), module.k_proj(x), module.v_proj(x)
        module.q_proj(x)  # and nobody asks for k and v

    handle = attention.register_forward_pre_hook(inside, with_kwargs=True)
    with torch.no_grad():
        want = model(tokens(), memory=MIXED).logits
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(tokens(), memory=MIXED).logits, want)
    (k_other, v_copy), (k, k_again, v) = found["others"], found["again"]
    assert torch.equal(k, k_again) and torch.equal(v, v_copy) and not torch.equal(k, k_other)
    assert model.koff.running.ahead is None


def test_an_exception_leaves_nothing_for_the_next_call():
    model = with_lora()
    x = torch.randn(3, 5, 64)

    def broken(module, args, kwargs):
        module.q_proj(x)
        assert model.koff.running.ahead.x is x
        raise KeyboardInterrupt

    handle = model.model.layers[1].self_attn.register_forward_pre_hook(broken, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(), memory=MIXED)
    handle.remove()
    assert model.koff.running.ahead is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_computed_together_again(reentrant, calls):
    want, want_grads = step(with_lora())
    calls.clear()
    model = with_lora()
    activation_checkpointing.enable(model, reentrant)
    model.enable_input_require_grads()
    got, grads = step(model.train())
    assert calls.count(3) == 2 * 3
    assert torch.equal(got, want) and same(grads, want_grads)
    assert model.koff.running.ahead is None


@pytest.mark.slow  # test_calls_side_by_side compiles a model without gradients
def test_compiled_as_a_whole_in_training():
    changes = dict(num_hidden_layers=1)
    want, want_grads = step(with_lora(changes=changes))
    model = with_lora(changes=changes)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = compiled(tokens(), memory=MIXED, use_cache=False).logits
    logits.square().mean().backward()
    torch.testing.assert_close(logits, want)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(grads, want_grads)
    assert model.koff.running.ahead is None


def test_a_copy_computes_by_its_own_weights(calls):
    model = with_lora()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].self_attn.k_proj.weight.zero_()
        want = model(tokens(), memory=MIXED).logits
        changed = twin(tokens(), memory=MIXED).logits
        assert not torch.equal(changed, want)
        assert torch.equal(hooked(twin, "k_proj")[0](tokens(), memory=MIXED).logits, changed)


def test_detach_gives_the_base_back():
    model = with_lora()
    model(tokens(), memory=MIXED)
    base = koff.detach(model)
    assert torch.equal(base(tokens()).logits, tiny("llama")(tokens()).logits)
