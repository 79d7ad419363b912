"""attach changes nothing until something is learned, detach restores, and misfits are refused."""

import copy

import pytest
import torch
from support.models import ARCHITECTURES, NAMES, attached, perturb, tiny, tokens
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

import koff
from koff.model import arch
from koff.model.state import count_weights

ALL = koff.LoRAConfig(r=4, target_modules="all-linear")
CONFIG = koff.KoffConfig(memories=NAMES, lora=ALL, kv=koff.KVConfig(num_tokens=5, init="tokens"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_open_gates_and_no_memory_are_bit_equal_to_the_base(architecture, dtype):
    model, ids = tiny(architecture).to(dtype), tokens()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    before = [model(ids).logits, model(ids, attention_mask=mask).logits[:, 4:]]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    koff.attach(model, CONFIG).eval()
    perturb(model)  # memories may be anything while none is used
    with torch.no_grad():
        for p in model.koff.gates.log_alpha:
            p.clamp_(min=2.5)  # where a new gate starts
    assert all(bool((z == 1).all()) for z in model.koff.gates.values())
    after = [model(ids).logits, model(ids, attention_mask=mask).logits[:, 4:]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    kept = {n: t for n, t in model.state_dict().items() if not n.startswith("koff.")}
    assert kept.keys() == state.keys()
    assert all(torch.equal(kept[name], state[name]) for name in state)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_detach_restores_the_model(architecture):
    model = tiny(architecture)
    model.model.embed_tokens.weight.requires_grad_(False)
    ids, classes = tokens(), [type(m) for m in model.modules()]
    logits, attention = model(ids).logits, model.config._attn_implementation
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    koff.attach(model, CONFIG)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "koff" not in n)
    assert koff.detach(perturb(model)) is model
    assert [type(m) for m in model.modules()] == classes
    assert model.config._attn_implementation == attention
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert torch.equal(model(ids).logits, logits)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_learned_stays_fp32(dtype):
    model = attached("qwen3").to(dtype)
    assert model.lm_head.weight.dtype == dtype
    assert {p.dtype for p in model.koff.parameters()} == {torch.float32}
    buffers = {n: b for n, b in model.koff.named_buffers() if b.is_floating_point()}
    assert {b.dtype for b in buffers.values()} == {torch.float32}
    half = copy.deepcopy(model).float()
    wide = half(tokens(), memory="en").logits
    error = (model(tokens(), memory="en").logits.float() - wide).norm() / wide.norm()
    assert error < 0.05  # a few bf16 roundings (2^-8 each) per layer, 3 layers


def _config(**changes):
    return koff.KoffConfig(**{**dict(memories=("a",), kv=koff.KVConfig(2, "normal")), **changes})


def test_unsupported_models_are_refused_by_name():
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11))
    with pytest.raises(ValueError, match="must be one of llama, .*got 'gpt2'; its MLPs are not ga"):
        koff.attach(gpt, _config())
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel, got Linear"):
        koff.attach(torch.nn.Linear(2, 2), _config())
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=11)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    moe = MixtralForCausalLM(MixtralConfig(num_local_experts=2, **small, **heads))
    with pytest.raises(ValueError, match="must be one of llama, .*got 'mixtral'; its MLPs are mix"):
        koff.attach(moe, _config())
    narrow = GemmaForCausalLM(GemmaConfig(head_dim=8, **small, **heads))
    with pytest.raises(ValueError, match="got 'gemma'; its layers look alike, but nobody has che"):
        koff.attach(narrow, _config())
    bare = tiny("llama").model
    with pytest.raises(TypeError, match="must be a causal language model like LlamaForCausalLM"):
        koff.attach(bare, _config())


def test_fused_or_biased_mlps_are_refused():
    model = tiny("llama")
    layer = model.model.layers[1]
    layer.mlp.gate_up_proj = torch.nn.Linear(64, 192, bias=False)  # as Phi-3, which llama is not
    del layer.mlp.gate_proj, layer.mlp.up_proj
    with pytest.raises(TypeError, match="layer 1 must .* without gate_proj, up_proj; load"):
        koff.attach(model, _config())
    with pytest.raises(ValueError, match="MLP of layer 0 must have no bias, got mlp_bias=True"):
        koff.attach(tiny("llama", mlp_bias=True), _config())


