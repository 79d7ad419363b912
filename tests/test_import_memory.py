"""Adapters that PEFT trained elsewhere become memories: cut to the kept neurons, or refused."""

import json

import pytest
import torch
from peft import CartridgeConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.models import ARCHITECTURES, attached, tiny, tokens
from support.widths import spread
from transformers import AutoModelForCausalLM

import koff

pytestmark = pytest.mark.usefixtures("no_real_fsync")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FP32 = 1e-5
VARIANTS = {
    "all layers": dict(target_modules=ALL),
    "some layers": dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2]),
    "rslora": dict(target_modules=ALL, use_rslora=True),
    "patterns": dict(
        target_modules=ALL,
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7},
        alpha_pattern={"layers.0.mlp.gate_proj": 1, "v_proj": 20},
    ),
    "patterns with alternatives": dict(
        target_modules=ALL,
        rank_pattern={r"layers\.(0|2)\.self_attn\.(q|k)_proj": 2, "up_proj|down_proj": 3},
        alpha_pattern={r"^model\.layers\.1\.mlp.gate_proj$": 1, "layers.0.mlp.(up|gate)_proj": 9},
    ),
    "regex": dict(target_modules=r".*\.(up|down)_proj"),
}


def foreign_lora(architecture, folder, base=None, **config):
    """A LoRA of the dense base as PEFT trains and saves it; the folder and PEFT's model."""
    torch.manual_seed(4)
    base = base or tiny(architecture)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder, model.eval()


def foreign_kv(architecture, folder):
    config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    torch.manual_seed(5)
    model = get_peft_model(tiny(architecture), config)
    with torch.no_grad():
        for p in model.prompt_encoder.parameters():
            p.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder, model.eval()


def masked(architecture, per_layer="global"):
    model = spread(attached(architecture, target_sparsity=0.4))
    koff.binarize(model, multiple_of=1, per_layer=per_layer)
    return model


CASES = [(a, "all layers", kind) for a in ARCHITECTURES for kind in ("global", "uniform")]
CASES += [("qwen3", variant, "global") for variant in VARIANTS if variant != "all layers"]


@pytest.mark.parametrize(("architecture", "variant", "per_layer"), CASES)
@torch.no_grad()
def test_a_lora_of_the_dense_base_is_cut_to_the_kept_neurons(
    architecture, variant, per_layer, tmp_path
):
    folder, theirs = foreign_lora(architecture, tmp_path / "lora", **VARIANTS[variant])
    ids, wide = tokens(), masked(architecture, per_layer)
    dense = koff.attach(tiny(architecture), koff.KoffConfig(memories=("x",), target_sparsity=0))
    koff.import_memory(dense, "de", lora=folder)
    assert (dense(ids, memory="de").logits - theirs(ids).logits).abs().max() < FP32
    small = koff.compact(wide)
    koff.import_memory(wide, "de", lora=folder)
    koff.import_memory(small, "de", lora=folder)
    wanted = wide(ids, memory="de").logits
    assert (small(ids, memory="de").logits - wanted).abs().max() < FP32
    assert (koff.compact(wide)(ids, memory="de").logits - wanted).abs().max() < FP32
    assert (small(ids).logits - wanted).abs().max() > 0.01
    mixed = small(ids, memory=["de", "en", None]).logits
    assert (mixed[:1] - wanted[:1]).abs().max() < FP32


