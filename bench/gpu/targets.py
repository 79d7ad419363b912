"""Target rows: what pruned structure and memories cost, as a share of this run's own limits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from koffkernels.clock import Variant

from .. import timing
from . import attention, layers, training
from .context import Bench, pruned
from .layers import Koff, Layer, Plain
from .results import Case, Deadline, Results, judged

FEW_TOKENS = (1, 8, 16)
MEMORIES = 8


def _spreads(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {name: timing.spread(values) for name, values in times.items()}


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _mlps(bench: Bench, width: int, count: int, memories: int = 1) -> list[Layer]:
    return [layers.random_layer(bench, width, memories, layers.MLP) for _ in range(count)]


@torch.no_grad()
def pruned_mlp(bench: Bench, masked: bool) -> list[dict]:
    """The pruned MLP with gates and one memory against the dense one without, many tokens.

    The limit is the dense time over the ratio of the widths: LoRA and gates count as loss.
    """
    hidden, dense = bench.shape.hidden, bench.shape.intermediate
    width, tokens = pruned(dense), math.prod(bench.prefill())
    sets = bench.sets(3 * hidden * dense * bench.dtype.itemsize)
    wide = _mlps(bench, dense, sets)
    xs = [bench.normal(*bench.prefill(), hidden) for _ in range(sets)]
    gates = torch.rand(dense, device=bench.device) + 0.5
    if masked:
        gates[width:] = 0.0
        ours, narrow = Koff(True, gates=gates), wide
    else:
        ours = Koff(True, gates=gates[:width].contiguous())
        narrow = [layers.prune(layer, width) for layer in wide]
    kept = [layers.prune(layer, width) for layer in wide] if masked else narrow
    times = bench.measure(
        dense=Variant(lambda i: Plain().mlp(wide[i], xs[i]), sets, calls=4),
        ours=Variant(lambda i: ours.mlp(narrow[i], xs[i]), sets, calls=4),
        products=Variant(lambda i: _products(kept[i].weights, xs[i]), sets, calls=4),
    )
    ideal = dense / width
    speedup = timing.paired_ratio(times["dense"], times["ours"])
    flops = layers.mlp_flops(tokens, hidden, width)
    name = "mlp-masked-prefill" if masked else "mlp-pruned-prefill"
    return [
        judged(
            name,
            speedup["median"] / ideal,
            None if masked else 0.95,
            us=_median(times["ours"]),
            limit_us=_median(times["dense"]) / ideal,
            limit="dense MLP by torch over the ratio of the widths",
            shape={"tokens": tokens, "hidden": hidden, "width": width, "dense": dense},
            rank=bench.rank,
            speedup=speedup,
            ideal=ideal,
            three_products_us=_median(times["products"]),
            operations_per_second=flops * 1e6 / _median(times["ours"]),
            times=_spreads(times),
        )
    ]


def _products(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The three products of a pruned MLP and nothing else."""
    F.linear(x, weights["up"])
    return F.linear(F.linear(x, weights["gate"]), weights["down"])


def _few_tokens(bench: Bench, tokens: int) -> tuple[int, list[Layer], list[Tensor], Tensor]:
    """(number of sets, pruned MLPs, inputs, gates) at decode."""
    hidden, width = bench.shape.hidden, pruned(bench.shape.intermediate)
    sets = bench.sets(3 * hidden * width * bench.dtype.itemsize)
    found = _mlps(bench, width, sets)
    xs = [bench.normal(tokens, 1, hidden) for _ in range(sets)]
    return sets, found, xs, torch.rand(width, device=bench.device) + 0.5


@torch.no_grad()
def pruned_mlp_few_tokens(bench: Bench, tokens: int) -> list[dict]:
    """The pruned MLP with gates and one memory at decode, as a share of the copy bandwidth."""
    hidden, width = bench.shape.hidden, pruned(bench.shape.intermediate)
    sets, found, xs, gates = _few_tokens(bench, tokens)
    ours = Koff(True, gates=gates)
    times = bench.measure(
        dense=Variant(lambda i: Plain().mlp(found[i], xs[i]), sets),
        ours=Variant(lambda i: ours.mlp(found[i], xs[i]), sets),
    )
    size = layers.weight_bytes(found[0]) + layers.lora_bytes(found[0], 1)
    size += gates.nbytes + 2 * xs[0].nbytes
    limit = size / bench.copy_rate
    return [
        judged(
            f"mlp-pruned-decode-{tokens}",
            limit / _median(times["ours"]),
            0.85,
            us=_median(times["ours"]),
            limit_us=limit,
            limit="bytes of weights, LoRA (fp32), gates, input and output at copy bandwidth",
            shape={"tokens": tokens, "hidden": hidden, "width": width},
            rank=bench.rank,
            bytes=size,
            same_width_by_torch_us=_median(times["dense"]),
            times=_spreads(times),
        )
    ]


