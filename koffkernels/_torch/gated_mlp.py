"""Gated MLP that keeps only x, g and u for backward (under ``recompute_hidden`` only x); everything
else of width I is recomputed there, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import compute_dtype, recomputes, without_autocast
from ..reference import ACTIVATIONS
from ..types import GatedMLPLoRA, RowGroups
from .rows import (
    add_delta,
    add_delta_by_memory,
    as_rows,
    known_rows,
    linear_backward,
    lora_gradients,
    traced_linear,
)

# Elementwise work on the CPU goes through pieces of this many elements: 8 MiB in fp32, so that the
# handful of passes over one piece stay in cache and no temporary has the size of the whole. Smaller
# pieces are hardly faster on an idle machine and much slower on a busy one: the threads meet after
# every pass over a piece, and each time wait for the one that was interrupted.
PIECE_ELEMENTS = 1 << 21

_aten = torch.ops.aten
_ACTIVATION_OUT = {
    "silu": _aten.silu.out,
    "gelu": _aten.gelu.out,
    "gelu_tanh": partial(_aten.gelu.out, approximate="tanh"),
}
_ACTIVATION_BACKWARD_OUT = {
    "silu": _aten.silu_backward.grad_input,
    "gelu": _aten.gelu_backward.grad_input,
    "gelu_tanh": partial(_aten.gelu_backward.grad_input, approximate="tanh"),
}


def _pieces(shape: tuple[int, int, int], device: torch.device) -> list[tuple[slice, slice]]:
    """Cut [B, T, I] into (rows, tokens) pieces: parts of one row, or several whole rows; one piece
    on a GPU."""
    rows, tokens, width = shape
    if device.type != "cpu" or rows * tokens * width <= PIECE_ELEMENTS:
        return [(slice(None), slice(None))]
    if tokens * width >= PIECE_ELEMENTS:
        step = max(1, PIECE_ELEMENTS // width)
        return [
            (slice(b, b + 1), slice(t, t + step))
            for b in range(rows)
            for t in range(0, tokens, step)
        ]
    step = PIECE_ELEMENTS // (tokens * width)
    return [(slice(b, b + step), slice(None)) for b in range(0, rows, step)]


def _hidden(g: Tensor, u: Tensor, gates: Tensor | None, activation: str) -> Tensor:
    """Return h = act(g) u z, [B, T, I]."""
    h = torch.empty_like(g)
    for piece in _pieces(g.shape, g.device):
        part = h[piece]
        _ACTIVATION_OUT[activation](g[piece], out=part)
        part.mul_(u[piece])
        if gates is not None:
            part.mul_(gates)
    return h


def _stored(w_gate: Tensor, w_up: Tensor) -> tuple[Tensor, ...]:
    """Return gate and up as they are stored: each on its own, or the weight [2 I, H] whose halves
    they are."""
    apart = (w_gate, w_up)
    if torch.compiler.is_compiling() or not (w_gate.is_contiguous() and w_up.is_contiguous()):
        return apart
    if w_gate.data_ptr() + w_gate.nbytes != w_up.data_ptr():
        return apart
    # Two tensors may lie side by side by chance.
    if w_gate.untyped_storage().data_ptr() != w_up.untyped_storage().data_ptr():
        return apart
    return (w_gate.as_strided((2 * w_gate.shape[0], w_gate.shape[1]), w_gate.stride()),)


def _gate_up(x: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return x Wg^T and x Wu^T.

    A model that has both in one weight runs one GEMM, so this does: two smaller ones may sum in
    another order, and an MLP without gates and memories would not be bit-equal to the base's.
    """
    if len(weights) == 1:
        return F.linear(x, weights[0]).chunk(2, dim=-1)
    return [F.linear(x, weight) for weight in weights]