def test_quantised_and_adapted_models_are_refused():
    model = tiny("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="must not be quantised"):
        koff.attach(model, _config())
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"got PeftModel; take the adapter off first \(merge"):
        koff.attach(wrapped, _config())
    for target in arch.LINEARS[:7]:
        wrapped = get_peft_model(tiny("llama"), LoraConfig(target_modules=[target]))
        said = (
            rf"{target} of layer 0 must be a plain torch.nn.Linear, got peft\..*\.Linear; take the"
        )
        with pytest.raises(TypeError, match=said):
            koff.attach(wrapped.base_model.model, _config())


def test_replaced_linear_layers_are_refused():
    """As libraries for quantised weights do it."""

    class Linear8bit(torch.nn.Linear):
        pass

    model = tiny("llama")
    model.model.layers[1].mlp.up_proj = Linear8bit(64, 96, bias=False)
    with pytest.raises(
        TypeError, match=r"up_proj of layer 1 must .*Linear8bit; load the model wit"
    ):
        koff.attach(model, _config())


def test_patched_modules_are_refused():
    model = tiny("qwen2")
    module = model.model.layers[2].mlp
    module.forward = type(module).forward.__get__(module)  # as kernel libraries do
    with pytest.raises(ValueError, match=r"modules of layer 2 must use their classes' own forward"):
        koff.attach(model, _config())


def test_positions_where_a_prefix_cannot_be_exact_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny("llama", rope_parameters=rope)
    with pytest.raises(ValueError, match="must be one of default, linear, llama3, yarn, got 'dyn"):
        koff.attach(model, _config())
    koff.attach(model, _config(kv=None))  # LoRA alone does not care
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = tiny("qwen3", use_sliding_window=True, sliding_window=4, layer_types=kinds)
    with pytest.raises(ValueError, match="must all be full attention"):
        koff.attach(model, _config())
    koff.attach(model, _config(kv=None))
    for architecture in ("mistral", "phi3"):  # in every layer
        model = tiny(architecture, sliding_window=4)
        with pytest.raises(ValueError, match="all be full attention, got sliding_window=4"):
            koff.attach(model, _config())
        koff.attach(model, _config(kv=None))
    factors = dict(short_factor=[1.0] * 6, long_factor=[1.0] * 6, rope_theta=1e4)
    model = tiny("phi3", rope_parameters={"rope_type": "longrope", **factors})
    with pytest.raises(ValueError, match="llama3, yarn, got 'longrope'; use kv=None"):
        koff.attach(model, _config())
    koff.attach(model, _config(kv=None))


def test_attention_dropout_is_refused_where_a_cache_is_learned():
    def published():
        return tiny("granite", attention_dropout=0.1)

    with pytest.raises(ValueError, match="attach: attention dropout must be 0 .* got 0.1; load"):
        koff.attach(published(), _config())
    model = koff.attach(published(), _config(kv=None))
    koff.binarize(model, multiple_of=1)
    with pytest.raises(ValueError, match="add_memory: attention dropout must be 0"):
        koff.add_memory(model, "b", [{"input_ids": list(range(3, 40))}] * 4, kv=koff.KVConfig(2))
    assert model.koff.memory_names == ("a",)


