"""Measure which route and configuration of each operation is fastest on this GPU, at the shapes of
a model, and keep that for every later run.

    python -m koffkernels.tune [--model ID|FOLDER] [--minutes 3]

The table goes to the user's cache folder (``routes.own_table_path``), where it comes before the one
that is shipped. It is written whole after each shape, and what it already holds for these versions
is not measured again: a run that was cut goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import routes
from .checks import refuse
from .clock import Clock, EventClock, Variant, WarmClock, measure
from .dispatch import force_backend
from .gated_mlp import gated_mlp
from .lora_linear import lora_linears
from .prefix_attention import prefix_attention
from .routes import DECODE_TOKENS, force_route
from .types import GatedMLPLoRA, LoRA, Prefix

MARGIN = 0.99  # of the usual route's time, that another one must stay below to be chosen
ARCHS = (80, 90, 100)  # chips that configurations know; another counts as the next older one
RANK = 16
MEMORIES = 8  # of a call with memory ids
LEARNED = 512  # keys of the prefix in front of a prefill's own
# The file in koffkernels/_triton whose CONFIGS an operation's route can use; a fused backward
# computes the gradient of its input by the GEMM of a linear layer.
FILES = {
    ("gated_mlp", "forward", "fused"): "mlp.gemm",
    ("gated_mlp", "forward", "decode"): "mlp.decode",
    ("gated_mlp", "backward", "fused"): "lora.gemm",
    ("lora_linear", "forward", "fused"): "lora.gemm",
    ("lora_linear", "forward", "decode"): "lora.decode",
    ("lora_linear", "backward", "fused"): "lora.gemm",
    ("prefix_attention", "forward", "fused"): "attention.fwd",
}


class Key(NamedTuple):
    """What a row of the table is for.

    Args:
        op: as in ``routes.Shape``.
        direction: "forward" or "backward".
        m, k, n: tokens, and the widths of the GEMM k -> n, of an MLP its hidden width and neurons.
            The GEMM of a linear layer's backward goes from its outputs to its inputs. Of an
            attention: own keys of a row, as many as queries; a head's width; the same keys again.
        r: rank of the LoRA, 0 for an attention.
        mixed: eight memories and memory ids, instead of one memory without.
        heads, kv_heads: of an attention; or of q, k and v, which are one "lora_linear" whose
            outputs lie side by side. 0: a linear layer on its own.
    """

    op: str
    direction: str
    m: int
    k: int
    n: int
    r: int
    mixed: bool = False
    heads: int = 0
    kv_heads: int = 0

    @property
    def name(self) -> str:
        heads = f"-h{self.heads}over{self.kv_heads}" if self.heads else ""
        rank = f"-r{self.r}" if self.r else ""
        ids = "-mixed" if self.mixed else ""
        return f"{self.op}-{self.direction}-{self.m}x{self.k}x{self.n}{heads}{rank}{ids}"

    def shape(self, dtype: torch.dtype) -> routes.Shape:
        """Return what a call of this shape asks a route for."""
        several = self.op == "lora_linear" and self.heads > 0
        return routes.Shape(*self[:5], dtype, self.mixed, several)


class Candidate(NamedTuple):
    """A route, and the name of one of its configurations (None: its default)."""

    route: str
    config: str | None

    @property
    def name(self) -> str:
        return self.route if self.config is None else f"{self.route}:{self.config}"


class ModelShape(NamedTuple):
    """Sizes of a model's layers: hidden width, the different numbers of neurons, heads."""

    hidden: int
    widths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int


# What is measured without --model: Llama-3.1-8B (dense, and without 17 % of its neurons),
# Llama-3.2-3B and SmolLM2-1.7B, from their config.json.
MODELS = (
    ModelShape(4096, (11904, 14336), 32, 8, 128),
    ModelShape(3072, (8192,), 24, 8, 128),
    ModelShape(2048, (8192,), 32, 32, 64),
)


@dataclass(frozen=True)
class Machine:
    """Where a shape is measured.

    Args:
        device: "cuda", or "cpu" in a dry run.
        dtype: of base weights and activations.
        clock: how calls are timed.
        l2: bytes of the L2 cache.
    """

    device: torch.device
    dtype: torch.dtype
    clock: Clock
    l2: int

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Return random normal values: zeros multiply faster than data does."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype) * scale

    def sets(self, size: int) -> int:
        """Return how many input sets of ``size`` bytes to rotate, for four times the L2 cache."""
        return min(256, max(2, math.ceil(4 * self.l2 / max(size, 1))))

    @property
    def arch(self) -> int:
        """Compute capability, 90 for 9.0; 0 on the CPU."""
        if self.device.type != "cuda":
            return 0
        major, minor = torch.cuda.get_device_capability(self.device)
        return 10 * major + minor


