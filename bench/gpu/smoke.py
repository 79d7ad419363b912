"""Is it right at real sizes? Every operation and route, forward and backward, at the shapes of
Llama-3.1-8B and at small awkward ones, in bf16, against plain torch in fp32 on the same GPU.

A row holds the relative error (RMS of the difference over RMS of the reference) of the output and
of every gradient, and whether two runs give the same bits. Nothing is timed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import koffkernels
from koffkernels import GatedMLPLoRA, LoRA, Prefix, RowBounds, replay
from koffkernels.routes import force_route

from .. import launching, timing
from .context import Bench, pruned
from .results import Case, Deadline, Results

# A bf16 number is off by 0.17 % (RMS); an output has two or three such roundings behind it, a
# gradient up to five.
FORWARD_TOLERANCE = 0.01
BACKWARD_TOLERANCE = 0.02
PDL = "pdl"  # the decode kernels with programmatic dependent launch
ACTIVATIONS = {"x", "q", "k", "v"}  # what changes between the steps of a decode
Call = Callable[[dict[str, Tensor]], Tensor | tuple[Tensor, ...]]


class Problem(NamedTuple):
    """Arguments by name, the operation, and the same in plain torch of any dtype.

    Args:
        tensors: arguments; base weights in ``frozen`` have no gradient.
        ours, plain: functions of such tensors.
        frozen: names without a gradient.
    """

    tensors: dict[str, Tensor]
    ours: Call
    plain: Call
    frozen: tuple[str, ...]


def row_memories(rows: int, memories: int) -> list[int]:
    """The memory of each row: none (-1) and all of them in turn, or the only one."""
    return [0] * rows if memories == 1 else [row % (memories + 1) - 1 for row in range(rows)]


def prefix_lengths(longest: int, memories: int) -> list[int]:
    """Learned tokens of each memory, all different."""
    return [max(1, longest - 3 * m) for m in range(memories)]


def _ids(bench: Bench, rows: int, memories: int) -> Tensor | None:
    """int64 [rows]; None with one memory, which every row has then."""
    if memories == 1:
        return None
    return torch.tensor(row_memories(rows, memories), device=bench.device)


def _lora(bench: Bench, name: str, n: int, r: int, k: int, out: int) -> dict[str, Tensor]:
    """fp32 LoRA whose delta is about as large as the base output."""
    return {
        f"{name}.a": bench.normal(n, r, k, scale=k**-0.5, dtype=torch.float32),
        f"{name}.b": bench.normal(n, out, r, scale=r**-0.5, dtype=torch.float32),
        f"{name}.s": torch.linspace(0.5, 1.5, n, device=bench.device),
    }


def _of(t: dict[str, Tensor], name: str) -> LoRA:
    return LoRA(t[f"{name}.a"], t[f"{name}.b"], t[f"{name}.s"])


def _plain_linear(x: Tensor, w: Tensor, lora: LoRA, ids: Tensor | None) -> Tensor:
    """Each memory on its own rows."""
    y = F.linear(x, w)
    if ids is None:
        return y + lora.scaling[0] * F.linear(F.linear(x, lora.a[0]), lora.b[0])
    for m in range(lora.a.shape[0]):
        rows = (ids == m).nonzero()[:, 0]
        if len(rows):
            delta = F.linear(F.linear(x[rows], lora.a[m]), lora.b[m])
            y = y.index_add(0, rows, lora.scaling[m] * delta)
    return y


def linear(bench: Bench, lead: tuple[int, int], k: int, out: int, n: int, r: int) -> Problem:
    """lora_linear."""
    ids = _ids(bench, lead[0], n)
    tensors = {
        "x": bench.normal(*lead, k),
        "w": bench.normal(out, k, scale=k**-0.5),
        **_lora(bench, "lora", n, r, k, out),
    }

    def ours(t: dict[str, Tensor]) -> Tensor:
        return koffkernels.lora_linear(t["x"], t["w"], lora=_of(t, "lora"), memory_ids=ids)

    def plain(t: dict[str, Tensor]) -> Tensor:
        return _plain_linear(t["x"], t["w"], _of(t, "lora"), ids)

    return Problem(tensors, ours, plain, ("w", "lora.s"))


def linears(
    bench: Bench, lead: tuple[int, int], k: int, outs: Sequence[int], n: int, r: int
) -> Problem:
    """lora_linears: q, k and v of one x."""
    ids, names = _ids(bench, lead[0], n), [f"{i}" for i in range(len(outs))]
    tensors = {"x": bench.normal(*lead, k)}
    for name, out in zip(names, outs, strict=True):
        tensors[f"w{name}"] = bench.normal(out, k, scale=k**-0.5)
        tensors |= _lora(bench, f"lora{name}", n, r, k, out)

    def ours(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        weights, lora = [t[f"w{i}"] for i in names], [_of(t, f"lora{i}") for i in names]
        return koffkernels.lora_linears(t["x"], weights, lora=lora, memory_ids=ids)

    def plain(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(_plain_linear(t["x"], t[f"w{i}"], _of(t, f"lora{i}"), ids) for i in names)

    frozen = (*(f"w{i}" for i in names), *(f"lora{i}.s" for i in names))
    return Problem(tensors, ours, plain, frozen)


def mlp(
    bench: Bench,
    lead: tuple[int, int],
    width: int,
    n: int,
    r: int,
    recompute: bool = False,
    gates: bool = True,
) -> Problem:
    """gated_mlp, with gates of which some are 0, or without."""
    hidden, ids = bench.shape.hidden, _ids(bench, lead[0], n)
    sizes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    z = (torch.rand(width, device=bench.device) * 2 - 0.5).clamp(0, 1)
    tensors = {"x": bench.normal(*lead, hidden)}
    if gates:
        tensors["z"] = z
    for name, (out, k) in sizes.items():
        tensors[name] = bench.normal(out, k, scale=k**-0.5)
        tensors |= _lora(bench, f"{name}.lora", n, r, k, out)

    def ours(t: dict[str, Tensor]) -> Tensor:
        lora = GatedMLPLoRA(*(_of(t, f"{name}.lora") for name in sizes))
        weights = [t[name] for name in sizes]
        with koffkernels.recompute_hidden(recompute):
            return koffkernels.gated_mlp(
                t["x"], *weights, gates=t.get("z"), lora=lora, memory_ids=ids
            )

    def plain(t: dict[str, Tensor]) -> Tensor:
        g, u = (_plain_linear(t["x"], t[p], _of(t, f"{p}.lora"), ids) for p in ("gate", "up"))
        h = F.silu(g) * u
        return _plain_linear(h * t["z"] if gates else h, t["down"], _of(t, "down.lora"), ids)

    frozen = (*sizes, *(f"{name}.lora.s" for name in sizes))
    return Problem(tensors, ours, plain, frozen)


class Attention(NamedTuple):
    """Sizes: rows, heads, key-value heads, queries, own keys, prefix, width, memories; padded?"""

    rows: int
    heads: int
    kv: int
    queries: int
    keys: int
    prefix: int
    width: int
    n: int
    padded: bool = False


def attention(bench: Bench, size: Attention) -> Problem:
    """prefix_attention; memories of different length, and rows without one."""
    rows, t, s = size.rows, size.queries, size.keys
    ids = _ids(bench, rows, max(size.n, 1))
    tensors = {
        "q": bench.normal(rows, size.heads, t, size.width),
        "k": bench.normal(rows, size.kv, s, size.width),
        "v": bench.normal(rows, size.kv, s, size.width),
    }
    lengths = prefix_lengths(size.prefix, size.n)
    if size.n:
        shape = (size.n, size.kv, size.prefix, size.width)
        tensors["pk"] = bench.normal(*shape, dtype=torch.float32)
        tensors["pv"] = bench.normal(*shape, dtype=torch.float32)
    at = torch.tensor(lengths, device=bench.device)
    bounds, start, end = None, [0] * rows, [s] * rows
    if size.padded:
        start, end = [(3 * b) % (s - t + 1) for b in range(rows)], [s - 2] * rows
        parts = (start, end, [s - 2 - t] * rows)
        bounds = RowBounds(*(torch.tensor(part, device=bench.device) for part in parts))

    def ours(t: dict[str, Tensor]) -> Tensor:
        prefix = Prefix(t["pk"], t["pv"], at) if size.n else None
        return koffkernels.prefix_attention(
            t["q"], t["k"], t["v"], prefix, memory_ids=ids, bounds=bounds
        )

    chosen = row_memories(rows, max(size.n, 1))

    def plain(tensors: dict[str, Tensor]) -> Tensor:
        """Row by row over the concatenation."""
        out = []
        for b in range(rows):
            m = chosen[b] if size.n else -1
            length = lengths[m] if m >= 0 else 0
            k, v = tensors["k"][b : b + 1], tensors["v"][b : b + 1]
            if length:
                k = torch.cat([tensors["pk"][m : m + 1, :, :length], k], 2)
                v = torch.cat([tensors["pv"][m : m + 1, :, :length], v], 2)
            j = torch.arange(s, device=bench.device)
            first = end[b] - t
            last = first + torch.arange(t, device=bench.device)
            mask = (j >= start[b]) & (j < end[b]) & (j <= last[:, None])
            mask = torch.cat([mask.new_ones(t, length), mask], 1)
            nothing = ~mask.any(1, keepdim=True)  # such a query is to give 0, and no gradient
            y = F.scaled_dot_product_attention(
                tensors["q"][b : b + 1], k, v, attn_mask=mask | nothing, enable_gqa=True
            )
            out.append(y.masked_fill(nothing, 0.0))
        return torch.cat(out)

    return Problem(tensors, ours, plain, ())


@contextlib.contextmanager
def _routed(bench: Bench, route: str) -> Iterator[None]:
    """``force_route``; "flash" and "cudnn" are the vendor's route with that attention."""
    with contextlib.ExitStack() as stack:
        if route in ("flash", "cudnn") and not bench.dry:
            vendor = importlib.import_module("koffkernels._triton.attention.vendor")
            stack.enter_context(vendor.forced(route))
            route = "vendor"
        route = "decode" if route == PDL else route
        if route != "auto" and not bench.dry:
            stack.enter_context(force_route(route))
        yield


