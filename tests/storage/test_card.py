"""The model card says what is so, and the code in it runs as it stands."""

import json
import re
import shutil

import pytest
import torch
from support import bare
from support.character_tokenizer import make_tokenizer
from support.models import attached
from support.widths import spread

import koff

pytestmark = pytest.mark.usefixtures("no_real_fsync")

RUN = """
import contextlib, io, json, os, sys
from pathlib import Path
shown = []
for folder, code in json.loads(Path(sys.argv[1]).read_text()):
    os.chdir(folder)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, folder, "exec"), {})
    shown.append(out.getvalue())
Path(sys.argv[1]).write_text(json.dumps(shown))
"""
ROWS = [
    dict(variant="koff", memory=None, domain="en", split="test", perplexity=3.25, bits_per_byte=1.5)
]


def code_blocks(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)


def outputs(python, blocks, place, **env):
    """What blocks of code print, each run in its folder."""
    place.mkdir()
    (place / "blocks.json").write_text(json.dumps([(str(f), code) for f, code in blocks]))
    check = "" if env else bare.NO_KOFF
    bare.run(python, check + RUN, place / "blocks.json", cwd=place, **env)
    return json.loads((place / "blocks.json").read_text())


def saved(folder, kind, tokenizer, **config):
    changes = {"vocab_size": len(make_tokenizer()), "eos_token_id": None}
    model = spread(attached("llama", changes=changes, target_sparsity=0.4, **config))
    koff.binarize(model, per_layer=kind, multiple_of=8)
    metadata = {"base": "some/base", "results": ROWS, "data": {"en": "wiki:en:train"}}
    small = koff.compact(model, inplace=True)
    return koff.save(small, folder, tokenizer=tokenizer, metadata=metadata)


@pytest.mark.slow
def test_the_code_in_a_card_runs(bare_python, tmp_path):
    tokenizer = make_tokenizer(bos_token="<s>")
    folders = {
        "both": saved(tmp_path / "a", "global", tokenizer),
        "lora": saved(tmp_path / "b", "uniform", None, kv=None),
        "kv": saved(tmp_path / "c", "uniform", tokenizer, lora=None),
        "none": saved(tmp_path / "d", "global", None, memories=(), lora=None, kv=None),
    }
    with_koff, without = [], []
    for folder in folders.values():
        first, second = code_blocks(folder)
        assert "import koff" in first and "koff." not in second
        with_koff.append((folder, first))
        without.append((folder, second))
    for name in ("both", "lora", "kv"):
        exported = koff.export_merged(folders[name], "en", tmp_path / f"exported_{name}")
        (only,) = code_blocks(exported)
        without.append((exported, only))
    ours = outputs(bare.sys.executable, with_koff, tmp_path / "1", PYTHONPATH=str(bare.ROOT))
    theirs = outputs(bare_python, without, tmp_path / "2")
    assert all(len(text) > 20 for text in ours)
    assert theirs == [*ours, *ours[:3]]


def test_a_card_says_what_was_measured_and_how_it_was_made(tmp_path):
    folder = saved(tmp_path / "out", "global", None)
    card = (folder / "README.md").read_text()
    facts = json.loads((folder / "koff.json").read_text())
    widths = facts["widths"]
    for part in (
        "base_model: some/base\n",
        "| memories | en, keys, es |",
        f"| MLP neurons removed | {facts['sparsity']['mlp']:.2%} |",
        f"| MLP widths | {min(widths)} to {max(widths)} (dense: 96) |",
        "| trained on | en: wiki:en:train |",
        "| koff | none | en | test | 3.250 | 1.5000 |",
        f"torch {torch.__version__}",
    ):
        assert part in card, part
    assert "trust_remote_code=True" in card
    stock = saved(tmp_path / "stock", "uniform", None)
    assert "trust_remote_code" not in (stock / "README.md").read_text()


@pytest.mark.parametrize("base", ["/home/someone/base", "a: b", None])
def test_a_base_that_is_no_hub_id_stays_out_of_the_cards_header(base, tmp_path):
    model = attached("llama", target_sparsity=0)
    folder = koff.save(model, tmp_path / "out", metadata={"base": base})
    header = (folder / "README.md").read_text().split("---")[1]
    assert "base_model" not in header


def test_a_card_names_the_data_of_the_memories_that_are_there(tmp_path):
    model = attached("llama", target_sparsity=0)
    data = {"en": "en.train.jsonl", "keys": "keys.jsonl", "gone": "gone.jsonl"}
    folder = koff.save(model, tmp_path / "out", metadata={"data": data})
    lora = tmp_path / "lora"
    shutil.copytree(folder / "memories/en/lora", lora)

    def trained():
        return re.findall(r"\| trained on \| (.*) \|", (folder / "README.md").read_text())

    assert trained() == ["en: en.train.jsonl, keys: keys.jsonl"]
    koff.remove_memory(folder, "en")
    assert trained() == ["keys: keys.jsonl"]
    assert "en" not in json.loads((folder / "koff.json").read_text())["metadata"]["data"]
    koff.import_memory(folder, "en", lora=lora)  # trained elsewhere, on nobody knows what
    assert trained() == ["keys: keys.jsonl"]
    koff.import_memory(folder, "gone", lora=lora)
    assert trained() == ["keys: keys.jsonl"]


def test_a_card_of_gates_alone_names_their_data(tmp_path):
    model = spread(attached("llama", target_sparsity=0.4, memories=(), lora=None, kv=None))
    koff.binarize(model, multiple_of=8)
    metadata = {"data": {"en": "en.train.jsonl"}}
    folder = koff.save(koff.compact(model), tmp_path / "out", metadata=metadata)
    assert "| trained on | en: en.train.jsonl |" in (folder / "README.md").read_text()
