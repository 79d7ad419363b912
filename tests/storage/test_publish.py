"""How one saved model takes the place of another, and what a run that died at its start leaves."""

import json
import os
import shutil
import stat

import pytest
import torch
from support.character_tokenizer import make_tokenizer
from support.models import attached, same, tiny
from support.small_models import outputs, small
from transformers import PreTrainedModel

import koff
from koff.commands import train as pipeline
from koff.storage import files
from koff.storage.layout import COMMITTED, tokenizer_names
from koff.storage.publish import files_of, settle
from koff.storage.saved_folder import open_saved

pytestmark = pytest.mark.usefixtures("no_real_fsync")


@pytest.fixture(scope="module")
def models():
    return small(("en", "fr"), 0, 0.4), small(("en",), 1, 0.2)


def names(directory):
    return set(files_of(directory))


def test_the_old_version_goes_wholly_and_other_files_stay(models, tmp_path):
    out = koff.save(models[0], tmp_path / "out")
    (out / "memories/fr/mine.txt").write_text("mine")
    (out / "model-00001-of-00002.safetensors").write_text("mine")
    koff.save(models[1], out, overwrite=True)
    fresh = koff.save(models[1], tmp_path / "fresh")
    mine = {"memories/fr/mine.txt", "model-00001-of-00002.safetensors"}
    assert names(out) == names(fresh) | mine
    assert not (out / "memories/fr/lora").exists()
    assert same(outputs(koff.load(out)), outputs(models[1]))


def test_shards_of_the_old_version_go(models, tmp_path, monkeypatch):
    out, write = tmp_path / "out", PreTrainedModel.save_pretrained
    monkeypatch.setattr(
        PreTrainedModel, "save_pretrained", lambda m, d, **k: write(m, d, max_shard_size=3000, **k)
    )
    koff.save(models[0], out)
    assert (out / "model.safetensors.index.json").exists()
    assert same(outputs(koff.load(out)), outputs(models[0]))
    sharded = {name for name in names(out) if name.startswith("model")}
    assert len(sharded) > 2
    monkeypatch.undo()
    for damage in (False, True):
        copy = shutil.copytree(out, tmp_path / f"copy{damage}")
        if damage:  # then what a backbone would be loaded from goes by its name
            (copy / "koff.json").write_text("{")
        koff.save(models[1], copy, overwrite=True)
        assert {n for n in names(copy) if n.startswith(("model.", "model-"))} == {
            "model.safetensors"
        }
        assert same(outputs(koff.load(copy)), outputs(models[1]))


