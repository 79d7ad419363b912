"""The microbenchmarks: every case runs, and a wrong result prints no time."""

import json
import os
import subprocess
import sys

import pytest
import torch
from support.imports import ROOT

from bench.gpu import smoke
from bench.gpu.context import TINY, Bench
from bench.micro import peers
from bench.micro.cases import CASES, MODELS, check, scaled
from koffkernels.clock import WallClock


@pytest.mark.slow
def test_micro_runs_and_writes_what_it_promises(tmp_path):
    """One model, tiny, without what has to be compiled."""
    file = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "bench/micro", "-q", "-p", "no:cacheprovider"]
    command += ["--divide", "64", "--benchmark-only", "--benchmark-max-time", "0.001"]
    command += ["--benchmark-min-rounds", "1", "--benchmark-calibration-precision", "1"]
    command += ["--benchmark-json", str(file), "-k", "qwen and not compiled and not flex"]
    # A worker of xdist would hand its variables on, under which pytest-benchmark measures nothing.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    result = json.loads(file.read_text())
    expected = [c for c in CASES if c[3] not in ("compiled", "flex")]
    assert len(result["benchmarks"]) == len(expected)
    for row in result["benchmarks"]:
        info = row["extra_info"]
        assert info["bytes"] > 0 and info["peak_bytes"] > 0 and info["share_of_limit"] > 0, row
    groups = {row["group"] for row in result["benchmarks"]}
    assert "gated_mlp decode mixed qwen2.5-7b" in groups
    assert "node" not in result["machine_info"] and result["machine_info"]["koff"]["torch"]


@pytest.mark.parametrize("name", MODELS)
def test_micro_scaled_models_keep_their_proportions(name):
    whole, part = MODELS[name], scaled(MODELS[name], 4)
    assert scaled(whole, 1) == whole
    assert part.heads / part.kv_heads == whole.heads / whole.kv_heads
    assert part.head_dim == whole.head_dim
    assert part.intermediate / part.hidden == pytest.approx(
        whole.intermediate / whole.hidden, rel=0.05
    )


@pytest.mark.parametrize("operation", ["gated_mlp", "lora_linear", "prefix_attention"])
@pytest.mark.parametrize("training", [False, True])
def test_micro_wrong_results_are_not_timed(operation, training):
    bench = Bench(torch.device("cpu"), False, TINY, WallClock(), 0, dtype=torch.float32)
    found = peers.problem(bench, operation, 2, 16, 3)
    check(found, found.ours, training, torch.float32)
    off = lambda t: found.ours(t) * 1.001  # noqa: E731
    with pytest.raises(AssertionError, match="y is off by 0.001"):
        check(found, off, training, torch.float32)


def test_micro_wrong_gradients_are_not_timed():
    bench = Bench(torch.device("cpu"), False, TINY, WallClock(), 0, dtype=torch.float32)
    found = peers.problem(bench, "lora_linear", 2, 16, 1)

    def off(t):
        return found.ours({**t, "lora.a": t["lora.a"].detach()}) + 0 * t["lora.a"].sum()

    with pytest.raises(AssertionError, match="dlora.a is off by 1"):
        check(found, off, True, torch.float32)


def test_micro_peers_are_other_code_than_ours():
    """What is compared with is not koffkernels under another name."""
    bench = Bench(torch.device("cpu"), False, TINY, WallClock(), 0, dtype=torch.float32)
    for operation in ("gated_mlp", "lora_linear", "prefix_attention"):
        found = peers.problem(bench, operation, 4, 8, 1)
        made = peers.peers(operation, found._replace(ours=_fails), 1)
        for name, make in made.items():
            if name not in ("koff", "compiled", "flex"):
                smoke._run(make(), found, True, False)


def _fails(tensors):
    raise AssertionError("a peer called koffkernels")
