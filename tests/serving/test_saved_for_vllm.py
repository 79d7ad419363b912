"""koff_vllm reads a saved folder with koff's distrust, and lays each memory out by its content."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.bare import ROOT
from support.damage import HOUSE, cut, edit, flip, reseal, reshape
from support.models import attached
from support.widths import compacted, spread

import koff
import koff_vllm
from koff.model import arch
from koff.model.narrow import narrow_classes
from koff.storage import manifest
from koff_vllm.saved import LINEARS, NARROW, SEALED, SavedModel, is_inside_a_memory, staged_memory


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("KOFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_sealed_is_what_koff_seals():
    assert sorted(SEALED) == sorted(manifest.SEALED)


def test_a_staged_memory_holds_what_was_saved(saved, cache):
    model = SavedModel(saved)
    assert list(model.memories) == json.loads((saved / "koff.json").read_text())["memories"]
    for name in model.memories:
        staged, lora = model.stage(name)
        assert staged.label == lora.parent.name and lora.is_relative_to(cache)
        assert staged == staged_memory(str(lora)) and staged.num_tokens == 7
        weights = "adapter_model.safetensors"
        for copied, original in ((lora / weights, "lora"), (lora.parent / "kv.safetensors", "kv")):
            ours, theirs = (
                load_file(copied),
                load_file(saved / f"memories/{name}/{original}" / weights),
            )
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        settings = json.loads((lora / "adapter_config.json").read_text())
        assert settings["r"] == 4 and settings["lora_alpha"] == 6
    assert not is_inside_a_memory(str(lora))
    assert is_inside_a_memory(str(saved / "memories/en/lora"))


def test_a_memory_of_learned_keys_alone_gets_a_lora_of_zeros(saved, tmp_path):
    koff.import_memory(saved, "alone", kv=saved / "memories/en/kv")
    staged, lora = SavedModel(saved).stage("alone")
    tensors = load_file(lora / "adapter_model.safetensors")
    assert len(tensors) == 2 and not any(t.any() for t in tensors.values())
    assert staged.num_tokens == 7


def test_a_memory_of_a_lora_alone_has_no_learned_keys(saved):
    koff.import_memory(saved, "alone", lora=saved / "memories/en/lora")
    assert SavedModel(saved).stage("alone")[0].num_tokens == 0


def test_another_content_is_another_name(saved, tmp_path):
    before = SavedModel(saved).stage("en")
    for part in ("lora", "kv"):
        shutil.copytree(saved / "memories/es" / part, tmp_path / part)
    koff.remove_memory(saved, "en")
    koff.import_memory(saved, "en", lora=tmp_path / "lora", kv=tmp_path / "kv")
    after = SavedModel(saved).stage("en")
    assert before[0].label != after[0].label and before[0].lora_id != after[0].lora_id
    assert before[1].is_dir() and before[1] != after[1]


def test_a_damaged_copy_is_made_again(saved):
    staged, lora = SavedModel(saved).stage("en")
    flip(lora / "adapter_model.safetensors")
    assert SavedModel(saved).stage("en") == (staged, lora)
    ours = load_file(lora / "adapter_model.safetensors")
    theirs = load_file(saved / "memories/en/lora/adapter_model.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_interrupted_save_counts_once_it_is_committed(saved, tmp_path):
    other = koff.save(compacted("llama", memories=("new",)), tmp_path / "other")
    other.rename(saved / ".koff-committed")
    for path in (saved, saved / ".koff-committed"):
        model = SavedModel(path)
        assert list(model.memories) == ["new"] and model.directory == saved
        model.stage("new")


def test_options_fit_the_memories(saved):
    options = koff_vllm.options(saved)
    assert options["model"] == str(saved.absolute()) and options["max_lora_rank"] == 16
    assert options["max_loras"] == 3 and options["max_cpu_loras"] > 3
    transfer = options["kv_transfer_config"]
    assert transfer["kv_connector_module_path"] == "koff_vllm.connector"
    assert koff_vllm.memory(saved, None) is None


def test_an_unknown_memory_is_named(saved):
    with pytest.raises(KeyError, match="must be one of .*'en'.*, got 'xx'"):
        SavedModel(saved).stage("xx")


def nan(path):
    """Put a NaN into the first tensor of a file."""
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def elsewhere(directory):
    """A LoRA on the embedding too, in a folder whose hashes agree."""
    tensors = load_file(directory / LORA)
    vocabulary, hidden = load_file(directory / "model.safetensors")[EMBEDDING].shape
    stem = f"base_model.model.{EMBEDDING.removesuffix('.weight')}.lora_"
    rank = json.loads((directory / LORA).with_name("adapter_config.json").read_text())["r"]
    tensors |= {f"{stem}A.weight": torch.ones(rank, hidden)}
    tensors |= {f"{stem}B.weight": torch.ones(vocabulary, rank)}
    save_file(tensors, directory / LORA, metadata={"format": "pt"})
    reseal(directory)


def variant(directory):
    """A LoRA of another formula, in a folder whose hashes agree."""
    edit(directory / "memories/en/lora/adapter_config.json", use_rslora=True)
    reseal(directory)


def more(directory):
    """A memory with a part that vLLM knows nothing of."""
    facts = json.loads((directory / "koff.json").read_text())
    (directory / "memories/en/kv/cache.safetensors").write_bytes(b"")
    edit(directory / "koff.json", files=facts["files"] | {"memories/en/kv/cache.safetensors": ""})
    reseal(directory)


def link(directory):
    """A file of the folder that lies elsewhere."""
    path = directory / "memories/en/kv/adapter_model.safetensors"
    path.rename(directory.parent / "elsewhere")
    path.symlink_to(directory.parent / "elsewhere")


EMBEDDING = "model.embed_tokens.weight"
LORA = "memories/en/lora/adapter_model.safetensors"
KV = "memories/en/kv/adapter_model.safetensors"
DAMAGES = {
    "no marker": (lambda d: (d / "koff.json").unlink(), "must be a model that koff.save wrote"),
    "format": (lambda d: edit(d / "koff.json", format=True), "format version must be 1, got True"),
    "not json": (lambda d: (d / "koff.json").write_text("[" * 9999), "must be JSON"),
    "no object": (lambda d: (d / "koff.json").write_text("[]"), "must hold a JSON object"),
    "unsealed": (lambda d: edit(d / "koff.json", memories=["en"]), "must match its checksum"),
    "bad name": (
        lambda d: (edit(d / "koff.json", memories=["../x"]), reseal(d)),
        "must be a list of names",
    ),
    "bad file": (
        lambda d: (edit(d / "koff.json", files={"../x": "0" * 64}), reseal(d)),
        "must be file names and their sha256",
    ),
    "weights": (lambda d: flip(d / "model.safetensors"), "must have the sha256"),
    "config": (lambda d: edit(d / "config.json", rms_norm_eps=1.0), "must have the sha256"),
    "lora": (lambda d: flip(d / LORA), "must have the sha256"),
    "cut": (lambda d: (cut(d / KV), reseal(d)), "must be a safetensors file"),
    "missing": (lambda d: (d / KV).unlink(), "must be there, got no such file"),
    "another backbone": (
        lambda d: (edit(d / "memories/en/memory.json", backbone_sha256="0" * 64), reseal(d)),
        "must belong to this backbone",
    ),
    "lora elsewhere": (elsewhere, "a LoRA must be on q_proj, .* on model.embed_tokens in"),
    "lora shape": (lambda d: (reshape(d / LORA), reseal(d)), "must have the shape"),
    "kv shape": (
        lambda d: (reshape(d / KV), reseal(d)),
        "the learned cache of memory 'en' must be",
    ),
    "nan": (lambda d: (nan(d / KV), reseal(d)), "must be finite"),
    "another part": (more, "must consist of a LoRA and learned keys, got memories/en/kv/cache.s"),
    "variant": (variant, "must describe a plain LoRA"),
    "link": (link, "must lie in its folder, got a link"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_refused(saved, cache, case):
    damage, message = DAMAGES[case]
    damage(saved)
    with pytest.raises((ValueError, OSError), match=message) as error:
        koff_vllm.options(saved)
        SavedModel(saved).stage("en")
    assert re.match(HOUSE, str(error.value))
    # Nothing half made is left for anybody to find.
    assert not (cache / "vllm").exists() or os.listdir(cache / "vllm") == []


@pytest.mark.parametrize("name", arch.ARCHITECTURES)
def test_every_architecture_has_a_narrow_model_for_vllm(name):
    config, model = (cls.__name__ for cls in narrow_classes(name))
    module, _, found = NARROW[f"koff_{name}"].partition(":")
    assert found == model
    classes = (ROOT / "koff_vllm/configs.py").read_text()
    assert (
        f"class {config}({config.removeprefix('Koff')})" in classes
        and f"    {config},\n" in classes
    )
    # vLLM's model, or the base model that vLLM's of transformers' models builds.
    defined = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    base = config.replace("Config", "Model")
    assert f"class {model}(NarrowMixin, " in defined or f"class {base}(NarrowMixin, " in defined


def test_vllm_is_told_of_every_linear_layer_that_a_lora_may_be_on():
    """What it is not told of it leaves out of a LoRA, and says nothing."""
    found = set()
    for entry in arch.ARCHITECTURES.values():
        found |= {*entry.attention_linears, *entry.recurrent_linears, *entry.mlp_linears}
    assert found == set(LINEARS)


def test_a_family_without_a_narrow_model_is_refused(tmp_path, monkeypatch):
    narrow = koff.save(compacted("olmo2", memories=("en",)), tmp_path / "out")
    monkeypatch.delitem(NARROW, "koff_olmo2")  # as if it were new
    with pytest.raises(ValueError, match="must be of koff_llama, .*, got koff_olmo2"):
        koff_vllm.options(narrow)


def equally_narrow(architecture, **config):
    model = spread(attached(architecture, target_sparsity=0.4, **config))
    koff.binarize(model, per_layer="uniform", multiple_of=1)
    return koff.compact(model, inplace=True)


def test_recurrent_layers_take_memories_of_lora_alone(tmp_path):
    """vLLM has no KV connector beside them, and no way in for a learned state."""
    both = equally_narrow("qwen3_5_text", memories=("en",))
    with pytest.raises(ValueError, match="must be LoRA alone, got learned keys and states in 'en'"):
        koff_vllm.options(koff.save(both, tmp_path / "both"))
    lora = equally_narrow("qwen3_5_text", memories=("en",), kv=None)
    options = koff_vllm.options(koff.save(lora, tmp_path / "lora"))
    assert options["enable_lora"] and "kv_transfer_config" not in options
    different = compacted("qwen3_5_text", memories=("en",))
    with pytest.raises(ValueError, match="must be LoRA alone, got learned keys and states in 'en'"):
        koff_vllm.options(koff.save(different, tmp_path / "different"))