def test_without_hard_links_files_are_copied(models, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no hard links here")

    out = koff.save(models[0], tmp_path / "out")
    monkeypatch.setattr(os, "link", refuse)
    koff.save(models[1], out, overwrite=True)
    assert same(outputs(koff.load(out)), outputs(models[1]))
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_a_model_may_be_saved_over_the_folder_it_was_loaded_from(models, tmp_path):
    out = koff.save(models[0], tmp_path / "out")
    model = koff.load(out)
    koff.save(model, out, overwrite=True)
    assert same(outputs(model), outputs(models[0]))
    assert same(outputs(koff.load(out)), outputs(models[0]))


def test_a_committed_version_counts_before_it_is_in_place(models, tmp_path):
    out, new = koff.save(models[0], tmp_path / "out"), koff.save(models[1], tmp_path / "new")
    shutil.copytree(new, out / COMMITTED)
    assert same(outputs(koff.load(out)), outputs(models[1]))
    with pytest.raises(ValueError, match="must not hold a saved model"):
        koff.save(models[0], out)
    settle(out)
    assert names(out) == names(new) and not (out / COMMITTED).exists()


def test_folders_have_the_usual_permissions(models, tmp_path):
    out = koff.save(models[0], tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def in_the_way(kind, path, elsewhere):
    if kind == "folder":
        path.mkdir()
    else:
        elsewhere.mkdir()
        path.symlink_to(elsewhere, target_is_directory=True)


@pytest.mark.parametrize("kind", ["folder", "link"])
@pytest.mark.parametrize("name", ["config.json", "koff.json", "memories"])
def test_what_stands_in_the_way_is_refused_and_stays(name, kind, models, tmp_path):
    if (name, kind) == ("memories", "folder"):
        koff.save(models[0], tmp_path / "out")  # a folder in a folder's place is fine
        return
    out = tmp_path / "out"
    out.mkdir()
    in_the_way(kind, out / name, tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"must be (a file or free|a folder), got a f.*move it away"
    ):
        koff.save(models[0], out, overwrite=True)
    assert [p.name for p in out.iterdir()] == [name]
    assert kind == "folder" or not any((tmp_path / "elsewhere").iterdir())


def test_a_hostile_old_version_does_not_lead_a_save_astray(models, tmp_path):
    out = koff.save(models[0], tmp_path / "out")
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("mine")
    (out / "leads").symlink_to(tmp_path / "mine")
    facts = json.loads((out / "koff.json").read_text())
    facts["files"] |= dict.fromkeys(("../mine.txt", str(tmp_path / "mine.txt"), "leads/x"), "0")
    (out / "koff.json").write_text(json.dumps(facts))
    koff.save(models[1], out, overwrite=True)
    assert (tmp_path / "mine.txt").exists() and (tmp_path / "mine" / "x").exists()
    assert same(outputs(koff.load(out)), outputs(models[1]))


def test_a_dead_link_is_no_place_to_save(models, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must be a folder, got a file or a dead link"):
        koff.save(models[0], tmp_path / "out")


def test_hashes_of_large_files_are_those_of_small_ones(tmp_path, monkeypatch):
    for number in range(6):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 1000)
    few = files.digests(tmp_path, sorted(names(tmp_path)))
    monkeypatch.setattr(files, "_FEW_BYTES", 1)
    assert files.digests(tmp_path, sorted(names(tmp_path))) == few and len(set(few.values())) == 6


def test_a_run_that_died_at_its_start_may_begin_again(tmp_path):
    """Before recipe.json is there, only these can be."""
    (tmp_path / pipeline.CHECKPOINTS).mkdir()
    (tmp_path / f".{pipeline.RECIPE_FILE}.x1y2z3").write_text("{")
    assert pipeline.check_output(tmp_path, None) is None
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(
        ValueError, match="must be empty or hold an interrupted run, got .'mine.txt"
    ):
        pipeline.check_output(tmp_path, None)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"recipe": 5, "root": "x"}', '{"recipe": {}}'])
def test_a_damaged_recipe_is_refused(text, tmp_path):
    (tmp_path / pipeline.RECIPE_FILE).write_text(text)
    with pytest.raises(ValueError, match="koff train: recipe.json must"):
        pipeline.check_output(tmp_path, None)


def test_a_committed_model_is_a_finished_one(tmp_path):
    (tmp_path / COMMITTED).mkdir()
    (tmp_path / COMMITTED / "koff.json").write_text("{}")
    with pytest.raises(ValueError, match="must not hold a finished model"):
        pipeline.check_output(tmp_path, None)


def test_loading_keeps_the_base_and_the_generation_config(models, tmp_path):
    model = koff.load(koff.save(models[0], tmp_path / "a", metadata={"base": "me/mine"}))
    model.generation_config.max_new_tokens = 7
    again = koff.load(koff.save(model, tmp_path / "b"))
    assert json.loads((tmp_path / "b/koff.json").read_text())["base"] == "me/mine"
    assert again.generation_config.max_new_tokens == 7
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    ids = torch.tensor([[3, 4]])
    assert again.generate(ids, memory="en", do_sample=False).shape[1] <= 9


def stock(folder, shards=False):
    """A model of transformers', a note and a card, none of them koff's."""
    model = tiny("llama")
    model.save_pretrained(folder, max_shard_size="40KB" if shards else "1GB")
    for name in ("README.md", "notes.txt"):
        (folder / name).write_text("mine")
    return {name: (folder / name).read_bytes() for name in files_of(folder)}


@pytest.mark.parametrize("shards", [False, True])
def test_a_folder_of_others_is_left_alone(models, shards, tmp_path):
    """Such as that of the dense model."""
    before = stock(tmp_path, shards)
    assert shards == (len([name for name in before if name.endswith(".safetensors")]) > 1)
    with pytest.raises(ValueError, match="must not hold files that koff did not write.*got config"):
        koff.save(models[0], tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files_of(tmp_path)} == before
    koff.save(models[0], tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert same(outputs(koff.load(tmp_path)), outputs(models[0]))


@pytest.mark.parametrize("name", ["README.md", "memories/en/memory.json", "tokenizer.json"])
def test_one_file_of_others_under_a_name_of_the_models_is_left_alone(models, name, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"got {name} in .*overwrite=True"):
        koff.save(models[0], tmp_path, tokenizer=make_tokenizer())
    assert files_of(tmp_path) == [name] and (tmp_path / name).read_text() == "mine"


def test_what_lies_beside_a_loaded_model_is_kept(models, tmp_path):
    data = {"en": "three rows", "fr": "four"}
    metadata = {"base": "me/mine", "revision": "main", "data": data, "mine": [1]}
    out = koff.save(models[0], tmp_path / "a", metadata=metadata)
    model = koff.load(out)
    koff.remove_memory(model, "fr")
    kept = koff.load(koff.save(model, tmp_path / "b", metadata={"mine": [2]})).koff.metadata
    assert kept == {"revision": "main", "data": {"en": "three rows"}, "mine": [2]}
    assert koff.load(out).koff.metadata["data"] == data


def test_the_tokenizer_of_a_replaced_model_is_kept(models, tmp_path):
    tokenizer = make_tokenizer()
    out = koff.save(models[0], tmp_path / "out", tokenizer=tokenizer)
    want = sorted(tokenizer_names(names(out) - {"koff.json"}))
    for _ in range(2):
        koff.save(models[1], out, overwrite=True)
        assert sorted(tokenizer_names(names(out) - {"koff.json"})) == want and want
        open_saved(out).load_tokenizer()
    other = attached("llama", changes=dict(vocab_size=90), memories=("en",), target_sparsity=0)
    koff.save(other, out, overwrite=True)
    assert not tokenizer_names(names(out) - {"koff.json"})
