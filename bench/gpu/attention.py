"""Attention over a learned prefix against torch's attention over the concatenation.

Torch gets its keys and values already concatenated, without paying for that.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import koffkernels
from koffkernels import Prefix
from koffkernels.clock import Times, Variant

from .. import timing
from . import device
from .context import Bench
from .results import Case, judged


class Sizes(NamedTuple):
    """rows, queries per row, own keys per row, prefix length."""

    rows: int
    queries: int
    keys: int
    prefix: int


def _backends(bench: Bench) -> dict[str, SDPBackend]:
    if bench.dry:
        return {"flash": SDPBackend.MATH, "cudnn": SDPBackend.MATH}
    return {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def _qkv(bench: Bench, rows: int, queries: int, keys: int) -> list[Tensor]:
    shape = bench.shape
    heads = ((shape.heads, queries), (shape.kv_heads, keys), (shape.kv_heads, keys))
    return [bench.normal(rows, h, length, shape.head_dim) for h, length in heads]


def _prefix(bench: Bench, length: int) -> Prefix:
    """One memory, fp32 as it is learned."""
    shape = (1, bench.shape.kv_heads, length, bench.shape.head_dim)
    k, v = (bench.normal(*shape, dtype=torch.float32) for _ in range(2))
    return Prefix(k, v, torch.full((1,), length, device=bench.device))


def _works(call: Callable[[int], object]) -> str | None:
    """None if torch's backend takes this call, else its refusal."""
    try:
        call(0)
    except RuntimeError as error:
        return device.without_paths(str(error), 200)
    return None


def _compare(
    bench: Bench, ours: Callable, peers: dict[str, Callable], sets: int, graph: bool
) -> tuple[Times, dict[str, str]]:
    """Times of ours and of every peer that takes the call, and the others' refusals."""
    refused = {name: why for name, call in peers.items() if (why := _works(call))}
    calls = {"ours": ours} | {n: call for n, call in peers.items() if n not in refused}
    variants = {name: Variant(call, sets, graph, 8) for name, call in calls.items()}
    return bench.measure(**variants), refused


def prefill(bench: Bench, sizes: Sizes, backward: bool) -> list[dict]:
    """Many queries: our operations per second over those of torch's faster backend at the same
    total length.

    It attends causally over queries and keys of the total length, which is slightly more work
    than a prefix with fewer queries: hence rates, not times.
    """
    total = sizes.keys + sizes.prefix
    sets = bench.sets(sum(x.nbytes for x in _qkv(bench, sizes.rows, sizes.queries, sizes.keys)))
    ids = torch.zeros(sizes.rows, dtype=torch.int64, device=bench.device)
    own = [_qkv(bench, sizes.rows, sizes.queries, sizes.keys) for _ in range(sets)]
    prefixes = [_prefix(bench, sizes.prefix) for _ in range(sets)]
    whole = [_qkv(bench, sizes.rows, total, total) for _ in range(sets)]

    def attend(i: int) -> Tensor:
        return koffkernels.prefix_attention(*own[i], prefixes[i], memory_ids=ids)

    calls = {
        name: lambda i, b=backend: _sdpa(b, *whole[i], True)
        for name, backend in _backends(bench).items()
    }
    ours: Callable = attend
    if backward:
        ours = _backward(attend, own, [p[:2] for p in prefixes])
        calls = {name: _backward(call, whole) for name, call in calls.items()}
    with contextlib.nullcontext() if backward else torch.no_grad():
        times, refused = _compare(bench, ours, calls, sets, graph=not backward)
    pairs = sizes.queries * sizes.prefix + sizes.queries * (sizes.queries + 1) // 2
    work = pairs / (total * (total + 1) / 2)
    name = f"attention-{'training' if backward else 'prefill'}"
    return [_row(name, times, refused, work, 0.8 if backward else 0.9, sizes)]


def _backward(call: Callable[[int], Tensor], *inputs: list) -> Callable[[int], object]:
    """Forward and all gradients of a call."""
    leaves = [
        [t.requires_grad_() for part in inputs for t in part[i]] for i in range(len(inputs[0]))
    ]
    dy = torch.randn_like(call(0))
    return lambda i: torch.autograd.grad(call(i), leaves[i], dy)


