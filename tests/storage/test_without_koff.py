"""What koff saves, opened where koff is not installed: same hidden states, logits and text."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import bare
from support.character_tokenizer import make_tokenizer
from support.models import ARCHITECTURES, attached
from support.widths import spread
from transformers import AutoTokenizer

import koff

FP32 = 1e-5
KINDS = ("uniform", "global")
MEMORIES = ("both", "lora", "kv", None)
CASES = list(itertools.product(ARCHITECTURES, KINDS, MEMORIES))


def build(architecture, kind, folder, tokenizer):
    """Masked and compacted model with a memory of every kind, the latter saved."""
    changes = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": None}
    masked = spread(attached(architecture, memories=("both",), changes=changes))
    koff.binarize(masked, target=0.4, per_layer=kind, multiple_of=8)
    first = koff.save(koff.compact(masked), folder / "first")
    adapters = {part: first / "memories/both" / part for part in ("lora", "kv")}
    small = koff.compact(masked)
    for part, path in adapters.items():
        koff.import_memory(small, part, **{part: path})
    koff.save(small, folder / "saved", tokenizer=tokenizer)
    return masked, small


@pytest.fixture(scope="module")
def world(tmp_path_factory, bare_python):
    """Everything computed by koff and by stock libraries; (architecture, kind, memory) -> both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        return make_world(tmp_path_factory, bare_python)


def make_world(tmp_path_factory, bare_python):
    place, tokenizer = tmp_path_factory.mktemp("world"), make_tokenizer(bos_token="<s>")
    ids = tokenizer(["abc de", "fgh aX"], return_tensors="pt").input_ids
    save_file({"ids": ids}, place / "inputs.safetensors")
    jobs, found = [], {}
    for architecture, kind in itertools.product(ARCHITECTURES, KINDS):
        folder = place / f"{architecture}_{kind}"
        masked, small = build(architecture, kind, folder, tokenizer)
        narrow = json.loads((folder / "saved/config.json").read_text())["model_type"][:4] == "koff"
        assert narrow == (kind == "global")
        for memory in MEMORIES:
            home = folder / "saved/memories" / str(memory)
            parts = {p: str(home / p) if (home / p).is_dir() else None for p in ("lora", "kv")}
            output = folder / f"{memory}.safetensors"
            files = {"inputs": str(place / "inputs.safetensors"), "output": str(output)}
            jobs.append({"folder": str(folder / "saved"), "narrow": narrow, **parts, **files})
            found[architecture, kind, memory] = (masked, small, ids, output)
            exported = None if memory is None else folder / f"exported_{memory}"
            if exported is not None:
                koff.export_merged(folder / "saved", memory, exported)
                kv = str(exported / "kv") if (exported / "kv").is_dir() else None
                assert (kv is None) == (memory == "lora")
                output = str(folder / f"exported_{memory}.safetensors")
                own = {"folder": str(exported), "lora": None, "kv": kv, "output": output}
                jobs.append(jobs[-1] | own)
    bare.compute(bare_python, jobs, place / "child")
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_stock_libraries_compute_what_koff_does(world, case):
    masked, small, ids, output = world[case]
    memory = case[-1]
    theirs, ours = load_file(output), small(ids, memory=memory, output_hidden_states=True)
    for index, state in enumerate(ours.hidden_states):
        assert (theirs[f"hidden_{index}"] - state).abs().max() < FP32
    assert len(ours.hidden_states) == len(theirs) - 1
    assert (theirs["logits"] - ours.logits).abs().max() < FP32
    if memory in ("both", None):  # the dense model with its mask, before anything was removed
        dense = masked(ids, memory=memory, output_hidden_states=True)
        for index, state in enumerate(dense.hidden_states):
            assert (theirs[f"hidden_{index}"] - state).abs().max() < FP32
    if memory is not None:
        assert (theirs["logits"] - small(ids).logits).abs().max() > 0.01
    tokens = small.generate(ids, memory=memory, max_new_tokens=12, do_sample=False)
    tokenizer = AutoTokenizer.from_pretrained(output.parent / "saved")
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert texts == json.loads(output.with_suffix(".json").read_text())
    assert all(len(text) > 6 for text in texts)


@pytest.mark.parametrize("case", [case for case in CASES if case[-1]], ids=str)
@torch.no_grad()
def test_exported_models_compute_what_koff_does(world, case):
    _, small, ids, output = world[case]
    theirs = load_file(output.with_name(f"exported_{case[-1]}.safetensors"))
    assert (theirs["logits"] - small(ids, memory=case[-1]).logits).abs().max() < FP32


def test_a_uniform_backbone_has_no_trace_of_koff(world):
    for architecture in ARCHITECTURES:
        folder = world[architecture, "uniform", None][-1].parent
        for saved in (folder / "saved", folder / "exported_both"):
            config = json.loads((saved / "config.json").read_text())
            assert config["model_type"] == architecture and "auto_map" not in config
            assert "koff" not in (saved / "config.json").read_text()
            assert "koff" not in (saved / "generation_config.json").read_text()
            names = load_file(saved / "model.safetensors")
            assert not [n for n in names if "koff" in n] and not list(saved.glob("*.py"))
            width = names["model.layers.0.mlp.gate_proj.weight"].shape[0]
            assert config["intermediate_size"] == width
        assert not (folder / "exported_both/koff.json").exists()
