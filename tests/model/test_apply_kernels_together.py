"""q, k and v of somebody else's PEFT model are one operation under apply_kernels, and what they
compute is what they compute one by one."""

import copy
import threading

import pytest
import torch
from peft import LoraConfig
from support import activation_checkpointing
from support.models import HYBRID, VOCAB, tiny
from support.peft_models import with_adapters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.bart.modeling_bart import BartAttention
from transformers.models.llama.modeling_llama import LlamaAttention

import koff
from koff.model import apply_kernels as home
from koff.model import arch
from koffkernels import dispatch, force_route
from koffkernels._triton.shared import launch as common

QKV = ["q_proj", "k_proj", "v_proj"]
LAYERS = 3  # of ``tiny``


def with_lora(model, adapters=("fr",), **config):
    """A PEFT model with LoRA on all of an attention, whose adapters do something."""
    config = {"target_modules": [*QKV, "o_proj"], "rank_pattern": {"k_proj": 2}} | config
    settings = {
        name: LoraConfig(r=4 + i, lora_alpha=6, **config) for i, name in enumerate(adapters)
    }
    return with_adapters(model, settings)


def pair(architecture="llama", **kwargs):
    """The same model by PEFT's own code, and with the kernels."""
    theirs = with_lora(tiny(architecture), **kwargs)
    ours = copy.deepcopy(theirs)
    koff.apply_kernels(ours)
    return theirs, ours


def ids(rows=4):
    return torch.randint(3, VOCAB, (rows, 7), generator=torch.Generator().manual_seed(2))


def logits(model, **kwargs):
    with torch.no_grad():
        return model(ids(), **kwargs).logits


def step(model):
    """Logits, and gradients, None where a parameter has none."""
    model.zero_grad()
    out = model(ids(), use_cache=False).logits
    out.log_softmax(-1)[..., 5].mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return out.detach(), {n: None if g is None else g.clone() for n, g in grads.items()}


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


def close_steps(ours, theirs):
    (got, grads), (want, want_grads) = step(ours), step(theirs)
    close(got, want)
    assert grads.keys() == want_grads.keys()
    for name, grad in grads.items():
        assert (grad is None) == (want_grads[name] is None), name
        if grad is not None:
            torch.testing.assert_close(grad, want_grads[name], rtol=1e-4, atol=2e-5, msg=name)


def attentions(model):
    return [module for module in model.modules() if hasattr(module, "q_proj")]


@pytest.fixture
def calls(monkeypatch):
    """How many linear layers each call had."""
    seen, one, several = [], home.lora_linear, home.lora_linears
    spies = {
        "lora_linear": lambda *a, **k: seen.append(1) or one(*a, **k),
        "lora_linears": lambda x, ws, *a, **k: seen.append(len(ws)) or several(x, ws, *a, **k),
    }
    for name, spy in spies.items():
        monkeypatch.setattr(home, name, spy)
    yield seen
    assert home._running.ahead is None


def singles(monkeypatch):
    """From now on each layer is computed on its own."""
    monkeypatch.setattr(home._Ahead, "begin", lambda *args: None)


KNOWN = sorted(arch._ONE_INPUT & set(CONFIG_MAPPING))  # of which an older transformers has fewer


@pytest.mark.parametrize("model_type", KNOWN)
def test_every_architecture_that_is_said_to_have_one_input_has(model_type, calls):
    """Also behind a cache. Where one of the three were called with another x, it would be on its
    own, a fourth call beside o's."""
    sizes = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, num_experts=4, num_local_experts=4, num_experts_per_tok=2, n_group=1,
        moe_intermediate_size=16, n_routed_experts=4, topk_group=1,
    )  # fmt: skip
    default = AutoConfig.for_model(model_type)
    sizes = {name: size for name, size in sizes.items() if hasattr(default, name)}
    if getattr(default, "layer_types", None):  # of two layers, one of each kind
        sizes["layer_types"] = [default.layer_types[0], default.layer_types[-1]]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval()
    found = attentions(model)
    assert found and all(map(arch.has_one_input, found))
    ours = with_lora(model, target_modules=QKV)
    want = logits(ours)
    koff.apply_kernels(ours)
    with torch.no_grad():
        out = ours(ids(), use_cache=True)
        ours(ids()[:, :1], past_key_values=out.past_key_values)
    assert calls == [3] * 2 * len(found)
    close(logits(ours), want)


