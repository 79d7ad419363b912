"""The command line, end to end on a tiny random Llama, and every error as one line."""

import json
import shutil

import pytest
import torch
from support.command_line import fail, invoke, succeed

import koff
from koff.commands import train
from koff.commands.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("no_data_root")


def test_help_lists_the_commands():
    text = succeed("--help")
    for name in ("demo", "train", "eval", "analyse", "generate", "info"):
        assert name in text


def test_version():
    assert succeed("--version") == f"koff {koff.__version__}\n"


def test_train_writes_the_model_its_recipe_and_its_log(trained):
    for name in ("koff.json", "recipe.json", "train_log.json", "config.json", "tokenizer.json"):
        assert (trained / name).is_file(), name
    assert sorted(item.name for item in (trained / "memories").iterdir()) == ["en", "fr"]
    log = json.loads((trained / "train_log.json").read_text("utf-8"))
    assert log["sparsity"]["hard"] and log["sparsity"]["mlp"] == 0.5
    assert log["history"] and log["seconds"] > 0
    stored = json.loads((trained / "recipe.json").read_text("utf-8"))["recipe"]
    assert stored["train"]["steps"] == 4 and stored["model"] == "model"


def test_eval_measures_every_memory_and_the_base_and_writes_json(trained, tmp_path):
    file = tmp_path / "rows.json"
    text = succeed("eval", trained, "--base", "--json", file, "--device", "cpu")
    assert "own memory" in text and "dense" in text
    rows = json.loads(file.read_text("utf-8"))
    cells = {(row["variant"], row["memory"], row["domain"]) for row in rows}
    domains, memories = ("en", "fr", "math"), ("en", "fr", None)
    assert cells == {("base", None, domain) for domain in domains} | {
        ("koff", memory, domain) for memory in memories for domain in domains
    }
    assert set(rows[0]) == {
        "variant", "memory", "domain", "split", "perplexity", "bits_per_byte", "tokens"
    }  # fmt: skip
    succeed("eval", trained, "--base", "--json", file, "--device", "cpu")
    assert json.loads(file.read_text("utf-8")) == rows


def test_analyse_shows_the_attention_on_a_memory_and_writes_json(trained, tmp_path):
    file = tmp_path / "mass.json"
    text = succeed("analyse", trained, "--domain", "fr", "--json", file, "--device", "cpu")
    assert "attention of fr (test) to memory fr" in text and "of it on the first token" in text
    found = json.loads(file.read_text("utf-8"))
    assert (found["memory"], found["domain"], found["split"]) == ("fr", "fr", "test")
    assert found["tokens"] > 0 and found["frozen_tokens"] == 1
    assert [len(heads) for heads in found["heads"]] == [4, 4]
    assert [len(tokens) for tokens in found["positions"]] == [4, 4]
    for heads, tokens in zip(found["heads"], found["positions"], strict=True):
        assert 0 < sum(heads) / 4 < 1 and sum(heads) / 4 == pytest.approx(sum(tokens))
        assert f"{sum(heads) / 4:.4f}" in text
    other = ("--memory", "en", "--batch-size", 1, "--device", "cpu")
    assert "to memory en" in succeed("analyse", trained, "--domain", "math", *other)


def test_analyse_errors_are_one_line(trained, tmp_path):
    line = fail("analyse", trained, "--domain", "de")
    assert "--domain must be one of ['en', 'fr', 'math'] for the test split, got 'de'" in line
    line = fail("analyse", trained, "--domain", "math")
    assert "koff analyse: memory must be one of ['en', 'fr'], got 'math'" in line
    line = fail("analyse", trained, "--domain", "en", "--json", tmp_path / "none" / "mass.json")
    assert "must lie in an existing folder" in line


def test_eval_measures_the_first_documents_alone(trained, tmp_path):
    """Whole documents, the same for the base and for every memory."""
    whole, part = tmp_path / "whole.json", tmp_path / "part.json"
    succeed("eval", trained, "--json", whole, "--device", "cpu")
    succeed("eval", trained, "--base", "--max-tokens", 100, "--json", part, "--device", "cpu")
    whole, part = (json.loads(path.read_text("utf-8")) for path in (whole, part))
    # Documents of 60 letters, a token each, with BOS and EOS: two of them are 124 tokens, or 7
    # blocks of 16, of which 15 tokens each are scored.
    assert {row["tokens"] for row in part} == {105}
    assert all(row["tokens"] > 105 for row in whole)
    assert len({row["variant"] for row in part}) == 2
    assert invoke("eval", trained, "--max-tokens", 0).exit_code == 2


