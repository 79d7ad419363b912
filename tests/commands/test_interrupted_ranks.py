"""`koff train` on two ranks that are stopped, killed, or on two machines: the model in the end is
that of two ranks on one machine that nothing happened to, bit for bit."""

import signal
import socket
from pathlib import Path

import pytest
from support.command_line import weights_of
from support.distributed import run, torchrun
from support.started import Started

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_data_root")]

# Enough steps to hit one, a checkpoint now and then.
SETTINGS = dict(steps=60, batch_size=2, save_every=8, logging_every=1)


def train(root: Path, output: Path) -> list[str]:
    sets = [text for key, value in SETTINGS.items() for text in ("--set", f"train.{key}={value}")]
    recipe, folder = str(root / "recipe.yaml"), str(output)
    return ["-m", "koff.cli", "train", recipe, "--output", folder, "--device", "cpu", *sets]


@pytest.fixture(scope="module")
def undisturbed(root):
    run([*torchrun(2), *train(root, root / "undisturbed")])
    return weights_of(root / "undisturbed")


def test_ranks_stop_at_one_step_and_go_on(root, tmp_path, undisturbed):
    output = tmp_path / "out"
    # Ctrl-C, which torchrun passes on to its ranks.
    first = Started([*torchrun(2), *train(root, output)])
    first.await_line("training 3/60")
    first.send(signal.SIGINT)
    assert first.end() != 0
    assert first.text.count("stopped by SIGINT after step ") == 1, first.text
    # One rank alone hears of the end, and the other one ends with it.
    second = Started([*torchrun(2), *train(root, output)])
    second.await_line("60 steps, from step ")
    second.await_line("training 20/60")
    second.send(signal.SIGTERM, rank=1)
    assert second.end() != 0
    assert second.text.count("stopped by SIGTERM after step ") == 1, second.text
    assert "exitcode  : 143" in second.text  # of a rank, in torchrun's report
    assert "60 steps, from step " in run([*torchrun(2), *train(root, output)])
    assert weights_of(output) == undisturbed


def test_torchrun_restarts_ranks_of_which_one_was_killed(root, tmp_path, monkeypatch, undisturbed):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    started = Started([*torchrun(2, "--max-restarts=1"), *train(root, tmp_path / "out")])
    started.await_line("training 12/60")
    started.send(signal.SIGKILL, rank=1)
    assert started.end() == 0, started.text
    # From the last checkpoint, which lies a few steps back.
    assert any("60 steps, from step " in line for line in started.lines)
    assert weights_of(tmp_path / "out") == undisturbed


def test_two_machines_of_one_rank_equal_one_of_two(root, tmp_path, undisturbed):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = f"--rdzv-endpoint=localhost:{free.getsockname()[1]}"
    options = "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=koff", meeting
    command = [*torchrun(1, *options), *train(root, tmp_path / "out")]
    machines = [Started(command), Started(command)]
    assert [machine.end() for machine in machines] == [0, 0], machines[0].text + machines[1].text
    assert sum("saved to" in machine.text for machine in machines) == 1
    assert weights_of(tmp_path / "out") == undisturbed
