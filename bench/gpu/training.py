"""Forward and backward of the MLP with one LoRA, against what a user would write or install."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from koffkernels import LoRA, recompute_hidden
from koffkernels.clock import Times, Variant

from .. import timing
from ..peers.lora_mlp import lora_mlp
from . import device, layers
from .context import Bench
from .results import Case, judged

# name -> (least speed-up over it, most memory of it); None: only for information
PEERS = {"peft-liger": (1.3, 0.7), "hand-written": (1.1, None), "peft": (None, None)}
Call = Callable[[Tensor], Tensor]


def _ours(layer: layers.Layer) -> tuple[Call, list[Tensor]]:
    """koffkernels with fp32 master weights."""
    lora = {}
    trained: list[Tensor] = []
    for name, (a, b, scaling) in layer.lora.items():
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        lora[name] = LoRA(a, b, scaling)
        trained += [a, b]
    path = layers.Koff(True)
    held = layers.Layer(layer.weights, lora)
    return lambda x: path.mlp(held, x), trained


def _recomputing(pair: tuple[Call, list[Tensor]]) -> tuple[Call, list[Tensor]]:
    """The same, keeping only the MLP's input for backward."""

    def call(x: Tensor) -> Tensor:
        with recompute_hidden():
            return pair[0](x)

    return call, pair[1]


def _hand_written(layer: layers.Layer) -> tuple[Call, list[Tensor]]:
    """``bench.peers.lora_mlp`` with LoRA in the base's dtype."""
    weights = tuple(layer.weights[name] for name in layers.MLP)
    like = weights[0]
    flat = [m[0].to(like.dtype) for name in layers.MLP for m in layer.lora[name][:2]]
    trained = [m.requires_grad_() for m in flat]
    return lambda x: lora_mlp(x, weights, trained, 2.0), trained


def _peft(layer: layers.Layer, rank: int, liger: bool) -> tuple[Call, list[Tensor]] | None:
    """PEFT on transformers' or Liger's MLP; None where that is not installed."""
    from ..peers import peft_mlp  # imports transformers and peft

    kind = peft_mlp.liger_mlp() if liger else peft_mlp.LlamaMLP
    if kind is None:
        return None
    weights = tuple(layer.weights[name] for name in layers.MLP)
    mlp = peft_mlp.peft_mlp(weights, rank, kind)
    return mlp, [p for p in mlp.parameters() if p.requires_grad]


