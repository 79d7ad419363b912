"""Several processes (gloo) learn what one process learns with the same global batch: gates and
memories, the mask fixed on the way, compacted and saved."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.distributed import launch

pytestmark = pytest.mark.slow

U = 2**-24  # unit roundoff of fp32
STEPS, EPSILON = 4, 0.1  # of the worker's runs; EPSILON is Adam's


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    launch(1, "distributed_worker.py", folder, "ddp")
    return load_file(folder / "ddp1.safetensors"), json.loads((folder / "ddp1.json").read_text())


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_ranks_equal_one_process_with_the_same_global_batch(mode, ranks, alone, tmp_path):
    launch(ranks, "distributed_worker.py", tmp_path, mode)
    tensors, logs = alone
    together = load_file(tmp_path / f"{mode}{ranks}.safetensors")
    assert together.keys() == tensors.keys()
    for name, want in tensors.items():
        got = together[name]
        if not want.is_floating_point():
            assert torch.equal(got, want), name  # the mask
            continue
        if name.endswith("logits"):
            continue
        # Means over ranks of means over rows, instead of means over all rows: sums in another
        # order. Clipped to a norm of 1, a gradient is off by at most 64 u (backward in fp32,
        # tests/support/tolerances.py), and Adam's step lr g / (|g| + epsilon) makes lr 64 u /
        # epsilon of that. Each step starts from the error of those before it, and adds no more than
        # they did together: a factor of 2 per step.
        rate = 0.1 if "log_alpha" in name else 1e-2
        error = 2**STEPS * rate * 64 * U / EPSILON + 2 * U * want.abs()
        assert ((got - want).abs() <= error).all(), (name, (got - want).abs().max())
    _, ours = logs, json.loads((tmp_path / f"{mode}{ranks}.json").read_text())
    for run, entries in logs.items():
        assert [set(e) for e in ours[run]] == [set(e) for e in entries]
        for mine, theirs in zip(ours[run], entries, strict=True):
            for key, value in theirs.items():
                if key not in ("train_runtime",) and not key.endswith("_per_second"):
                    assert mine[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (run, key)
