"""The cases of ``bench.e2e`` on a GPU, one after another: what a user sees of a model of
Llama-3.2-3B's shape with random weights, which are made there.

A case that the time does not reach is listed; one whose result is wrong has no time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from .. import e2e
from ..models import LLAMA_3B
from .context import Bench
from .results import Case, Deadline, Results

READINGS = {"prefill": 4, "decode": 1, "train": 10}  # of decode one reading is many steps


class EndToEnd:
    """All models of a run, made when the first case needs them."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.sizes = e2e.DRY if bench.dry else e2e.Sizes()
        if bench.warm:  # beside other processes memory is short, and times mean nothing
            self.sizes = self.sizes._replace(new=3)

    @functools.cached_property
    def models(self) -> e2e.Models:
        """Over one dense model."""
        shape = self.bench.shape if self.bench.dry else LLAMA_3B
        return e2e.Models(e2e.random_llama(shape, self.bench.device, self.bench.dtype), self.sizes)

    @functools.cached_property
    def limits(self) -> dict[str, float]:
        """Of this run."""
        return self.bench.limits()

    def measure(self, case: e2e.Case) -> list[dict]:
        """The row of a case."""
        cuda = self.bench.device.type == "cuda"
        if self.bench.warm:
            self.models.prepare(case, check=False)
            return [{"name": case.name, "text": "ran"}]
        limits = self.limits  # measured before the first case, whose memory it would count as
        reading = self.models.prepare(case)
        if cuda:
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        readings = [reading() for _ in range(READINGS[case.phase])]
        row = self.models.row(case, readings, limits)
        # Beyond the weights of all models, which are there side by side.
        row["peak_gb"] = (torch.cuda.max_memory_allocated() - held) / 1e9 if cuda else 0.0
        row["text"] += f", {row['peak_gb']:.1f} GB"
        return [row]


def cases(bench: Bench) -> Iterator[Case]:
    """Most telling first."""
    made = EndToEnd(bench)
    for case in e2e.cases(made.sizes, cuda=bench.device.type == "cuda"):
        yield case.name, functools.partial(made.measure, case)


def run(bench: Bench, results: Results, deadline: Deadline, only: tuple[str, ...]) -> None:
    """Run everything."""
    results.note(dtype=bench.dtype_name, model=LLAMA_3B.record())
    results.run(cases(bench), deadline, only)