def joined(y: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What an operation returns as one tensor: the outputs of several layers side by side."""
    return y if isinstance(y, Tensor) else torch.cat(y, -1)


def _run(
    call: Call, problem: Problem, train: bool, wide: bool = False, moved: bool = False
) -> dict[str, Tensor]:
    """The output and, in training, all gradients; of arguments in fp32 if ``wide``, which all lie
    elsewhere in memory than the problem's if ``moved``."""
    leaves = {}
    for name, tensor in problem.tensors.items():
        leaf = tensor.detach()
        leaf = leaf.float() if wide and leaf.is_floating_point() else leaf
        trains = train and name not in problem.frozen
        leaf = leaf.clone() if trains or moved else leaf
        leaves[name] = leaf.requires_grad_() if trains else leaf
    with torch.set_grad_enabled(train):
        y = joined(call(leaves))
    found = {"y": y.detach()}
    if train:
        trained = [name for name, leaf in leaves.items() if leaf.requires_grad]
        generator = torch.Generator(y.device).manual_seed(1)
        dy = torch.randn(y.shape, device=y.device, generator=generator).to(torch.bfloat16)
        grads = torch.autograd.grad(
            y, [leaves[name] for name in trained], dy.to(y.dtype), allow_unused=True
        )
        found |= {
            f"d{name}": torch.zeros_like(leaves[name]) if grad is None else grad
            for name, grad in zip(trained, grads, strict=True)
        }
    return found


def relative_error(got: Tensor, want: Tensor) -> float:
    """RMS of the difference over RMS of what it should be; inf where that is 0 and it is not."""
    got, want = got.float(), want.float()
    if not bool(got.isfinite().all()):
        return float("inf")
    size, off = float(want.norm()), float((got - want).norm())
    return off / size if size else (0.0 if off == 0.0 else float("inf"))


def race(bench: Bench, problem: Problem, replays: int = 40) -> int:
    """How many replays of a CUDA graph with programmatic dependent launch gave other bits than
    launches in order.

    Activations change their sign between replays, so that a kernel which did not wait for the one
    before it would find that one's results of the replay before, which are wrong now.
    """
    tensors = {k: t.clone() if k in ACTIVATIONS else t for k, t in problem.tensors.items()}

    def change() -> None:
        for name in ACTIVATIONS & tensors.keys():
            tensors[name].neg_()

    call = timing.overlapped(lambda: joined(problem.ours(tensors)))
    with torch.no_grad():
        want = []
        for _ in range(2):
            change()
            want.append(joined(problem.ours(tensors)).clone())
        replay = capture(call) if bench.device.type == "cuda" else call
        wrong = 0
        for i in range(replays):
            change()
            wrong += not torch.equal(replay(), want[i % 2])
    return wrong


def capture(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What replays a call's CUDA graph, and gives its output."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiled
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()

    def replay() -> Tensor:
        graph.replay()
        return y

    return replay


def check(bench: Bench, name: str, make: Callable[[], Problem], route: str, train: bool) -> dict:
    """One row: errors against fp32, of a run as it is written and of a replayed one, whichever is
    further off, and whether both give the same bits."""
    torch.manual_seed(7)
    problem = make()
    replay.forget()
    with _routed(bench, route):
        ours = timing.overlapped(problem.ours) if route == PDL else problem.ours
        got = _run(ours, problem, train)
        _run(ours, problem, train)  # the second call of a kind is recorded, the third is replayed
        with launching.plays() as plays:
            again = _run(ours, problem, train, moved=True)
        wrong = race(bench, problem, 2 if bench.warm else 40) if route == PDL else 0
    varies = [key for key in got if not torch.equal(got[key], again[key])]
    shapes = {key: list(value.shape) for key, value in problem.tensors.items()}
    row = {"name": name, "route": route, "train": train, "shapes": shapes, "varies": varies}
    row |= {"plays": plays[0], "kinds": replay.kinds()}
    if bench.warm:
        return row | {"text": "ran"}
    want = _run(problem.plain, problem, train, wide=True)
    errors = {key: max(relative_error(run[key], want[key]) for run in (got, again)) for key in got}
    limits = {key: FORWARD_TOLERANCE if key == "y" else BACKWARD_TOLERANCE for key in got}
    bad = [key for key in got if not errors[key] <= limits[key]]
    worst = max(errors, key=lambda key: errors[key] / limits[key])
    row |= {"errors": errors, "tolerance": limits, "bad": bad}
    bits = "same bits" if not varies else f"bits vary: {','.join(varies)[:30]}"
    if wrong:
        return row | {"error": f"{wrong} of 40 replays differ from launches in order"}
    if bad:
        said = " ".join(f"{key}={errors[key]:.2g}" for key in bad)
        return row | {"error": f"off from fp32 by {said}; {bits}"}
    said = f"ok y={errors['y']:.4f} {worst}={errors[worst]:.4f} {bits}"
    return row | {"text": f"{said}, {row['plays']} replayed"}


def problems(bench: Bench) -> Iterator[tuple[str, Callable[[], Problem], str, bool]]:
    """(name, problem, route, forward and backward or forward alone), most telling first."""
    shape = bench.shape
    hidden, kv = shape.hidden, shape.kv_heads * shape.head_dim
    dense, lead = shape.intermediate, bench.prefill()
    narrow, few = pruned(dense), ((1, 1), (8, 1), (64, 1))

    def at(function: Callable, *args: object) -> Callable[[], Problem]:
        return lambda: function(bench, *args)

    heads, kvs, wide, qkv = shape.heads, shape.kv_heads, shape.head_dim, (hidden, (hidden, kv, kv))
    long = 2048 if not bench.dry else 24
    learned = 512 if not bench.dry else 10
    for n, what in ((1, "one"), (8, "mixed")):
        yield f"mlp-train-{what}", at(mlp, lead, narrow, n, 16), "auto", True
        yield f"linear-train-{what}", at(linear, lead, hidden, hidden, n, 16), "auto", True
        yield f"qkv-train-{what}", at(linears, lead, *qkv, n, 16), "auto", True
        size = Attention(4, heads, kvs, long, long, learned, wide, min(n, 3))
        yield f"attention-train-{what}-vendor", at(attention, size), "vendor", True
        yield f"attention-train-{what}-flash", at(attention, size), "flash", True
        yield f"attention-train-{what}-one-pass", at(attention, size), "fused", True
        for rows, tokens in few:
            if n > rows:
                continue
            yield (
                f"qkv-decode-{what}-{rows}",
                at(linears, (rows, tokens), *qkv, n, 16),
                "auto",
                False,
            )
            for route in ("auto", "decode"):
                name = f"{what}-{rows}-{route}"
                yield f"mlp-decode-{name}", at(mlp, (rows, tokens), narrow, n, 16), route, False
                cells = (rows, tokens), hidden, hidden, n, 16
                yield f"linear-decode-{name}", at(linear, *cells), route, False
        for rows, own in ((1, 600), (8, long), (64, 256)):
            if n > 1 and rows == 1:
                continue
            size = Attention(rows, heads, kvs, 1, min(own, long), long, wide, n)
            yield f"attention-decode-{what}-{rows}", at(attention, size), "auto", False
    for n, what in ((1, "one"), (8, "mixed")):
        yield f"mlp-train-{what}-fused", at(mlp, lead, dense, n, 16), "fused", True
        yield f"linear-train-{what}-fused", at(linear, lead, hidden, kv, n, 16), "fused", True
        yield f"qkv-train-{what}-fused", at(linears, lead, *qkv, n, 16), "fused", True
        yield f"mlp-infer-{what}", at(mlp, lead, dense, n, 16), "auto", False
        yield f"mlp-train-{what}-r64", at(mlp, lead, narrow, n, 64), "auto", True
        yield f"linear-train-{what}-r64", at(linear, lead, hidden, kv, n, 64), "auto", True
        cells = (64, 1), hidden, hidden, n, 64
        yield f"linear-decode-{what}-r64", at(linear, *cells), "decode", False
        yield f"mlp-decode-{what}-r64", at(mlp, (64, 1), narrow, n, 64), "decode", False
    for n, rows in ((1, 1), (8, 64)):
        yield f"mlp-decode-{rows}-pdl", at(mlp, (rows, 1), narrow, n, 16), PDL, False
        yield f"linear-decode-{rows}-pdl", at(linear, (rows, 1), hidden, hidden, n, 16), PDL, False
        yield f"qkv-decode-{rows}-pdl", at(linears, (rows, 1), *qkv, n, 16), PDL, False
        size = Attention(rows, heads, kvs, 1, min(600, long), long, wide, n)
        yield f"attention-decode-{rows}-pdl", at(attention, size), PDL, False
    yield "mlp-train-mixed-recompute", at(mlp, lead, narrow, 8, 16, True), "auto", True
    for width in (64, 128):
        size = Attention(5, 8, 2, 160, 160, 70, width, 3)
        yield f"attention-160-{width}-vendor", at(attention, size), "vendor", True
        yield f"attention-160-{width}-one-pass", at(attention, size), "fused", True
        padded = Attention(5, 8, 2, 130, 150, 70, width, 3, True)
        yield f"attention-padded-{width}", at(attention, padded), "auto", True
    bare = Attention(2, heads, kvs, long, long, 0, wide, 0)
    yield "attention-train-no-prefix", at(attention, bare), "vendor", True
    yield "linear-odd", at(linear, (7, 19), 37, 29, 3, 5), "auto", True
    yield "qkv-odd", at(linears, (7, 19), 37, (29, 13, 17), 3, 5), "auto", True
    yield "mlp-odd", at(mlp, (7, 19), 67, 3, 5), "auto", True


def _patient(bench: Bench, *case: object) -> list[dict]:
    """``check``, again after a while where other processes had taken the memory."""
    for _ in range(3):
        try:
            return [check(bench, *case)]
        except torch.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()
            time.sleep(3.0)
    return [check(bench, *case)]


def cases(bench: Bench) -> Iterator[Case]:
    """One case per problem."""
    for name, make, route, train in problems(bench):
        yield name, lambda c=(name, make, route, train): _patient(bench, *c)


def run(bench: Bench, results: Results, deadline: Deadline, only: tuple[str, ...]) -> None:
    """Check everything."""
    tolerance = {"forward": FORWARD_TOLERANCE, "backward": BACKWARD_TOLERANCE}
    results.note(tolerance=tolerance, dtype=bench.dtype_name)
    results.run(cases(bench), deadline, only)
