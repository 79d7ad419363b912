"""The command line as a user calls it, in a folder with a tiny model, data and a recipe."""

import json
import random
from pathlib import Path

import torch
import yaml
from support.character_tokenizer import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from koff.cli import app

RECIPE = {
    "model": "model",
    "dtype": "float32",
    "data": {
        "en": {"train": "en.train.jsonl", "test": "en.test.jsonl"},
        "fr": {"train": "fr.train.jsonl", "test": "fr.test.jsonl"},
    },
    "general": {"math": {"train": "math.train.jsonl", "test": "math.test.jsonl"}},
    "koff": {
        "target_sparsity": 0.5,
        "lora": {"r": 2, "alpha": 4, "target_modules": "all-linear"},
        "kv": {"num_tokens": 4, "init": "text"},
    },
    "train": {
        "steps": 4,
        "batch_size": 4,
        "block_size": 16,
        "general_every": 2,
        "width_multiple_of": 16,
        "save_every": 2,
        "logging_every": 1,
    },
    "seed": 0,
}


def write_split(folder: Path, name: str, letters: str, rng: random.Random) -> None:
    """Write twenty documents of random letters to ``name``.jsonl."""
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(20):
            file.write(json.dumps({"text": "".join(rng.choices(letters, k=60))}) + "\n")


def fill_root(folder: Path) -> Path:
    """Write a tiny model, its tokenizer, data of three domains and a recipe to a folder."""
    rng = random.Random(0)
    for name, letters in (("en", "abcd "), ("fr", "efghé "), ("math", "aceg ")):
        for split in ("train", "test"):
            write_split(folder, f"{name}.{split}", letters, rng)
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), "utf-8")
    return folder


def invoke(*arguments: object):
    """Run `koff` in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    """Runs a command that must work, and returns what it wrote to stdout."""
    result = invoke(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def fail(*arguments: object) -> str:
    """Runs a command that must fail with one line on stderr, and returns the line."""
    result = invoke(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.output
    return result.stderr


def weights_of(output: Path) -> dict[str, bytes]:
    """The files of tensors that a finished run has saved; those of its checkpoints are left out."""
    paths = {path.relative_to(output).as_posix(): path for path in output.rglob("*.safetensors")}
    found = {n: p.read_bytes() for n, p in paths.items() if not n.startswith("checkpoints/")}
    assert "model.safetensors" in found
    return found
