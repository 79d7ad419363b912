"""Tokens per second of decode through all layers: dense and pruned; no, one and eight memories."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from koffkernels import LoRA
from koffkernels.clock import Variant

from .. import timing
from ..peers.unmerged import Unmerged, adapters_of
from . import layers
from .context import Bench, pruned
from .layers import Koff, Layer, Path, Plain
from .results import Case, Deadline, Results
from .stack import Stack

BATCHES = (1, 16, 64)
MEMORIES = (0, 1, 8)
CONTEXT = 512


class Decode:
    """The stack, built when the first row needs it and pruned when the first pruned row does."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.stack: Stack | None = None
        self.width = bench.shape.intermediate

    def at(self, width: int) -> Stack:
        """The stack with ``width`` neurons per layer."""
        if self.stack is None:
            context = 8 if self.bench.dry else CONTEXT
            self.stack = Stack(self.bench, max(MEMORIES), max(BATCHES), context)
        if width < self.width:
            self.stack.prune(width)
            self.width = width
        return self.stack

    def paths(self, stack: Stack, memories: int, rows: int) -> dict[str, tuple[Path, list[Layer]]]:
        """What is compared: torch without memories, koff, and with memories PEFT's way."""
        plain = {"torch": (Plain(), stack.layers)}
        if not memories:
            return plain | {"koff": (Koff(False), stack.layers)}
        chosen = [Layer(layer.weights, _first(layer.lora, memories)) for layer in stack.layers]
        ids = layers.mixed_ids(self.bench, rows, memories) if memories > 1 else None
        adapters = {
            id(layer): {
                name: adapters_of(lora, layer.weights[name]) for name, lora in layer.lora.items()
            }
            for layer in chosen
        }
        where = None if ids is None else [(ids == m).nonzero()[:, 0] for m in range(memories)]
        return plain | {
            "koff": (Koff(True, ids), chosen),
            "unmerged": (Unmerged(adapters, where), chosen),
        }

    @torch.no_grad()
    def measure(self, width: int, memories: int, rows: int) -> list[dict]:
        """Rows of one setting, one per path; torch's and ours also launched one by one ("eager"),
        as generate without a CUDA graph does."""
        stack = self.at(width)
        paths = self.paths(stack, memories, rows)

        def variant(path: Path, chosen: list[Layer], graph: bool = True) -> Variant:
            return Variant(lambda i: stack.step(path, rows, chosen), graph=graph, calls=1)

        variants = {name: variant(*pair) for name, pair in paths.items()}
        for name in ("torch", "koff"):
            variants[f"{name}-eager"] = variant(*paths[name], graph=False)
        times = self.bench.measure(**variants)
        return [self._row(name, values, stack, (memories, rows)) for name, values in times.items()]

    def _row(self, path: str, times: list[float], stack: Stack, setting: tuple[int, int]) -> dict:
        memories, rows = setting
        us = statistics.median(times)
        used = 0 if path.startswith("torch") else min(memories, rows)
        size = stack.bytes(rows, used)
        return {
            "name": f"{name_of(self.width, memories, rows, self.bench)}-{path}",
            "path": path,
            "us": us,
            "tokens_per_second": rows * 1e6 / us,
            "bytes": size,
            "share_of_copy_bandwidth": size / self.bench.copy_rate / us,
            "shape": {"layers": len(stack.layers), "width": self.width, "context": stack.context},
            "memories": memories,
            "batch": rows,
            "times": timing.spread(times),
        }


def _first(lora: dict[str, LoRA], memories: int) -> dict[str, LoRA]:
    """The first ``memories`` memories of every linear layer."""
    return {name: LoRA(*(part[:memories] for part in found)) for name, found in lora.items()}


def name_of(width: int, memories: int, rows: int, bench: Bench) -> str:
    """Name of a setting: "decode-pruned-8-memories-batch-16"."""
    kind = "dense" if width == bench.shape.intermediate else "pruned"
    return f"decode-{kind}-{memories}-memories-batch-{rows}"


def cases(bench: Bench) -> Iterator[Case]:
    """All settings, dense ones first: pruning cannot be undone."""
    decode, dense = Decode(bench), bench.shape.intermediate
    for width in (dense, pruned(dense)):
        for memories in MEMORIES:
            for rows in BATCHES:
                setting = (width, memories, rows)
                yield name_of(*setting, bench), lambda s=setting: decode.measure(*s)


def run(bench: Bench, results: Results, deadline: Deadline, only: tuple[str, ...]) -> None:
    """Measure the copy bandwidth, then every setting."""
    results.note(limits={"copy_bytes_per_second": bench.copy_rate * 1e6}, dtype=bench.dtype_name)
    results.run(cases(bench), deadline, only)