def configurations(op: str, direction: str, route: str, arch: int) -> list[str]:
    """Return the configurations that a route may use on ``arch`` (90: sm_90)."""
    file = FILES.get((op, direction, route))
    if file is None:
        return []
    found = importlib.import_module(f"._triton.{file}", __package__).CONFIGS
    chip = max((known for known in ARCHS if known <= arch), default=ARCHS[0])
    return [name for name, config in found.items() if chip in (config.archs or ARCHS)]


def candidates(key: Key, arch: int) -> list[Candidate]:
    """Return what may run a shape, the vendor's route first.

    Up to ``DECODE_TOKENS`` the fused GEMMs are left out: most of their tile would be empty.
    """
    found = [Candidate("vendor", None)]
    if key.op == "prefix_attention":
        found += [Candidate("vendor", "cudnn"), Candidate("vendor", "flash")]
        if key.direction == "backward":
            return [*found, Candidate("fused", None)]
    few = key.direction == "forward" and key.m <= DECODE_TOKENS
    route = "decode" if few and key.op != "prefix_attention" else "fused"
    names = configurations(key.op, key.direction, route, arch)
    return found + [Candidate(route, name) for name in names]


def usual(key: Key, dtype: torch.dtype, found: list[Candidate]) -> Candidate:
    """Return the candidate that runs where nothing was measured."""
    name = routes.usual(key.shape(dtype))
    return next(c for c in found if c.route == name)


def _lora(machine: Machine, key: Key, out: int, k: int, train: bool) -> LoRA:
    """Return fp32 LoRA whose delta is about a tenth of the base output."""
    n = MEMORIES if key.mixed else 1
    a = machine.normal(n, key.r, k, scale=k**-0.5, dtype=torch.float32)
    b = machine.normal(n, out, key.r, scale=0.1 * key.r**-0.5, dtype=torch.float32)
    scaling = torch.linspace(0.5, 1.5, n, device=machine.device)
    return LoRA(a.requires_grad_(train), b.requires_grad_(train), scaling)


