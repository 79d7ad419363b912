"""Compile kernels before they are needed: the first request and the first step then do not wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_there, refuse
from .gated_mlp import gated_mlp
from .lora_linear import lora_linears
from .prefix_attention import prefix_attention
from .types import GatedMLPLoRA, LoRA, Prefix


class LayerShape(NamedTuple):
    """Sizes of a decoder layer and of its memories.

    Args:
        hidden: H.
        neurons: I, the MLP's width (after pruning).
        heads, kv_heads, head_dim: of the attention.
        rank: of the LoRA, 0 for none.
        prefix: learned tokens P, 0 for none.
        memories: n.
    """

    hidden: int
    neurons: int
    heads: int
    kv_heads: int
    head_dim: int
    rank: int = 16
    prefix: int = 0
    memories: int = 1


def _lora(shape: LayerShape, k: int, n: int, trains: bool, device: torch.device) -> LoRA | None:
    if not shape.rank:
        return None
    a = torch.zeros(shape.memories, shape.rank, k, device=device, requires_grad=trains)
    b = torch.zeros(shape.memories, n, shape.rank, device=device, requires_grad=trains)
    return LoRA(a, b, torch.ones(shape.memories, device=device))


def _mlp(shape: LayerShape, x: Tensor, ids: Tensor | None, trains: bool) -> Tensor:
    h, i = shape.hidden, shape.neurons
    weights = x.new_zeros(i, h), x.new_zeros(i, h), x.new_zeros(h, i)
    ways = ((h, i), (h, i), (i, h))
    lora = GatedMLPLoRA(*(_lora(shape, k, n, trains, x.device) for k, n in ways))
    gates = torch.ones(i, device=x.device, requires_grad=True) if trains else None
    return gated_mlp(x, *weights, gates=gates, lora=lora, memory_ids=ids)


def _linears(shape: LayerShape, x: Tensor, ids: Tensor | None, trains: bool) -> list[Tensor]:
    h, wide, narrow = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    o = x.new_zeros(*x.shape[:2], wide, requires_grad=trains)
    return [
        y
        for given, widths in ((x, (wide, narrow, narrow)), (o, (h,)))  # q, k and v; o
        for y in lora_linears(
            given,
            [given.new_zeros(n, given.shape[-1]) for n in widths],
            lora=[_lora(shape, given.shape[-1], n, trains, x.device) for n in widths],
            memory_ids=ids,
        )
    ]


def _attention(shape: LayerShape, x: Tensor, ids: Tensor | None, trains: bool) -> Tensor:
    rows, tokens, _ = x.shape
    q = x.new_zeros(rows, shape.heads, tokens, shape.head_dim, requires_grad=trains)
    k = x.new_zeros(rows, shape.kv_heads, tokens, shape.head_dim, requires_grad=trains)
    size = (shape.memories, shape.kv_heads, max(shape.prefix, 1), shape.head_dim)
    learned = torch.zeros(size, device=x.device, requires_grad=trains)
    lengths = torch.full((shape.memories,), shape.prefix, device=x.device)
    return prefix_attention(q, k, k, Prefix(learned, learned, lengths), memory_ids=ids)


def warmup(
    shape: LayerShape,
    *,
    batches: Sequence[tuple[int, int]] = ((1, 1), (8, 1), (1, 512)),
    dtype: torch.dtype = torch.bfloat16,
    training: bool = False,
    device: torch.device | str = "cuda",
) -> None:
    """Run every operation once at the sizes of a layer, so that its kernels are compiled.

    Args:
        shape: the layer; call once for each distinct shape of a model.
        batches: (rows, tokens) of the calls to come; both with one memory and with mixed ones.
        dtype: of the base weights.
        training: also run backward, with gates.
        device: where; memory for one layer's weights and activations is taken for the time.

    Raises:
        ValueError: a size that is not positive, or no such device.
    """
    check_there("warmup", device)
    for name, value in shape._asdict().items():
        lowest = 0 if name in ("rank", "prefix") else 1
        if value < lowest:
            step = "take it from the model's config"
            refuse("warmup", name, f"be at least {lowest}", value, step)
    for rows, tokens in batches:
        mixed = torch.arange(rows, device=device) % (shape.memories + 1) - 1
        for ids in (None, mixed) if shape.memories == 1 else (mixed,):
            x = torch.zeros(rows, tokens, shape.hidden, dtype=dtype, device=device)
            x.requires_grad_(training)
            with torch.set_grad_enabled(training):
                outputs = [_mlp(shape, x, ids, training), *_linears(shape, x, ids, training)]
                if shape.prefix:
                    outputs.append(_attention(shape, x, ids, training))
                if training:
                    sum(y.sum() for y in outputs).backward()