def test_eval_swaps_the_halves_of_memories(trained, tmp_path):
    file = tmp_path / "swaps.json"
    shown = succeed("eval", trained, "--swaps", "--json", file, "--device", "cpu")
    rows = json.loads(file.read_text("utf-8"))
    assert [(r["lora"], r["kv"], r["domain"]) for r in rows[:3]] == [
        ("en", "en", "en"), ("en", "en", "fr"), ("en", "fr", "en")
    ]  # fmt: skip
    assert len(rows) == 18 and {row["split"] for row in rows} == {"test"}
    assert f"{rows[2]['perplexity']:.2f}" in shown and "LoRA of" in shown
    line = fail("eval", trained, "--swaps", "--base")
    assert "--swaps must stand alone, got --base too" in line


def test_eval_finds_the_data_where_koff_data_says(root, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("KOFF_DATA", str(tmp_path))
    assert "en.test.jsonl must be an existing file" in fail("eval", trained)
    for name in ("en", "fr", "math"):
        (tmp_path / f"{name}.test.jsonl").symlink_to(root / f"{name}.test.jsonl")
    assert "own memory" in succeed("eval", trained, "--device", "cpu")


def test_generate_continues_the_prompt(trained):
    arguments = ("generate", trained, "abc", "--max-new-tokens", 5, "--device", "cpu")
    text = succeed(*arguments, "--memory", "en")
    assert text.startswith("abc") and text == succeed(*arguments, "--memory", "en")
    assert succeed(*arguments).startswith("abc")
    sampled = (*arguments, "--temperature", 1.5, "--seed")
    assert succeed(*sampled, 1) == succeed(*sampled, 1)


def test_info_shows_sizes_and_memories(trained):
    text = succeed("info", trained)
    for part in ("model", "en", "fr", "sparsity", "50.0%"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "memories", "gates"),
    [
        (("--without", "lora", "--without", "kv"), [], True),
        (("--without", "kv"), ["en", "fr"], True),
        (("--sparsity", "0", "--without", "lora"), ["en", "fr"], False),
    ],
    ids=["gates-only", "lora-only", "kv-without-gates"],
)
def test_train_parts_can_be_left_out(root, tmp_path, options, memories, gates):
    output = tmp_path / "out"
    succeed("train", root / "recipe.yaml", "--output", output, "--steps", 2, *options)
    folder = output / "memories"
    assert sorted(i.name for i in folder.iterdir()) == memories if memories else not folder.exists()
    for name in memories:
        parts = {item.name for item in (folder / name).iterdir() if item.is_dir()}
        assert parts == {"lora", "kv"} - set(options)
    width = json.loads((output / "config.json").read_text("utf-8")).get("intermediate_size")
    log = json.loads((output / "train_log.json").read_text("utf-8"))
    assert ("sparsity" in log) == gates and (gates or width == 64)
    file = tmp_path / "rows.json"
    succeed("eval", output, "--json", file)
    found = {row["memory"] for row in json.loads(file.read_text("utf-8"))}
    assert found == {None, *memories}


def test_train_resumes_the_same_recipe_and_ends_in_the_same_model(root, trained, tmp_path):
    """Cut a run after its first checkpoint, start it again: the same weights, bit for bit."""
    output = tmp_path / "out"
    output.mkdir()
    shutil.copy(trained / "recipe.json", output)
    shutil.copytree(trained / "checkpoints" / "checkpoint-2", output / "checkpoints/checkpoint-2")
    arguments = ("train", root / "recipe.yaml", "--output", output, "--device", "cpu")
    assert "got one with another train.steps" in fail(*arguments, "--steps", 3)
    succeed(*arguments)
    for file in sorted(trained.rglob("*.safetensors")):
        name = file.relative_to(trained)
        if "checkpoints" not in name.parts:
            assert (output / name).read_bytes() == file.read_bytes(), name
    log = json.loads((output / "train_log.json").read_text("utf-8"))
    assert log["resumed_from"].endswith("checkpoint-2")


