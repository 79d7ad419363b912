"""koff train, and the README's own script, on two processes: all of them come to every line."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from support.command_line import succeed
from support.distributed import run, torchrun
from support.readme import prepare

import koff

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_data_root")]

# As `accelerate launch` starts processes on a machine with GPUs; --device cpu keeps off these.
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"),
    *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
]


def options(root: Path, output: Path, rows: int) -> list[str]:
    settings = (f"train.batch_size={rows}", "train.save_every=0")
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


def test_the_readme_runs_under_torchrun_as_it_stands(tmp_path):
    (tmp_path / "example.py").write_text(prepare(tmp_path), encoding="utf-8")
    run([*torchrun(2), "example.py"], cwd=tmp_path)
    assert koff.load(tmp_path / "out").koff.memory_names == ("en", "fr", "es")