def _seven_ways(
    bench: Bench, memories: int, rows: tuple[int, int]
) -> tuple[dict[str, Variant], Layer, int]:
    """All seven linears by torch and by koff without LoRA, and by koff with it; a layer, and the
    bytes of an input."""
    width = bench.shape.intermediate
    elements = sum(n * k for n, k in layers.sizes(bench.shape, width).values())
    sets = bench.sets(elements * bench.dtype.itemsize)
    found = [layers.random_layer(bench, width, memories) for _ in range(sets)]
    inputs = [[bench.normal(*rows, bench.shape.hidden) for _ in range(3)] for _ in range(sets)]
    ids = layers.mixed_ids(bench, rows[0], memories) if memories > 1 else None
    paths = {"torch": Plain(), "without": Koff(False), "ours": Koff(True, ids)}

    def variant(path: layers.Path) -> Variant:
        return Variant(lambda i: layers.seven(path, found[i], *inputs[i]), sets)

    variants = {name: variant(path) for name, path in paths.items()}
    return variants, found[0], inputs[0][0].nbytes


def _seven(bench: Bench, memories: int, rows: tuple[int, int]) -> tuple[dict, Layer, int]:
    """The times of ``_seven_ways``."""
    variants, layer, size = _seven_ways(bench, memories, rows)
    return bench.measure(**variants), layer, size


def _baseline(times: dict[str, list[float]]) -> str:
    """The faster of the two ways without LoRA, so that a slow baseline hides nothing."""
    return min(("torch", "without"), key=lambda name: _median(times[name]))


@torch.no_grad()
def overhead_prefill(bench: Bench) -> list[dict]:
    """Time that one memory adds to all seven linears with many tokens.

    Allowed: reading each input (of q, k, v; of o; of gate, up; of down) once more for the shrink,
    at copy bandwidth, and 2 %.
    """
    times, _, size = _seven(bench, 1, bench.prefill())
    base = _baseline(times)
    overhead = timing.paired_ratio(times["ours"], times[base])
    hidden, width = bench.shape.hidden, bench.shape.intermediate
    traffic = size * (3 * hidden + width) // hidden
    allowed = traffic / bench.copy_rate / _median(times[base]) + 0.02
    return [
        judged(
            "lora-overhead-prefill",
            overhead["median"] - 1.0,
            allowed,
            at_most=True,
            us=_median(times["ours"]),
            limit_us=_median(times[base]) * (1.0 + allowed),
            limit="the seven linears without LoRA, the shrink's reads at copy bandwidth, and 2 %",
            shape={"tokens": math.prod(bench.prefill()), "hidden": hidden, "width": width},
            rank=bench.rank,
            shrink_bytes=traffic,
            baseline=base,
            times=_spreads(times),
        )
    ]


@torch.no_grad()
def overhead_decode(bench: Bench, tokens: int) -> list[dict]:
    """Time that one memory adds to all seven linears at decode."""
    times, _, _ = _seven(bench, 1, (tokens, 1))
    base = _baseline(times)
    overhead = timing.paired_ratio(times["ours"], times[base])
    return [
        judged(
            f"lora-overhead-decode-{tokens}",
            overhead["median"] - 1.0,
            0.08,
            at_most=True,
            us=_median(times["ours"]),
            limit_us=_median(times[base]) * 1.08,
            limit="the seven linears without LoRA, and 8 %",
            shape={"tokens": tokens, "hidden": bench.shape.hidden},
            rank=bench.rank,
            baseline=base,
            times=_spreads(times),
        )
    ]


