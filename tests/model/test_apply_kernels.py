"""koffkernels under models that know nothing of koff: the same numbers, PEFT's own ways intact."""

import copy
import pickle

import pytest
import torch
import transformers
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from support import activation_checkpointing
from support.models import VOCAB, tiny
from support.peft_models import with_adapters
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import koff
from koffkernels import force_backend

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Both sides compute the same products in fp32 and add them up in another order: a few roundings of
# 6e-8 on sums of up to 96 terms of size 1.
CLOSE = dict(rtol=1e-5, atol=2e-5)
_SMALL = dict(
    vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=12, pad_token_id=0,
)  # fmt: skip


def of(name: str):
    if name in ("llama", "qwen2", "qwen3"):
        return tiny(name)
    torch.manual_seed(0)
    kind = {"mistral": "Mistral", "gemma": "Gemma"}[name]
    config = getattr(transformers, f"{kind}Config")(**_SMALL)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def peft(model, targets=SEVEN, adapters=("fr",), **config) -> PeftModel:
    """A PEFT model whose adapters do something, each of its own rank."""
    return with_adapters(
        model,
        {
            name: LoraConfig(r=3 + i, lora_alpha=5 + i, target_modules=targets, **config)
            for i, name in enumerate(adapters)
        },
    )


def ids(rows=4, tokens=7) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(2))


def step(model, **kwargs):
    """Logits, and the gradients of a loss."""
    model.zero_grad()
    logits = model(ids(), **kwargs).logits
    logits.log_softmax(-1)[..., 5].mean().backward()
    return logits.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def calls_of(monkeypatch) -> list[str]:
    """The koffkernels operations that run from now on."""
    from koff.model import apply_kernels as home

    seen = []
    for name in ("gated_mlp", "lora_linear", "lora_linears"):
        run = getattr(home, name)
        monkeypatch.setattr(
            home, name, lambda *a, _run=run, _name=name, **k: seen.append(_name) or _run(*a, **k)
        )
    return seen


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
@pytest.mark.parametrize("targets", [SEVEN, ["q_proj", "v_proj"], ["down_proj"]], ids=len)
def test_apply_kernels_is_peft_forward_and_gradients(name, targets, monkeypatch):
    model = peft(of(name), targets)
    want, want_grads = step(model)
    done, seen = koff.apply_kernels(model), calls_of(monkeypatch)
    got, grads = step(model)
    torch.testing.assert_close(got, want, **CLOSE)
    assert grads.keys() == want_grads.keys() and len(grads) > 0
    for key, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[key], **CLOSE, msg=key)
    layers = model.config.num_hidden_layers
    together, alone = "q_proj" in targets, "o_proj" in targets
    assert seen.count("gated_mlp") == layers
    assert seen.count("lora_linears") == together * layers
    assert seen.count("lora_linear") == alone * layers
    assert sorted(set(done.replaced.values())) == ["GatedMLP", "LoRALinear"] and not done.left
    done.undo()
    again, _ = step(model)
    assert torch.equal(again, want)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_apply_kernels_of_a_plain_model(name, monkeypatch):
    model = of(name)
    with torch.no_grad():
        want = model(ids()).logits
    with koff.apply_kernels(model) as done:
        seen = calls_of(monkeypatch)
        with torch.no_grad():
            torch.testing.assert_close(model(ids()).logits, want, **CLOSE)
        assert seen and set(done.replaced.values()) == {"GatedMLP"}
        seen.clear()
        # All weights of a fresh model ask for gradients, which the kernels do not have.
        _, grads = step(model)
        assert not seen and any("gate_proj" in key for key in grads)
    assert type(model.model.layers[0].mlp).__mro__[1] is nn.Module


