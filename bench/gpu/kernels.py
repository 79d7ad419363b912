"""Where does the time go? Every kernel of every operation at the shapes of Llama-3.1-8B, by torch's
profiler: microseconds, launches, GB/s, TFLOP/s, and the share of this run's own limits.

One row per operation. Its ``kernels`` are our Triton kernels by name, "gemm" (cuBLAS), "flash"
(torch's attention) and "other" (torch's elementwise kernels). A kernel's bytes are those of the
tensors it was launched with, what it changes in place twice: what it must move, unless it skips
some. Beside them stand the time in a CUDA graph and launched one by one, there the GPU's and the
host's.
"""

from __future__ import annotations

import collections
import csv
import importlib
import io
import math
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from koffkernels.clock import Variant

from . import device, smoke
from .context import Bench, pruned
from .results import Case, Deadline, Results

ROOT = Path(__file__).parents[2]
NCU_SECONDS = 25.0
TURNS = 6  # how often a profile runs an operation over its input sets
# Arguments that a kernel reads and writes; of the others each is one or the other. A kernel with
# ONTO adds to y where that says so.
IN_PLACE = {"_expand_fwd_kernel": ("y_ptr", "y1.ptr", "y2.ptr")}
NCU = ("ncu", "/usr/local/cuda/bin/ncu", "/opt/nvidia/nsight-compute/ncu")
NCU_METRICS = {
    "Duration": "us",
    "DRAM Throughput": "dram",
    "Memory Throughput": "memory",
    "Compute (SM) Throughput": "compute",
    "Achieved Occupancy": "occupancy",
    "Theoretical Occupancy": "possible",
    "Registers Per Thread": "registers",
    "Waves Per SM": "waves",
}


class Operation(NamedTuple):
    """What is profiled.

    Args:
        name: of the row.
        make: builds one input set.
        route: "auto" or a forced one.
        train: forward and all gradients, or forward alone.
        flops: operations of the base weights' products, or of attention.
        size: bytes of one input set, roughly.
        streams: bound by memory: the share of the copy bandwidth says how good it is.
    """

    name: str
    make: Callable[[], smoke.Problem]
    route: str
    train: bool
    flops: float
    size: int
    streams: bool = True


def operations(bench: Bench) -> Iterator[Operation]:
    """The most telling first."""
    shape, lead = bench.shape, bench.prefill()
    hidden, kv, width = shape.hidden, shape.kv_heads * shape.head_dim, pruned(shape.intermediate)

    def mlp(what: str, n: int, rows: tuple[int, int], route: str, train: bool, r: int = 16):
        flops = 2 * 3 * math.prod(rows) * hidden * width * (2 if train else 1)
        name = f"mlp-{'train' if train else 'infer'}-{math.prod(rows)}-{what}"
        name += ("" if r == 16 else f"-r{r}") + ("" if route == "auto" else f"-{route}")
        make = lambda: smoke.mlp(bench, rows, width, n, r)  # noqa: E731
        return Operation(name, make, route, train, flops, 3 * hidden * width * 2)

    def linear(what: str, n: int, rows: tuple[int, int], route: str, train: bool, out: int, r=16):
        flops = 2 * math.prod(rows) * hidden * out * (2 if train else 1)
        name = f"linear-{'train' if train else 'infer'}-{math.prod(rows)}x{out}-{what}"
        name += ("" if r == 16 else f"-r{r}") + ("" if route == "auto" else f"-{route}")
        make = lambda: smoke.linear(bench, rows, hidden, out, n, r)  # noqa: E731
        return Operation(name, make, route, train, flops, hidden * out * 2)

    def qkv(what: str, n: int, rows: tuple[int, int], route: str, train: bool):
        outs = hidden, kv, kv
        flops = 2 * math.prod(rows) * hidden * sum(outs) * (2 if train else 1)
        name = f"qkv-{'train' if train else 'infer'}-{math.prod(rows)}-{what}"
        name += "" if route == "auto" else f"-{route}"
        make = lambda: smoke.linears(bench, rows, hidden, outs, n, 16)  # noqa: E731
        return Operation(name, make, route, train, flops, hidden * sum(outs) * 2)

    def attention(what: str, size: smoke.Attention, route: str, train: bool):
        pairs = size.queries * size.prefix
        own = size.queries * (size.queries + 1) // 2 if size.queries > 1 else size.keys
        # Two products forward and five backward.
        flops = 4 * size.rows * size.heads * size.width * (pairs + own) * (3.5 if train else 1)
        name = f"attention-{'train' if train else 'infer'}-{size.queries}-{size.rows}-{what}"
        name += "" if route == "auto" else f"-{route}"
        make = lambda: smoke.attention(bench, size)  # noqa: E731
        total = 2 * size.rows * size.kv * size.keys * size.width * 2
        return Operation(name, make, route, train, flops, total, size.queries == 1)

    heads, wide = shape.heads, shape.head_dim
    long, learned = (24, 10) if bench.dry else (2048, 512)

    def size(rows: int, queries: int, keys: int, prefix: int, n: int) -> smoke.Attention:
        return smoke.Attention(rows, heads, shape.kv_heads, queries, keys, prefix, wide, n)

    one, eight = ("one", 1), ("mixed", 8)
    for n in (one, eight):
        yield mlp(*n, lead, "auto", True)
        yield linear(*n, lead, "auto", True, hidden)
        yield qkv(*n, lead, "auto", True)
    for n, rows in ((one, 1), (eight, 64)):
        for route in ("auto", "decode"):
            yield mlp(*n, (rows, 1), route, False)
            yield linear(*n, (rows, 1), route, False, hidden)
        yield qkv(*n, (rows, 1), "auto", False)
    for route in ("vendor", "flash", "fused"):
        yield attention("one", size(4, long, long, learned, 1), route, True)
    yield attention("one", size(64, 1, 128 if not bench.dry else 4, long, 1), "auto", False)
    yield attention("mixed", size(64, 1, 512 if not bench.dry else 8, long, 8), "auto", False)
    yield attention("one", size(1, 1, long, long, 1), "auto", False)
    yield attention("mixed", size(4, long, long, learned, 3), "vendor", True)
    yield mlp("mixed-64", 8, lead, "auto", True, 64)
    for n in (one, eight):
        yield mlp(*n, lead, "auto", False)
        yield linear(*n, lead, "auto", False, kv)
        yield mlp(*n, lead, "fused", True)
        yield linear(*n, lead, "fused", True, hidden)
        yield qkv(*n, lead, "fused", True)
    for n, rows in ((one, 8), (eight, 8)):
        for route in ("auto", "decode"):
            yield mlp(*n, (rows, 1), route, False)
            yield linear(*n, (rows, 1), route, False, kv)


