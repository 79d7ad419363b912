"""Route tables: every route and configuration of an operation at every shape, and the winners.

All timings go to bench/results/<gpu>-tables.json; ``koffkernels.routes.table_path`` holds the
fastest route of each shape. A route must beat the vendor's by ``MARGIN`` to be chosen.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch

import koffkernels
from koffkernels import GatedMLPLoRA
from koffkernels.routes import DECODE_TOKENS, force_route, table_path

from .. import timing
from . import device, layers
from .clock import Variant
from .context import Bench, pruned
from .results import Case, Deadline, Results, line

MARGIN = 0.99
ARCHS = (80, 90, 100)  # chips that configurations know; another counts as the next older one
FORWARD_TOKENS = (1, 16, 64, 256, 1024, 8192, 4, 2048)  # in order of value
BACKWARD_TOKENS = (8192, 1024)
# The file in koffkernels/_triton whose CONFIGS an operation's route can use; a fused backward
# computes the gradient of its input by the GEMM of a linear layer.
FILES = {
    ("gated_mlp", "forward", "fused"): "mlp.gemm",
    ("gated_mlp", "forward", "decode"): "mlp.decode",
    ("gated_mlp", "backward", "fused"): "lora.gemm",
    ("lora_linear", "forward", "fused"): "lora.gemm",
    ("lora_linear", "forward", "decode"): "lora.decode",
    ("lora_linear", "backward", "fused"): "lora.gemm",
}
# (op, k, n) of the models in koff/recipes/, in order of value; n of gated_mlp: neurons.
LLAMA_8B = (
    ("gated_mlp", 4096, 14336),
    ("gated_mlp", 4096, pruned(14336)),
    ("lora_linear", 4096, 4096),
    ("lora_linear", 4096, 1024),
)
OTHERS = (
    ("gated_mlp", 3072, 8192),  # Llama-3.2-3B
    ("lora_linear", 3072, 3072),
    ("lora_linear", 3072, 1024),
    ("gated_mlp", 3584, 18944),  # Qwen2.5-7B
    ("lora_linear", 3584, 3584),
    ("lora_linear", 3584, 512),
    ("gated_mlp", 4096, 12288),  # Qwen3-8B
)


class Key(NamedTuple):
    """What a row of the table is for: tokens m, and the widths k -> n of the GEMM, of an MLP H and
    I. The GEMM of a linear layer's backward goes from its outputs to its inputs.
    """

    op: str
    direction: str
    m: int
    k: int
    n: int
    r: int

    @property
    def name(self) -> str:
        return f"{self.op}-{self.direction}-{self.m}x{self.k}x{self.n}-r{self.r}"


class Candidate(NamedTuple):
    """A route, and the name of one of its configurations (None: it has none)."""

    route: str
    config: str | None

    @property
    def name(self) -> str:
        return self.route if self.config is None else f"{self.route}:{self.config}"


def configurations(op: str, direction: str, route: str, arch: int) -> list[str]:
    """Configurations that a route may use on ``arch`` (90: sm_90); none without its file."""
    module = f"koffkernels._triton.{FILES[op, direction, route]}"
    if importlib.util.find_spec(module) is None:
        return []
    found = importlib.import_module(module).CONFIGS
    chip = max((known for known in ARCHS if known <= arch), default=ARCHS[0])
    return [name for name, config in found.items() if chip in (config.archs or ARCHS)]


def candidates(key: Key, arch: int) -> list[Candidate]:
    """The vendor's route, then every configuration of the others that can run this shape."""
    routes = ["fused"]
    if key.direction == "forward" and key.m <= DECODE_TOKENS:
        routes.append("decode")
    found = [
        Candidate(route, name)
        for route in routes
        for name in configurations(key.op, key.direction, route, arch)
    ]
    return [Candidate("vendor", None), *found]


def routed(bench: Bench, candidate: Candidate) -> AbstractContextManager:
    """Run one candidate; a dry run has no routes."""
    if bench.dry:
        return contextlib.nullcontext()
    return force_route(candidate.name)


def _call(bench: Bench, key: Key, layer: layers.Layer, x: torch.Tensor) -> Callable:
    """The operation with one memory, as a function without arguments."""
    if key.op == "lora_linear":
        weight, lora = layer.weights["q"], layer.lora["q"]
        return lambda: koffkernels.lora_linear(x, weight, lora=lora)
    weights = [layer.weights[name] for name in layers.MLP]
    lora = GatedMLPLoRA(*(layer.lora[name] for name in layers.MLP))
    return lambda: koffkernels.gated_mlp(x, *weights, lora=lora)


def _layer(bench: Bench, key: Key, train: bool) -> layers.Layer:
    """Weights and one memory of an operation."""
    forward = key.direction == "forward"
    names = {"q": (key.n, key.k) if forward else (key.k, key.n)}
    if key.op == "gated_mlp":
        names = {"gate": (key.n, key.k), "up": (key.n, key.k), "down": (key.k, key.n)}
    weights = {name: bench.normal(*size, scale=size[1] ** -0.5) for name, size in names.items()}
    lora = {name: layers.random_lora(bench, 1, size, key.r) for name, size in names.items()}
    for part in lora.values():
        part.a.requires_grad_(train)
        part.b.requires_grad_(train)
    return layers.Layer(weights, lora)


def _forward(bench: Bench, key: Key) -> Callable[[Candidate], Variant]:
    """candidate -> what to time."""
    size = key.k * key.n * bench.dtype.itemsize * (3 if key.op == "gated_mlp" else 1)
    sets = bench.sets(size + key.m * key.k * bench.dtype.itemsize)
    calls = [
        _call(bench, key, _layer(bench, key, False), bench.normal(key.m, key.k))
        for _ in range(sets)
    ]

    def variant(candidate: Candidate) -> Variant:
        def call(i: int) -> object:
            with torch.no_grad(), routed(bench, candidate):
                return calls[i]()

        return Variant(call, sets, calls=16 if key.m <= 1024 else 2)

    return variant


