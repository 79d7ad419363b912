"""Gated MLP that keeps only x, g and u for backward; everything else of width I is recomputed
there, piece by piece."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import compute_dtype
from ..reference import ACTIVATIONS
from ..types import GatedMLPLoRA, LoRA
from .rows import add_delta, lora_gradients, row_matrices

# Elementwise work on the CPU goes through pieces of this many elements: about 1 MiB in fp32, so
# that the handful of passes over one piece stay in the second-level cache.
PIECE_ELEMENTS = 1 << 18

_ACTIVATION_BACKWARD = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, g: torch.ops.aten.gelu_backward(grad, g, approximate="tanh"),
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
    """h = act(g) u z, [B, T, I]."""
    h = torch.empty_like(g)
    for piece in _pieces(g.shape, g.device):
        torch.mul(ACTIVATIONS[activation](g[piece]), u[piece], out=h[piece])
        if gates is not None:
            h[piece].mul_(gates)
    return h


def _linear(
    x: Tensor, weight: Tensor, lora: tuple | None, ids: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """y = x W^T + delta, and s = x A^T for backward."""
    y = F.linear(x, weight.to(x.dtype))
    return y, None if lora is None else add_delta(
        y, x, *row_matrices(lora, ids, x.shape[0], x.dtype)
    )


def _linear_backward(
    dy: Tensor, weight: Tensor, lora: tuple | None, ids: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """dx = dy W + t A with t = scaling dy B [B, T, r]."""
    dx = dy @ weight.to(dy.dtype)
    if lora is None:
        return dx, None
    a_rows, b_rows = row_matrices(lora, ids, dy.shape[0], dy.dtype)
    t = torch.bmm(dy, b_rows)
    return dx.baddbmm_(t, a_rows), t


def _hidden_backward(
    dh: Tensor,
    g: Tensor,
    u: Tensor,
    gates: Tensor | None,
    activation: str,
    t_down: Tensor | None,
    needs_gates: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dg, du, dz, da_down rows); du is written over dh, and h is rebuilt one piece at a time for
    A_down's gradient."""
    rows, _, width = g.shape
    dg = torch.empty_like(g)
    dz = (
        torch.zeros(width, dtype=torch.promote_types(g.dtype, torch.float32), device=g.device)
        if needs_gates
        else None
    )
    da = (
        None
        if t_down is None
        else g.new_zeros(
            rows, t_down.shape[-1], width, dtype=torch.promote_types(g.dtype, torch.float32)
        )
    )
    for piece in _pieces(g.shape, g.device):
        act = ACTIVATIONS[activation](g[piece])
        product = act * u[piece]
        if dz is not None:
            dz += (dh[piece] * product).flatten(0, 1).sum(0, dtype=dz.dtype)
        if gates is not None:
            product.mul_(gates)
            dh[piece].mul_(gates)
        if da is not None:
            da[piece[0]] += torch.bmm(t_down[piece].transpose(1, 2), product)
        torch.mul(dh[piece], u[piece], out=product)
        dg[piece] = _ACTIVATION_BACKWARD[activation](product, g[piece])
        dh[piece].mul_(act)
    return dg, dh, dz, da


class _GatedMLP(torch.autograd.Function):
    """x [B, T, H] -> y [B, T, H]. ``flat`` holds a, b, scaling of gate, up and down (None where
    there is no LoRA)."""

    @staticmethod
    def forward(ctx, x, w_gate, w_up, w_down, gates, ids, activation, *flat):
        lora = [None if flat[i] is None else flat[i : i + 3] for i in (0, 3, 6)]
        g, s_gate = _linear(x, w_gate, lora[0], ids)
        u, s_up = _linear(x, w_up, lora[1], ids)
        y, s_down = _linear(_hidden(g, u, gates, activation), w_down, lora[2], ids)
        ctx.activation = activation
        keep_x = x if s_gate is not None or s_up is not None else None
        ctx.save_for_backward(
            keep_x, g, u, s_gate, s_up, s_down, w_gate, w_up, w_down, gates, ids, *flat
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, g, u, s_gate, s_up, s_down, w_gate, w_up, w_down, gates, ids, *flat = ctx.saved_tensors
        lora = [None if flat[i] is None else tuple(flat[i : i + 3]) for i in (0, 3, 6)]
        grads: list[Tensor | None] = [None] * 9
        with torch.autocast(dy.device.type, enabled=False):
            dh, t_down = _linear_backward(dy, w_down, lora[2], ids)
            needs_gates = gates is not None and ctx.needs_input_grad[4]
            dg, du, dz, da_down = _hidden_backward(
                dh, g, u, gates, ctx.activation, t_down, needs_gates
            )
            if lora[2] is not None:
                db_rows = torch.bmm(dy.transpose(1, 2), s_down)
                grads[6:8] = lora_gradients(lora[2], ids, da_down, db_rows)
            dx, t_gate = _linear_backward(dg, w_gate, lora[0], ids)
            dx_up, t_up = _linear_backward(du, w_up, lora[1], ids)
            dx += dx_up
            for slot, part, t, s, d in (
                (0, lora[0], t_gate, s_gate, dg),
                (3, lora[1], t_up, s_up, du),
            ):
                if part is not None:
                    rows = torch.bmm(t.transpose(1, 2), x), torch.bmm(d.transpose(1, 2), s)
                    grads[slot : slot + 2] = lora_gradients(part, ids, *rows)
        dz = None if dz is None else dz.to(gates.dtype)
        return dx if ctx.needs_input_grad[0] else None, None, None, None, dz, None, None, *grads


def _plain(x: Tensor, weights: tuple[Tensor, Tensor, Tensor], activation: str) -> Tensor:
    """The base model's own operations, so that an MLP without gates and memories is bit-equal to
    it."""
    w_gate, w_up, w_down = weights
    return F.linear(ACTIVATIONS[activation](F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def _flatten(lora: GatedMLPLoRA | None) -> list[Tensor | None]:
    parts: tuple[LoRA | None, ...] = lora or (None, None, None)
    return [t for part in parts for t in (part or (None, None, None))]


def run(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    gates: Tensor | None,
    lora: GatedMLPLoRA | None,
    memory_ids: Tensor | None,
    activation: str,
) -> Tensor:
    """See ``koffkernels.gated_mlp``."""
    flat = _flatten(lora)
    if gates is None and all(t is None for t in flat):
        return _plain(x, weights, activation)
    if x.dim() == 3:
        rows = x
    else:
        rows = x[None] if memory_ids is None else x[:, None, :]
    rows = rows.to(compute_dtype(x, weights[0]))
    with torch.autocast(x.device.type, enabled=False):
        y = _GatedMLP.apply(rows, *weights, gates, memory_ids, activation, *flat)
    return y if x.dim() == 3 else y.reshape(x.shape[0], -1)