def _call(bench: Bench, operation: Operation, problem: smoke.Problem) -> Callable[[], object]:
    """The operation on one input set, launched as in a model."""
    leaves = {}
    for name, tensor in problem.tensors.items():
        leaves[name] = tensor.detach()
        if operation.train and name not in problem.frozen:
            leaves[name].requires_grad_()
    trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
    cotangents: list[Tensor] = []

    def call() -> object:
        with smoke._routed(bench, operation.route), torch.set_grad_enabled(operation.train):
            ys = problem.ours(leaves)
            ys = (ys,) if isinstance(ys, Tensor) else ys
            if not operation.train:
                return ys
            cotangents[:] = cotangents or map(torch.randn_like, ys)
            return torch.autograd.grad(ys, trained, cotangents)

    return call


def kind(name: str) -> str:
    """Our kernels keep their name; the vendor's are grouped."""
    if re.match(r"_[a-z]", name) and not name.startswith("_Z"):
        return name
    low = name.lower()
    if "flash" in low or "fmha" in low or "sdpa" in low:
        return "flash"
    if re.search(r"gemm|nvjet|cutlass|xmma|cublas|splitk|gemv|dot_kernel", low):
        return "gemm"
    return "other"


def profiled(calls: list[Callable[[], object]], turns: int) -> dict[str, tuple[int, float]]:
    """kernel -> (launches, microseconds) over ``turns`` x all calls; empty without CUPTI."""
    from torch.profiler import ProfilerActivity, profile

    for call in calls:
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(turns):
            for call in calls:
                call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for name, us in _device_events(prof):
        entry = found[kind(name)]
        entry[0] += 1
        entry[1] += us
    return {name: (int(count), us) for name, (count, us) in found.items()}


def _device_events(prof) -> Iterator[tuple[str, float]]:
    """(name, microseconds) of everything that ran on the GPU."""
    for event in prof.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            yield event.name(), event.duration_ns() / 1e3


def launched(call: Callable[[], object]) -> dict[str, int]:
    """kernel -> bytes of one call, from the arguments it is launched with."""
    common = importlib.import_module("koffkernels._triton.shared.launch")
    sizes: dict[str, int] = collections.Counter()
    with common.recording() as launches:
        call()
    for launch in launches:
        kernel = getattr(launch.kernel, "fn", launch.kernel).__name__
        twice = ("y_ptr",) if launch.args.get("ONTO") else IN_PLACE.get(kernel, ())
        # Two arguments at one address are read as one and written as the other.
        for name, value in common.tensors_of(launch.args).items():
            sizes[kernel] += value.numel() * value.element_size() * (2 if name in twice else 1)
    return dict(sizes)


