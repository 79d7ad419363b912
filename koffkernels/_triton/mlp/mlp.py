"""Gated MLP, forward and backward, on [M, H]: the vendor's GEMMs with narrow kernels between them,
fused GEMMs, or the decode kernels; ``routes`` says which, of the down projection as of any linear
layer.

Saved for backward: x, g0 and u0 (the GEMMs' results, before the low-rank updates, in one [M, 2 I]
buffer) and the narrow s; with ``recompute`` g0 and u0 are not saved but computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import routes
from ...types import GatedMLPLoRA, LoRA
from ..lora.decode import CONFIGS as DECODE_DOWN
from ..lora.decode import decode_linear
from ..lora.expand import expand_
from ..lora.gemm import CONFIGS as FUSED_DOWN
from ..lora.gemm import gemm_linear
from ..lora.grad import lora_grad
from ..lora.linear import Trained, matrix_gradients, updates
from ..lora.linear import route_of as linear_route
from ..lora.shrink import shrink, shrink_each
from ..shared.launch import Rows
from ..shared.operands import Delta
from .decode import CONFIGS as DECODE_UP
from .decode import decode_mlp_up
from .gemm import CONFIGS as FUSED_UP
from .gemm import gemm_mlp_up
from .hidden import mlp_hidden
from .hidden_bwd import HiddenDeltas, HiddenGrads, mlp_hidden_bwd


class Layer(NamedTuple):
    """An MLP as it is called: base weights, gates [I] or None, updates, memory of each token."""

    weights: tuple[Tensor, Tensor, Tensor]
    gates: Tensor | None
    lora: GatedMLPLoRA
    rows: Rows
    activation: str


class Saved(NamedTuple):
    """What backward needs of a forward, None for what is not there: g0 and u0 [M, 2 I], s of gate
    and up [M, r_gate + r_up], s of down [M, r_down]."""

    gu: Tensor | None
    s_gate_up: Tensor | None
    s_down: Tensor | None


def _route(stage: str, x: Tensor, w_gate: Tensor, rows: Rows) -> routes.Route:
    """Return the route of the gate and up projections of x [M, H]."""
    i, h = w_gate.shape
    mixed = rows.ids is not None
    shape = routes.Shape("gated_mlp", stage, x.shape[0], h, i, x.dtype, mixed)
    return routes.choose(shape, x.device)


def _first(lora: GatedMLPLoRA) -> list[LoRA]:
    """Return the updates of gate and up, which share x, as far as they are there."""
    return [part for part in (lora.gate, lora.up) if part is not None]


def _deltas(s: Tensor | None, lora: GatedMLPLoRA) -> list[Delta | None]:
    """Return the updates of g and u, whose s lie side by side: [M, r_gate + r_up]."""
    parts = lora.gate, lora.up
    return updates(s, [None if part is None else (part.b, part.scaling) for part in parts])


def _gate_up(x: Tensor, w_gate: Tensor, w_up: Tensor) -> Tensor:
    """Return [x Wg^T, x Wu^T] as one [M, 2 I].

    Two GEMMs, of which every time in docs/gpu.md is. A single one would need both weights in one
    buffer, and whoever saves a model takes views of one buffer for tied weights.
    """
    gu = x.new_empty(x.shape[0], 2 * w_gate.shape[0])
    g, u = gu.chunk(2, 1)
    torch.mm(x, w_gate.t(), out=g)
    torch.mm(x, w_up.t(), out=u)
    return gu


def _hidden(
    x: Tensor, layer: Layer, route: routes.Route, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (h, g0 and u0 or None, s of gate and up) by one of the GEMM routes."""
    (w_gate, w_up, _), gates, lora, rows, activation = layer
    given = _first(lora)
    s_gate_up = shrink(x, [part.a for part in given], rows) if given else None
    deltas = _deltas(s_gate_up, lora)
    if route.name == "fused":
        config = routes.find(FUSED_UP, route)
        h, gu = gemm_mlp_up(x, w_gate, w_up, gates, *deltas, rows, activation, config, keep)
        return h, gu, s_gate_up
    gu = _gate_up(x, w_gate, w_up)
    h = mlp_hidden(*gu.chunk(2, 1), gates, *deltas, rows, activation)
    return h, gu, s_gate_up


def _down(h: Tensor, layer: Layer, route: routes.Route) -> tuple[Tensor, Tensor | None]:
    """Return (y, s of down) by one of the GEMM routes."""
    w_down, part, rows = layer.weights[2], layer.lora.down, layer.rows
    s = None if part is None else shrink(h, [part.a], rows)
    delta = () if part is None else (Delta(s, part.b, part.scaling),)
    if route.name == "fused":  # a forced config may be one of gate and up's
        return gemm_linear(h, w_down, None, delta, rows, FUSED_DOWN.get(route.config)), s
    y = F.linear(h, w_down)
    return expand_(y, delta, rows) if delta else y, s