def test_what_is_not_known_stays_one_by_one(calls):
    """A cross attention has layers of these names, and a class of one's own may do anything under
    the config of a model that is known."""
    assert not arch.has_one_input(BartAttention(16, 2, config=AutoConfig.for_model("bart")))
    assert not arch.has_one_input(torch.nn.Linear(2, 2))
    model = tiny("llama")

    class Own(LlamaAttention):
        pass

    model.model.layers[1].self_attn.__class__ = Own
    theirs = with_lora(model)
    want = logits(theirs)
    koff.apply_kernels(theirs)
    close(logits(theirs), want)
    assert calls == [3, 1] + [1] * 4 + [3, 1]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", HYBRID])
def test_together_is_one_by_one(architecture, calls, monkeypatch):
    """Bit for bit, and gradients but for the order in which x's are added."""
    theirs, ours = pair(architecture)
    close_steps(ours, theirs)
    got, grads = step(ours)
    together = len(attentions(ours))
    assert calls == [3, 1] * 2 * together
    singles(monkeypatch)
    want, want_grads = step(ours)
    assert calls[4 * together :] == [1] * 4 * together
    assert torch.equal(got, want)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[name], msg=name)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "v_proj"], ["k_proj"]])
def test_layers_without_lora_are_left_to_torch(targets, calls):
    theirs, ours = pair(target_modules=targets, rank_pattern={})
    close_steps(ours, theirs)
    assert calls == [len(targets)] * LAYERS
    for attention in attentions(ours):
        kinds = {type(getattr(attention, name)) for name in {*QKV} - {*targets}}
        assert kinds == {torch.nn.Linear}


def test_whatever_peft_says_at_the_moment(calls):
    """Adapters that are switched, added up, mixed in a batch, absent from a layer, disabled and
    merged; ranks differ from one to the next, and from layer to layer."""
    theirs, ours = pair(adapters=("en", "fr"))
    for model in (theirs, ours):
        model.add_adapter("part", LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
        generator = torch.Generator().manual_seed(3)
        for name, p in model.named_parameters():
            if ".part." in name:
                p.data.normal_(std=0.2, generator=generator)

    def check(*counts, **kwargs):
        calls.clear()
        close(logits(ours, **kwargs), logits(theirs, **kwargs))
        assert calls == [*counts] * LAYERS

    check(3, 1)
    for active, counts in ((["fr"], (3, 1)), (["part"], (2,)), (["fr", "part"], (3, 1))):
        for model in (theirs, ours):
            model.base_model.set_adapter(active)
        check(*counts)
        close_steps(ours, theirs)
    check(3, 1, adapter_names=["fr", "__base__", "en", "en"])
    check(3, 1, adapter_names=["part", "part", "fr", "__base__"])
    check(2, adapter_names=["part"] * 4)
    check(adapter_names=["__base__"] * 4)
    with ours.disable_adapter(), theirs.disable_adapter():
        check()
    for model in (theirs, ours):
        model.base_model.set_adapter(["en"])
        model.merge_adapter()
    check()
    for model in (theirs, ours):
        model.unmerge_adapter()
    check(3, 1)


@pytest.mark.parametrize("config", [dict(lora_dropout=0.5), dict(use_dora=True)], ids=str)
def test_what_the_kernels_do_not_compute_is_pefts(config, calls):
    theirs, ours = pair(**config)
    results = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        results.append(step(model.train()))
    assert calls == [] and torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(grad, results[1][1][name]) for name, grad in results[0][1].items())
    if "lora_dropout" in config:
        logits(ours.eval())
        assert calls == [3, 1] * LAYERS


def test_a_base_weight_that_is_trained_parts_its_layer_alone(calls):
    theirs, ours = pair()
    for model in (theirs, ours):
        attentions(model)[1].k_proj.base_layer.weight.requires_grad_(True)
    close_steps(ours, theirs)
    assert calls == [3, 1, 2, 1, 3, 1]


@pytest.mark.parametrize("part", ["", ".base_layer", ".lora_A.fr"])
@pytest.mark.parametrize("name", QKV)
def test_hooks_part_their_layer_alone(name, part, calls):
    theirs, ours = pair()
    seen = {}
    for key, model in (("theirs", theirs), ("ours", ours)):
        found = seen[key] = []
        module = attentions(model)[1].get_submodule(name + part)
        module.register_forward_hook(lambda _, args, y, found=found: found.append((args[0], y)))
    close_steps(ours, theirs)
    # A layer of which a part is hooked is PEFT's, one that is hooked itself is still an operation.
    assert calls[:2] == [3, 1] and calls[-2:] == [3, 1]
    assert sorted(calls[2:-2]) == [1] * (1 + (part == "")) + [2]
    close(seen["ours"], seen["theirs"])