def _row(
    name: str, times: Times, refused: dict[str, str], work: float, target: float, sizes: Sizes
) -> dict:
    """Our rate over the faster backend's; ``work`` is our operations over theirs."""
    medians = {n: statistics.median(values) for n, values in times.items()}
    peer = min((n for n in medians if n != "ours"), key=lambda n: medians[n], default=None)
    shares = {
        n: timing.paired_ratio(times[n], times["ours"])["median"] * work
        for n in times
        if n != "ours"
    }
    return judged(
        name,
        shares.get(peer),
        target,
        us=medians["ours"],
        limit_us=None if peer is None else medians[peer] * work,
        limit=f"the faster of torch's backends ({peer}) at the same total length, per operation",
        peer=peer,
        share_of_flash=shares.get("flash"),
        share_of_cudnn=shares.get("cudnn"),
        refused=refused,
        shape=sizes._asdict(),
        times={n: timing.spread(values) for n, values in times.items()},
    )


def _cache(bench: Bench, sizes: Sizes) -> int:
    """Bytes of a key and its value, of every row."""
    return 2 * sizes.rows * bench.shape.kv_heads * bench.shape.head_dim * bench.dtype.itemsize


def decode_calls(bench: Bench, sizes: Sizes) -> tuple[list[Prefix], Callable[[int], Tensor], int]:
    """(prefixes, our call, number of input sets) of one query per row."""
    sets = bench.sets(_cache(bench, sizes) * sizes.keys)
    ids = torch.zeros(sizes.rows, dtype=torch.int64, device=bench.device)
    own = [_qkv(bench, sizes.rows, 1, sizes.keys) for _ in range(sets)]
    prefixes = [_prefix(bench, sizes.prefix) for _ in range(sets)]

    def ours(i: int) -> Tensor:
        return koffkernels.prefix_attention(*own[i], prefixes[i], memory_ids=ids)

    return prefixes, ours, sets


@torch.no_grad()
def decode(bench: Bench, sizes: Sizes, target: float) -> list[dict]:
    """One query per row: our speed-up over the concatenated cache, as a share of the ideal one."""
    total, cache = sizes.keys + sizes.prefix, _cache(bench, sizes)
    prefixes, ours, sets = decode_calls(bench, sizes)
    whole = [_qkv(bench, sizes.rows, 1, total) for _ in range(bench.sets(cache * total))]
    peers = {
        name: lambda i, b=backend: _sdpa(b, *whole[i % len(whole)], False)
        for name, backend in _backends(bench).items()
    }
    times, refused = _compare(bench, ours, peers, sets, graph=True)
    medians = {n: statistics.median(values) for n, values in times.items()}
    peer = min((n for n in medians if n != "ours"), key=lambda n: medians[n])
    ideal = sizes.rows * total / (sizes.rows * sizes.keys + sizes.prefix)
    speedup = timing.paired_ratio(times[peer], times["ours"])
    size = cache * sizes.keys + prefixes[0].k.nbytes + prefixes[0].v.nbytes
    return [
        judged(
            f"attention-decode-{sizes.prefix}-{sizes.keys}",
            speedup["median"] / ideal,
            target,
            us=medians["ours"],
            limit_us=medians[peer] / ideal,
            limit=f"the faster of torch's backends ({peer}) over the concatenated cache",
            speedup=speedup,
            ideal=ideal,
            share_of_copy_bandwidth=size / bench.copy_rate / medians["ours"],
            refused=refused,
            shape=sizes._asdict(),
            times={n: timing.spread(values) for n, values in times.items()},
        )
    ]


def short(bench: Bench) -> Sizes:
    """Decode over many learned keys and few of one's own."""
    return Sizes(4, 1, 4, 16) if bench.dry else Sizes(64, 1, 128, 2048)


def cases(bench: Bench) -> Iterator[Case]:
    """The attention rows."""
    many = Sizes(2, 16, 16, 8) if bench.dry else Sizes(4, 4096, 4096, 512)
    long = Sizes(4, 1, 16, 16) if bench.dry else Sizes(64, 1, 2048, 2048)
    yield "attention-prefill", lambda: prefill(bench, many, backward=False)
    yield "attention-training", lambda: prefill(bench, many, backward=True)
    yield "attention-decode-long", lambda: decode(bench, long, 0.75)
    yield "attention-decode-short", lambda: decode(bench, short(bench), 0.6)
