"""Two processes (gloo): one step on two ranks is one step on a batch twice as large."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TESTS = Path(__file__).parents[1]
WORKER = TESTS / "support" / "distributed_worker.py"


def launch(ranks: int, folder: Path, mode: str) -> dict[str, torch.Tensor]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    if ranks > 1:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    runs = []
    for rank in range(ranks):
        env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else common
        command = [
            sys.executable,
            str(WORKER),
            str(folder),
            mode,
        ]
        pipe = subprocess.PIPE
        runs.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=subprocess.STDOUT))
    outputs = [run.communicate(timeout=240)[0].decode() for run in runs]
    assert all(run.returncode == 0 for run in runs), "\n".join(outputs)[-4000:]
    return load_file(folder / f"{ranks}.safetensors")


@pytest.mark.parametrize("mode", ["trainer", "fsdp"])
def test_two_ranks_equal_one_with_twice_the_batch(mode, tmp_path):
    alone, together = launch(1, tmp_path, mode), launch(2, tmp_path, mode)
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        # Means over ranks instead of over rows: fp32 rounding, which Adam's division by the
        # gradient's own size can blow up in single entries; two steps at rate 1e-2.
        gap = (value.float() - together[name].float()).abs()
        assert gap.mean() < 1e-4, name


def test_two_ranks_write_one_checkpoint_and_resume_from_it(tmp_path):
    launch(2, tmp_path, "resume")
    names = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "koff_checkpoint.json"} <= names