def _rows(machine: Machine, key: Key) -> tuple[int, Tensor | None]:
    """Return how many rows a call has, and the memory of each: neighbours differ."""
    if key.op == "prefix_attention":
        rows = max(1, 8192 // key.m)
    else:
        rows = key.m if key.m <= DECODE_TOKENS else MEMORIES
    ids = torch.arange(rows, device=machine.device) % MEMORIES if key.mixed else None
    return rows, ids


class _Operation(NamedTuple):
    """A call without arguments that returns all outputs, and what is trained."""

    call: Callable[[], Sequence[Tensor]]
    trained: list[Tensor]


def _weights(key: Key) -> list[tuple[int, int]]:
    """Return the sizes [N, K] of the weights of a gated MLP, of a linear layer, or of q, k and
    v."""
    if key.op == "gated_mlp":
        return [(key.n, key.k), (key.n, key.k), (key.k, key.n)]
    # The GEMM of a backward goes the other way.
    out, inner = (key.n, key.k) if key.direction == "forward" else (key.k, key.n)
    if not key.heads:
        return [(out, inner)]
    width = out // (key.heads + 2 * key.kv_heads)
    return [(heads * width, inner) for heads in (key.heads, key.kv_heads, key.kv_heads)]


def _operation(machine: Machine, key: Key, train: bool) -> _Operation:
    """Return one operation with random weights and memories."""
    rows, ids = _rows(machine, key)
    if key.op == "prefix_attention":
        sizes = [(rows, h, key.m, key.k) for h in (key.heads, key.kv_heads, key.kv_heads)]
        # As a model has them: [B, T, H, D], seen as [B, H, T, D].
        qkv = [
            machine.normal(b, t, h, d).transpose(1, 2).requires_grad_(train) for b, h, t, d in sizes
        ]
        n = MEMORIES if key.mixed else 1
        learned = [
            machine.normal(n, key.kv_heads, LEARNED, key.k, dtype=torch.float32) for _ in range(2)
        ]
        learned = [x.requires_grad_(train) for x in learned]
        lengths = torch.full((n,), LEARNED, device=machine.device)
        prefix = Prefix(*learned, lengths)
        return _Operation(
            lambda: [prefix_attention(*qkv, prefix, memory_ids=ids)], [*qkv, *learned]
        )
    sizes = _weights(key)
    x = machine.normal(rows, key.m // rows, sizes[0][1]).requires_grad_(train)
    weights = [machine.normal(*size, scale=size[1] ** -0.5) for size in sizes]
    parts = [_lora(machine, key, *size, train) for size in sizes]
    trained = [x, *(t for part in parts for t in part[:2])]
    if key.op == "gated_mlp":
        lora = GatedMLPLoRA(*parts)
        return _Operation(lambda: [gated_mlp(x, *weights, lora=lora, memory_ids=ids)], trained)
    return _Operation(lambda: lora_linears(x, weights, lora=parts, memory_ids=ids), trained)


def _bytes(key: Key, size: int) -> int:
    """Return about how many bytes a call reads, with elements of ``size`` bytes."""
    if key.op == "prefix_attention":
        return 8192 * key.k * (key.heads + 2 * key.kv_heads) * size
    weights = key.k * key.n * (3 if key.op == "gated_mlp" else 1)
    return (weights + key.m * key.k) * size


def _forward(machine: Machine, key: Key) -> Callable[[Candidate], Variant]:
    """Return candidate -> what to time."""
    sets = machine.sets(_bytes(key, machine.dtype.itemsize))
    operations = [_operation(machine, key, False) for _ in range(sets)]

    def variant(candidate: Candidate) -> Variant:
        def call(i: int) -> object:
            with torch.no_grad(), force_route(candidate.name, key.op):
                return operations[i].call()

        return Variant(call, sets, calls=16 if key.m <= 1024 else 2)

    return variant


def _backward(machine: Machine, key: Key) -> Callable[[Candidate], Variant]:
    """Return candidate -> what to time: a forward of the vendor's, and all gradients. Both go into
    one CUDA graph: launched one by one, the many small kernels would wait for the host."""
    call, trained = _operation(machine, key, True)
    dys = [torch.randn_like(y) for y in call()]

    def variant(candidate: Candidate) -> Variant:
        def gradients(i: int) -> object:
            with force_route("vendor", key.op):
                ys = call()
            with force_route(candidate.name, key.op):
                return torch.autograd.grad(ys, trained, dys)

        return Variant(gradients, 1, calls=2)

    return variant


def measure_key(machine: Machine, key: Key) -> list[dict]:
    """Return one row per candidate; one that does not run has "error" instead of "us"."""
    make = (_forward if key.direction == "forward" else _backward)(machine, key)
    found = candidates(key, machine.arch)
    first = usual(key, machine.dtype, found)
    variants, failed = {}, []
    for candidate in found:
        try:
            variant = make(candidate)
            variant.call(0)
            variants[candidate] = variant
        except Exception as error:  # a configuration that does not run loses, and says why
            lines = str(error).strip().splitlines() or [""]
            failed.append(
                _row(machine, key, candidate)
                | {"error": f"{type(error).__name__}: {lines[-1][:300]}"}
            )
    if not variants:
        return failed
    times = measure(machine.clock, {c.name: v for c, v in variants.items()})
    usual_us = statistics.median(times[first.name]) if first.name in times else None
    rows = [
        _row(machine, key, c)
        | {"us": statistics.median(times[c.name]), "usual": c == first, "times": times[c.name]}
        for c in variants
    ]
    return [row | {"usual_us": usual_us} for row in rows] + failed


def _row(machine: Machine, key: Key, candidate: Candidate) -> dict:
    return {
        "name": f"{key.name}-{candidate.name}",
        **{"pass" if field == "direction" else field: x for field, x in key._asdict().items()},
        "dtype": routes.DTYPES[machine.dtype],
        "route": candidate.route,
        "config": candidate.config,
        **routes.versions(),
    }


SAME = ("op", "pass", "m", "k", "n", "r", "mixed", "heads", "kv_heads", "dtype", "torch", "triton")
FIELDS = (*SAME, "route", "config", "us", "usual_us")


def _same(row: dict) -> tuple:
    """Return what rows of one shape and of the same versions have in common."""
    return tuple(row.get(field) for field in SAME)


def winners(rows: Iterable[dict]) -> list[dict]:
    """Return the fastest row of each shape: another than the usual one only if faster by
    ``MARGIN``."""
    best: dict[tuple, tuple[float, dict]] = {}
    for row in (row for row in rows if "error" not in row):
        handicapped = row["us"] * (MARGIN if row["usual"] else 1.0)
        if _same(row) not in best or handicapped < best[_same(row)][0]:
            best[_same(row)] = handicapped, row
    return [{field: row[field] for field in FIELDS} for _, row in best.values()]


def write(path: Path, gpu: str, rows: list[dict]) -> None:
    """Write a table, in one step: who is stopped halfway leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    scratch.write_text(f'{{\n "gpu": {json.dumps(gpu)},\n "rows": [\n  {lines}\n ]\n}}\n')
    os.replace(scratch, path)


def keys_of(shapes: Iterable[ModelShape], rank: int = RANK) -> list[Key]:
    """Return all shapes to measure, those that decide most first."""
    shapes = tuple(shapes)

    def linears(direction: str, m: int, mixed: bool) -> Iterator[Key]:
        for s in shapes:
            q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
            for width in s.widths:
                yield Key("gated_mlp", direction, m, s.hidden, width, rank, mixed)
            down = [(width, s.hidden, 0, 0) for width in s.widths]
            qkv = s.hidden, q + 2 * kv, s.heads, s.kv_heads
            for k, n, *heads in (*down, qkv, (q, s.hidden, 0, 0)):
                if direction == "backward":
                    k, n = n, k
                yield Key("lora_linear", direction, m, k, n, rank, mixed, *heads)

    def attention(direction: str, m: int) -> Iterator[Key]:
        for s in shapes:
            if s.head_dim in (64, 128):
                sizes = (m, s.head_dim, m)
                yield Key("prefix_attention", direction, *sizes, 0, False, s.heads, s.kv_heads)

    found = [
        *linears("forward", 1, False),
        *attention("forward", 2048),
        *linears("forward", 8, True),
        *linears("forward", 8192, False),
        *attention("backward", 2048),
        *linears("forward", 64, True),
    ]
    for m, mixed in ((1, True), (16, False), (64, False), (2048, True), (256, False)):
        found += linears("forward", m, mixed)
    found += linears("backward", 8192, False)
    for m in (512, 8192):
        found += [*attention("forward", m), *attention("backward", m)]
    for m, mixed in ((16, True), (2048, False), (4, False), (256, True), (8192, True)):
        found += linears("forward", m, mixed)
    found += linears("backward", 2048, True)
    return list(dict.fromkeys(found))


def model_shape(config: dict) -> ModelShape:
    """Return the sizes that a model's config.json gives."""
    text = config.get("text_config") or config
    try:
        hidden, heads = text["hidden_size"], text["num_attention_heads"]
        widths = text.get("intermediate_sizes") or text["intermediate_size"]
    except KeyError as error:
        rule = "have hidden_size, intermediate_size and num_attention_heads"
        step = "give the folder or id of a model with gated MLPs"
        refuse("koffkernels.tune", "config.json", rule, f"none of {error}", step)
    widths = sorted(set(widths if isinstance(widths, list) else [widths]))
    if len(widths) > 3:  # the nearest counts
        widths = [widths[0], widths[len(widths) // 2], widths[-1]]
    kv_heads = text.get("num_key_value_heads") or heads
    return ModelShape(
        hidden, tuple(widths), heads, kv_heads, text.get("head_dim") or hidden // heads
    )


def read_config(model: str) -> dict:
    """Return the config.json of a folder or, where huggingface_hub is installed, of a hub's id."""
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        if importlib.util.find_spec("huggingface_hub") is None:
            step = "install huggingface_hub to give the id of a model"
            refuse("koffkernels.tune", "--model", "be a folder with a config.json", model, step)
        hub = importlib.import_module("huggingface_hub")
        path = Path(hub.hf_hub_download(model, "config.json"))
    return json.loads(path.read_text(encoding="utf-8"))


def _variant(key: Key) -> tuple:
    """Return what mostly decides which kernels a shape needs, so that few are compiled twice."""
    tokens = DECODE_TOKENS + 1 if key.m > DECODE_TOKENS else max(16, 1 << (key.m - 1).bit_length())
    return (
        key.op,
        key.direction,
        tokens,
        key.mixed,
        key.k % 256 == 0,
        key.n % 256 == 0,
        bool(key.heads),
        key.op == "prefix_attention" and key.k,  # a head's width
    )


def compile_ahead(keys: list[Key], dtype: str, seconds: float) -> None:
    """Compile the kernels of ``keys`` in several processes, for at most ``seconds``."""
    keys = list({_variant(key): key for key in reversed(keys)}.values())[::-1]
    free, _ = torch.cuda.mem_get_info()
    count = min(12, (os.cpu_count() or 2) - 1, int(free // (4 << 30)), len(keys))
    if count < 2:
        return
    command = [sys.executable, "-m", f"{__package__}.tune", "--compile", "--dtype", dtype]
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(count)
    ]
    end = time.monotonic() + seconds
    try:
        for i, process in enumerate(processes):
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(keys[i::count]).encode())
                process.stdin.close()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def missing(machine: Machine, keys: list[Key], path: Path) -> list[Key]:
    """Return the shapes of which a table has no row for these versions."""
    done = {_same(row) for row in routes.read(path)}
    return [key for key in keys if _same(_row(machine, key, Candidate("vendor", None))) not in done]


def tune(
    machine: Machine, keys: list[Key], path: Path, gpu: str, end: Callable[[], bool]
) -> list[dict]:
    """Measure shapes until the time is over, and write the table after each.

    Args:
        machine: where.
        keys: in the order to measure them.
        path: of the table; its rows stay, and shapes that it has for these versions are done.
        gpu: the name that CUDA gives it.
        end: whether the time is over.

    Returns:
        The table's rows.
    """
    start = time.monotonic()
    for i, key in enumerate(keys):
        if end():
            print(f"time is over: {len(keys) - i} shapes left; run the same command again")
            break
        rows = measure_key(machine, key)
        best = winners(rows)
        # Read again: another process may have tuned meanwhile.
        kept = {_same(row): row for row in routes.read(path)}
        kept |= {_same(row): row for row in best}
        write(path, gpu, list(kept.values()))
        seconds = time.monotonic() - start
        print(f"{seconds:5.0f} s  {i + 1}/{len(keys)}  {said(rows)}", flush=True)
    return routes.read(path)


def said(rows: list[dict]) -> str:
    """Return one line about all candidates of a shape."""
    good = [row for row in rows if "us" in row]
    if not good:
        return f"{rows[0]['name']}: {rows[0].get('error')}"
    best = winners(rows)[0]
    name = next(row for row in good if row["us"] == best["us"])["name"]
    text = f"{name}: {best['us']:.1f} us"
    if best["usual_us"] is not None:
        text = f"{text}, usual {best['usual_us']:.1f} us"
    return text if len(good) == len(rows) else f"{text}, {len(good)} of {len(rows)} ran"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m koffkernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", action="append", default=[], help="folder or hub id; may be given several times"
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="time to take, 3 without it")
    parser.add_argument("--rank", type=int, default=RANK, help="of the LoRA, 16 without it")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--again", action="store_true", help="measure again what the table holds")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Tune this machine's GPU; 2 if there is none."""
    args = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("koffkernels.tune: a CUDA GPU must be visible to torch, got none", file=sys.stderr)
        return 2
    start = time.monotonic()
    properties = torch.cuda.get_device_properties(0)
    dtype = {name: dtype for dtype, name in routes.DTYPES.items()}[args.dtype]
    l2 = getattr(properties, "L2_cache_size", 50 << 20)
    device = torch.device("cuda", torch.cuda.current_device())
    with force_backend("triton"):
        if args.compile:
            warm = Machine(device, dtype, WarmClock(), 0)
            for key in (Key(*key) for key in json.load(sys.stdin)):
                measure_key(warm, key)
            return 0
        gpu = torch.cuda.get_device_name(device)
        path = routes.own_table_path(gpu)
        shapes = [model_shape(read_config(model)) for model in args.model] or MODELS
        keys = keys_of(shapes, args.rank)
        machine = Machine(device, dtype, EventClock(), l2)
        todo = keys if args.again else missing(machine, keys, path)
        print(f"{gpu}: {len(todo)} of {len(keys)} shapes to measure, table {path}", flush=True)
        if todo:
            print("compiling ahead", flush=True)
            compile_ahead(todo, args.dtype, 0.4 * 60 * args.minutes)
        tune(machine, todo, path, gpu, lambda: time.monotonic() - start > 60 * args.minutes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
