"""Which implementation runs: the automatic choice, KOFF_BACKEND and force_backend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.kernel_inputs import normal

import koffkernels
from koffkernels import dispatch

ROOT = Path(__file__).parents[2]
OPS = ["gated_mlp", "lora_linear", "prefix_attention", "hard_concrete"]


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    monkeypatch.setattr(dispatch, "_ENVIRONMENT", None)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter from the repository's root."""
    env = {k: v for k, v in os.environ.items() if k != "KOFF_BACKEND"} | environment
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )


def test_dispatch_chooses_torch_and_says_why():
    assert list(dispatch.IMPLEMENTATIONS) == OPS
    for op in OPS:
        choice = dispatch.choose(op)
        assert (choice.op, choice.backend) == (op, "torch") and choice.reason


def test_dispatch_every_listed_implementation_can_be_called():
    for op, found in dispatch.IMPLEMENTATIONS.items():
        assert set(found) >= {"torch", "reference"} and set(found) <= set(dispatch.BACKENDS)
        for backend in ("torch", "reference"):
            with koffkernels.force_backend(backend):
                assert callable(dispatch.implementation(op, torch.device("cpu")))


def test_dispatch_force_backend_nests_and_restores():
    with koffkernels.force_backend("reference"):
        assert dispatch.choose("gated_mlp") == ("gated_mlp", "reference", "set by force_backend")
        with pytest.raises(RuntimeError), koffkernels.force_backend("torch"):
            assert dispatch.choose("gated_mlp").backend == "torch"
            raise RuntimeError
        assert dispatch.choose("gated_mlp").backend == "reference"
    assert "force" not in dispatch.choose("gated_mlp").reason


def test_dispatch_force_backend_changes_what_runs(monkeypatch):
    calls = []
    for backend in ("torch", "reference"):
        stub = lambda *args, b=backend: calls.append(b) or args[1]  # noqa: E731
        monkeypatch.setitem(dispatch._LOADED, ("lora_linear", backend), stub)
    for backend in ("reference", "torch"):
        with koffkernels.force_backend(backend):
            koffkernels.lora_linear(normal(2, 3), normal(4, 3))
    assert calls == ["reference", "torch"]


@pytest.mark.parametrize("name", ["cuda", "interpret", "", None])
def test_dispatch_force_backend_refuses(name):
    with pytest.raises(ValueError, match="force_backend: backend must be one of torch, triton, "):
        with koffkernels.force_backend(name):
            pass


def test_dispatch_triton_refuses_tensors_on_the_cpu():
    with koffkernels.force_backend("triton"):
        with pytest.raises(ValueError) as error:
            koffkernels.lora_linear(normal(2, 3), normal(4, 3))
    assert str(error.value) == (
        "lora_linear: the backend (force_backend) must fit tensors on cpu, got 'triton'; "
        "move them to a GPU, or choose torch"
    )


def test_dispatch_backend_that_an_operation_lacks():
    with koffkernels.force_backend("triton"):
        choice = dispatch.choose("hard_concrete", torch.device("cpu"))
        z = koffkernels.hard_concrete(torch.zeros(3), sample=False)
    assert choice.backend == "torch" and "has no hard_concrete" in choice.reason
    assert torch.equal(z, torch.full((3,), 0.5))


@pytest.mark.parametrize(
    ("missing", "device", "backend", "reason"),
    [
        (None, "cuda", "triton", "tensors on a CUDA GPU"),
        (None, "cpu", "torch", "tensors on cpu"),
        ("no CUDA GPU", "cuda", "torch", "no CUDA GPU"),
    ],
)
def test_dispatch_automatic_choice(missing, device, backend, reason, monkeypatch):
    """What a machine with a GPU would choose; nothing runs on it here."""
    monkeypatch.setattr(dispatch, "_WITHOUT_TRITON", missing)
    monkeypatch.setattr(dispatch, "_too_old", lambda index: False)
    choice = dispatch.choose("gated_mlp", torch.device(device))
    assert (choice.backend, choice.reason) == (backend, reason)
    assert dispatch.choose("hard_concrete", torch.device(device)).backend == "torch"


@pytest.mark.parametrize("allowed", [False, True])
def test_dispatch_fp32_takes_triton_only_with_tf32(allowed, monkeypatch):
    monkeypatch.setattr(dispatch, "_WITHOUT_TRITON", None)
    monkeypatch.setattr(dispatch, "_too_old", lambda index: False)
    monkeypatch.setattr(dispatch, "tf32", lambda: allowed)
    gpu, fp32 = torch.device("cuda"), torch.float32
    for op in OPS[:3]:
        choice = dispatch.choose(op, gpu, fp32)
        assert choice.backend == ("triton" if allowed else "torch")
        assert allowed or choice.reason == "fp32, and TF32 is not allowed"
        for dtype in (torch.bfloat16, torch.float16, None):
            assert dispatch.choose(op, gpu, dtype).backend == "triton"
        with koffkernels.force_backend("triton"):
            assert dispatch.choose(op, gpu, fp32).backend == "triton"


def test_dispatch_of_fp32_is_traced_whole(monkeypatch):
    monkeypatch.setattr(dispatch, "_WITHOUT_TRITON", None)

    @torch.compile(fullgraph=True, backend="eager")
    def add(x):
        choice = dispatch.choose("lora_linear", torch.device("cuda"), x.dtype)
        return x + (1 if choice.backend == "triton" else 2)

    assert add(torch.zeros(1)).item() == 2 and add(torch.zeros(1).bfloat16()).item() == 1


def test_dispatch_reads_what_the_program_allows():
    result = python(
        "import torch, koffkernels.dispatch as d; print(d.tf32())\n"
        "torch.backends.cuda.matmul.allow_tf32 = True; print(d.tf32())\n"
        "torch.set_float32_matmul_precision('highest'); print(d.tf32())\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'; print(d.tf32())\n"
    )
    assert result.stdout.split() == ["False", "True", "False", "True"], result.stderr