def test_apply_kernels_of_several_adapters(monkeypatch):
    model = peft(of("llama"), adapters=("en", "fr", "es"))
    model.add_adapter("part", LoraConfig(r=2, target_modules=["up_proj", "q_proj"]))
    for key, p in model.named_parameters():
        if "lora_B.part" in key:
            p.data.normal_(std=0.2)
    twin = copy.deepcopy(model)
    koff.apply_kernels(model)
    seen = calls_of(monkeypatch)
    mixes = [
        ["en", "fr", "es", "__base__"],
        ["part", "__base__", "part", "en"],
        ["__base__"] * 4,
        ["es"] * 4,
    ]
    with torch.no_grad():
        for names in mixes:
            want = twin(ids(), adapter_names=names).logits
            torch.testing.assert_close(model(ids(), adapter_names=names).logits, want, **CLOSE)
        for active in (["en"], ["fr", "es"], ["es", "part"]):
            for one in (model, twin):
                one.base_model.set_adapter(active)
            torch.testing.assert_close(model(ids()).logits, twin(ids()).logits, **CLOSE)
        with model.disable_adapter(), twin.disable_adapter():
            torch.testing.assert_close(model(ids()).logits, twin(ids()).logits, **CLOSE)
    layers = model.config.num_hidden_layers
    assert seen.count("gated_mlp") == (len(mixes) + 3 + 1) * layers
    model.base_model.set_adapter(["fr", "es"])
    twin.base_model.set_adapter(["fr", "es"])
    (_, grads), (_, want) = step(model), step(twin)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, want[key], **CLOSE, msg=key)
    # Last, because PEFT leaves its hooks behind when a forward fails.
    with pytest.raises(ValueError, match="same as the number of inputs"):
        model(ids(), adapter_names=["en"])


def test_apply_kernels_and_peft_go_on_as_before(tmp_path):
    model = peft(of("llama"))
    koff.apply_kernels(model)
    with torch.no_grad():
        want = model(ids()).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(of("llama"), tmp_path / "fr")
        torch.testing.assert_close(again(ids()).logits, want, **CLOSE)
        model.merge_adapter()
        torch.testing.assert_close(model(ids()).logits, want, **CLOSE)
        model.unmerge_adapter()
        torch.testing.assert_close(model(ids()).logits, want, **CLOSE)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids()).logits, want, **CLOSE)


def test_apply_kernels_leaves_what_it_does_not_compute(monkeypatch):
    """Dropout in training, DoRA, LoRA biases: PEFT's own code, and the report or the forward says
    so."""
    for config in (dict(use_dora=True), dict(lora_bias=True), dict(lora_dropout=0.5)):
        model = peft(of("qwen2"), **config)
        model.train()
        torch.manual_seed(3)
        want, want_grads = step(model)
        koff.apply_kernels(model)
        seen = calls_of(monkeypatch)
        torch.manual_seed(3)
        got, grads = step(model)
        assert not seen and torch.equal(got, want)
        assert all(torch.equal(grads[key], want_grads[key]) for key in want_grads)
        if "lora_dropout" in config:
            model.eval()
            with torch.no_grad():
                model(ids())
            assert "gated_mlp" in seen


def test_apply_kernels_sees_hooks_that_come_later(monkeypatch):
    model = peft(of("llama"))
    koff.apply_kernels(model)
    seen, called = calls_of(monkeypatch), []
    up = model.base_model.model.model.layers[0].mlp.up_proj
    for module in (up, up.base_layer, up.lora_A["fr"]):
        seen.clear(), called.clear()
        handle = module.register_forward_hook(lambda *a: called.append(1))
        with torch.no_grad():
            model(ids())
        assert called == [1] and seen.count("gated_mlp") == model.config.num_hidden_layers - 1
        handle.remove()
    seen.clear()
    handle = register_module_forward_hook(lambda module, *a: called.append(module))
    with torch.no_grad():
        model(ids())
    handle.remove()
    assert seen == [] and {up, up.base_layer, up.lora_A["fr"]} <= {*called}


