"""Exports: one rounding, the given model untouched, nothing written when refused. What stock
libraries compute with them is in test_without_koff.py."""

import pytest
import torch
from safetensors.torch import load_file
from support.models import attached, tokens
from support.widths import spread
from transformers import AutoModelForCausalLM

import koff

pytestmark = pytest.mark.usefixtures("no_real_fsync")


def small(**config):
    model = spread(attached("qwen2", target_sparsity=0.4, **config))
    koff.binarize(model, multiple_of=8)
    return koff.compact(model, inplace=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_merged_in_fp32_and_rounded_once(dtype, tmp_path):
    wide = koff.save(small(), tmp_path / "wide")
    model = koff.load(koff.save(koff.load(wide, dtype=dtype), tmp_path / "out"))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    koff.export_merged(model, "es", tmp_path / "exported")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    merged, memory = load_file(tmp_path / "exported/model.safetensors"), model.koff.memories["es"]
    assert {t.dtype for t in merged.values()} == {dtype}
    weight = before["model.layers.1.mlp.up_proj.weight"].double()
    lora = memory.lora["1_up_proj"]
    exact = weight + memory.scaling * lora.b.double() @ lora.a.double()
    got = merged["model.layers.1.mlp.up_proj.weight"]
    # fp32 errors move a value to its other neighbour only if it lies within them of the middle
    assert (got == exact.to(dtype)).double().mean() > 0.99
    assert (got.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps
    other = "model.embed_tokens.weight"
    assert torch.equal(merged[other], before[other])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").dtype == dtype


def test_a_model_without_gates_exports_as_a_stock_model(tmp_path):
    model = attached("llama", target_sparsity=0, kv=None)
    koff.export_merged(model, "en", tmp_path / "deep/exported")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "deep/exported")
    assert type(stock).__module__.startswith("transformers.")
    assert (stock(tokens()).logits - model(tokens(), memory="en").logits).abs().max() < 1e-5
    assert not (tmp_path / "deep/exported/kv").exists()


def test_refused_exports_write_nothing(tmp_path):
    model, taken = small(), tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    for source, name, output, message in (
        (model, "de", "out", "the memory must be one of .*'es'.*got 'de'"),
        (model, "en", "taken", "the output must be a new or empty folder"),
        (model, "en", "taken/notes.txt", "the output must be a new or empty folder"),
        (attached("llama"), "en", "out", "must be compacted, got one with gates"),
        (tmp_path / "none", "en", "out", "must be a saved model, got no folder there"),
    ):
        with pytest.raises((ValueError, KeyError, FileNotFoundError), match=message):
            koff.export_merged(source, name, tmp_path / output)
    with torch.no_grad():
        model.koff.memories["en"].lora["0_q_proj"].b.fill_(float("inf"))
    with pytest.raises(ValueError, match="q_proj.weight must be finite when merged"):
        koff.export_merged(model, "en", tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "notes.txt"]
    (tmp_path / "empty").mkdir()
    koff.export_merged(model, "es", tmp_path / "empty")
    assert (tmp_path / "empty/config.json").is_file()
