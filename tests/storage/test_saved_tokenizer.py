"""The tokenizer of a saved model is the one that was saved, or there is an error that says so."""

import json
import os
import shutil

import pytest
from support.character_tokenizer import make_tokenizer
from support.damage import HOUSE, reseal
from support.models import attached

import koff
from koff.commands import saved as runs
from koff.storage.layout import tokenizer_names
from koff.storage.saved_folder import open_saved

pytestmark = pytest.mark.usefixtures("no_real_fsync")

TEXT = "abc abd"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    model = attached("llama", changes={"vocab_size": len(make_tokenizer())}, target_sparsity=0)
    folder = tmp_path_factory.mktemp("original") / "out"
    return koff.save(model, folder, tokenizer=make_tokenizer(bos_token="<s>"))


def vocabulary_turned(folder):
    """Another tokenizer that loads as well: it would give other text without a word."""
    values = json.loads((folder / "tokenizer.json").read_text())
    words = values["model"]["vocab"]
    values["model"]["vocab"] = dict(zip(words, reversed(words.values()), strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(values))


def cut(folder):
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-50])


def outside(folder):
    shutil.move(folder / "tokenizer.json", folder.parent / "elsewhere")
    (folder / "tokenizer.json").symlink_to(folder.parent / "elsewhere")


def without(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


DAMAGES = {
    "changed": (vocabulary_turned, "tokenizer.json must have the sha256"),
    "cut short": (cut, "tokenizer.json must have the sha256"),
    "a part gone": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json must be there"),
    "a link": (outside, "tokenizer.json must lie in its folder, got a link"),
    "gone": (without, "must hold a tokenizer, got a folder without one"),
    "cut short and listed so": (
        lambda d: (cut(d), reseal(d)),
        "the tokenizer in .*out must be one that transformers loads",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_another_tokenizer_is_refused(damage, saved):
    harm, message = DAMAGES[damage]
    harm(saved)
    for act in (
        lambda at: open_saved(at).load_tokenizer(),
        lambda at: runs.generate_text(at, TEXT, max_new_tokens=1, device="cpu"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            act(saved)
        caught.match(HOUSE)
    assert koff.load(saved).koff.memory_names == ("en", "keys", "es")  # which needs none


def test_the_saved_one_loads(saved):
    wanted = make_tokenizer(bos_token="<s>")(TEXT).input_ids
    assert open_saved(saved).has_tokenizer
    assert open_saved(saved).load_tokenizer()(TEXT).input_ids == wanted
    without(saved)
    assert not open_saved(saved).has_tokenizer


def test_one_that_was_put_there_later_loads_too(tmp_path):
    model = attached("llama", changes={"vocab_size": len(make_tokenizer())}, target_sparsity=0)
    folder = koff.save(model, tmp_path / "out")
    make_tokenizer().save_pretrained(folder)
    assert open_saved(folder).load_tokenizer()(TEXT).input_ids == make_tokenizer()(TEXT).input_ids


def test_only_the_files_of_a_tokenizer_are_compared(saved):
    names = tokenizer_names(json.loads((saved / "koff.json").read_text())["files"])
    assert sorted(names) == ["tokenizer.json", "tokenizer_config.json"]
    others = ["model.safetensors.index.json", "modeling_koff.py", "README.md", "x.py"]
    others += ["config.json", "model-00001-of-00002.safetensors", "memories/en/memory.json"]
    assert tokenizer_names(dict.fromkeys([*others, "vocab.txt"])) == ["vocab.txt"]
    (saved / "README.md").write_text("my own words")
    os.remove(saved / "memories/es/memory.json")
    assert open_saved(saved).load_tokenizer() is not None


def test_the_name_of_a_tokenizer_is_none(original, tmp_path):
    model = koff.load(original)
    with pytest.raises(TypeError, match="^koff.save: the tokenizer must be one of .* got 'gpt2'"):
        koff.save(model, tmp_path / "out", tokenizer="gpt2")
    with pytest.raises(TypeError, match="^koff.export_merged: the tokenizer must be .* got 'gpt2'"):
        koff.export_merged(original, "en", tmp_path / "out", tokenizer="gpt2")
    assert not list(tmp_path.iterdir())