@torch.no_grad()
def test_a_lora_of_the_pruned_backbone_is_taken_as_it_is(tmp_path):
    small = koff.compact(masked("llama"))
    out = koff.save(small, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(out)
    folder, theirs = foreign_lora("llama", tmp_path / "lora", base, target_modules=ALL)
    koff.import_memory(small, "de", lora=folder)
    assert (small(tokens(), memory="de").logits - theirs(tokens()).logits).abs().max() < FP32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_cartridge_with_or_without_a_lora(architecture, tmp_path):
    kv, theirs = foreign_kv(architecture, tmp_path / "kv")
    lora, _ = foreign_lora(architecture, tmp_path / "lora", target_modules=ALL)
    ids, only = tokens(), dict(memories=("x",), target_sparsity=0, kv=None)
    dense = koff.attach(tiny(architecture), koff.KoffConfig(**only))
    koff.import_memory(dense, "kv", kv=kv)
    want = theirs(ids, attention_mask=torch.ones_like(ids)).logits
    assert (dense(ids, memory="kv").logits - want).abs().max() < FP32
    out = koff.save(koff.compact(masked(architecture)), tmp_path / "out")
    assert koff.import_memory(out, "both", lora=lora, kv=kv) == out
    koff.import_memory(str(out), "kv", kv=kv)
    small, base = koff.load(out), AutoModelForCausalLM.from_pretrained(out)
    assert small.koff.memory_names == ("en", "keys", "es", "both", "kv")
    base.load_adapter(str(out / "memories/both/lora"))
    stock = PeftModel.from_pretrained(base, str(out / "memories/both/kv")).eval()
    want = stock(ids, attention_mask=torch.ones_like(ids)).logits
    assert (small(ids, memory="both").logits - want).abs().max() < FP32
    assert (small(ids, memory="kv").logits - want).abs().max() > 0.01


def edited(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def renamed(folder, old, new):
    path = folder / "adapter_model.safetensors"
    tensors = {name.replace(old, new): t for name, t in load_file(path).items()}
    save_file(tensors, path)


def reshaped(folder, part, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(n for n in sorted(tensors) if part in n)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path)


HARMS = {
    "dora": (lambda d: edited(d, use_dora=True), "use_dora must be unset"),
    "bias": (lambda d: edited(d, bias="all"), "bias must be unset"),
    "lora bias": (lambda d: edited(d, lora_bias=True), "lora_bias must be unset"),
    "saved modules": (lambda d: edited(d, modules_to_save=["lm_head"]), "modules_to_save must be"),
    "pissa": (lambda d: edited(d, init_lora_weights="pissa"), "init_lora_weights must leave the"),
    "alora": (lambda d: edited(d, alora_invocation_tokens=[1]), "alora_invocation_tokens must be"),
    "from the future": (lambda d: edited(d, use_new=1), "use_new must be unset"),
    "kind": (lambda d: edited(d, peft_type="LOHA"), "peft_type must be 'LORA', got 'LOHA'"),
    "rank": (lambda d: edited(d, r=5), "must have rank 5, got 4"),
    "alpha": (lambda d: edited(d, lora_alpha="6"), "a positive number of at most .*, got '6'"),
    "alpha true": (lambda d: edited(d, lora_alpha=True), "must be a positive number"),
    "alpha 0": (lambda d: edited(d, lora_alpha=0), "must be a positive number"),
    "alpha infinite": (lambda d: edited(d, lora_alpha=float("inf")), "must be a positive number"),
    "alpha no number": (lambda d: edited(d, lora_alpha=float("nan")), "must be a positive number"),
    "alpha beyond floats": (lambda d: edited(d, lora_alpha=10**400), "must be a positive number"),
    "alpha beyond fp32": (lambda d: edited(d, lora_alpha=1e308), "must be a positive number of at"),
    "alpha below fp32": (lambda d: edited(d, lora_alpha=5e-324), "must be at least 1.2e-38"),
    "alpha by module": (
        lambda d: edited(d, alpha_pattern={"q_proj": 1e308}),
        "lora_alpha of 0_q_proj must be a positive number",
    ),
    "ranks as a list": (lambda d: edited(d, rank_pattern=[1]), "rank_pattern must be an object"),
    "alphas as a text": (lambda d: edited(d, alpha_pattern="x"), "alpha_pattern must be an obj"),
    "ranks as texts": (lambda d: edited(d, rank_pattern={"q_proj": "4"}), "modules, as the model"),
    "many ranks": (
        lambda d: edited(d, rank_pattern={f"x{i}": 1 for i in range(22)}),
        "rank_pattern must be an object of at most 21 modules",
    ),
    "no expression": (
        lambda d: edited(d, rank_pattern={"(": 2}),
        "a module's name in rank_pattern",
    ),
    "an endless expression": (
        lambda d: edited(d, rank_pattern={"(.*)*(.*)*(.*)*x$y": 2}),
        "a module's name in rank_pattern must have at most 128",
    ),
    "many groups": (
        lambda d: edited(d, alpha_pattern={"(.|.)" * 20 + "x": 2}),
        "a module's name in alpha_pattern must have at most 128",
    ),
    "a long name": (lambda d: edited(d, alpha_pattern={"x" * 129: 2}), "must have at most 128"),
    "a long number": (
        lambda d: renamed(d, "layers.0.", f"layers.{'0' * 5000}."),
        "a tensor must be a",
    ),
    "head": (lambda d: renamed(d, "model.layers.0.mlp.up_proj", "lm_head"), "a tensor must be a"),
    "layer": (lambda d: renamed(d, "layers.0.", "layers.3."), "linear modules"),
    "half": (lambda d: renamed(d, "layers.0.mlp.up_proj.lora_B", "layers.0.x_b.y.lora_B"), "be a"),
    "width": (lambda d: reshaped(d, "gate_proj.lora_B", lambda t: t[1:]), r"must have \(in, out\)"),
    "input": (lambda d: reshaped(d, "q_proj.lora_A", lambda t: t[:, 1:]), r"must have \(in, out\)"),
    "ranks": (lambda d: reshaped(d, "q_proj.lora_A", lambda t: t[1:]), r"must have A \[r, K\]"),
    "nan": (lambda d: reshaped(d, "q_proj.lora_A", lambda t: t * torch.nan), "must be finite"),
    "no file": (lambda d: (d / "adapter_model.safetensors").unlink(), "must be there"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_a_memory_cannot_hold_is_refused(harm, tmp_path):
    folder, _ = foreign_lora("llama", tmp_path / "lora", target_modules=ALL)
    out = koff.save(koff.compact(masked("llama")), tmp_path / "out")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    hurt, message = HARMS[harm]
    hurt(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        koff.import_memory(out, "de", lora=folder)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_virtual_tokens=10**12), "the learned cache must be"),
        (dict(num_virtual_tokens="7"), "num_tokens must be a whole number"),
        (dict(num_frozen_tokens=9), "num_frozen_tokens must lie in"),
    ],
)
def test_a_cartridge_is_compared_with_its_file_before_anything_is_allocated(
    changes, message, tmp_path, monkeypatch
):
    folder, _ = foreign_kv("llama", tmp_path / "kv")
    edited(folder, **changes)
    small = koff.compact(masked("llama"))
    monkeypatch.setattr(koff.manage, "new_memory", lambda *_: pytest.fail("allocated first"))
    with pytest.raises(ValueError, match=message):
        koff.import_memory(small, "de", kv=folder)
    assert small.koff.memory_names == ("en", "keys", "es")


def test_wrong_arguments_are_refused_and_the_model_stays(tmp_path):
    small = koff.compact(masked("llama"))
    lora, _ = foreign_lora("qwen3", tmp_path / "lora", target_modules=ALL)
    kv, _ = foreign_kv("qwen3", tmp_path / "kv")
    for arguments, message in (
        (dict(name="de"), "must have a LoRA or a KV part, got neither"),
        (dict(name="en", kv=kv), "the name must differ from those there are"),
        (dict(name="../x", kv=kv), "a memory name must be 1 to 64 letters"),
        (dict(name="de", lora=lora), r"must have \(in, out\)"),
        (dict(name="de", kv=tmp_path), f"_config.json must be there, got no such .* {tmp_path};"),
        (dict(name="de", lora=tmp_path / "no"), f"be there, got no folder {tmp_path / 'no'}; che"),
        (dict(name="de", lora=kv), "peft_type must be 'LORA', got 'CARTRIDGE'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            koff.import_memory(small, **arguments)
    assert small.koff.memory_names == ("en", "keys", "es")
    with pytest.raises(FileNotFoundError, match="must be a saved model, got no folder there"):
        koff.import_memory(tmp_path / "none", "de", kv=kv)
