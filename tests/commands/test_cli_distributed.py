"""koff train, and the README's own script, on two processes: all of them come to every line."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import succeed
from support.distributed import TESTS, run, torchrun
from support.readme import prepare

import koff

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_data_root")]

# As `accelerate launch` starts processes on a machine with GPUs; --device cpu keeps off these.
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"),
    *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
]


def options(root: Path, output: Path, rows: int, *more: str) -> list[str]:
    settings = (f"train.batch_size={rows}", "train.save_every=0", *more)
    sets = [text for value in settings for text in ("--set", value)]
    recipe = str(root / "recipe.yaml")
    return ["train", recipe, "--output", str(output), "--device", "cpu", *sets]


@pytest.mark.parametrize("start", [torchrun(2), ACCELERATE], ids=["torchrun", "accelerate launch"])
def test_koff_train_on_two_processes_saves_what_one_saves(start, root, tmp_path):
    alone, output = tmp_path / "alone", tmp_path / "out"
    succeed(*options(root, alone, rows=4))
    text = run([*start, "-m", "koff.cli", *options(root, output, rows=2)])
    assert text.count("saved to") == 1 and text.count("training: 4 steps of 4 x 16 tokens") == 1
    assert " on 2 processes; " in text
    names = [
        {p.relative_to(folder).as_posix() for p in folder.rglob("*")} for folder in (alone, output)
    ]
    assert names[0] == names[1]
    ours, theirs = (json.loads((folder / "koff.json").read_text()) for folder in (output, alone))
    assert ours["kept"] == theirs["kept"]  # the values: tests/training/test_distributed.py
    assert koff.load(output).koff.memory_names == ("en", "fr")
    shutil.rmtree(output)


@pytest.mark.few_bits
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_base_in_few_bits_trains_on_two_processes(name, root, tmp_path):
    """As one process does, within what another order of sums makes: each rank quantises the same
    checkpoint for itself."""
    alone, output = tmp_path / "alone", tmp_path / "out"
    few = (f"quantization={name}", "train.saliency_batches=0")
    succeed(*options(root, alone, 4, *few))
    run([*torchrun(2), "-m", "koff.cli", *options(root, output, 2, *few)])
    for memory in ("en", "fr"):
        file = f"memories/{memory}/lora/adapter_model.safetensors"
        ours, theirs = (load_file(folder / file) for folder in (output, alone))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, atol=1e-4, rtol=1e-3)
    assert koff.load(output).koff.memory_names == ("en", "fr")


def test_koff_train_fsdp_saves_what_one_process_saves(root, tmp_path, monkeypatch):
    alone, output = tmp_path / "alone", tmp_path / "out"
    # Gates that start alike: saliency depends on the rows of a process.
    alike = "train.saliency_batches=0"
    succeed(*options(root, alone, 4, alike))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    shared = [text for text in options(root, output, 2, alike) if text not in ("--device", "cpu")]
    text = run([*torchrun(2), str(TESTS / "support" / "fsdp_command.py"), *shared, "--fsdp"])
    assert text.count("saved to") == 1 and " on 2 processes; " in text
    names, facts = [], []
    for folder in (alone, output):
        names.append({p.relative_to(folder).as_posix() for p in folder.rglob("*")})
        facts.append(json.loads((folder / "koff.json").read_text()))
    assert names[0] == names[1] and facts[0]["kept"] == facts[1]["kept"]
    for file in ("model.safetensors", "memories/en/lora/adapter_model.safetensors"):
        ours, theirs = (load_file(folder / file) for folder in (output, alone))
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():  # the bound: tests/training/test_distributed.py
            torch.testing.assert_close(ours[name], value, atol=1e-4, rtol=1e-3)
    assert koff.load(output).koff.memory_names == ("en", "fr")


def test_the_readme_runs_under_torchrun_as_it_stands(tmp_path):
    (tmp_path / "example.py").write_text(prepare(tmp_path), encoding="utf-8")
    run([*torchrun(2), "example.py"], cwd=tmp_path)
    assert koff.load(tmp_path / "out").koff.memory_names == ("en", "fr", "es")
