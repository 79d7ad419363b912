"""Layers whose weight is no plain matrix: their own forward, koff's backward.

What a vendor's forward keeps for autograd may be the dequantised weight: 2 or 4 bytes for each
parameter that a base in few bits was to save. So it runs without autograd, and backward dequantises
again, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import compute_dtype, recomputes
from ..reference import ACTIVATIONS
from ..types import GatedMLPLoRA, LoRA, OpaqueLinear, RowGroups
from .gated_mlp import _flatten, _hidden, _hidden_backward, _linear_backward, _triples
from .rows import (
    add_delta,
    add_delta_by_memory,
    as_rows,
    known_rows,
    lora_gradients,
    traced_delta,
)


def _gate_up(x: Tensor, layers: Sequence[OpaqueLinear]) -> Sequence[Tensor]:
    """Return gate(x) and up(x), [B, T, I] each; the last of the layers is down."""
    if len(layers) == 2:
        return layers[0].forward(x).chunk(2, dim=-1)
    return [layer.forward(x) for layer in layers[:2]]


class _Linear(torch.autograd.Function):
    """x [B, T, K] -> y [B, T, N]."""

    @staticmethod
    def forward(ctx, x, layer, rows, *lora):
        y = layer.forward(x)
        s = add_delta(y, x, lora, rows) if lora else None
        ctx.layer, ctx.rows = layer, rows
        trains = any(ctx.needs_input_grad[3:])
        ctx.save_for_backward(x if trains else None, s if trains else None, *lora)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, s, *lora), rows, needs_x = ctx.saved_tensors, ctx.rows, ctx.needs_input_grad[0]
        grads: Sequence[Tensor | None] = [None] * len(lora)
        with torch.autocast(dy.device.type, enabled=False):
            weight = ctx.layer.weight(dy.dtype) if needs_x else None
            dx, t = _linear_backward(dy, weight, tuple(lora) or None, rows, needs_x)
            if x is not None:
                parts = torch.bmm(t.transpose(1, 2), x), torch.bmm(dy.transpose(1, 2), s)
                grads = lora_gradients(lora, rows, *parts)
        return dx, None, None, *grads


def _mlp(
    x: Tensor,
    layers: Sequence[OpaqueLinear],
    gates: Tensor | None,
    lora: Sequence[tuple | None],
    rows: RowGroups | None,
    activation: str,
    add: Callable[..., Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Return y, g, u and what ``add``, one of ``add_delta`` and ``add_delta_by_memory``, returns
    for gate, up and down (None without LoRA)."""
    g, u = _gate_up(x, layers)
    s_gate = None if lora[0] is None else add(g, x, lora[0], rows)
    s_up = None if lora[1] is None else add(u, x, lora[1], rows)
    h = _hidden(g, u, gates, activation)
    y = layers[-1].forward(h)
    s_down = None if lora[2] is None else add(y, h, lora[2], rows)
    return y, g, u, s_gate, s_up, s_down


