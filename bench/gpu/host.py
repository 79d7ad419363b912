"""What Python takes where it cannot be hidden: decode launched one by one and training steps of
small batches, of a model with eight of Llama-3.2-3B's layers, so that the GPU waits for the host.

The ways in which launches can go (``bench.launching``) take turns. Rows also say what has become of
the kinds of calls (``koffkernels.replay.kinds``): which are replayed, and why others are not.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Iterator

from koffkernels import replay

from .. import e2e, timing
from ..launching import WAYS, launching, plays
from ..models import LLAMA_3B
from .context import Bench
from .results import Case, Deadline, Results

SIZES = e2e.Sizes(train=(8, 32), prompt=16, new=16)
# Hardly any table of tokens: the head's product is no launch of ours.
SHAPE = dataclasses.replace(LLAMA_3B, layers=8, vocab=1024)
ROUNDS = 5
CASES = (
    e2e.Case("decode", 8, "koff-dynamic", "dense", 8),
    e2e.Case("train", 8, "koff", "dense", 1),
    e2e.Case("train", 8, "koff", "dense", 8),
    e2e.Case("decode", 1, "koff-dynamic", "dense", 1),
)


class Host:
    """The model, made when the first case needs it."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.shape = bench.shape if bench.dry else SHAPE

    @functools.cached_property
    def models(self) -> e2e.Models:
        """Over one dense model."""
        base = e2e.random_llama(self.shape, self.bench.device, self.bench.dtype)
        return e2e.Models(base, e2e.DRY if self.bench.dry else SIZES)

    def measure(self, case: e2e.Case) -> list[dict]:
        """A row for each way."""
        device = self.bench.device.type
        # Overlapped launches are for decode alone.
        ways = [way for way in WAYS if way != "overlapped" or case.phase == "decode"]
        replay.forget()
        reading = self.models.prepare(case, check=False)
        taken: dict[str, list[float]] = {way: [] for way in ways}
        played = dict.fromkeys(ways, 0)
        for way in ways:  # what is new here compiles, and is written down
            with launching(way, device):
                for _ in range(3):
                    reading()
        if self.bench.warm:
            return [{"name": f"host-{case.phase}-{case.memories}", "text": "ran"}]
        for turn in range(ROUNDS):
            for way in ways[:: 1 if turn % 2 == 0 else -1]:
                with launching(way, device), plays() as count:
                    taken[way].append(reading())
                played[way] = count[0]
        kinds = replay.kinds()
        return [self._row(case, way, taken, played[way], kinds) for way in ways]

    def _row(
        self,
        case: e2e.Case,
        way: str,
        taken: dict[str, list[float]],
        played: int,
        kinds: dict[str, dict[str, int]],
    ) -> dict:
        us = statistics.median(taken[way]) * 1e6
        ratio = timing.paired_ratio(taken[way], taken["triton"])
        never = {
            f"{name}: {why}"
            for name, states in kinds.items()
            for why in states.keys() - {"replayed", "seen once"}
        }
        text = f"{us / self.shape.layers:.0f} us a layer, {ratio['median']:.2f} of triton's"
        text += f", {played} calls replayed" if way in WAYS[2:] else ""
        return {
            "name": f"host-{case.phase}-{case.memories}-{way}",
            **case._asdict(),
            "way": way,
            "us": us,
            "us_of_a_layer": us / self.shape.layers,
            "of_triton": ratio,
            "plays": played,
            "kinds": kinds,
            "times": timing.spread([1e6 * value for value in taken[way]]),
            "text": "; ".join([text, *sorted(never)][:3]),
        }


def cases(bench: Bench) -> Iterator[Case]:
    """Most telling first."""
    host = Host(bench)
    for case in CASES:
        yield f"host-{case.phase}-{case.memories}", functools.partial(host.measure, case)


def run(bench: Bench, results: Results, deadline: Deadline, only: tuple[str, ...]) -> None:
    """Run everything."""
    results.note(dtype=bench.dtype_name, model=SHAPE.record())
    results.run(cases(bench), deadline, only)