@torch.no_grad()
def mixed_decode(bench: Bench, tokens: int) -> list[dict]:
    """Eight memories in one decode batch against none, by the ratio of the bytes read."""
    times, layer, size = _seven(bench, MEMORIES, (tokens, 1))
    base = _baseline(times)
    plain = layers.weight_bytes(layer) + 2 * size
    ideal = (plain + layers.lora_bytes(layer, MEMORIES)) / plain
    slowdown = timing.paired_ratio(times["ours"], times[base])
    return [
        judged(
            f"mixed-decode-{tokens}",
            ideal / slowdown["median"],
            0.92,
            us=_median(times["ours"]),
            limit_us=_median(times[base]) * ideal,
            limit="the seven linears without LoRA times the ratio of the bytes",
            shape={"tokens": tokens, "hidden": bench.shape.hidden, "memories": MEMORIES},
            rank=bench.rank,
            baseline=base,
            share_of_copy_bandwidth=plain * ideal / bench.copy_rate / _median(times["ours"]),
            times=_spreads(times),
        )
    ]


@torch.no_grad()
def overlap(bench: Bench, name: str, ours: Variant, **shape: int) -> list[dict]:
    """What programmatic dependent launch makes of a decode row: time in order over time with it."""
    times = bench.measure(ours=ours, pdl=ours._replace(call=timing.overlapped(ours.call)))
    speedup = timing.paired_ratio(times["ours"], times["pdl"])
    return [
        judged(
            f"{name}-pdl",
            speedup["median"],
            None,
            us=_median(times["pdl"]),
            limit_us=_median(times["ours"]),
            limit="the same, each kernel behind the end of the one before",
            shape=shape,
            speedup=speedup,
            times=_spreads(times),
        )
    ]


def overlap_mlp(bench: Bench, tokens: int) -> list[dict]:
    """``overlap`` of the pruned MLP with gates and one memory."""
    sets, found, xs, gates = _few_tokens(bench, tokens)
    ours = Koff(True, gates=gates)
    variant = Variant(lambda i: ours.mlp(found[i], xs[i]), sets)
    return overlap(bench, f"mlp-pruned-decode-{tokens}", variant, tokens=tokens)


def overlap_seven(bench: Bench, memories: int, tokens: int) -> list[dict]:
    """``overlap`` of the seven linears with one or several memories."""
    name = f"{'mixed' if memories > 1 else 'lora-overhead'}-decode-{tokens}"
    variant = _seven_ways(bench, memories, (tokens, 1))[0]["ours"]
    return overlap(bench, name, variant, tokens=tokens, memories=memories)


def overlap_attention(bench: Bench) -> list[dict]:
    """``overlap`` of attention over many learned keys and few of one's own."""
    sizes = attention.short(bench)
    _, ours, sets = attention.decode_calls(bench, sizes)
    return overlap(bench, "attention-decode-short", Variant(ours, sets, calls=8), **sizes._asdict())


def cases(bench: Bench) -> Iterator[Case]:
    """All target rows, the most telling first."""
    attend = dict(attention.cases(bench))
    yield "mlp-pruned-prefill", lambda: pruned_mlp(bench, masked=False)
    yield "mlp-pruned-decode-1", lambda: pruned_mlp_few_tokens(bench, 1)
    yield "attention-prefill", attend.pop("attention-prefill")
    train = dict(training.cases(bench))
    yield "mlp-training", train.pop("mlp-training")
    yield "lora-overhead-decode-1", lambda: overhead_decode(bench, 1)
    yield "mixed-decode-64", lambda: mixed_decode(bench, 64)
    yield "lora-overhead-prefill", lambda: overhead_prefill(bench)
    yield "attention-training", attend.pop("attention-training")
    yield "mlp-pruned-decode-1-pdl", lambda: overlap_mlp(bench, 1)
    yield "mixed-decode-64-pdl", lambda: overlap_seven(bench, MEMORIES, 64)
    yield "attention-decode-short-pdl", lambda: overlap_attention(bench)
    yield "lora-overhead-decode-1-pdl", lambda: overlap_seven(bench, 1, 1)
    yield from attend.items()
    yield from train.items()
    yield "mixed-decode-16", lambda: mixed_decode(bench, 16)
    for tokens in FEW_TOKENS[1:]:
        yield f"mlp-pruned-decode-{tokens}", lambda t=tokens: pruned_mlp_few_tokens(bench, t)
        yield f"lora-overhead-decode-{tokens}", lambda t=tokens: overhead_decode(bench, t)
    yield "mlp-masked-prefill", lambda: pruned_mlp(bench, masked=True)


def run(bench: Bench, results: Results, deadline: Deadline, only: tuple[str, ...]) -> None:
    """Measure the limits, then every target row."""
    limits = {} if bench.warm else bench.limits()
    results.note(limits=limits, dtype=bench.dtype_name)
    results.run(cases(bench), deadline, only)
