"""Several processes (gloo) learn what one process learns with the same global batch: gates and
memories, the mask fixed on the way, accumulated, checkpointed, evaluated, resumed, compacted and
saved."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.distributed import launch

pytestmark = pytest.mark.slow

U = 2**-24  # unit roundoff of fp32
STEPS, EPSILON = 4, 0.1  # of the worker's runs; EPSILON is Adam's


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all of them write, since the others resume from a checkpoint of the one process."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(folder):
    launch(1, "distributed_worker.py", folder, "ddp")
    return load_file(folder / "ddp1.safetensors"), json.loads((folder / "ddp1.json").read_text())


def bound(name, value):
    """How far another order of sums may bring a value in STEPS steps.

    Means over ranks of means over rows, instead of means over all rows: clipped to a norm of 1, a
    gradient is off by at most 64 u (backward in fp32, tests/support/tolerances.py), and Adam's step
    lr g / (|g| + epsilon) makes lr 64 u / epsilon of that. Each step starts from the error of those
    before it, and adds no more than they did together: a factor of 2 per step.
    """
    rate = 0.1 if "log_alpha" in name else 1e-2
    return 2**STEPS * rate * 64 * U / EPSILON + 2 * U * value.abs()


def test_what_is_learned_is_far_more_than_what_is_tolerated(alone):
    tensors, _ = alone
    for part in ("log_alpha", ".lora.", ".kv.", "multiplier"):
        moved = [
            ((after - tensors[f"before.{name}"]).abs() > 100 * bound(name, after)).any()
            for name, after in tensors.items()
            if part in name and name.startswith("mixed.")
        ]
        assert any(moved), part


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_ranks_equal_one_process_with_the_same_global_batch(mode, ranks, alone, folder):
    launch(ranks, "distributed_worker.py", folder, mode)
    wanted, logs = alone
    got = load_file(folder / f"{mode}{ranks}.safetensors")
    assert got.keys() == wanted.keys()
    for name, want in wanted.items():
        if want.is_floating_point():
            gap = (got[name] - want).abs()
            assert (gap <= bound(name, want)).all(), (name, gap.max())
        else:
            assert torch.equal(got[name], want), name  # the mask
    for run, ours in json.loads((folder / f"{mode}{ranks}.json").read_text()).items():
        assert [set(entry) for entry in ours] == [set(entry) for entry in logs[run]]
        for entry, want in zip(ours, logs[run], strict=True):
            for key, value in want.items():
                if key != "train_runtime" and not key.endswith("_per_second"):
                    assert entry[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (run, key)
