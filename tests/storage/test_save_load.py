"""save and load: bit-equal, in formats that PEFT opens, and never half done."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from support.damage import DAMAGES, edit
from support.models import ARCHITECTURES, attached, tiny, tokens
from support.widths import compacted
from transformers import AutoModelForCausalLM

import koff
from koff.model import modeling_koff

MIX = ["es", None, "keys"]


@pytest.fixture
def saved(tmp_path):
    return koff.save(compacted(), tmp_path / "out")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_save_and_load_are_bit_equal(architecture, tmp_path):
    model, ids = compacted(architecture), tokens()
    koff.save(model, tmp_path / "out", metadata={"base": "tiny/base", "note": 1})
    again = koff.load(tmp_path / "out")
    for memory in ("en", "keys", "es", None, MIX):
        assert torch.equal(again(ids, memory=memory).logits, model(ids, memory=memory).logits)
    assert koff.sparsity(again) == koff.sparsity(model)
    assert again.koff.memory_names == model.koff.memory_names
    assert again.koff.dense_widths == model.koff.dense_widths
    assert all(map(torch.equal, again.koff.kept, model.koff.kept))
    generated = [
        m.generate(ids, memory=MIX, max_new_tokens=5, do_sample=False) for m in (model, again)
    ]
    assert torch.equal(*generated)
    koff.save(again, tmp_path / "twice")
    for path in (tmp_path / "out").rglob("*.safetensors"):
        other = tmp_path / "twice" / path.relative_to(tmp_path / "out")
        assert path.read_bytes() == other.read_bytes()


def test_a_gpu_that_is_not_there_is_said(saved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device must be one that torch finds, got cuda"):
        koff.load(saved, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_backbones_come_back_as_they_were(dtype, tmp_path):
    wide, ids = koff.save(compacted(), tmp_path / "wide"), tokens()
    model = koff.load(wide, dtype=dtype)  # .to(dtype) would round RoPE's frequencies for good
    again = koff.load(koff.save(model, tmp_path / "out"))
    assert again.dtype == dtype and {p.dtype for p in again.koff.parameters()} == {torch.float32}
    assert torch.equal(again(ids, memory=MIX).logits, model(ids, memory=MIX).logits)
    assert koff.load(tmp_path / "out", dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    "config", [dict(lora=None), dict(kv=None), dict(memories=(), lora=None, kv=None)]
)
def test_parts_of_memories_and_gates_alone(config, tmp_path):
    model, ids = compacted("llama", **config), tokens()
    again = koff.load(koff.save(model, tmp_path / "out"))
    for memory in (*model.koff.memory_names, None):
        assert torch.equal(again(ids, memory=memory).logits, model(ids, memory=memory).logits)


def test_memories_without_gates_keep_a_stock_backbone(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    model, ids = attached("llama", target_sparsity=0), tokens()
    koff.save(model, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(stock) is LlamaForCausalLM
    assert torch.equal(stock(ids).logits, model(ids).logits)
    assert torch.equal(
        koff.load(tmp_path / "out")(ids, memory="en").logits, model(ids, memory="en").logits
    )


def test_auto_class_loads_the_backbone(saved):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(model(tokens()).logits, koff.load(saved)(tokens()).logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stock_peft_gives_the_same_logits(architecture, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, ids = compacted(architecture), tokens()
    out = koff.save(model, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(out)
    base.load_adapter(str(out / "memories/keys/lora"))
    peft_model = PeftModel.from_pretrained(base, str(out / "memories/keys/kv")).eval()
    with torch.no_grad():
        theirs = peft_model(ids, attention_mask=torch.ones_like(ids)).logits
    assert (theirs - model(ids, memory="keys").logits).abs().max() < 1e-5
    assert (theirs - model(ids).logits).abs().max() > 0.01


def test_nothing_on_disk_can_execute(saved):
    files = [p for p in saved.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json", ".md", ".py"}
    code = [p for p in files if p.suffix == ".py"]  # for use without koff, which never runs it
    assert [p.read_bytes() for p in code] == [Path(modeling_koff.__file__).read_bytes()]
    facts = json.loads((saved / "koff.json").read_text())
    assert facts["format"] == 1 and len(facts["kept"]) == 3 and len(facts["backbone_sha256"]) == 64
    card = (saved / "README.md").read_text()
    assert "koff.load" in card and "40.00%" in card


def test_unfinished_models_are_refused_and_nothing_is_written(tmp_path):
    out = tmp_path / "out"
    model = attached("llama")
    with pytest.raises(
        ValueError, match="must be compacted, got one with gates; call koff.binarize"
    ):
        koff.save(model, out)
    model = attached("llama", target_sparsity=0, kv=koff.KVConfig(4, init="text"))
    with pytest.raises(
        ValueError, match="KV part of memory 'en' must be filled, got one that waits"
    ):
        koff.save(model, out)
    with pytest.raises(ValueError, match="must have koff attached"):
        koff.save(tiny("llama"), out)
    assert not any(tmp_path.iterdir())


def test_a_saved_model_is_not_overwritten_by_accident(saved):
    model = compacted("llama")
    before = {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="must not hold a saved model"):
        koff.save(model, saved)
    assert {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()} == before
    koff.save(model, saved, overwrite=True)
    ids = tokens()
    assert torch.equal(koff.load(saved)(ids, memory="en").logits, model(ids, memory="en").logits)
    assert not [p for p in saved.parent.iterdir() if p != saved]  # no staging folder is left


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused(damage, saved):
    harm, error, message = DAMAGES[damage]
    koff.load(saved)
    harm(saved)
    with pytest.raises(error, match=message):
        koff.load(saved)


def test_a_folder_without_a_model_is_named(tmp_path):
    gone, empty = tmp_path / "gone", tmp_path / "checkpoint-6"
    empty.mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        koff.load(gone)
    assert f"koff.json must be there, got no folder {gone}; check the folder" in str(caught.value)
    with pytest.raises(FileNotFoundError) as caught:
        koff.load(empty)
    assert f"got no such file in {empty}; check the folder" in str(caught.value)


def test_a_mask_of_the_wrong_length_is_refused(saved):
    facts = json.loads((saved / "koff.json").read_text())
    facts["kept"][1] = facts["kept"][1][:-1]
    edit(saved / "koff.json", kept=facts["kept"])
    with pytest.raises(ValueError, match="kept neurons of layer 1 must be"):
        koff.load(saved)


@pytest.mark.parametrize("sparsity", [0, 0.4])
def test_adapters_name_only_a_base_that_they_belong_on(sparsity, tmp_path):
    """PEFT's Auto classes load the named base; a LoRA on attention and a cache fit the dense one,
    and would compute something else there than on the pruned backbone."""
    tiny("llama").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    parts = dict(
        lora=koff.LoRAConfig(r=2, target_modules=("q_proj",)), kv=koff.KVConfig(3, "tokens")
    )
    koff.attach(model, koff.KoffConfig(("en",), target_sparsity=sparsity, **parts))
    if sparsity:
        koff.binarize(model, per_layer="uniform", multiple_of=1)
        model = koff.compact(model)
    folder = koff.save(model, tmp_path / "out") / "memories/en"
    for part in ("lora", "kv"):
        named = json.loads((folder / part / "adapter_config.json").read_text())
        assert named["base_model_name_or_path"] == (None if sparsity else str(tmp_path / "base"))
        if sparsity:
            with pytest.raises(OSError):
                AutoPeftModelForCausalLM.from_pretrained(folder / part)
        else:
            AutoPeftModelForCausalLM.from_pretrained(folder / part)
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    PeftModel.from_pretrained(backbone, folder / "lora")