def test_a_second_attach_and_a_missing_one_are_refused():
    model = attached("llama")
    with pytest.raises(ValueError, match="must not have koff attached"):
        koff.attach(model, _config())
    for call in (koff.detach, koff.binarize, koff.compact, koff.sparsity):
        with pytest.raises(ValueError, match="must have koff attached"):
            call(tiny("llama"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(memories="en"), r"must be a sequence of names, got 'en'; write \('en',\)"),
        (dict(memories=("a", "a")), "memories must differ"),
        (dict(memories=("../x",)), "must be 1 to 64 letters"),
        (dict(memories=("a.b",)), "must be 1 to 64 letters"),
        (dict(memories=(3,)), "must be a string, got 3"),
        (dict(target_sparsity=0.97), r"must lie in 0..0.953 .*got 0.97"),
        (dict(target_sparsity=float("nan")), "must be a finite number, got nan"),
        (dict(sparsity_scope="all"), "must be one of mlp, model, got 'all'"),
        (dict(lora=None, kv=None), "must have a LoRA or a KV part"),
        (dict(memories=(), target_sparsity=0), "must learn something"),
        (dict(lora={"r": 2}), "must be a LoRAConfig or None"),
    ],
)
def test_illegal_configs_are_refused(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        koff.KoffConfig(**{**dict(memories=("en",)), **changes})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: koff.LoRAConfig(r=0), "r must be a whole number of at least 1, got 0"),
        (lambda: koff.LoRAConfig(alpha=-1), "alpha must be positive"),
        (lambda: koff.LoRAConfig(target_modules=("wq",)), "must name linear layers, got 'wq'"),
        (lambda: koff.KVConfig(num_tokens=0), "num_tokens must be a whole number of at least 1"),
        (lambda: koff.KVConfig(4, init="zeros"), "must be one of text, tokens, normal"),
        (lambda: koff.KVConfig(4, num_frozen_tokens=4), r"must lie in 0..3, got 4"),
        (lambda: koff.KoffConfig.from_dict({"memory": ["a"]}), "did you mean 'memories'"),
    ],
)
def test_illegal_parts_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("lora", [koff.LoRAConfig(), ALL], ids=["default", "all-linear"])
def test_config_goes_through_json(lora):
    import json

    config = koff.KoffConfig(memories=("en", "fr"), lora=lora, kv=None, target_sparsity=0.3)
    assert koff.KoffConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("architecture", "lora", "names"),
    [
        ("qwen3", koff.LoRAConfig(), arch.MLP_LINEARS),
        ("qwen3", ALL, arch.ATTENTION_LINEARS + arch.MLP_LINEARS),
        ("phi3", koff.LoRAConfig(), ("gate_up_proj", "down_proj")),
        ("phi3", ALL, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        ("phi3", koff.LoRAConfig(target_modules=("gate_up_proj",)), ("gate_up_proj",)),
    ],
)
def test_lora_is_on_the_mlp_by_default_and_on_all_linear_layers_when_asked(
    architecture, lora, names
):
    model = koff.attach(tiny(architecture), _config(lora=lora))
    layers = len(arch.layers(model))
    wanted = {f"{index}_{name}" for index in range(layers) for name in names}
    assert set(model.koff.memories["a"].lora) == wanted
    # What is saved names layers, and no longer asks for whatever a model has.
    assert model.koff.config.lora.target_modules == names
    assert model.koff.memories["a"].lora_config == model.koff.config.lora


def test_names_that_the_model_lacks_are_refused():
    lora = koff.LoRAConfig(target_modules=("gate_proj", "down_proj"))
    message = "must name linear layers of this model, got 'gate_proj'; phi3 has qkv_proj, o_proj, "
    model = tiny("phi3")
    with pytest.raises(ValueError, match=f"attach: target_modules {message}gate_up_proj, down"):
        koff.attach(model, _config(lora=lora))
    assert not hasattr(model, "koff")


def test_model_scope_turns_into_a_share_of_neurons():
    model = tiny("llama")
    koff.attach(model, _config(target_sparsity=0.1, sparsity_scope="model"))
    weights = count_weights(model)
    assert model.koff.gates.target == pytest.approx(0.1 * weights["total"] / weights["mlp"])
    koff.binarize(model, multiple_of=1)
    assert koff.sparsity(model).model == pytest.approx(0.1, abs=1e-3)
    with pytest.raises(ValueError, match="share of MLP neurons that it means"):
        koff.attach(tiny("llama"), _config(target_sparsity=0.9, sparsity_scope="model"))


def test_llama_config_is_not_changed_by_forward():
    model = attached("llama")
    before = model.config.to_dict()
    model(tokens(), memory="en")
    assert model.config.to_dict() == before and isinstance(model.config, LlamaConfig)


def test_head_of_a_prompts_last_tokens_is_one_product():
    """The last tokens of several rows lie apart; the head takes them together all the same, where
    torch would multiply row by row by a table that has no gradient."""
    model = attached("llama")
    with torch.profiler.profile(record_shapes=True) as profile:
        model(tokens(4, 9), logits_to_keep=1, memory=None)
    head = model.get_output_embeddings().weight
    shapes = [event.input_shapes for event in profile.events() if event.name == "aten::bmm"]
    assert not [shape for shape in shapes if shape[1][1:] == [*head.T.shape]]
