"""Microseconds of a call: by events around replays of a CUDA graph, in turns with what it is
compared with, over several sets of inputs that together do not fit the L2 cache."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Times = dict[str, list[float]]


class Variant(NamedTuple):
    """One of the things that a measurement compares.

    Args:
        call: what to time; gets the number of the input set.
        sets: how many input sets there are.
        graph: capture all sets in one CUDA graph and time its replays; otherwise the calls are
            launched one after another, which is right where the GPU is slower than the host.
        calls: at least so many calls go into one graph, so that the gap between two replays is
            spread over them.
    """

    call: Callable[[int], object]
    sets: int = 1
    graph: bool = True
    calls: int = 16


class _Run(NamedTuple):
    """Something to time that makes ``calls`` calls of a variant."""

    go: Callable[[], object]
    calls: int


class WallClock:
    """Host time of single calls: for dry runs on the CPU."""

    rounds, warmup = 2, 0

    def prepare(self, variant: Variant) -> _Run:
        """All sets, one after another."""
        return _Run(lambda: [variant.call(i) for i in range(variant.sets)], variant.sets)

    def time(self, run: _Run, repeats: int) -> float:
        """Microseconds of one call."""
        start = time.perf_counter()
        for _ in range(repeats):
            run.go()
        return (time.perf_counter() - start) * 1e6 / (repeats * run.calls)

    def repeats(self, run: _Run) -> int:
        """How often to run between two readings."""
        return 1

    def limit_rounds(self, microseconds: float) -> int:
        """How many rounds to take, given what one takes."""
        return self.rounds


class EventClock:
    """Device time by CUDA events."""

    warmup = 1
    reading = 3000.0  # microseconds that one reading lasts at least
    budget = 6e5  # microseconds that one variant's readings may take
    fewest, most = 5, 15

    def prepare(self, variant: Variant) -> _Run:
        """Compile, warm up and, if asked for, capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                for i in range(variant.sets):
                    variant.call(i)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        loops = max(1, math.ceil(variant.calls / variant.sets)) if variant.graph else 1

        def calls() -> None:
            for _ in range(loops):
                for i in range(variant.sets):
                    variant.call(i)

        if not variant.graph:
            return _Run(calls, variant.sets)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        return _Run(graph.replay, loops * variant.sets)

    def time(self, run: _Run, repeats: int) -> float:
        """Microseconds of one call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run.go()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / (repeats * run.calls)

    def repeats(self, run: _Run) -> int:
        """How often to run between two readings, for one to last long enough."""
        once = self.time(run, 1) * run.calls
        return min(1000, max(1, math.ceil(self.reading / max(once, 1.0))))

    def limit_rounds(self, microseconds: float) -> int:
        """How many rounds fit the budget, given what one takes."""
        return min(self.most, max(self.fewest, int(self.budget / max(microseconds, 1.0))))


class WarmClock(WallClock):
    """Runs every variant once and times nothing: compiles what a later process will time."""

    rounds = 1

    def prepare(self, variant: Variant) -> _Run:
        """The first set alone."""
        variant.call(0)
        return _Run(lambda: None, 1)

    def time(self, run: _Run, repeats: int) -> float:
        """Not a time."""
        return 1.0


Clock = WallClock | EventClock


def measure(clock: Clock, variants: dict[str, Variant]) -> Times:
    """Microseconds per call of each variant, taken in turns whose order alternates.

    Args:
        clock: by what.
        variants: name -> what to time.

    Returns:
        name -> one reading per round; the i-th readings of two variants belong together.
    """
    runs = {name: clock.prepare(variant) for name, variant in variants.items()}
    repeats = {name: clock.repeats(run) for name, run in runs.items()}
    warm = [
        clock.time(run, repeats[name]) * repeats[name] * run.calls for name, run in runs.items()
    ]
    rounds = clock.limit_rounds(sum(warm) / len(warm))
    times: Times = {name: [] for name in runs}
    for turn in range(clock.warmup + rounds):
        order = list(runs) if turn % 2 == 0 else list(runs)[::-1]
        for name in order:
            took = clock.time(runs[name], repeats[name])
            if turn >= clock.warmup:
                times[name].append(took)
    return times