def _backward(bench: Bench, key: Key) -> Callable[[Candidate], Variant]:
    """candidate -> what to time: the vendor's forward, and all gradients. Both go into one CUDA
    graph: launched one by one, the many small kernels would wait for the host."""
    layer = _layer(bench, key, True)
    width = key.k if key.op == "gated_mlp" else key.n
    x = bench.normal(key.m, width).requires_grad_()
    trained = [x, *(t for part in layer.lora.values() for t in part[:2])]
    call = _call(bench, key, layer, x)

    dy = bench.normal(key.m, key.k)

    def variant(candidate: Candidate) -> Variant:
        def gradients(i: int) -> object:
            with routed(bench, Candidate("vendor", None)):
                y = call()
            with routed(bench, candidate):
                return torch.autograd.grad(y, trained, dy)

        return Variant(gradients, 1, calls=2)

    return variant


def measure(bench: Bench, key: Key, arch: int) -> list[dict]:
    """One row per candidate, errors of single candidates included."""
    make = (_forward if key.direction == "forward" else _backward)(bench, key)
    variants, failed = {}, []
    for candidate in candidates(key, arch):
        try:
            variant = make(candidate)
            variant.call(0)
            variants[candidate] = variant
        except Exception as error:  # a configuration that does not run loses, and says why
            text = f"{type(error).__name__}: {device.without_paths(str(error), 300)}"
            failed.append(_row(bench, key, candidate) | {"error": text})
    times = bench.measure(**{c.name: v for c, v in variants.items()})
    vendor = statistics.median(times["vendor"])
    rows = [
        _row(bench, key, c)
        | {
            "us": statistics.median(times[c.name]),
            "vendor_us": vendor,
            "times": timing.spread(times[c.name]),
        }
        for c in variants
    ]
    return rows + failed


def _row(bench: Bench, key: Key, candidate: Candidate) -> dict:
    return {
        "name": f"{key.name}-{candidate.name}",
        "op": key.op,
        "pass": key.direction,
        "m": key.m,
        "k": key.k,
        "n": key.n,
        "r": key.r,
        "dtype": bench.dtype_name,
        "route": candidate.route,
        "config": candidate.config,
    }


FIELDS = ("op", "pass", "m", "k", "n", "r", "dtype", "route", "config", "us", "vendor_us")


def winners(rows: list[dict]) -> list[dict]:
    """The fastest route of each shape: one other than the vendor's only if faster by the margin."""
    best: dict[tuple, dict] = {}
    for row in (row for row in rows if "error" not in row):
        key = tuple(row[field] for field in FIELDS[:7])
        handicap = 1.0 if row["route"] == "vendor" else 1.0 / MARGIN
        if key not in best or row["us"] * handicap < best[key]["handicapped"]:
            best[key] = row | {"handicapped": row["us"] * handicap}
    return [{field: row[field] for field in FIELDS} for row in best.values()]


def table(environment: dict, rows: list[dict]) -> dict:
    """What koffkernels/configs/<gpu>.json holds."""
    gpu = environment["gpu"]
    return {
        "gpu": gpu["name"],
        "capability": gpu["capability"],
        "torch": environment["torch"],
        "triton": environment["triton"],
        "rows": winners(rows),
    }


def best(rows: list[dict]) -> str:
    """One line for all candidates of a shape."""
    good = [row for row in rows if "us" in row]
    if not good:
        return line(rows[0])
    first = min(good, key=lambda row: row["us"])
    name = first["name"].removesuffix(f"-{first['route']}")
    text = f"{name:60s} {first['us']:.1f} us, vendor {first['vendor_us']:.1f} us"
    return f"{text}, {len(good)} of {len(rows)} ran"


def keys(bench: Bench) -> Iterator[Key]:
    """All shapes, in order of value."""
    if bench.dry:
        for op, direction in (("gated_mlp", "forward"), ("lora_linear", "backward")):
            yield Key(op, direction, 4, 64, 128, bench.rank)
        return
    for op, k, n in LLAMA_8B[1:3]:  # little time: what decides most
        for m in (1, 16, 64):
            yield Key(op, "forward", m, k, n, bench.rank)
    yield Key("gated_mlp", "forward", 8192, 4096, pruned(14336), bench.rank)
    yield Key("gated_mlp", "backward", 8192, 4096, pruned(14336), bench.rank)
    for shapes in (LLAMA_8B, OTHERS):
        for m in FORWARD_TOKENS:
            yield from (Key(op, "forward", m, k, n, bench.rank) for op, k, n in shapes)
        for m in BACKWARD_TOKENS:
            yield from (Key(op, "backward", m, k, n, bench.rank) for op, k, n in shapes)


def run(
    bench: Bench, results: Results, deadline: Deadline, only: tuple[str, ...], folders: set[Path]
) -> None:
    """Measure every shape, and rewrite the table in every folder after each."""
    environment = results.record["environment"]
    major, minor = environment["gpu"]["capability"]
    arch = 10 * major + minor
    name = table_path(environment["gpu"]["name"]).name

    def case(key: Key) -> list[dict]:
        rows = measure(bench, key, arch)
        found = table(environment, results.record["rows"] + rows)
        for folder in folders:
            timing.write(folder / name, found)
        return rows

    cases: Iterator[Case] = ((key.name, lambda k=key: case(k)) for key in keys(bench))
    results.brief = best
    results.note(margin=MARGIN, weight_sets_bytes=4 * bench.l2)
    results.run(cases, deadline, only)
