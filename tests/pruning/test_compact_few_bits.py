"""Compacting a base in few bits: the weights of its checkpoint, or its own, and never a mixture."""

import json
import os
import shutil

import pytest
import torch
from support import bare
from support.fake_hub import Hub
from support.few_bits import FORMATS, checkpoint, quantised, with_koff
from support.models import attached, multimodal, same, tiny, tokens
from transformers import AutoModelForCausalLM

import koff
from koff.model import arch
from koff.model.arch import is_few_bits
from koff.model.few_bits import is_plain

pytestmark = pytest.mark.few_bits

MEMORIES = ["en", None, "fr"]
every_format = pytest.mark.parametrize("name", FORMATS)


def logits(model, **options):
    with torch.no_grad():
        return model(tokens(), **options).logits


def dense_copy(model, architecture="llama", dtype=torch.float32):
    """The checkpoint's own model with the gates and memories of one in few bits, compacted."""
    plain = with_koff(tiny(architecture).to(dtype))
    plain.koff.load_state_dict(model.koff.state_dict())
    return koff.compact(plain)


@pytest.mark.parametrize("inplace", [False, True], ids=["copied", "inplace"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
@every_format
def test_compact_few_bits_takes_the_weights_of_the_checkpoint(name, architecture, inplace):
    model = with_koff(quantised(name, architecture))
    koff.binarize(model, multiple_of=1)
    wanted, before = dense_copy(model, architecture), logits(model)
    narrow = koff.compact(model, inplace=inplace)
    assert (narrow is model) is inplace and not is_few_bits(narrow)
    assert same(narrow.state_dict(), wanted.state_dict())
    assert type(narrow) is type(wanted) and narrow.dtype == torch.float32
    assert getattr(narrow.config, "quantization_config", None) is None
    assert torch.equal(logits(narrow.eval(), memory="en"), logits(wanted.eval(), memory="en"))
    if not inplace:
        assert is_few_bits(model) and torch.equal(logits(model), before)
    assert all(p.requires_grad for p in koff.detach(narrow).parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_compact_few_bits_dequantised_is_the_masked_model(name, dtype):
    """Both add up the same numbers, in another order, and torchao's scales come behind the product
    instead of before it: each of a layer's 12 results (7 products, 2 norms, activation, 2 sums) is
    rounded once more, by at most u, on the way through the layers."""
    folder = checkpoint(dtype=dtype)
    model = with_koff(quantised(name, dtype=dtype, folder=folder)).eval()
    koff.binarize(model, multiple_of=1)
    narrow = koff.compact(model, dequantize=True)
    assert not is_few_bits(narrow) and narrow.koff.gates is None and narrow.dtype == dtype
    got, wanted = (logits(m, memory=MEMORIES).double() for m in (narrow, model))
    roundings = 12 * len(arch.layers(model)) * torch.finfo(dtype).eps / 2
    assert (got - wanted).norm() < roundings * wanted.norm()


def test_compact_few_bits_keeps_the_dtype_of_the_checkpoint(tmp_path):
    folder = checkpoint(dtype=torch.bfloat16)
    model = with_koff(quantised("nf4", dtype=torch.float32, folder=folder))
    assert model.dtype == torch.float32
    narrow = koff.compact(model, inplace=True)
    base = {p.dtype for n, p in narrow.named_parameters() if not n.startswith("koff.")}
    assert base == {torch.bfloat16} and narrow.config.dtype == torch.bfloat16
    koff.save(narrow, tmp_path / "out")
    again = koff.load(tmp_path / "out")
    assert again.dtype == torch.bfloat16 and same(again.state_dict(), narrow.state_dict())


def test_compact_few_bits_without_gates_makes_it_plain(tmp_path):
    model = with_koff(quantised("nf4"), target_sparsity=0)
    narrow = koff.compact(model, inplace=True)
    wanted = dict(arch.sites(tiny("llama")))
    assert all(torch.equal(x.weight, wanted[site].weight) for site, x in arch.sites(narrow))
    koff.save(narrow, tmp_path / "out")
    again = koff.load(tmp_path / "out")
    assert torch.equal(logits(again, memory=MEMORIES), logits(narrow.eval(), memory=MEMORIES))
    with pytest.raises(ValueError, match="must have gates, got none"):
        koff.compact(narrow)


def test_compact_few_bits_opens_in_transformers_and_in_few_bits_again(tmp_path):
    from support.few_bits import quantization

    narrow = koff.compact(with_koff(quantised("nf4")), inplace=True)
    koff.save(narrow, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(stock), logits(narrow.eval(), memory=None))
    options = dict(quantization_config=quantization("nf4"), device_map={"": "cpu"})
    few = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    assert arch.widths(few) == arch.widths(narrow)
    again = koff.compact(with_koff(few, target_sparsity=0), inplace=True)
    stored = dict(arch.sites(narrow))
    assert all(torch.equal(x.weight, stored[site].weight) for site, x in arch.sites(again))


def test_compact_few_bits_of_a_multimodal_checkpoint(tmp_path):
    whole = multimodal()
    whole.save_pretrained(tmp_path)
    model = with_koff(quantised("nf4", "qwen3_5_text", folder=tmp_path))
    narrow = koff.compact(model, dequantize=False)
    text = whole.model.language_model
    wanted = text.layers[1].self_attn.q_proj.weight
    assert torch.equal(narrow.model.layers[1].self_attn.q_proj.weight, wanted)
    kept = narrow.koff.kept[2]
    found = narrow.model.layers[2].mlp.down_proj.weight
    assert torch.equal(found, text.layers[2].mlp.down_proj.weight[:, kept])


def test_compact_few_bits_sharded_files(tmp_path):
    tiny("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = with_koff(quantised("nf4", folder=tmp_path))
    assert same(koff.compact(model).state_dict(), dense_copy(model).state_dict())


HUB = """
import sys
import huggingface_hub.constants
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
import koff
options = dict(quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"})
model = AutoModelForCausalLM.from_pretrained("someone/base", **options)
huggingface_hub.constants.HF_HUB_OFFLINE = True  # all that is wanted is in the cache by now
small = koff.compact(koff.attach(model, koff.KoffConfig(target_sparsity=0.3)), inplace=True)
koff.save(small, sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("shards", ["50GB", "100KB"])
def test_compact_few_bits_of_a_hub_id(shards, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base", max_shard_size=shards)
    server = Hub()
    server.files["someone/base"] = {f.name: f.read_bytes() for f in (tmp_path / "base").iterdir()}
    paths = f"{bare.ROOT}:{os.environ['PYTHONPATH']}"  # of make test-few-bits
    env = {"HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0", "PYTHONPATH": paths}
    bare.run(bare.sys.executable, HUB, tmp_path / "out", cwd=tmp_path, **env)
    server.close()
    found, wanted = (dict(arch.sites(m)) for m in (koff.load(tmp_path / "out"), tiny("llama")))
    for site, linear in found.items():
        if site.linear.endswith("_proj") and site.linear[0] in "qkvo":
            assert torch.equal(linear.weight, wanted[site].weight)


# ---- what is refused, and leaves the model as it was ----


@pytest.mark.parametrize("damage", ["another", "gone", "pickled", "narrow", "quantised", "shard"])
def test_compact_few_bits_refuses_another_checkpoint(tmp_path, damage):
    shutil.copytree(checkpoint(), tmp_path / "base")
    base, file = tmp_path / "base", tmp_path / "base" / "model.safetensors"
    model = with_koff(quantised("nf4"))
    before = logits(model.eval(), memory="en")
    said = {
        "another": "be what the model was quantised from, got a .* that differs by 1[0-9][0-9] %",
        "gone": "be in safetensors, got",
        "pickled": "be in safetensors, got",
        "narrow": r"hold .* as \(96, 64\) in 16 or 32 bits, got F32 \(95, 64\)",
        "quantised": "hold .* in 16 or 32 bits, got U8",
        "shard": "be whole, got .* without model-00002-of-00002.safetensors",
    }[damage]
    if damage == "another":
        other = tiny("llama")
        other.init_weights()
        with torch.no_grad():
            for p in other.parameters():
                p.normal_()
        other.save_pretrained(base)
    elif damage == "narrow":
        tiny("llama", intermediate_size=95).save_pretrained(base)
    elif damage == "quantised":
        quantised("nf4").save_pretrained(base)
    else:
        file.unlink()
    if damage == "pickled":
        torch.save(tiny("llama").state_dict(), base / "pytorch_model.bin")
    if damage == "shard":
        index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"compact: the original checkpoint .* must {said}"):
        koff.compact(model, inplace=True, base=base)
    assert is_few_bits(model) and not model.koff.gates.fixed
    assert torch.equal(logits(model, memory="en"), before)


def test_compact_few_bits_arguments_are_for_few_bits():
    model = attached("llama", target_sparsity=0.3)
    for options in (dict(base="x"), dict(dequantize=True)):
        with pytest.raises(ValueError, match="base and dequantize must be left out for a plain"):
            koff.compact(model, **options)
    assert all(is_plain(linear) for _, linear in arch.sites(model))