def test_dispatch_every_operation_says_its_dtype(monkeypatch):
    """Autocast's where it is on."""
    seen = {}

    def implementation(op, device, dtype=None):
        seen[op] = dtype
        return lambda *args: args[1]

    monkeypatch.setattr(dispatch, "implementation", implementation)
    x, w, q = normal(2, 4), normal(6, 4), normal(1, 2, 3, 4)

    def call():
        koffkernels.lora_linear(x, w)
        koffkernels.gated_mlp(x, w, w, normal(4, 6))
        koffkernels.prefix_attention(q, q, q, None)
        return set(seen) == set(OPS[:3]) and set(seen.values())

    assert call() == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert call() == {torch.bfloat16}


def test_dispatch_rocm_runs_triton_only_when_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(dispatch, "_WITHOUT_TRITON", dispatch._missing())
    choice = dispatch.choose("gated_mlp", torch.device("cuda"))
    assert choice.backend == "torch" and 'force_backend("triton") runs them' in choice.reason
    with koffkernels.force_backend("triton"):
        assert dispatch.choose("gated_mlp", torch.device("cuda")).backend == "triton"


def test_dispatch_old_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "_WITHOUT_TRITON", None)
    monkeypatch.setattr(dispatch, "_too_old", lambda index: True)
    choice = dispatch.choose("gated_mlp", torch.device("cuda"))
    assert choice.backend == "torch" and "8.0" in choice.reason


def test_environment_interpret_must_come_before_triton():
    """The interpreter cannot be switched on once triton is there."""
    code = "import triton, koffkernels"
    result = python(code, KOFF_BACKEND="interpret")
    assert "interpret must be chosen before triton is imported" in result.stderr
    assert python(code, KOFF_BACKEND="interpret", TRITON_INTERPRET="1").returncode == 0


def test_backends_prints_every_operation(capsys):
    choices = koffkernels.backends()
    printed = capsys.readouterr().out.splitlines()
    assert [choice.op for choice in choices] == OPS
    for choice, line in zip(choices, printed, strict=True):
        assert line.split()[:2] == [choice.op, choice.backend] and choice.reason in line


def test_environment_is_read_once_and_force_backend_wins():
    """And torch.compile, which cannot import, finds the implementations already there."""
    result = python(
        "import os, torch, koffkernels\n"
        "os.environ['KOFF_BACKEND'] = 'torch'\n"
        "torch.compile(koffkernels.hard_concrete, fullgraph=True, backend='eager')(\n"
        "    torch.zeros(3), sample=False)\n"
        "koffkernels.backends()\n"
        "with koffkernels.force_backend('torch'): koffkernels.backends()\n",
        KOFF_BACKEND="reference",
    )
    lines = [line.split(maxsplit=2) for line in result.stdout.splitlines()]
    assert [line[1] for line in lines] == ["reference"] * 4 + ["torch"] * 4, result.stderr
    assert lines[0][2] == "set by KOFF_BACKEND" and lines[4][2] == "set by force_backend"


def test_environment_unknown_or_empty(monkeypatch):
    monkeypatch.setenv("KOFF_BACKEND", "cuda")
    with pytest.raises(ValueError) as error:
        dispatch._read_environment()
    assert str(error.value) == (
        "KOFF_BACKEND: the backend must be one of torch, triton, interpret, reference, "
        "got 'cuda'; unset it for the automatic choice"
    )
    monkeypatch.setenv("KOFF_BACKEND", "")
    assert dispatch._read_environment() is None


def test_compiled_function_follows_force_backend():
    compiled = torch.compile(koffkernels.lora_linear, fullgraph=True, backend="aot_eager")
    x, w = normal(2, 3), normal(4, 3)
    want = compiled(x, w)
    with (
        koffkernels.force_backend("triton"),
        pytest.raises(Exception, match="must fit tensors on cpu"),
    ):
        compiled(x, w)
    with koffkernels.force_backend("reference"):
        torch.testing.assert_close(compiled(x, w), want)
    torch.testing.assert_close(compiled(x, w), want)


def test_compiled_shapes_do_not_recompile():
    """No check or choice may fix a size: each batch would compile anew."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    weights = normal(12, 8), normal(12, 8), normal(8, 12)
    lora = koffkernels.LoRA(normal(2, 3, 8), normal(2, 12, 3), torch.ones(2))
    prefix = koffkernels.Prefix(normal(2, 2, 6, 4), normal(2, 2, 6, 4), torch.tensor([6, 3]))

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def both(x, ids):
        part = koffkernels.GatedMLPLoRA(up=lora)
        y = koffkernels.gated_mlp(x, *weights, lora=part, memory_ids=ids)
        q = y.unflatten(-1, (2, 4)).transpose(1, 2)
        return koffkernels.prefix_attention(q, q, q, prefix, memory_ids=ids)

    for rows in (3, 4, 6):
        for tokens in (5, 7, 9):
            both(normal(rows, tokens, 8), torch.arange(rows) % 3 - 1)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("x", "weight", "autocast", "want"),
    [
        ("float32", "float32", False, "float32"),
        ("bfloat16", "bfloat16", False, "bfloat16"),
        ("float32", "float32", True, "bfloat16"),
        ("bfloat16", "float32", True, "bfloat16"),
        ("float64", "float64", True, "float64"),
    ],
)
def test_compute_dtype(x, weight, autocast, want):
    tensors = [torch.ones(1, dtype=getattr(torch, name)) for name in (x, weight)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert dispatch.compute_dtype(*tensors) == getattr(torch, want)