def measure(bench: Bench, operation: Operation) -> list[dict]:
    """The row of one operation."""
    torch.manual_seed(3)
    sets = max(2, min(24, bench.sets(operation.size)))
    if bench.warm or bench.dry:
        sets = 1
    calls = [_call(bench, operation, operation.make()) for _ in range(sets)]
    row = {"name": operation.name, "route": operation.route, "flops": operation.flops}
    if bench.warm:
        calls[0]()
        return [row | {"text": "ran"}]
    if bench.dry:
        times = bench.measure(all=Variant(lambda i: calls[i](), sets))
        us = statistics.median(times["all"])
        return [row | {"us": us, "kernels": {}, "text": f"{us:.0f} us (dry)"}]
    row |= _profile_row(bench, operation, calls)
    row |= one_by_one(bench, calls)
    variant = Variant(lambda i: calls[i](), sets, calls=2 if operation.size > 1 << 27 else 8)
    try:  # what is left when nothing waits for the host
        row["graph_us"] = statistics.median(bench.measure(graph=variant)["graph"])
    except Exception as error:
        row["failed"] = row.get("failed") or f"no graph: {device.words(error)}"
    row["text"] = _text(row)
    return [row]


def one_by_one(bench: Bench, calls: list[Callable[[], object]]) -> dict[str, float]:
    """Microseconds of a call without a graph: from one to the next on the GPU, and of the host
    until all that it launches is asked for."""
    variant = Variant(lambda i: calls[i](), len(calls), graph=False)
    times = bench.measure(eager=variant)["eager"]
    asked = []
    for _ in range(10):
        torch.cuda.synchronize()  # an empty queue, which takes some thousand launches
        start = time.perf_counter()
        for call in calls:
            call()
        asked.append((time.perf_counter() - start) * 1e6 / len(calls))
    torch.cuda.synchronize()
    return {"eager_us": statistics.median(times), "host_us": statistics.median(asked)}


def products(call: Callable[[], object]) -> int:
    """Operations of torch's own matrix products in one call."""
    aten = torch.ops.aten
    # Of shapes y [M, N], a [M, K], b [K, N]; torch's counter leaves it out.
    in_place = {aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        call()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(op, 0) for op in (aten.mm, aten.addmm, aten.addmm_, aten.bmm))


def _profile_row(bench: Bench, operation: Operation, calls: list[Callable]) -> dict:
    """What the profiler says of one call."""
    turns = max(1, math.ceil(TURNS / len(calls)))
    try:
        found = profiled(calls, turns)
    except Exception as error:
        found, failed = {}, device.words(error)
    else:
        failed = None if found else "the profiler saw no kernel"
    try:
        sizes, own = launched(calls[0]), products(calls[0])
    except Exception as error:
        sizes, own, failed = {}, 0, failed or f"bytes and operations: {device.words(error)}"
    torch.cuda.synchronize()
    count = turns * len(calls)
    kernels = {}
    for name, (launches, us) in sorted(found.items(), key=lambda item: -item[1][1]):
        one = {"launches": launches / count, "us": us / count}
        if name in sizes:
            one["bytes"] = sizes[name]
            one["gb_per_second"] = sizes[name] / one["us"] / 1e3
            if operation.streams or not name.startswith("_prefix_attention"):
                one["share"] = sizes[name] / one["us"] / bench.copy_rate
        if name == "gemm":
            one["tflop_per_second"] = own / one["us"] / 1e6
            one["share"] = own / one["us"] / bench.gemm_rate
        kernels[name] = one
    total = sum(one["us"] for one in kernels.values())
    row = {
        "kernels": kernels,
        "us": total,
        "launches": sum(k["launches"] for k in kernels.values()),
    }
    if failed:
        row["failed"] = failed
    if total:
        row["tflop_per_second"] = operation.flops / total / 1e6
    return row


def short(name: str) -> str:
    """A kernel's name for a line."""
    return (
        name.removeprefix("_")
        .removesuffix("_kernel")
        .removesuffix("_fwd")
        .replace("prefix_attention", "attn")
    )


def _text(row: dict) -> str:
    """Sum of the kernels, in a graph, one by one, host; the six heaviest kernels with their share
    of the limit."""
    times = row["us"], row.get("graph_us", 0), row["eager_us"], row["host_us"]
    parts = ["{:.0f}us/{:.0f}g/{:.0f}e/{:.0f}h".format(*times)]
    if row.get("tflop_per_second", 0) > 50:
        parts[0] += f" {row['tflop_per_second']:.0f}TF"
    parts.append(f"{row['launches']:.0f}L")
    for name, one in list(row["kernels"].items())[:6]:
        share = f" {100 * one['share']:.0f}%" if "share" in one else ""
        parts.append(f"{short(name)} {one['us']:.0f}{share}")
    if "failed" in row:
        parts.append(row["failed"][:60])
    return ", ".join(parts)