class _GatedMLP(torch.autograd.Function):
    """x [B, T, H] -> y [B, T, H]. ``flat`` holds a, b, scaling of gate, up and down (None where
    there is no LoRA)."""

    @staticmethod
    def forward(ctx, x, layers, gates, rows, activation, recompute, *flat):
        y, g, u, *narrow = _mlp(x, layers, gates, _triples(flat), rows, activation, add_delta)
        ctx.layers, ctx.activation, ctx.rows = layers, activation, rows
        ctx.trains = [any(ctx.needs_input_grad[i : i + 3]) for i in (6, 9, 12)]
        s = [s if train else None for s, train in zip(narrow, ctx.trains, strict=True)]
        saved_x = x if recompute or ctx.trains[0] or ctx.trains[1] else None
        g, u = (None, None) if recompute else (g, u)
        ctx.save_for_backward(saved_x, g, u, *s, gates, *flat)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, g, u, s_gate, s_up, s_down, gates, *flat = ctx.saved_tensors
        rows, lora = ctx.rows, _triples(flat)
        needs_x, needs_gates = ctx.needs_input_grad[0:3:2]
        grads: list[Tensor | None] = [None] * 9
        *first, down = ctx.layers
        with torch.autocast(dy.device.type, enabled=False):
            if g is None:
                g, u = _gate_up(x, ctx.layers)
                for wide, part in ((g, lora[0]), (u, lora[1])):
                    if part is not None:
                        add_delta(wide, x, part, rows)
            dh, t_down = _linear_backward(dy, down.weight(dy.dtype), lora[2], rows)
            dg, du, dz, da_down = _hidden_backward(
                dh, g, u, gates, ctx.activation, t_down if ctx.trains[2] else None, needs_gates
            )
            if ctx.trains[2]:
                db_rows = torch.bmm(dy.transpose(1, 2), s_down)
                grads[6:9] = lora_gradients(lora[2], rows, da_down, db_rows)
            dx = None
            # One weight at a time: gate's is gone before up's is made, unless they are one.
            whole = first[0].weight(dy.dtype).chunk(2) if needs_x and len(first) == 1 else None
            for i, d, s in ((0, dg, s_gate), (1, du, s_up)):
                weight = None
                if needs_x:
                    weight = first[i].weight(dy.dtype) if whole is None else whole[i]
                dx, t = _linear_backward(d, weight, lora[i], rows, needs_x, onto=dx)
                if ctx.trains[i]:
                    parts = torch.bmm(t.transpose(1, 2), x), torch.bmm(d.transpose(1, 2), s)
                    grads[3 * i : 3 * i + 3] = lora_gradients(lora[i], rows, *parts)
        dz = None if dz is None else dz.to(gates.dtype)
        return dx, None, dz, None, None, None, *grads


def _traced_linear(x, layer, rows, *lora):
    """Return the same by autograd, for torch.compile: see ``rows.traced_linear``."""
    return traced_delta(layer.forward(x), x, lora or None, rows)


def _traced_mlp(x, layers, gates, rows, activation, *flat):
    lora = _triples(flat)
    g, u = _gate_up(x, layers)
    g, u = traced_delta(g, x, lora[0], rows), traced_delta(u, x, lora[1], rows)
    h = ACTIVATIONS[activation](g) * u
    if gates is not None:
        h = (h * gates).to(x.dtype)
    return traced_delta(layers[-1].forward(h), h, lora[2], rows)


def linear(
    x: Tensor,
    layer: OpaqueLinear,
    lora: LoRA | None,
    memory_ids: Tensor | RowGroups | None,
) -> Tensor:
    """See ``koffkernels.opaque_lora_linear``."""
    rows = None if lora is None else known_rows(memory_ids, lora.a.shape[0])
    wide = as_rows(x, rows is None).to(compute_dtype(x, x))
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling():
            y = _traced_linear(wide, layer, rows, *(lora or ()))
        elif torch.is_grad_enabled():
            y = _Linear.apply(wide, layer, rows, *(lora or ()))
        else:
            y = layer.forward(wide)
            if lora is not None:
                add_delta_by_memory(y, wide, lora, rows)
    return y.view(*x.shape[:-1], y.shape[-1])


def gated_mlp(
    x: Tensor,
    layers: Sequence[OpaqueLinear],
    gates: Tensor | None,
    lora: GatedMLPLoRA | None,
    memory_ids: Tensor | RowGroups | None,
    activation: str,
) -> Tensor:
    """See ``koffkernels.opaque_gated_mlp``."""
    flat = _flatten(lora)
    memories = next((part.a.shape[0] for part in lora or () if part is not None), 0)
    rows = known_rows(memory_ids, memories) if memories else None
    wide = as_rows(x, rows is None).to(compute_dtype(x, x))
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling():
            y = _traced_mlp(wide, layers, gates, rows, activation, *flat)
        elif torch.is_grad_enabled():
            y = _GatedMLP.apply(wide, layers, gates, rows, activation, recomputes(), *flat)
        else:
            add = add_delta_by_memory
            y, *_ = _mlp(wide, layers, gates, _triples(flat), rows, activation, add)
    return y.view(*x.shape[:-1], y.shape[-1])
