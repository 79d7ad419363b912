"""Commands that change a saved folder or make another of it, end to end on a tiny random Llama."""

import json
import random
import shutil
from dataclasses import asdict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import bare
from support.command_line import fail, succeed, write_split
from transformers import AutoModelForCausalLM

import koff
from koff.commands.recipe import TrainSettings

pytestmark = pytest.mark.usefixtures("no_real_fsync", "no_data_root")


@pytest.fixture
def folder(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path / "out"


def contents(folder):
    changing = ("koff.json", "README.md")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in changing
    }


def test_add_eval_generate_and_remove_a_memory(root, folder, tmp_path, monkeypatch):
    before = contents(folder)
    for split, letters in (("train", "gh é"), ("test", "gh é")):
        write_split(tmp_path, f"de.{split}", letters, random.Random(1))
    monkeypatch.chdir(tmp_path)
    arguments = ("--name", "de", "--data", "de.train.jsonl", "--device", "cpu")
    options = ("--steps", 3, "--batch-size", 2, "--set", "train.block_size=16")
    rate = ("--set", "train.lora_learning_rate=1e-2", "--test", "de.test.jsonl")
    assert "memory de added" in succeed("add-memory", folder, *arguments, *options, *rate)
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[1] for name in set(after) - set(before)} == {"de"}
    assert "memory de" in succeed("info", folder)
    assert succeed(
        "generate", folder, "ghg", "--memory", "de", "--device", "cpu", "--max-new-tokens", 3
    ).startswith("ghg")
    file = tmp_path / "rows.json"
    monkeypatch.chdir("/")  # its data are found again from anywhere
    succeed("eval", folder, "--json", file, "--device", "cpu", "--card")
    rows = json.loads(file.read_text("utf-8"))
    cells = {(row["memory"], row["domain"]) for row in rows}
    assert cells == {(m, d) for m in ("en", "fr", "de", None) for d in ("en", "fr", "de", "math")}
    facts, card = json.loads((folder / "koff.json").read_text()), (folder / "README.md").read_text()
    assert facts["metadata"]["results"] == rows and facts["memories"] == ["en", "fr", "de"]
    assert "| koff | de | de | test |" in card and "de: de.train.jsonl" in card
    assert "en: en.train.jsonl" in card and "| general mixture | math: math.train.jsonl |" in card
    assert "removed" in succeed("remove-memory", folder, "de")
    assert contents(folder) == before
    card = (folder / "README.md").read_text()
    assert "| koff | de |" not in card and "de.train.jsonl" not in card
    assert koff.load(folder).koff.memory_names == ("en", "fr")


def test_add_memory_begins_from_the_recipe_in_the_folder(root, folder, tmp_path, monkeypatch):
    """Of a run of rows of 16 tokens: the default of 512 exceeds the model's 128 positions."""
    stored = json.loads((folder / "recipe.json").read_text("utf-8"))
    of_the_run = {"distractor_rows": 0.5, "distillation_weight": 0.5, "mask": "magnitude"}
    stored["recipe"]["train"] |= of_the_run | {"lora_learning_rate": 0.02, "general_every": 3}
    stored["recipe"]["seed"] = 7
    (folder / "recipe.json").write_text(json.dumps(stored), "utf-8")
    write_split(tmp_path, "de", "gh é", random.Random(1))
    monkeypatch.chdir(tmp_path)
    options = ("--data", "de.jsonl", "--device", "cpu")
    said = succeed("add-memory", folder, "--name", "de", *options)
    assert f"settings of {folder}/recipe.json, and the options: 4 steps of 4 rows of 16" in said
    said = succeed("add-memory", folder, "--name", "es", *options, "--steps", 2, "--set", "seed=8")
    assert "2 steps of 4 rows of 16 tokens per device, LoRA at 0.02, KV at 0.01" in said
    added = json.loads((folder / "koff.json").read_text("utf-8"))["metadata"]["added"]
    de, es = added["de"], added["es"]
    assert (de["seed"], es["seed"], es["train"]["steps"]) == (7, 8, 2)
    kept = {"steps": 4, "block_size": 16, "general_every": 3, "logging_every": 1}
    assert {name: de["train"][name] for name in kept} == kept
    usual = asdict(TrainSettings())
    for name in (*of_the_run, "save_every", "width_multiple_of"):
        assert de["train"][name] == usual[name]


def test_add_memory_without_a_recipe_begins_from_defaults(folder, tmp_path, monkeypatch):
    (folder / "recipe.json").unlink()
    write_split(tmp_path, "de", "gh é", random.Random(1))
    monkeypatch.chdir(tmp_path)
    arguments = ("add-memory", folder, "--name", "de", "--data", "de.jsonl", "--device", "cpu")
    assert "positions, got 512 + 4" in fail(*arguments)
    said = succeed(*arguments, "--steps", 2, "--set", "train.block_size=16")
    assert "settings a recipe's defaults, and the options: 2 steps of 8 rows of 16" in said