def mlp_forward(x: Tensor, layer: Layer, keep: bool) -> tuple[Tensor, Saved]:
    """Return (y, what backward needs), g0 and u0 only with ``keep``. x is [M, H]."""
    route = _route("forward", x, layer.weights[0], layer.rows)
    h, gu, s_gate_up = _hidden(x, layer, route, keep)
    y, s_down = _down(h, layer, linear_route("forward", h, layer.weights[2:], layer.rows))
    return y, Saved(gu if keep else None, s_gate_up, s_down)


def mlp_inference(x: Tensor, layer: Layer) -> Tensor:
    """Return y of ``mlp_forward``, where nothing is saved for backward."""
    weights, gates, lora, rows, activation = layer
    route = _route("forward", x, weights[0], rows)
    if route.name == "decode":
        config = routes.find(DECODE_UP, route)
        h = decode_mlp_up(x, *weights[:2], gates, lora.gate, lora.up, rows, activation, config)
    else:
        h = _hidden(x, layer, route, keep=False)[0]
    route = linear_route("forward", h, weights[2:], rows)
    if route.name == "decode":  # a forced config may be one of gate and up's
        return decode_linear(h, weights[2], None, lora.down, rows, DECODE_DOWN.get(route.config))
    return _down(h, layer, route)[0]


def _hidden_backward(
    dh: Tensor, gu: Tensor, saved: Saved, t_down: Tensor | None, layer: Layer, needs_gates: bool
) -> HiddenGrads:
    """Return dg, du, dz and the sums over tokens.

    gu is written over where it was computed for this backward alone: what was saved belongs to
    autograd, which may run backward again.
    """
    _, gates, lora, rows, activation = layer
    s_gate, s_up = _deltas(saved.s_gate_up, lora)
    down = None
    if lora.down is not None:
        down = Delta(t_down, lora.down.a.transpose(1, 2), lora.down.scaling)
    return mlp_hidden_bwd(
        dh,
        gu.chunk(2, 1),
        gates,
        HiddenDeltas(s_gate, s_up, down),
        rows,
        activation,
        needs_gates=needs_gates,
        overwrite=saved.gu is None,
    )


def _input_gradient(dg: Tensor, du: Tensor, t: Tensor | None, layer: Layer) -> Tensor:
    """Return dx = dg Wg + du Wu + the low-rank updates of both, whose t lie side by side."""
    (w_gate, w_up, _), _, lora, rows, _ = layer
    parts = [(part.a.transpose(1, 2), part.scaling) for part in _first(lora)]
    deltas = tuple(updates(t, parts))
    route = _route("backward", dg, w_gate, rows)
    if route.name == "fused":
        config = FUSED_DOWN.get(route.config)  # a forced name may be one of the forward's
        dx = gemm_linear(dg, w_gate.t(), None, (), rows, config)
        return gemm_linear(du, w_up.t(), None, deltas, rows, config, onto=dx)
    dx = (dg @ w_gate).addmm_(du, w_up)  # torch.addmm would copy its first argument
    return expand_(dx, deltas, rows) if deltas else dx


def mlp_backward(
    dy: Tensor,
    x: Tensor,
    saved: Saved,
    layer: Layer,
    needs: tuple[bool, bool],
    trained: Sequence[Trained],
) -> list[Tensor | None]:
    """Return [dx, dz, then da, db, dscaling of gate, up and down], None where ``needs`` (x and
    gates) and ``trained`` (gate, up and down) say so."""
    (w_gate, w_up, w_down), gates, lora, rows, _ = layer
    needs_x, needs_gates = needs
    gu = _gate_up(x, w_gate, w_up) if saved.gu is None else saved.gu
    t_down = None
    if lora.down is not None:
        t_down = shrink(dy, [lora.down.b.transpose(1, 2)], rows)
    hidden = _hidden_backward(dy @ w_down, gu, saved, t_down, layer, needs_gates)
    sides = (hidden.dg, hidden.gate, trained[0]), (hidden.du, hidden.up, trained[1])
    sides = [side for part, side in zip(lora, sides, strict=False) if part is not None]
    t = None
    if sides:
        t = shrink_each(
            [wide for wide, *_ in sides], [part.b.transpose(1, 2) for part in _first(lora)], rows
        )
    grads: list[Tensor | None] = [
        _input_gradient(hidden.dg, hidden.du, t, layer) if needs_x else None,
        None if hidden.dz is None else hidden.dz.to(gates.dtype),
    ]
    found: list[list[Tensor | None]] = []
    if any(part is not None for given in trained[:2] for part in given):
        loras = _first(lora)
        ranks = [part.a.shape[1] for part in loras]
        das = lora_grad(t, x, loras[0].a.shape[0], rows).by_rank(ranks)
        found = matrix_gradients(loras, das, [db for _, db, _ in sides], [g for *_, g in sides])
    three = iter(found)
    for part in (lora.gate, lora.up):
        grads += next(three, [None] * 3) if part is not None else [None] * 3
    if any(part is not None for part in trained[2]):
        db = lora_grad(saved.s_down, dy, lora.down.a.shape[0], rows)
        grads += matrix_gradients([lora.down], [hidden.down], [db], trained[2:])[0]
    else:
        grads += [None] * 3
    return grads