def test_train_says_that_it_starts_from_the_beginning(root, trained, tmp_path, caplog):
    output = tmp_path / "out"
    output.mkdir()
    shutil.copy(trained / "recipe.json", output)
    succeed("train", root / "recipe.yaml", "--output", output, "--device", "cpu")
    assert "left no checkpoint: it starts from the beginning" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "train.stpes=3"), "did you mean 'steps'?"),
        (("--set", "train.steps"), "an override must read KEY=VALUE"),
        (("--steps", "0"), "train: steps must be at least 1, got 0"),
        (("--sparsity", "0.99"), "target_sparsity must lie in 0..0.953"),
        (("--without", "mlp"), "--without must be lora or kv, got 'mlp'"),
        (("--sparsity", "0", "--without", "lora", "--without", "kv"), "must learn something"),
        (("--set", "data.en.train=none.jsonl"), "none.jsonl must be an existing file"),
        (("--set", "data.en.test=none.jsonl"), "none.jsonl must be an existing file"),
        (("--set", "data.en.field=body"), "line 1 must have the field 'body', got ['text']"),
        (("--set", "model=./none"), "model must be an existing folder or a hub id"),
        (("--set", "model=no/such"), "koff: the base model must be a folder (below"),
        (("--fsdp",), "--fsdp must have several processes to share the base, got one"),
        (("--device", "cdu"), "device must be cpu (or left out), got 'cdu'"),
        (("--set", "train.block_size=5000"), "positions, got 5000 + 4"),
        (
            ("--set", "train.width_multiple_of=300"),
            "recipe: in train: width_multiple_of must let 50 % of the MLP neurons go, got 300, by "
            "which a layer can only keep 64; lower it, or change the target",
        ),
        (("--set", "koff.kv.num_tokens=100", "--set", "train.block_size=60"), "got 60 + 100"),
        (("--set", "general.math.train=short.txt"), "at least one block of 16 tokens, got 3"),
        (("--set", "data.en.train=bad.jsonl"), "bad.jsonl line 2 must be valid JSON"),
    ],
)  # fmt: skip
def test_train_errors_are_one_line_and_write_nothing(root, tmp_path, options, message):
    (root / "short.txt").write_text("a", "utf-8")
    (root / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n', "utf-8")
    output = tmp_path / "deep" / "out"
    assert message in fail("train", root / "recipe.yaml", "--output", output, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cpu"), "--fsdp must have a GPU for each process, got --device cpu"),
        (("--set", "gguf_file=base.gguf"), "--fsdp must have a base in safetensors"),
        (("--set", "quantization=nf4"), "--fsdp must have a plain base, got quantization: nf4"),
    ],
)
def test_what_processes_cannot_share_is_refused(root, tmp_path, monkeypatch, options, message):
    """Whether koff or accelerate is asked for FSDP, which says so in the environment."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = ("train", root / "recipe.yaml", "--output", tmp_path / "out", *options)
    assert message in fail(*command, "--fsdp")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert f"accelerate's {message.replace('--fsdp', '--use_fsdp')}" in fail(*command)
    assert not list(tmp_path.iterdir())


def test_train_in_bf16_needs_no_accelerator_and_no_option(root, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    settings = ("train.bf16=true", "train.steps=1", "train.save_every=0")
    options = [part for text in settings for part in ("--set", text)]
    succeed("train", root / "recipe.yaml", "--output", tmp_path / "out", *options)
    assert (tmp_path / "out" / "koff.json").is_file()


def test_an_accelerator_is_used_unless_the_cpu_is_asked_for(root, monkeypatch):
    recipe = load_recipe(root / "recipe.yaml")
    found = {}
    monkeypatch.setattr(train, "KoffTrainingArguments", lambda **given: found.update(given))
    for there, device, on_cpu in ((True, None, False), (True, "cpu", True), (False, None, True)):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda there=there: there)
        train.training_arguments(recipe, root, device)
        assert found["use_cpu"] is on_cpu


def test_train_refuses_foreign_models_before_writing(root, tmp_path):
    (root / "gpt2").mkdir(exist_ok=True)
    (root / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}', "utf-8")
    line = fail("train", root / "recipe.yaml", "--output", tmp_path / "out", "--set", "model=gpt2")
    assert "llama, qwen2, qwen3" in line and "'gpt2'" in line
    assert not list(tmp_path.iterdir())


def test_train_refuses_an_output_in_use(root, trained, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    assert "must not hold a finished model" in fail(
        "train", root / "recipe.yaml", "--output", trained
    )
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
    (tmp_path / "notes.txt").write_text("mine", "utf-8")
    assert "must be empty or hold an interrupted run" in fail(
        "train", root / "recipe.yaml", "--output", tmp_path
    )
    assert [item.name for item in tmp_path.iterdir()] == ["notes.txt"]


def test_other_commands_errors_are_one_line(trained, tmp_path):
    assert "must be an existing file" in fail("train", tmp_path / "no.yaml", "--output", "x")
    assert "got no folder there" in fail("eval", tmp_path / "none")
    assert "got a folder without koff.json" in fail("info", tmp_path)
    assert "memory must be one of ['en', 'fr'], got 'de'" in fail(
        "generate", trained, "abc", "--memory", "de"
    )
    assert "split must be 'train', 'validation' or 'test'" in fail(
        "eval", trained, "--split", "dev"
    )
    for command in (("eval",), ("generate", "abc"), ("analyse", "--domain", "en")):
        line = fail(command[0], trained, *command[1:], "--device", "foo")
        assert "--device must be cpu, cuda, cuda:1, ..., got 'foo'" in line
        line = fail(command[0], trained, *command[1:], "--device", "xpu")
        assert "--device must be there, got 'xpu' with no accelerator" in line
    assert "must name a validation split" in fail("eval", trained, "--split", "validation")
    assert "must lie in an existing folder" in fail(
        "eval", trained, "--json", tmp_path / "none" / "rows.json"
    )
    assert not list(tmp_path.iterdir())


def test_a_traceback_can_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("KOFF_TRACEBACK", "1")
    result = invoke("info", tmp_path)
    assert isinstance(result.exception, FileNotFoundError)
