"""warmup: every operation runs at the given sizes; kernels compile where nobody can write."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import koffkernels

ROOT = Path(__file__).parents[2]
module = sys.modules["koffkernels.warmup"]  # the package has a function of that name
SHAPE = koffkernels.LayerShape(
    16, 24, heads=4, kv_heads=2, head_dim=4, rank=3, prefix=5, memories=2
)


@pytest.mark.parametrize("training", [False, True])
def test_warmup_runs_every_operation(training, monkeypatch):
    calls = []
    for name in ("gated_mlp", "lora_linears", "prefix_attention"):
        real = getattr(module, name)

        def spy(x, *args, real=real, name=name, **kwargs):
            y = real(x, *args, **kwargs)
            first = y[0] if isinstance(y, tuple) else y
            calls.append((name, tuple(x.shape), first.requires_grad))
            return y

        monkeypatch.setattr(module, name, spy)
    batches = ((1, 1), (3, 7))
    koffkernels.warmup(SHAPE, batches=batches, dtype=torch.float32, training=training, device="cpu")
    assert {name for name, _, _ in calls} == {"gated_mlp", "lora_linears", "prefix_attention"}
    assert {(s[0], s[1]) for name, s, _ in calls if name == "gated_mlp"} == set(batches)
    assert all(grad == training for _, _, grad in calls)


def test_warmup_refuses_sizes():
    with pytest.raises(ValueError, match="warmup: hidden must be at least 1, got 0; take it from"):
        koffkernels.warmup(SHAPE._replace(hidden=0), device="cpu")


def test_warmup_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="warmup: device must be one that torch finds, got cuda"):
        koffkernels.warmup(SHAPE)


def test_kernels_find_a_cache_where_home_is_not_writable():
    code = (
        "import os; import koffkernels._triton.shared.launch; print(os.environ['TRITON_CACHE_DIR'])"
    )
    hidden = ("TRITON_CACHE_DIR", "TRITON_HOME")
    env = {k: v for k, v in os.environ.items() if k not in hidden} | {"HOME": "/proc/nobody"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    folder = Path(result.stdout.strip())
    assert folder.is_dir(), result.stderr
    folder.rmdir()