def ncu(bench: Bench, deadline: Deadline, seconds: float) -> list[dict]:
    """Registers, occupancy and bandwidth of our kernels by Nsight Compute; no clock is set."""
    tool = next((found for name in NCU if (found := shutil.which(name))), None)
    if tool is None or bench.dry:
        return [{"name": "ncu", "text": "no ncu here" if tool is None else "not in a dry run"}]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = [tool, "--clock-control", "none", "--set", "basic", "--csv", "--page", "details"]
        command += ["--kernel-name", "regex:^_[a-z]", "--launch-count", "60"]
        command += ["--profile-from-start", "off", "--log-file", str(log)]
        command += [sys.executable, "-m", "bench.gpu.kernels"]
        from .checks import _process  # stops everything it started

        code, output = _process(command, min(seconds, deadline.left()))
        text = log.read_text(errors="replace") if log.exists() else ""
    rows = parse_ncu(text)
    if not rows:
        why = "out of time" if code is None else f"exit code {code}"
        said = device.without_paths(output + text, 300).replace("\n", " ")
        return [{"name": "ncu", "text": f"{why}: {said}"}]
    return rows


def parse_ncu(text: str) -> list[dict]:
    """One row per distinct kernel and grid of ncu's CSV (lines before the header are its own)."""
    lines = text.splitlines()
    start = next((i for i, one in enumerate(lines) if one.startswith('"ID"')), None)
    if start is None:
        return []
    found: dict[str, dict] = {}
    for entry in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        row = found.setdefault(
            entry.get("ID") or "",
            {"kernel": entry.get("Kernel Name"), "grid": entry.get("Grid Size")},
        )
        field = NCU_METRICS.get((entry.get("Metric Name") or "").strip())
        if field is None:
            continue
        try:
            value = float((entry.get("Metric Value") or "").replace(",", ""))
        except ValueError:
            continue
        if field == "us":
            unit = (entry.get("Metric Unit") or "").strip()
            scales = {"ns": 1e-3, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3, "s": 1e6}
            value *= scales.get(unit, 1.0)
        row[field] = value
    rows, seen = [], set()
    for row in found.values():
        key = row["kernel"], row["grid"]
        if key in seen:
            continue
        seen.add(key)
        text = f"{row.get('us', 0):.1f}us dram {row.get('dram', 0):.0f}%"
        text += f" sm {row.get('compute', 0):.0f}%"
        text += f" occ {row.get('occupancy', 0):.0f}/{row.get('possible', 0):.0f}%"
        text += f" {row.get('registers', 0):.0f} regs {row.get('waves', 0):.1f} waves"
        rows.append(
            {"name": f"ncu {short(row['kernel'] or '')} {row['grid']}", "text": text, **row}
        )
    return rows


def cases(bench: Bench, deadline: Deadline) -> Iterator[Case]:
    """Every operation, and ncu once the most telling are done."""
    for index, operation in enumerate(operations(bench)):
        if index == 20 and not bench.warm:
            yield "ncu", lambda: ncu(bench, deadline, 50.0)
        yield operation.name, lambda o=operation: measure(bench, o)


def run(bench: Bench, results: Results, deadline: Deadline, only: tuple[str, ...]) -> None:
    """Measure the limits, then every operation."""
    if not bench.warm:
        results.note(limits=bench.limits(), dtype=bench.dtype_name)
        rates = [
            rate / scale for rate, scale in zip(bench.limits().values(), (1e9, 1e12), strict=True)
        ]
        print(f"limits: copy {rates[0]:.0f} GB/s, GEMM {rates[1]:.0f} TFLOP/s", flush=True)
        print("kernels: sum of kernels / in a graph / eager / host, launches, then the heaviest,"
              " each with its share of the copy bandwidth or GEMM rate", flush=True)  # fmt: skip
    results.run(cases(bench, deadline), deadline, only)


def main() -> int:
    """What ncu watches: each operation once between cudaProfilerStart and Stop, compiled before."""
    from . import context

    with context.bench(False) as bench:
        found = list(operations(bench))[:22]
        # Mixed memories, and attention: the others launch the same kernels.
        telling = [o for o in found if "mixed" in o.name or o.name.startswith("attention")]
        start = time.monotonic()
        for operation in telling:
            if time.monotonic() - start > NCU_SECONDS:
                break  # ncu prints at the end of the process: being killed would cost everything
            try:
                call = _call(bench, operation, operation.make())
                call()
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                call()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            except Exception as error:
                print(operation.name, device.words(error), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