def _hidden_backward(
    dh: Tensor,
    g: Tensor,
    u: Tensor,
    gates: Tensor | None,
    activation: str,
    t_down: Tensor | None,
    needs_gates: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (dg, du, dz, da_down rows); du is written over dh, and h is rebuilt one piece at a
    time for A_down's gradient."""
    rows, _, width = g.shape
    wide = torch.promote_types(g.dtype, torch.float32)
    dg = torch.empty_like(g)
    dz = g.new_zeros(width, dtype=wide) if needs_gates else None
    da = None if t_down is None else g.new_zeros(rows, t_down.shape[-1], width, dtype=wide)
    pieces = _pieces(g.shape, g.device)
    scratch = g.new_empty(2, *g[pieces[0]].shape)  # the first piece is the largest
    for piece in pieces:
        g_p, u_p, dh_p = g[piece], u[piece], dh[piece]
        act, product = (buffer[: g_p.shape[0], : g_p.shape[1]] for buffer in scratch)
        _ACTIVATION_OUT[activation](g_p, out=act)
        torch.mul(act, u_p, out=product)
        if da is not None:
            da[piece[0]] += torch.bmm(t_down[piece].transpose(1, 2), product)
        if dz is not None:
            dz += product.mul_(dh_p).flatten(0, 1).sum(0, dtype=wide)
        if gates is not None:
            dh_p.mul_(gates)
        torch.mul(dh_p, u_p, out=product)
        _ACTIVATION_BACKWARD_OUT[activation](product, g_p, grad_input=dg[piece])
        dh_p.mul_(act)
    if da is not None and gates is not None:
        da *= gates  # h = act u z, and z is the same for every token
    return dg, dh, dz, da


def _triples(flat: Sequence[Tensor | None]) -> list[tuple | None]:
    """Return (a, b, scaling) of gate, up and down, None where there is no LoRA."""
    return [None if flat[i] is None else tuple(flat[i : i + 3]) for i in (0, 3, 6)]


def _forward(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    gates: Tensor | None,
    lora: Sequence[tuple | None],
    rows: RowGroups | None,
    activation: str,
    add: Callable[..., Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Return y, g, u and what ``add``, one of ``add_delta`` and ``add_delta_by_memory``, returns
    for gate, up and down (None without LoRA)."""
    w_gate, w_up, w_down = weights
    g, u = _gate_up(x, [w.to(x.dtype) for w in _stored(w_gate, w_up)])
    s_gate = None if lora[0] is None else add(g, x, lora[0], rows)
    s_up = None if lora[1] is None else add(u, x, lora[1], rows)
    h = _hidden(g, u, gates, activation)
    y = F.linear(h, w_down.to(x.dtype))
    s_down = None if lora[2] is None else add(y, h, lora[2], rows)
    return y, g, u, s_gate, s_up, s_down


class _GatedMLP(torch.autograd.Function):
    """x [B, T, H] -> y [B, T, H]. ``flat`` holds a, b, scaling of gate, up and down (None where
    there is no LoRA)."""

    @staticmethod
    def forward(ctx, x, w_gate, w_up, w_down, gates, rows, activation, recompute, *flat):
        y, g, u, *narrow = _forward(
            x, (w_gate, w_up, w_down), gates, _triples(flat), rows, activation, add_delta
        )
        ctx.activation, ctx.rows = activation, rows
        ctx.trains = [any(ctx.needs_input_grad[i : i + 3]) for i in (8, 11, 14)]
        s = [s if train else None for s, train in zip(narrow, ctx.trains, strict=True)]
        # Of x only the gradients of A have need, and g and u where they are computed again.
        saved_x = x if recompute or ctx.trains[0] or ctx.trains[1] else None
        g, u = (None, None) if recompute else (g, u)
        ctx.save_for_backward(saved_x, g, u, *s, w_gate, w_up, w_down, gates, *flat)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, g, u, s_gate, s_up, s_down, w_gate, w_up, w_down, gates, *flat = ctx.saved_tensors
        rows, lora = ctx.rows, _triples(flat)
        needs_x, needs_gates = ctx.needs_input_grad[0:5:4]
        grads: list[Tensor | None] = [None] * 9
        with without_autocast(dy.device):
            if g is None:
                g, u = _gate_up(x, [w.to(x.dtype) for w in _stored(w_gate, w_up)])
                for wide, part in ((g, lora[0]), (u, lora[1])):
                    if part is not None:
                        add_delta(wide, x, part, rows)
            dh, t_down = linear_backward(dy, w_down, lora[2], rows)
            dg, du, dz, da_down = _hidden_backward(
                dh, g, u, gates, ctx.activation, t_down if ctx.trains[2] else None, needs_gates
            )
            if ctx.trains[2]:
                db_rows = torch.bmm(dy.transpose(1, 2), s_down)
                grads[6:9] = lora_gradients(lora[2], rows, da_down, db_rows)
            dx, t_gate = linear_backward(dg, w_gate, lora[0], rows, needs_x)
            dx, t_up = linear_backward(du, w_up, lora[1], rows, needs_x, onto=dx)
            for i, t, s, d in ((0, t_gate, s_gate, dg), (1, t_up, s_up, du)):
                if ctx.trains[i]:
                    parts = torch.bmm(t.transpose(1, 2), x), torch.bmm(d.transpose(1, 2), s)
                    grads[3 * i : 3 * i + 3] = lora_gradients(lora[i], rows, *parts)
        dz = None if dz is None else dz.to(gates.dtype)
        return dx, None, None, None, dz, None, None, None, *grads


def _traced(x, w_gate, w_up, w_down, gates, rows, activation, *flat):
    """Return the same by autograd, which decides by itself what to save; see ``traced_linear``."""
    lora = _triples(flat)
    g = traced_linear(x, w_gate, None, lora[0], rows)
    h = ACTIVATIONS[activation](g) * traced_linear(x, w_up, None, lora[1], rows)
    if gates is not None:
        h = (h * gates).to(x.dtype)
    return traced_linear(h, w_down, None, lora[2], rows)


def _plain(x: Tensor, weights: tuple[Tensor, Tensor, Tensor], activation: str) -> Tensor:
    """Return y by the base model's own operations, so that an MLP without gates and memories is
    bit-equal to it."""
    w_gate, w_up, w_down = weights
    g, u = _gate_up(x, _stored(w_gate, w_up))
    return F.linear(ACTIVATIONS[activation](g) * u, w_down)


def _flatten(lora: GatedMLPLoRA) -> list[Tensor | None]:
    return [t for part in lora for t in (part or (None, None, None))]


def run(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    gates: Tensor | None,
    lora: GatedMLPLoRA | None,
    memory_ids: Tensor | RowGroups | None,
    activation: str,
) -> Tensor:
    """See ``koffkernels.gated_mlp``."""
    lora = GatedMLPLoRA(*(part and part.stacked() for part in lora or ()))
    flat = _flatten(lora)
    if gates is None and all(t is None for t in flat):
        return _plain(x, weights, activation)
    memories = next((part.a.shape[0] for part in lora if part is not None), 0)
    rows = known_rows(memory_ids, memories) if memories else None
    wide = as_rows(x, memories > 0 and rows is None).to(compute_dtype(x, weights[0]))
    with without_autocast(x.device):
        if torch.compiler.is_compiling():
            y = _traced(wide, *weights, gates, rows, activation, *flat)
        elif torch.is_grad_enabled():
            y = _GatedMLP.apply(wide, *weights, gates, rows, activation, recomputes(), *flat)
        else:
            parts = _triples(flat)
            y = _forward(wide, weights, gates, parts, rows, activation, add_delta_by_memory)[0]
    return y if y.shape == x.shape else y.view(x.shape)
