"""What is measured: models, cases, and what a row says beside its time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..gpu import smoke
from ..gpu.smoke import Problem
from ..memory import peak_bytes
from ..models import Shape
from ..peers.peft_mlp import liger_mlp

# From each model's config.json; rows x tokens is the batch of the forward and backward rows.
MODELS = {
    "llama-3.2-3b": Shape(3072, 8192, 28, 24, 8, 128256, rows=8, tokens=512),
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128256, rows=8, tokens=512),
    "qwen2.5-7b": Shape(3584, 18944, 28, 28, 4, 152064, rows=8, tokens=512),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CUDA = torch.cuda.is_available()


OPERATIONS = {
    "gated_mlp": ("koff", "eager", "compiled", "peft", "hand-written"),
    "lora_linear": ("koff", "eager", "compiled", "peft"),
    "prefix_attention": ("koff", "eager", "compiled", "concatenated", "flex"),
    "hard_concrete": ("koff", "eager", "compiled"),
}
if CUDA and liger_mlp() is not None:
    OPERATIONS["gated_mlp"] += ("peft-liger",)
PHASES = ("forward", "backward", "decode")
MEMORIES = {"one": 1, "mixed": 8}
# RMS of the difference over RMS of the fp32 result. bf16: two or three roundings of 0.17 %, up to
# five in a gradient; fp32: sums of some thousand products in another order.
TOLERANCE = {torch.bfloat16: (0.01, 0.02), torch.float32: (1e-5, 1e-5)}


def _impossible(operation: str, phase: str, memories: str, peer: str) -> bool:
    """Whether there is no such thing to measure."""
    if operation == "hard_concrete":
        return phase == "decode" or memories == "mixed"
    if peer == "flex" and phase == "backward":
        return not CUDA  # torch's FlexAttention has no backward on the CPU
    return peer == "hand-written" and memories == "mixed"


CASES = [
    (operation, phase, memories, peer)
    for operation, names in OPERATIONS.items()
    for phase in PHASES
    for memories in MEMORIES
    for peer in names
    if not _impossible(operation, phase, memories, peer)
]


def scaled(shape: Shape, by: int) -> Shape:
    """A model of the same proportions; heads keep their width where they can."""
    if by == 1:
        return shape
    groups = shape.heads // shape.kv_heads
    kv = max(1, shape.kv_heads // by)
    heads = kv * groups
    intermediate = max(64, shape.intermediate // by // 64 * 64)
    hidden = heads * shape.head_dim
    return replace(
        shape,
        hidden=hidden,
        heads=heads,
        kv_heads=kv,
        intermediate=intermediate,
        tokens=max(8, shape.tokens // by),
    )


_last: list[torch.cuda.Event] = []
_elapsed = 0.0


def now() -> float:
    """Seconds by the clock that pytest-benchmark uses here: on a GPU its own, by events."""
    if not CUDA:
        return time.perf_counter()
    global _elapsed
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    event.synchronize()
    # Added up from short spans: an event's fp32 milliseconds lose microseconds after a minute.
    _elapsed += _last.pop().elapsed_time(event) / 1e3 if _last else 0.0
    _last.append(event)
    return _elapsed


def check(found: Problem, run: smoke.Call, training: bool, dtype: torch.dtype) -> None:
    """Fail where a result is off from plain torch in fp32."""
    got = smoke._run(run, found, training, False)
    want = smoke._run(found.plain, found, training, True)
    forward, backward = TOLERANCE[dtype]
    for name, value in want.items():
        error = smoke.relative_error(got[name], value)
        allowed = forward if name == "y" else backward
        assert error <= allowed, f"{name} is off by {error:.2g}, more than {allowed}: no time"


def timed(found: Problem, run: smoke.Call, training: bool) -> Callable[[], object]:
    """One call as it is timed: inference, or forward and all gradients."""
    leaves = {name: tensor.detach() for name, tensor in found.tensors.items()}
    if not training:

        def infer() -> Tensor:
            with torch.no_grad():
                return run(leaves)

        return infer
    trained = [leaf.requires_grad_() for name, leaf in leaves.items() if name not in found.frozen]
    cotangent = torch.randn_like(run(leaves))
    return lambda: torch.autograd.grad(run(leaves), trained, cotangent, allow_unused=True)


def extra(found: Problem, call: Callable[[], object], training: bool) -> dict[str, float]:
    """What a row says beside its time."""
    size = sum(tensor.nbytes for tensor in found.tensors.values())
    flops = _flops(found) * (2 if training else 1)  # frozen weights: backward is one product
    return {
        "bytes": 2 * size if training else size,
        "operations": flops,
        "peak_bytes": _peak(call),
        "dtype": str(next(iter(found.tensors.values())).dtype).removeprefix("torch."),
    }


def _flops(found: Problem) -> float:
    """Operations of the base weights' products, or of attention; the low-rank part is small."""
    t = found.tensors
    if "q" in t:
        rows, heads, queries, width = t["q"].shape
        keys = t["k"].shape[2]
        own = queries * (queries + 1) // 2 if queries > 1 else keys
        return 4.0 * rows * heads * width * (own + queries * t["pk"].shape[2])
    if "x" not in t:
        return 0.0  # elementwise
    weights = [t[name] for name in ("w", "gate", "up", "down") if name in t]
    return 2.0 * math.prod(t["x"].shape[:-1]) * sum(w.numel() for w in weights)


def least_seconds(info: dict, limits: dict[str, float]) -> float:
    """The longer of moving the bytes and doing the operations, at this run's limits."""
    return max(
        info["bytes"] / limits["copy_bytes_per_second"],
        info["operations"] / limits["gemm_operations_per_second"],
    )


def _peak(call: Callable[[], object]) -> int:
    """The most bytes that one call holds at once beyond its inputs."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    return peak_bytes(call)