def test_a_forward_that_somebody_binds_later_parts_its_layer(calls):
    theirs, ours = pair()
    for model in (theirs, ours):
        linear = attentions(model)[1].k_proj
        linear.forward = lambda x, own=linear.forward: own(2 * x)
    close(logits(ours), logits(theirs))
    # k's own is a call with another x.
    assert calls == [3, 1, 2, 1, 1, 3, 1]


def inside(model, do):
    """Let ``do(attention, x)`` run between q and k of the second layer."""
    attention, given = attentions(model)[1], {}

    def remember(module, args, kwargs):
        given["x"] = kwargs.get("hidden_states", args[0] if args else None)

    def between(*args):
        do(attention, given["x"])

    attention.register_forward_pre_hook(remember, with_kwargs=True)
    attention.q_norm.register_forward_hook(between)


@pytest.mark.parametrize("inference", [False, True])
def test_an_output_is_for_the_very_input_and_the_very_way(inference, calls):
    """Between q and k, somebody calls layers with other inputs, in another grad mode, under
    autocast, for other adapters, and with x itself."""
    theirs, ours = pair("qwen3", adapters=("fr", "en"))
    found = {}

    def do(attention, x, model):
        outputs = found[model] = [attention.k_proj(x.clone()), attention.v_proj(x[:2])]
        if not inference:
            with torch.enable_grad():
                outputs.append(attention.k_proj(x))
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(attention.k_proj(x))
        outputs.append(attention.k_proj(x, adapter_names=["en"] * 4))
        outputs += [attention.q_proj(x), attention.v_proj(x), attention.v_proj(x)]

    for model in (theirs, ours):
        inside(model, lambda attention, x, model=model: do(attention, x, model))
    with torch.inference_mode(inference), torch.no_grad():
        close(ours(ids()).logits, theirs(ids()).logits)
    for got, want in zip(found[ours], found[theirs], strict=True):
        assert got.dtype == want.dtype and got.requires_grad == want.requires_grad
        error = 2e-5 if got.dtype == torch.float32 else 0.01  # bf16: PEFT rounds once more
        torch.testing.assert_close(got, want, rtol=error, atol=error)
    # In the second layer q, and every call above but the first of v with x; v's own, and o.
    assert calls == [3, 1] + [3] + [1] * (6 if inference else 7) + [1, 1] + [3, 1]


def test_an_input_that_was_written_into_is_another(calls):
    theirs, ours = pair("qwen3")
    for model in (theirs, ours):
        inside(model, lambda attention, x: x.mul_(1.5))
    close(logits(ours), logits(theirs))
    assert calls == [3, 1, 3, 1, 1, 1, 3, 1]


def test_an_output_may_be_written_into(calls):
    """OLMo clips q, k and v in place."""

    def clip(module, args):
        args[0].clamp_(-0.5, 0.5)

    theirs, ours = pair("qwen3")
    for model in (theirs, ours):
        for attention in attentions(model):
            attention.q_norm.register_forward_pre_hook(clip)
            attention.k_norm.register_forward_pre_hook(clip)
    close_steps(ours, theirs)
    assert calls == [3, 1] * LAYERS


def test_an_attention_inside_of_itself_and_errors(calls):
    """Nothing is left over by a call that ends in an error, or is taken for another call's."""
    _, ours = pair("qwen3")
    want = logits(ours)
    state = {"depth": 0}

    def again(attention, x):
        state["depth"] += 1
        if state["depth"] == 1:
            running = home._running.ahead
            with pytest.raises(TypeError):
                attention(x, None, None)  # lacks its positions, which it misses behind v
            with pytest.raises(ValueError, match="x must have last dimension"):
                attention.q_proj(x[..., 1:])
            assert home._running.ahead is running and set(running.outputs) == {"k_proj", "v_proj"}
            assert running.x is x

    inside(ours, again)
    close(logits(ours), want)
    state["depth"] = 0

    def stop(*args):
        raise KeyboardInterrupt

    inside(ours, stop)
    with pytest.raises(KeyboardInterrupt):
        logits(ours)
    assert home._running.ahead is None


def test_a_layer_on_its_own_is_on_its_own(calls):
    theirs, ours = pair()
    x = torch.randn(2, 3, 64)
    for name in QKV:
        close(getattr(attentions(ours)[0], name)(x), getattr(attentions(theirs)[0], name)(x))
    assert calls == [1] * 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_computed_together_again(reentrant, calls):
    theirs, ours = pair()
    want = step(theirs)
    activation_checkpointing.enable(ours, reentrant)
    ours.enable_input_require_grads()
    got, grads = step(ours.train())
    assert calls.count(3) == 2 * LAYERS
    close(got, want[0])
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want[1][name], rtol=1e-4, atol=2e-5, msg=name)


