"""Damaged and hostile folders: a clear error each, nothing executed, nothing half loaded."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.damage import DAMAGES, HOUSE, cut, edit, flip, reseal
from support.models import tokens

import koff
from koff.commands import saved as runs
from koff.storage.files import DamagedFolder

LORA, KV = "memories/es/lora", "memories/es/kv"
WEIGHTS = "adapter_model.safetensors"


def config(**changes):
    return lambda d: edit(d / "config.json", **changes)


def facts(**changes):
    return lambda d: edit(d / "koff.json", **changes)


def lora(**changes):
    return lambda d: edit(d / LORA / "adapter_config.json", **changes)


def kv(**changes):
    return lambda d: edit(d / KV / "adapter_config.json", **changes)


def poison(path, value):
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = value
    save_file(tensors, path, metadata={"format": "pt"})


def outside(d, name):
    target = d.parent / "elsewhere"
    shutil.move(d / name, target)
    (d / name).symlink_to(target, target_is_directory=target.is_dir())


def swap(d, part):
    a, b = d / "memories/en" / part, d / "memories/es" / part
    a.rename(d.parent / "a")
    b.rename(a)
    (d.parent / "a").rename(b)


def unlist(d, name):
    values = json.loads((d / "koff.json").read_text())
    del values["files"][name]
    (d / "koff.json").write_text(json.dumps(values))


CHANGED = "must have the sha256"
# Damage that hashes find.
ACCIDENTS = {
    "a bit of the backbone": (lambda d: flip(d / "model.safetensors"), CHANGED),
    "a bit of a LoRA": (lambda d: flip(d / LORA / WEIGHTS), CHANGED),
    "a bit of a KV": (lambda d: flip(d / KV / WEIGHTS), CHANGED),
    "a backbone cut short": (lambda d: cut(d / "model.safetensors"), "must be a safetensors file"),
    "epsilon": (config(rms_norm_eps=1e-3), CHANGED),
    "alpha": (lora(lora_alpha=7), CHANGED),
    "kept": (lambda d: flip(d / "koff.json", -300), "koff.json must"),
    "LoRA swapped": (lambda d: swap(d, "lora"), CHANGED),
    "KV swapped": (lambda d: swap(d, "kv"), CHANGED),
    "no generation config": (lambda d: (d / "generation_config.json").unlink(), "must be there"),
}
HUGE = 10**12
# Damage that is refused even where every hash agrees with it.
FORGERIES = {
    "layers": (config(num_hidden_layers=10**9), "num_hidden_layers in config.json must be 3"),
    "layers as a text": (config(num_hidden_layers="3"), "must be 3, as in the weights, got '3'"),
    "no layers": (config(num_hidden_layers=-1), "num_hidden_layers in config.json must be 3"),
    "vocabulary": (config(vocab_size=HUGE), "must have shape|must describe a model"),
    "vocabulary as a text": (config(vocab_size="97"), "config.json must"),
    "no vocabulary": (config(vocab_size=-5), "config.json must"),
    "heads": (config(num_attention_heads=HUGE), "must"),
    "no heads": (config(num_attention_heads=0), "config.json must"),
    "head_dim": (config(head_dim=HUGE), "must"),
    "hidden size": (config(hidden_size=HUGE), "must"),
    "intermediate size": (config(intermediate_sizes=[HUGE] * 3), "must"),
    "model type": (config(model_type="gpt2"), "the model type must be one of"),
    "no model type": (config(model_type=["llama"]), "the model type must be a text"),
    "a method": (config(to_dict=5), "'to_dict' in config.json must be a setting"),
    "quantised": (config(quantization_config={"quant_method": "bnb"}), "not be quantised"),
    "dtype": (config(dtype="load"), "must"),
    "biases": (config(attention_bias=True), "the backbone's tensors must be those of config.json"),
    "hidden_act": (config(hidden_act="tanh"), "hidden_act must be one of"),
    "deep": (lambda d: (d / "config.json").write_text("[" * 100_000), "must be JSON"),
    "a list": (lambda d: (d / "config.json").write_text("[]"), "must hold a JSON object"),
    "no text": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), "must be JSON"),
    "format as a text": (facts(format="1"), "the format version must be 1, got '1'; update"),
    "format true": (facts(format=True), "the format version must be 1"),
    "widths": (facts(widths="wide"), "'widths' in koff.json must be a list"),
    "widths below 0": (facts(widths=[-1, 2, 3]), "'widths' in koff.json must be a list"),
    "no kept": (facts(kept=None), "the backbone's widths must be"),
    "kept as texts": (facts(kept=[["1"], ["2"], ["3"]]), "'kept' in koff.json must be null or"),
    "memories": (facts(memories="en"), "'memories' in koff.json must be a list"),
    "memory 5": (facts(memories=[5]), "a memory name must be a string"),
    "memory ../x": (facts(memories=["../x"]), "a memory name must be 1 to 64"),
    "memory twice": (facts(memories=["en", "en"]), "the memories must differ"),
    "memory unknown": (facts(memories=["fr"]), "memory 'fr': memory.json must be there"),
    "settings": (facts(config={"memories": 5}), "memories must be a sequence of names"),
    "seed": (facts(config={"memories": ["en"], "seed": "0"}), "seed must be a whole number"),
    "huge alpha": (facts(config={"lora": {"alpha": 10**400}}), "alpha must be a finite number"),
    "sparsity": (facts(sparsity={"mlp": 2}), "'sparsity' in koff.json must hold the shares"),
    "files": (facts(files=[]), "'files' in koff.json must be an object"),
    "a file above": (facts(files={"../x": "0" * 64}), "a file name must lie in the folder"),
    "a hidden file": (facts(files={".ssh/x": "0" * 64}), "a file name must lie in the folder"),
    "rank": (lora(r=10**9), "must have shape"),
    "rank as a text": (lora(r="4"), "memory 'es': LoRAConfig: r must be a whole number"),
    "targets": (lora(target_modules=[["q_proj"]]), "must name linear layers"),
    "targets as a number": (lora(target_modules=3), "target_modules must be a list, got 3"),
    "alpha as a text": (lora(lora_alpha="x"), "alpha must be a finite number"),
    "formula": (lora(fan_in_fan_out=True), "fan_in_fan_out must be unset"),
    "modules": (lora(modules_to_save=["lm_head"]), "modules_to_save must be unset"),
    "a memory's format": (
        lambda d: edit(d / "memories/es/memory.json", format=2),
        "its format in memory.json must be 1, got 2",
    ),
    "another memory": (lambda d: swap(d, ""), "its name in memory.json must be 'en', got 'es'"),
    "an unlisted config": (lambda d: unlist(d, "config.json"), "must be one of the files that"),
    "an unlisted memory": (lambda d: unlist(d, "memories/es/memory.json"), "must be one of the f"),
    "an unlisted adapter": (
        lambda d: unlist(d, "memories/es/lora/adapter_config.json"),
        "must be one of the files that were saved",
    ),
    "no weights": (lambda d: unlist(d, "model.safetensors"), "must hold weight files, got none"),
    "tokens": (kv(num_virtual_tokens=HUGE), "the learned cache must be"),
    "tokens as a text": (kv(num_virtual_tokens="7"), "num_tokens must be a whole number"),
    "frozen": (kv(num_frozen_tokens=-1), "num_frozen_tokens must lie in 0..6"),
    "NaN": (lambda d: poison(d / LORA / WEIGHTS, float("nan")), "must be finite, got NaN"),
    "infinity": (lambda d: poison(d / KV / WEIGHTS, float("inf")), "must be finite, got NaN"),
    "integers": (
        lambda d: save_file(
            {n: t.int() for n, t in load_file(d / LORA / WEIGHTS).items()}, d / LORA / WEIGHTS
        ),
        "must have one of the dtypes",
    ),
    "empty tensors": (
        lambda d: save_file({"prompt_embeddings": torch.zeros(10**9, 0)}, d / KV / WEIGHTS),
        "must hold values",
    ),
    "an empty memory": (lambda d: shutil.rmtree(d / LORA), "must be there"),
    "a link to a file": (lambda d: outside(d, "model.safetensors"), "must lie in its folder, got"),
    "a link to koff.json": (lambda d: outside(d, "koff.json"), "must lie in its folder, got"),
    "a link to a folder": (lambda d: outside(d, "memories"), "must lie in its folder, got a link"),
    "a link in a memory": (lambda d: outside(d, LORA), "must lie in its folder, got a link"),
    "a link to itself": (
        lambda d: ((d / "config.json").unlink(), (d / "config.json").symlink_to("config.json")),
        "config.json must be there",
    ),
    "a pipe": (
        lambda d: ((d / "config.json").unlink(), os.mkfifo(d / "config.json")),
        "config.json must be there",
    ),
    "a folder": (
        lambda d: ((d / "config.json").unlink(), (d / "config.json").mkdir()),
        "config.json must be there",
    ),
}


@pytest.mark.parametrize("damage", [*ACCIDENTS, *FORGERIES])
def test_damage_is_refused(damage, saved):
    harm, message = (ACCIDENTS | FORGERIES)[damage]
    harm(saved)
    if damage in FORGERIES and not (saved / "koff.json").is_symlink():
        reseal(saved)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        koff.load(saved)
    assert type(caught.value) in (ValueError, DamagedFolder, FileNotFoundError)
    pytest.raises(type(caught.value), koff.load, saved).match(HOUSE)


def test_what_koff_does_not_read_may_change(saved):
    wanted = koff.load(saved)(tokens(), memory="en").logits
    (saved / "README.md").write_text("my own words")
    (saved / "notes").mkdir()
    (saved / "memories/mine.txt").write_text("mine")
    edit(saved / "koff.json", metadata={"mine": [1]}, created="today")
    assert torch.equal(koff.load(saved)(tokens(), memory="en").logits, wanted)


def test_verify_can_be_left_out_for_the_backbone_alone(saved):
    edit(saved / "config.json", mine=1)
    assert koff.load(saved, verify=False).koff.memory_names == ("en", "keys", "es")
    flip(saved / LORA / WEIGHTS)
    with pytest.raises(ValueError, match=CHANGED):
        koff.load(saved, verify=False)


CODE = "import pathlib; pathlib.Path({!r}).write_text('ran')\n"


def test_no_code_of_the_folder_runs(saved, tmp_path):
    """Neither a model's nor a generation's nor an adapter's, and no kernel is fetched."""
    from transformers import AutoModelForCausalLM

    wanted = koff.load(saved)(tokens(), memory="en").logits
    for name in ("modeling_x.py", "configuration_x.py", "custom_generate/generate.py"):
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_text(CODE.format(str(tmp_path / "ran")))
    mapped = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"}
    edit(saved / "config.json", auto_map=mapped, attn_implementation="someone/kernel")
    edit(saved / "generation_config.json", custom_generate="someone/code")
    adapter = {"base_model_name_or_path": "someone/else", "peft_type": "LORA"}
    (saved / "adapter_config.json").write_text(json.dumps(adapter))
    reseal(saved)
    model = koff.load(saved)
    assert torch.equal(model(tokens(), memory="en").logits, wanted)
    assert model.generate(tokens(), memory="en", max_new_tokens=2, do_sample=False).shape[1] == 13
    assert not (tmp_path / "ran").exists()
    # The code is really there to be run: transformers does, if told to.
    edit(saved / "config.json", model_type="x")
    (saved / "adapter_config.json").unlink()
    with pytest.raises(Exception, match="."):
        AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_a_snapshot_of_the_hub_loads(saved, tmp_path):
    """huggingface_hub's cache holds links to ../../blobs; links to elsewhere stay refused."""
    wanted = koff.load(saved)(tokens(), memory="en").logits
    repo = tmp_path / "models--me--mine"
    snapshot, blobs = repo / "snapshots" / "abc", repo / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(p for p in saved.rglob("*") if p.is_file()):
        link = snapshot / path.relative_to(saved)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert torch.equal(koff.load(snapshot)(tokens(), memory="en").logits, wanted)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(saved / "config.json")
    with pytest.raises(ValueError, match="config.json must lie in its folder, got a link to"):
        koff.load(snapshot)


@pytest.mark.parametrize("damage", ["widths", "memory 5", "files", "a link to koff.json"])
def test_what_only_describes_refuses_too(damage, saved):
    FORGERIES[damage][0](saved)
    for look in (runs.describe, runs.saved_memories):
        with pytest.raises(ValueError, match=HOUSE):
            look(saved)


def test_memories_that_are_not_finite_are_not_saved(saved, tmp_path):
    model = koff.load(saved)
    model.koff.memories["en"].lora["0_q_proj"].b.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="memory 'en' must be finite, got NaN or infinity"):
        koff.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_every_known_damage_has_the_house_wording(saved):
    for name, (harm, error, _) in DAMAGES.items():
        copy = shutil.copytree(saved, saved.parent / f"copy {name}")
        harm(copy)
        with pytest.raises(error, match=HOUSE):
            koff.load(copy)