def test_add_memory_refuses_a_damaged_recipe(folder, tmp_path, monkeypatch):
    (folder / "recipe.json").write_text("{}", "utf-8")
    before = contents(folder)
    write_split(tmp_path, "de", "gh é", random.Random(1))
    monkeypatch.chdir(tmp_path)
    line = fail("add-memory", folder, "--name", "de", "--data", "de.jsonl")
    assert "koff add-memory: recipe.json must hold the recipe and its folder" in line
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--name", "en"), "the name must differ from those there are, ['en', 'fr']"),
        (("--name", "../x"), "a memory name must be 1 to 64 letters"),
        (("--data", "none.jsonl"), "none.jsonl must be an existing file"),
        (("--set", "model=other"), "--set must name a key under data, general, train"),
        (("--set", "koff.target_sparsity=0.5"), "the backbone is fixed"),
        (("--set", "train.stpes=3"), "did you mean 'steps'?"),
        (("--set", "koff.lora=null", "--set", "koff.kv=null"), "must learn something"),
        (("--set", "data.fr.train=de.jsonl"), "data must name 'de' alone"),
        (("--steps", "0"), "steps must be at least 1, got 0"),
        (("--set", "train.block_size=500"), "positions, got 500 + 4"),
    ],
)
def test_add_memory_errors_are_one_line_and_change_nothing(
    trained, tmp_path, monkeypatch, options, message
):  # fmt: skip
    write_split(tmp_path, "de", "gh é", random.Random(1))
    monkeypatch.chdir(tmp_path)
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    defaults = {"--name": "de", "--data": "de.jsonl"}
    given = [x for k, v in defaults.items() if k not in options for x in (k, v)]
    assert message in fail("add-memory", trained, *given, *options)
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()} == before


def test_import_memory(root, folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(root / "model")
    config = LoraConfig(r=2, target_modules=["up_proj", "down_proj"])
    get_peft_model(base, config).save_pretrained(tmp_path / "lora")
    arguments = ("--lora", tmp_path / "lora", "--kv", folder / "memories/en/kv")
    succeed("import-memory", folder, "--name", "de", *arguments)
    model = koff.load(folder)
    assert model.koff.memory_names == ("en", "fr", "de") and model.koff.memories["de"].length == 4
    line = fail("import-memory", folder, "--name", "es", "--lora", tmp_path / "none")
    assert "adapter_config.json must be there" in line
    assert "must have a LoRA or a KV part" in fail("import-memory", folder, "--name", "es")
    assert "must be one of ['en', 'fr', 'de'], got 'es'" in fail("remove-memory", folder, "es")


@torch.no_grad()
def test_export(trained, tmp_path):
    output, ids = tmp_path / "exported", torch.arange(3, 9)[None]
    succeed("export", trained, "--merged", "fr", "--output", output)
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "kv", "tokenizer.json"} <= names
    assert "koff.json" not in names and "memories" not in names
    plain = AutoModelForCausalLM.from_pretrained(output)
    model = koff.load(trained)
    assert (plain(ids).logits - model(ids).logits).abs().max() > 1e-6
    line = fail("export", trained, "--merged", "fr", "--output", output)
    assert "the output must be a new or empty folder" in line
    line = fail("export", trained, "--merged", "de", "--output", tmp_path / "other")
    assert "must be one of ['en', 'fr'], got 'de'" in line
    assert "got no folder there" in fail(
        "export", tmp_path / "none", "--merged", "en", "--output", tmp_path / "other"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported"]


def test_export_of_gguf(trained, tmp_path):
    line = fail("export", trained, "--gguf", tmp_path / "gguf")
    assert "koff.export_gguf: memory 'en' must have no learned keys" in line
    for wrong in (
        [],
        ["--merged", "fr"],
        ["--output", tmp_path / "x"],
        ["--merged", "fr", "--output", tmp_path / "x", "--gguf", tmp_path / "gguf"],
        ["--merged", "fr", "--output", tmp_path / "x", "--memory", "fr"],
        ["--merged", "fr", "--output", tmp_path / "x", "--without-kv"],
    ):
        assert "the options must be --merged NAME --output DIR, or" in fail(
            "export", trained, *wrong
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_eval_of_a_hub_id_from_an_offline_cache(root, trained, tmp_path):
    """The layout of huggingface_hub's cache, made by hand: blobs, refs, snapshots full of links."""
    repo = tmp_path / "hub/models--someone--model"
    snapshot = repo / "snapshots/0123456789"
    for index, path in enumerate(sorted(p for p in trained.rglob("*") if p.is_file())):
        link = snapshot / path.relative_to(trained)
        for place in (repo / f"blobs/{index}", link):
            place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, repo / f"blobs/{index}")
        link.symlink_to(repo / f"blobs/{index}")
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0123456789")
    code = "import sys; from koff.cli import app; app(sys.argv[1:])"
    env = {"PYTHONPATH": str(bare.ROOT), "HF_HOME": str(tmp_path), "KOFF_DATA": str(root)}
    arguments = ("eval", "someone/model", "--device", "cpu", "--json", tmp_path / "rows.json")
    bare.run(bare.sys.executable, code, *arguments, cwd=tmp_path, **env)
    got = json.loads((tmp_path / "rows.json").read_text("utf-8"))
    succeed("eval", trained, "--device", "cpu", "--json", tmp_path / "local.json")
    assert got == json.loads((tmp_path / "local.json").read_text("utf-8"))
