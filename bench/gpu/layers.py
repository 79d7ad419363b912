"""The seven linear layers of a decoder layer with random weights, and the ways to run them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import koffkernels
from koffkernels import GatedMLPLoRA, LoRA

from ..models import Shape
from .context import Bench

QKV = ("q", "k", "v")
ATTENTION = (*QKV, "o")
MLP = ("gate", "up", "down")


class Layer(NamedTuple):
    """Frozen weights [N, K] and the LoRA of n memories (empty for none), by linear layer."""

    weights: dict[str, Tensor]
    lora: dict[str, LoRA]


def sizes(shape: Shape, width: int) -> dict[str, tuple[int, int]]:
    """(N, K) of each linear layer; ``width`` is the number of MLP neurons."""
    hidden, kv = shape.hidden, shape.kv_heads * shape.head_dim
    return {
        "q": (hidden, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "o": (hidden, hidden),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }


def random_lora(bench: Bench, n: int, size: tuple[int, int], rank: int | None = None) -> LoRA:
    """fp32 LoRA of n memories whose delta is about a tenth of the base output."""
    (out, k), r = size, rank or bench.rank
    return LoRA(
        bench.normal(n, r, k, scale=k**-0.5, dtype=torch.float32),
        bench.normal(n, out, r, scale=0.1 * r**-0.5, dtype=torch.float32),
        torch.linspace(0.5, 1.5, n, device=bench.device),
    )


def random_layer(
    bench: Bench, width: int, memories: int, names: tuple[str, ...] = ATTENTION + MLP
) -> Layer:
    """A layer with ``width`` neurons and ``memories`` memories on the linear layers ``names``."""
    found = {name: size for name, size in sizes(bench.shape, width).items() if name in names}
    weights = {name: bench.normal(*size, scale=size[1] ** -0.5) for name, size in found.items()}
    lora = {name: random_lora(bench, memories, size) for name, size in found.items() if memories}
    return Layer(weights, lora)


def prune(layer: Layer, width: int) -> Layer:
    """The layer without the neurons from ``width`` on."""
    weights, lora = dict(layer.weights), dict(layer.lora)
    for name in ("gate", "up"):
        weights[name] = weights[name][:width].contiguous()
        if lora:
            lora[name] = lora[name]._replace(b=lora[name].b[:, :width].contiguous())
    weights["down"] = weights["down"][:, :width].contiguous()
    if lora:
        lora["down"] = lora["down"]._replace(a=lora["down"].a[:, :, :width].contiguous())
    return Layer(weights, lora)


def weight_bytes(layer: Layer) -> int:
    """Bytes of the base weights."""
    return sum(w.nbytes for w in layer.weights.values())


def lora_bytes(layer: Layer, used: int) -> int:
    """Bytes of the LoRA matrices of ``used`` memories, as stored (fp32)."""
    return sum((p.a[:used].nbytes + p.b[:used].nbytes) for p in layer.lora.values())


class Path(Protocol):
    """A way to run a layer's linear layers."""

    def linear(self, layer: Layer, name: str, x: Tensor) -> Tensor:
        """y [..., N] of one linear layer."""

    def qkv(self, layer: Layer, x: Tensor) -> Sequence[Tensor]:
        """q, k and v [..., N] of the attention."""

    def mlp(self, layer: Layer, x: Tensor) -> Tensor:
        """y [..., H] of the gated MLP."""


class Plain:
    """Plain torch without memories: the vendor's GEMMs."""

    def linear(self, layer: Layer, name: str, x: Tensor) -> Tensor:
        """x W^T."""
        return F.linear(x, layer.weights[name])

    def qkv(self, layer: Layer, x: Tensor) -> Sequence[Tensor]:
        """Each on its own."""
        return [self.linear(layer, name, x) for name in QKV]

    def mlp(self, layer: Layer, x: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x))."""
        g, u = self.linear(layer, "gate", x), self.linear(layer, "up", x)
        return self.linear(layer, "down", F.silu(g) * u)


class Koff:
    """koffkernels.

    Args:
        memories: use the layer's LoRA.
        ids: int64 [B], memory of each row; None with one memory.
        gates: fp32 [I] or None.
    """

    def __init__(self, memories: bool, ids: Tensor | None = None, gates: Tensor | None = None):
        self.memories, self.ids, self.gates = memories, ids if memories else None, gates

    def linear(self, layer: Layer, name: str, x: Tensor) -> Tensor:
        """``koffkernels.lora_linear``."""
        lora = layer.lora[name] if self.memories else None
        return koffkernels.lora_linear(x, layer.weights[name], lora=lora, memory_ids=self.ids)

    def qkv(self, layer: Layer, x: Tensor) -> Sequence[Tensor]:
        """``koffkernels.lora_linears``."""
        weights = [layer.weights[name] for name in QKV]
        lora = [layer.lora[name] for name in QKV] if self.memories else None
        return koffkernels.lora_linears(x, weights, lora=lora, memory_ids=self.ids)

    def mlp(self, layer: Layer, x: Tensor) -> Tensor:
        """``koffkernels.gated_mlp``."""
        lora = GatedMLPLoRA(*(layer.lora[name] for name in MLP)) if self.memories else None
        return koffkernels.gated_mlp(
            x,
            *(layer.weights[name] for name in MLP),
            gates=self.gates,
            lora=lora,
            memory_ids=self.ids,
        )


def seven(path: Path, layer: Layer, x: Tensor, attended: Tensor, middle: Tensor) -> list[Tensor]:
    """All seven linear layers: q, k, v of x, o of ``attended``, the MLP of ``middle``."""
    return [*path.qkv(layer, x), path.linear(layer, "o", attended), path.mlp(layer, middle)]


def mixed_ids(bench: Bench, rows: int, memories: int) -> Tensor:
    """int64 [rows]: every memory in turn, neighbours differ."""
    return torch.arange(rows, device=bench.device) % memories


def mlp_flops(tokens: int, hidden: int, width: int) -> int:
    """Operations of the three products of a gated MLP."""
    return 2 * 3 * tokens * hidden * width
