"""What is measured at the head is what the model's own logits give, whoever makes them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import attached, tiny, tokens
from transformers import Qwen3ForCausalLM

import koff
from koff.data.losses import token_losses
from koff.model.arch import ARCHITECTURES
from koff.model.head import head_of, measured

# Sums of up to 64 products in fp32, in another order; and the log-softmax after them.
FP32 = 64 * 2**-24


def states_and_head(states, head):
    return states, head


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_gives_the_models_logits(architecture):
    plain, koffs = tiny(architecture).requires_grad_(False), attached(architecture)
    for model, argument in ((plain, {}), (koffs, {"memory": ["en", None, "es"]})):
        wanted = model(tokens(), **argument).logits
        states, head = measured(model, states_and_head, input_ids=tokens(), **argument)
        assert head is not None
        assert (head.logits(states) - wanted).abs().max() <= FP32 * wanted.abs().max()


def hooked(model):
    model.get_output_embeddings().register_forward_hook(lambda *_: _[-1] * 2)
    return model


def patched(model):
    forward = model.get_output_embeddings().forward
    model.get_output_embeddings().forward = lambda x: forward(x) * 2
    return model


def with_adapter(model):
    adapter = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    return get_peft_model(model, adapter).base_model.model


def trained(model):
    model.get_output_embeddings().weight.requires_grad_()
    return model


class Own(Qwen3ForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


def of_its_own_class(model):
    model.__class__ = Own
    return model


@pytest.mark.parametrize("change", [hooked, patched, with_adapter, of_its_own_class])
@pytest.mark.parametrize("attach", [False, True])
def test_where_only_the_model_knows_its_logits_it_makes_them(attach, change):
    model = tiny("qwen3").requires_grad_(False)
    late = change is with_adapter  # attach refuses one that is there already
    model = model if late else change(model)
    if attach:
        model = koff.attach(model, koff.KoffConfig(("en",))).eval()
    model = change(model) if late else model
    assert head_of(model) is None
    ids = tokens()
    wanted = model(ids).logits
    logits, head = measured(model, states_and_head, input_ids=ids)
    assert head is None and torch.equal(logits, wanted)


def test_a_trained_head_has_its_gradient():
    model = trained(attached("qwen3"))
    weight = model.get_output_embeddings().weight
    total, _ = measured(
        model, lambda s, h: token_losses(s, h, tokens()), input_ids=tokens(), use_cache=False
    )
    (got,) = torch.autograd.grad(total, weight)
    logits = model(tokens(), use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten(), reduction="sum"
    )
    (wanted,) = torch.autograd.grad(loss, weight)
    assert torch.allclose(got, wanted, atol=FP32 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("change", [lambda m: m.register_forward_hook(lambda *_: None), "forward"])
def test_a_plain_model_is_not_passed_by_where_somebody_waits_for_its_call(change):
    model, calls = tiny("llama").requires_grad_(False), []
    if change == "forward":
        forward = model.forward
        model.forward = lambda *a, **k: calls.append(1) or forward(*a, **k)
    else:
        model.register_forward_hook(lambda *_: calls.append(1))
    _, head = measured(model, states_and_head, input_ids=tokens())
    assert calls and head is None


def test_generate_makes_the_logits_of_the_last_tokens_alone():
    model = attached("llama")
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda m, i, out: seen.append(out.shape[1]))
    model.generate(tokens(), memory=["en", None, "es"], max_new_tokens=3, pad_token_id=0)
    assert seen == [1, 1, 1]


def test_a_cache_is_filled_with_the_logits_of_one_token():
    model, seen = tiny("llama"), []
    model.get_output_embeddings().register_forward_hook(lambda m, i, out: seen.append(out.shape[1]))
    koff.attach(model, koff.KoffConfig(("en",), kv=koff.KVConfig(5, "tokens")))
    assert seen == [1]