@pytest.mark.parametrize("register", ["full_backward_hook", "full_backward_pre_hook"])
def test_apply_kernels_sees_hooks_on_gradients(register, monkeypatch):
    model = peft(of("llama"))
    koff.apply_kernels(model)
    up = model.base_model.model.model.layers[1].mlp.up_proj
    for module in (up, up.base_layer, up.lora_A["fr"]):
        called = []
        handle = getattr(module, f"register_{register}")(lambda *a, c=called: c.append(1))
        step(model)
        assert called == [1]
        handle.remove()


def test_apply_kernels_asks_the_class_what_it_computes():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(8, 12, False), nn.Linear(8, 12, False)
            self.down_proj, self.act_fn = nn.Linear(12, 8, False), nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd = Odd()

    with pytest.raises(
        ValueError, match=r"got none that fits in Model \(odd: it does not compute down"
    ):
        koff.apply_kernels(Model())
    with pytest.raises(ValueError, match="apply_kernels: the model must have gated MLPs"):
        koff.apply_kernels(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="apply_kernels: the model must be a torch.nn.Module"):
        koff.apply_kernels("llama")


def test_apply_kernels_twice_or_on_an_attached_model_is_refused():
    model = of("llama")
    koff.apply_kernels(model)
    with pytest.raises(ValueError, match="must not run on koffkernels already, got model.layers.0"):
        koff.apply_kernels(model)
    attached = koff.attach(of("llama"), koff.KoffConfig(memories=("fr",), kv=None))
    with pytest.raises(ValueError, match="must not run on koffkernels already"):
        koff.apply_kernels(attached)


def test_apply_kernels_reports_what_is_left():
    model = of("llama")
    model.model.layers[1].mlp.act_fn = nn.ReLU()
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward
    done = koff.apply_kernels(peft(model, ["q_proj"]))
    assert set(done.replaced.values()) == {"LoRALinear", "GatedMLP"}
    assert [why.split(" ")[0] for why in done.left.values()] == ["the", "its"]
    assert "2 left as they were" in str(done)


def all_by_own_code(done, why: str) -> None:
    """Of each of the 3 layers the MLP and its seven LoRA layers."""
    assert done.own_code() == dict.fromkeys(done.replaced, why)
    assert len(done.replaced) == 3 * (1 + len(SEVEN))
    assert str(done).splitlines() == [
        "0 modules run by koffkernels now, 24 replaced but run by their own code now, 0 left as "
        "they were",
        f"  24 by their own code: {why}",
    ]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (dict(use_dora=True), "DoRA"),
        (dict(lora_bias=True), "a LoRA bias"),
        (dict(lora_dropout=0.1), "LoRA dropout in training"),
    ],
    ids=str,
)
def test_apply_kernels_reports_what_peft_runs_now(config, why, monkeypatch):
    model = peft(of("llama"), **config).train()
    done, seen = koff.apply_kernels(model), calls_of(monkeypatch)
    model(ids())
    assert not seen
    all_by_own_code(done, why)
    model.eval()
    model(ids())
    assert bool(seen) == ("lora_dropout" in config) == (not done.own_code())


def test_apply_kernels_reports_a_trained_base():
    model = of("llama")
    done = koff.apply_kernels(model)
    assert set(done.own_code().values()) == {"a base weight is trained"}
    with torch.no_grad():
        assert done.own_code() == {} and str(done).startswith("3 modules run by koffkernels now")
    model.model.layers[0].mlp.requires_grad_(False)
    assert set(done.own_code()) == {"model.layers.1.mlp", "model.layers.2.mlp"}


