"""Alternating measurements: what is compared runs in turns, A B A B ..., so that a slow minute of
the machine hits both sides, and the ratio is taken pair by pair."""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from koff.commands.machine import environment, version_of

__all__ = [
    "alternate", "environment", "limits", "overlapped", "paired_ratio", "spread", "version_of",
    "write",
]  # fmt: skip


def alternate(
    functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each function, called in turns.

    Args:
        functions: name -> what to time, called without arguments.
        rounds: how many times each is timed.
        warmup: how many untimed turns come first.

    Returns:
        name -> ``rounds`` wall-clock times in seconds, in the order they were taken.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def overlapped(call: Callable[..., object]) -> Callable[..., object]:
    """Return the same call with programmatic dependent launch, which is off by default."""
    from koffkernels import dispatch  # the process that only starts others does without torch

    @functools.wraps(call)
    def run(*args: object, **named: object) -> object:
        with dispatch.programmatic(True):
            return call(*args, **named)

    return run


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum, maximum and number of ``values``."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "count": len(values),
    }


def paired_ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Spread of ``over[i] / under[i]``: measurements taken one right after the other."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def limits(device, dtype, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Bytes per second that a copy reads and writes, and operations per second of a square product,
    the best of several, on this machine now."""
    import torch  # the process that only starts others does without

    cuda = device.type == "cuda"
    source = torch.empty(1 << (30 if cuda else 26), dtype=torch.uint8, device=device).fill_(1)
    target, size = torch.empty_like(source), 4096 if cuda else 1024
    x, w = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def fastest(call: Callable[[], object]) -> float:
        taken = []
        for _ in range(7):
            start = clock()
            call()
            if cuda:
                torch.cuda.synchronize()
            taken.append(clock() - start)
        return min(taken[1:])

    return {
        "copy_bytes_per_second": 2 * source.nbytes / fastest(lambda: target.copy_(source)),
        "gemm_operations_per_second": 2
        * size**3
        / fastest(lambda: torch.nn.functional.linear(x, w)),
    }


def write(path: str | Path | None, record: dict[str, object]) -> None:
    """Write ``record`` as JSON, folders included; nothing if ``path`` is None.

    The file is replaced in one step, so whoever is stopped halfway leaves the last whole version.
    """
    if path is None:
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    scratch.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(scratch, target)
