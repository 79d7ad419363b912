"""The demo's corpus and base model, at a size that takes seconds."""

import dataclasses

import pytest
import torch
from support.demo_settings import SMALL

import koff
from koff.commands.train import check_model
from koff.data.cache import default_cache
from koff.demo import base_model as demo_base
from koff.demo import corpus as demo_data
from koff.demo import run as demo_run
from koff.demo.run import demo_recipe, run_demo


@pytest.fixture(autouse=True)
def _small_corpus(monkeypatch):
    monkeypatch.setattr(demo_data, "SIZES", {"train": 30_000, "validation": 4_000, "test": 4_000})


def test_corpus_is_reproducible_and_its_splits_share_nothing():
    corpus = demo_data.build_corpus()
    assert corpus == demo_data.build_corpus() != demo_data.build_corpus(seed=1)
    assert tuple(corpus) == demo_data.DOMAINS
    for splits in corpus.values():
        documents = [document for part in splits.values() for document in set(part)]
        assert len(documents) == len(set(documents)) > 0
        for split, part in splits.items():
            assert sum(map(len, part)) >= demo_data.SIZES[split]


def test_arithmetic_is_right():
    for document in demo_data.build_corpus()["math"]["test"]:
        for line in document.splitlines():
            for word in line.rstrip(".").split():
                left, equals, right = word.partition("=")
                if equals:
                    assert eval(left) == int(right), document
        assert document.rstrip().rsplit("#### ", 1)[1] in document.rsplit("####", 1)[0]


def test_separate_takes_docstrings_out():
    long = "A function that does something, told at a length worth keeping as prose. And it is."
    source = f'import os\n\ndef f(x):\n    """{long}"""\n    return x  # kept\n'
    code, docs = demo_data.separate(source)
    assert code == "import os\n\ndef f(x):\n    return x  # kept"
    assert docs == long
    assert demo_data.separate("def f(:") == ("", "")


def test_base_is_trained_once_and_cached(tmp_path, monkeypatch):
    folder = demo_base.prepare_base(tmp_path / "cache", settings=SMALL)
    assert [item.name for item in (tmp_path / "cache").iterdir()] == [folder.name]
    before = (folder / "base" / "model.safetensors").read_bytes()
    monkeypatch.setattr(demo_base, "pretrain", None)  # a second training would fail
    assert demo_base.prepare_base(tmp_path / "cache", settings=SMALL) == folder
    assert (folder / "base" / "model.safetensors").read_bytes() == before
    for gates_only in (False, True):
        places = folder / "base", folder / "data"
        recipe = demo_recipe(*places, seed=3, gates_only=gates_only)
        recipe.check_files()
        assert check_model(recipe).model_type == "llama"
        assert recipe.koff.memories == (() if gates_only else demo_data.DOMAINS)


def test_the_real_model_is_trained_on_the_same_corpus(tmp_path, monkeypatch):
    """Of a small model in its place: fetched, trained, pruned, measured on the first documents."""
    folder = demo_base.prepare_base(tmp_path / "cache", settings=SMALL)
    monkeypatch.setattr(demo_run, "prepare_smollm2", lambda cache: folder / "base")
    smollm2 = demo_run.DEMOS["smollm2"]
    short = smollm2.train | {"steps": 4, "block_size": 32, "saliency_batches": 2}
    short |= {"width_multiple_of": 1}
    small = dataclasses.replace(smollm2, dtype="float32", train=short, tokens=100)
    monkeypatch.setitem(demo_run.DEMOS, "smollm2", small)
    monkeypatch.setattr(demo_run, "speed_up", lambda *_: 1.0)
    output = tmp_path / "out"
    run_demo(model="smollm2", output=output, cache=tmp_path / "cache")
    model = koff.load(output)
    assert model.koff.memory_names == demo_data.DOMAINS
    assert koff.sparsity(model).mlp == pytest.approx(0.4, abs=0.01)
    corpora = [item for item in (tmp_path / "cache").iterdir() if "corpus" in item.name]
    assert [demo_data.prepare_corpus(tmp_path / "cache")] == corpora


def test_an_interrupted_pretraining_leaves_no_cache(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_base, "pretrain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_base.prepare_base(tmp_path, settings=SMALL)
    assert not list(tmp_path.iterdir())


def test_tokenizer_gives_back_any_text():
    tokenizer = demo_base.train_tokenizer(demo_data.build_corpus(), 300)
    text = "def f(é):\n\treturn  '雪'  # 12+30=42"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<s>", "</s>", "<pad>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KOFF_CACHE", str(tmp_path / "a"))
    assert default_cache() == tmp_path / "a"
    monkeypatch.delenv("KOFF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert default_cache() == tmp_path / "b" / "koff"


def test_pretraining_repeats_itself():
    corpus = demo_data.build_corpus()
    tokenizer = demo_base.train_tokenizer(corpus, 300)
    first, second = (demo_base.pretrain(corpus, tokenizer, SMALL) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not first.training