def test_checkpoints_inside_of_an_attention(calls):
    """What is recomputed without its attention must have been computed so."""
    theirs, ours = pair()
    for attention in attentions(ours):
        attention.v_proj = checkpoint_wrapper(attention.v_proj)
    want, got = step(theirs), step(ours)
    close(got[0], want[0])
    for name, grad in got[1].items():
        name = name.replace("._checkpoint_wrapped_module", "")
        torch.testing.assert_close(grad, want[1][name], rtol=1e-4, atol=2e-5, msg=name)
    assert calls == [2, 1, 1] * LAYERS + [1] * LAYERS


def test_autocast(calls):
    theirs, ours = pair()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = logits(ours), logits(theirs)
    exact = logits(theirs)
    assert (got - exact).norm() <= 1.25 * (want - exact).norm()
    assert calls[:2] == [3, 1]


@pytest.mark.slow
def test_compiled_as_a_whole():
    theirs, ours = pair()
    want, want_grads = step(theirs)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    got, grads = step(compiled)
    close(got, want)
    for name, grad in grads.items():
        name = name.removeprefix("_orig_mod.")
        torch.testing.assert_close(grad, want_grads[name], rtol=1e-4, atol=2e-5, msg=name)
    assert home._running.ahead is None


def test_threads_do_not_meet():
    """Two models whose attentions run at the same time, one between q and k of the other."""
    _, ours = pair("qwen3")
    want = logits(ours)
    barrier, got = threading.Barrier(2), {}
    inside(ours, lambda *args: barrier.wait(30))
    threads = [threading.Thread(target=lambda i=i: got.update({i: logits(ours)})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(got[0], want) and torch.equal(got[1], want)


def test_undo_gives_attentions_their_class_back(calls):
    ours = with_lora(tiny("llama"))
    want = logits(ours)
    with koff.apply_kernels(ours):
        assert all(type(a) is not LlamaAttention for a in attentions(ours))
        assert all(isinstance(a, LlamaAttention) for a in attentions(ours))
        merged = copy.deepcopy(ours).merge_and_unload()
        with pytest.raises(ValueError, match="must not run on koffkernels already"):
            koff.apply_kernels(merged)
        close(logits(merged), want)
        assert calls == []
    assert all(type(a) is LlamaAttention for a in attentions(ours))
    assert torch.equal(logits(ours), want) and calls == []


def test_adapters_that_come_later_have_theirs(calls):
    """A layer that PEFT puts there afterwards is PEFT's; the others stay together."""
    ours = with_lora(tiny("llama"), target_modules=["q_proj", "k_proj"])
    koff.apply_kernels(ours)
    ours.add_adapter("all", LoraConfig(r=2, target_modules=QKV))
    ours.base_model.set_adapter(["all"])
    twin = copy.deepcopy(ours)
    for module in twin.modules():
        if isinstance(module, home._OWN):
            home.unswap(module)
    close(logits(ours), logits(twin))
    assert calls == [2] * LAYERS


class Operators(TorchDispatchMode):
    """Counts torch's products and sums."""

    NAMES = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "add", "add_")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in self.NAMES
        return function(*args, **(kwargs or {}))


def launches(run) -> int:
    """Kernels of koffkernels that a call launches, and products and sums of torch's."""
    with common.recording() as found, Operators() as operators:
        run()
    return len(found) + operators.count


@pytest.mark.parametrize(
    "targets, decode, training", [([*QKV, "o_proj"], 4, 14), (["q_proj", "v_proj"], 2, 7)]
)
def test_launches_that_are_saved(targets, decode, training, monkeypatch):
    """By each attention, against one operation for each layer. Of q, k and v 6 for a token become
    2, as in tests/kernels/test_launches.py; a training step of so few tokens splits no sums, so
    that 24 of theirs, and 2 sums of x's gradients, become 12."""
    for op in ("lora_linear", "gated_mlp"):
        monkeypatch.setitem(dispatch._LOADED, (op, "torch"), dispatch._load(op, "triton"))
    ours = with_lora(tiny("llama", num_hidden_layers=1), target_modules=targets, rank_pattern={})
    koff.apply_kernels(ours)

    def counts():
        with force_route("decode"):
            first = launches(lambda: logits(ours))
        return torch.tensor([first, launches(lambda: step(ours))])

    together = counts()
    singles(monkeypatch)
    assert (counts() - together).tolist() == [decode, training]