def _step(call: Call, trained: list[Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Forward and all gradients: of x and of LoRA."""
    return torch.autograd.grad(call(x), [x, *trained], dy)


class Memory(NamedTuple):
    """Bytes beyond weights and inputs; 0 on the CPU.

    Args:
        peak: the most during forward and backward.
        held: between them, the output excluded: what every layer of a model keeps at once.
    """

    peak: float
    held: float


def memory_of(call: Call, trained: list[Tensor], x: Tensor, dy: Tensor) -> Memory:
    """Memory of one forward and backward, the fourth: the first allocates workspaces, and calls of
    ours are replayed from the third on."""
    for _ in range(3):
        _step(call, trained, x, dy)
    if x.device.type != "cuda":
        return Memory(0.0, 0.0)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = call(x)
    held = torch.cuda.memory_allocated() - before - y.nbytes
    grads = torch.autograd.grad(y, [x, *trained], dy)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del y, grads
    return Memory(float(peak), float(held))


def _build(bench: Bench, layer: layers.Layer) -> dict[str, tuple[Call, list[Tensor]]]:
    """What is compared; Liger only where it is installed."""
    ours = _ours(layer)
    found = {
        "ours": ours,
        "recompute": _recomputing(ours),
        "hand-written": _hand_written(layer),
        "peft": _peft(layer, bench.rank, False),
        "peft-liger": _peft(layer, bench.rank, True),
    }
    return {name: pair for name, pair in found.items() if pair is not None}


def _memories(
    built: dict[str, tuple[Call, list[Tensor]]], x: Tensor, dy: Tensor
) -> tuple[dict[str, Memory], dict[str, str]]:
    """Memory of everything that runs, and why a peer is missing or does not run."""
    memory = {name: memory_of(*built[name], x, dy) for name in ("ours", "recompute")}
    absent = {}
    for peer in PEERS:
        if peer not in built:
            absent[peer] = "peer missing: liger-kernel"
            continue
        try:
            memory[peer] = memory_of(*built[peer], x, dy)
        except Exception as error:  # a peer that does not run here must not cost the other rows
            absent[peer] = f"peer failed: {device.without_paths(str(error), 300)}"
    return memory, absent


def mlp_training(bench: Bench) -> list[dict]:
    """One time row and one memory row per peer."""
    hidden, width = bench.shape.hidden, bench.shape.intermediate
    sets = bench.sets(3 * hidden * width * bench.dtype.itemsize)
    built = [_build(bench, layers.random_layer(bench, width, 1, layers.MLP)) for _ in range(sets)]
    xs = [bench.normal(*bench.prefill(), hidden).requires_grad_() for _ in range(sets)]
    dy = bench.normal(*bench.prefill(), hidden)

    def step(name: str, i: int) -> object:
        return _step(*built[i][name], xs[i], dy)

    memory, absent = _memories(built[0], xs[0], dy)
    times = bench.measure(
        **{n: Variant(lambda i, n=n: step(n, i), sets, graph=False) for n in memory}
    )
    facts = {
        "shape": {"rows": dy.shape[0], "tokens": dy.shape[1], "hidden": hidden, "width": width},
        "rank": bench.rank,
        "times": {name: timing.spread(values) for name, values in times.items()},
    }
    rows = [_rows(peer, times, memory, facts) for peer in PEERS if peer not in absent]
    rows += [_absent_rows(peer, why) for peer, why in absent.items()]
    return [row for pair in rows for row in pair]


def _absent_rows(peer: str, why: str) -> list[dict]:
    """The rows of a peer that was not measured."""
    name, (faster, leaner) = f"mlp-training-over-{peer}", PEERS[peer]
    return [
        judged(name, None, faster, status=why),
        judged(f"{name}-memory", None, leaner, at_most=True, status=why),
    ]


def _rows(peer: str, times: Times, memory: dict[str, Memory], facts: dict) -> list[dict]:
    """The rows of one peer."""
    name, (faster, leaner) = f"mlp-training-over-{peer}", PEERS[peer]
    speedup = timing.paired_ratio(times[peer], times["ours"])
    ours, theirs = memory["ours"], memory[peer]
    medians = {n: statistics.median(times[n]) for n in ("ours", peer)}
    return [
        judged(
            name,
            speedup["median"],
            faster,
            us=medians["ours"],
            limit_us=medians[peer],
            limit=f"forward and backward by {peer}",
            speedup=speedup,
            **facts,
        ),
        judged(
            f"{name}-memory",
            ours.peak / theirs.peak if theirs.peak else None,
            leaner,
            at_most=True,
            bytes=ours.peak,
            limit_bytes=theirs.peak,
            limit=f"peak bytes of {peer} in forward and backward, beyond weights and inputs",
            held_bytes=ours.held,
            limit_held_bytes=theirs.held,
            held_share=ours.held / theirs.held if theirs.held else None,
            recompute=memory["recompute"]._asdict(),
            shape=facts["shape"],
            rank=facts["rank"],
        ),
    ]


def compiled_mlp_training(bench: Bench) -> list[dict]:
    """PEFT's MLP under torch.compile, which fuses what is not a product; only for information."""
    hidden, width = bench.shape.hidden, bench.shape.intermediate
    layer = layers.random_layer(bench, width, 1, layers.MLP)
    ours, peft = _ours(layer), _peft(layer, bench.rank, False)
    backend = "eager" if bench.dry else "inductor"
    built = {"ours": ours, "compiled": (torch.compile(peft[0], backend=backend), peft[1])}
    x = bench.normal(*bench.prefill(), hidden).requires_grad_()
    dy = bench.normal(*bench.prefill(), hidden)
    # One input set: activations are larger than the L2 cache.
    times = bench.measure(
        **{
            name: Variant(lambda i, n=name: _step(*built[n], x, dy), 1, graph=False)
            for name in built
        }
    )
    medians = {name: statistics.median(values) for name, values in times.items()}
    speedup = timing.paired_ratio(times["compiled"], times["ours"])
    return [
        judged(
            "mlp-training-over-compiled-peft",
            speedup["median"],
            None,
            us=medians["ours"],
            limit_us=medians["compiled"],
            limit="forward and backward by PEFT under torch.compile",
            speedup=speedup,
            shape={"tokens": dy.shape[0] * dy.shape[1], "hidden": hidden, "width": width},
            times={name: timing.spread(values) for name, values in times.items()},
        )
    ]


def cases(bench: Bench) -> Iterator[Case]:
    """The training rows."""
    yield "mlp-training", lambda: mlp_training(bench)
    yield "mlp-training-over-compiled-peft", lambda: compiled_mlp_training(bench)