def test_apply_kernels_reports_by_the_active_adapters():
    model = peft(of("llama"))
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], use_dora=True))
    done = koff.apply_kernels(model)
    assert done.own_code() == {}
    none = "no active LoRA (merged, disabled or none)"
    model.set_adapter("dora")
    own = done.own_code()
    ends = {path.rpartition(".")[2]: why for path, why in own.items()}
    dora = {"q_proj": "DoRA", "mlp": "DoRA", "up_proj": "DoRA"}
    assert ends == {name: none for name in SEVEN} | dora
    assert "  9 by their own code: DoRA" in str(done).splitlines()
    assert f"  15 by their own code: {none}" in str(done).splitlines()
    model.set_adapter("fr")
    with model.disable_adapter():  # the MLPs go on as one operation, without a LoRA
        alone = {path.rpartition(".")[2] for path in done.own_code()}
        assert alone == {"q_proj", "k_proj", "v_proj", "o_proj"}
    up = model.base_model.model.model.layers[0].mlp.up_proj
    handle = up.base_layer.register_forward_hook(lambda *a: None)
    ends = [path.rpartition(".")[2] for path in done.own_code()]
    assert ends == ["mlp", "up_proj"]
    assert set(done.own_code().values()) == {"hooks of somebody else"}
    handle.remove()
    assert done.own_code() == {}
    done.undo()
    all_by_own_code(done, "undone")


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, target_modules=["up_proj"]),
        IA3Config(target_modules=["up_proj"], feedforward_modules=[]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_apply_kernels_leaves_adapters_of_other_methods_that_come_later(config):
    model = of("llama")
    done = koff.apply_kernels(model)
    changed = get_peft_model(model, config).eval()
    for parameter in changed.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    with torch.no_grad():
        got = changed(ids()).logits
        assert all(config.peft_type.value.lower() in why for why in done.own_code().values())
        assert len(done.own_code()) == 3
        done.undo()
        assert torch.equal(got, changed(ids()).logits)


def test_apply_kernels_under_bf16_autocast_and_checkpointing():
    """Beside the fp32 result, the kernels are not further away than PEFT itself is: each rounds
    every product once to bf16, so the two distances are of one size and vary by chance."""
    model = peft(of("llama"))
    activation_checkpointing.enable(model)
    model.train()
    exact, exact_grads = step(model)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, their_grads = step(model)
        koff.apply_kernels(model)
        ours, our_grads = step(model)
    assert (ours - exact).norm() <= 1.25 * (theirs - exact).norm()
    for key, grad in exact_grads.items():
        assert (our_grads[key] - grad).norm() <= 1.5 * (their_grads[key] - grad).norm(), key


def test_apply_kernels_after_inference_mode_can_train():
    model = peft(of("llama"), adapters=("en", "fr"))
    koff.apply_kernels(model)
    with torch.inference_mode():
        model(ids())
        model(ids(), adapter_names=["en", "fr", "__base__", "en"])
    step(model)


def test_apply_kernels_runs_on_the_reference_too():
    model = peft(of("llama"))
    with torch.no_grad():
        want = model(ids()).logits
        koff.apply_kernels(model)
        with force_backend("reference"):
            torch.testing.assert_close(model(ids()).logits, want, **CLOSE)


def test_apply_kernels_keeps_ids_and_scalings_apart():
    """Adapters of which the first leaves a layer alone and the second scales by 1, in rows 0, 1:
    the ids (0, 1) and the scalings (0.0, 1.0) are equal tuples."""
    model = peft(of("llama"), ["up_proj"], adapters=("part",))
    model.add_adapter("en", LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]))
    for key, p in model.named_parameters():
        if "lora_B.en" in key:
            p.data.normal_(std=0.2)
    twin = copy.deepcopy(model)
    koff.apply_kernels(model)
    names = ["part", "en"]
    with torch.no_grad():
        want = twin(ids(2), adapter_names=names).logits
        torch.testing.assert_close(model(ids(2), adapter_names=names).logits, want, **CLOSE)


def test_apply_kernels_can_be_copied_and_pickled():
    model = peft(of("llama"))
    done = koff.apply_kernels(model)
    with torch.no_grad():
        want = model(ids()).logits
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(again(ids()).logits, want)
        assert torch.equal(copy.deepcopy(model)(ids()).logits, want)
        done.undo()
        assert torch.equal(again(ids()).logits, want)  # the copy runs on koffkernels still
