"""Gated MLP on Triton, as an operation of torch: see ``mlp`` for what it computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import dispatch
from ..._torch import gated_mlp as plain
from ...types import GatedMLPLoRA, LoRA
from ..lora.op import flat, rows_of
from ..shared.launch import Rows, dense, unit_stride
from ..shared.torch_operator import inference, needs_grad, operation, spread, wanted
from .mlp import Kept, Layer, mlp_backward, mlp_forward, mlp_inference


def _lora(parts: Sequence[Tensor | None]) -> GatedMLPLoRA:
    """From nine tensors: a, b and scaling of gate, up and down."""
    return GatedMLPLoRA(*(None if parts[k] is None else LoRA(*parts[k : k + 3]) for k in (0, 3, 6)))


def _layer(w_gate, w_up, w_down, gates, *rest) -> Layer:
    """From an operator's arguments after x: weights, gates, nine of LoRA, ids, tokens, activation,
    and whether to recompute."""
    ids, tokens, activation, _ = rest[9:]
    return Layer((w_gate, w_up, w_down), gates, _lora(rest[:9]), Rows(ids, tokens), activation)


def _or_empty(x: Tensor, kept: Kept) -> tuple[Tensor, ...]:
    """An operator's results cannot be None."""
    return tuple(x.new_empty(0) if part is None else part for part in kept)


def _forward(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gates: Tensor | None,
    gate_a: Tensor | None,
    gate_b: Tensor | None,
    gate_scaling: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    up_scaling: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    down_scaling: Tensor | None,
    ids: Tensor | None,
    tokens: int,
    activation: str,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = gate_a, gate_b, gate_scaling, up_a, up_b, up_scaling, down_a, down_b, down_scaling
    layer = _layer(w_gate, w_up, w_down, gates, *parts, ids, tokens, activation, recompute)
    y, kept = mlp_forward(x, layer, not recompute)
    return y, *_or_empty(x, kept)


def _inference(x, *args):
    return mlp_inference(x, _layer(*args))


def _fake_inference(x: Tensor, *_) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake(x, w_gate, w_up, w_down, gates, *rest):
    lora, recompute = _lora(rest[:9]), rest[12]
    (m, _), i = x.shape, w_gate.shape[0]
    ranks = [0 if part is None else part.a.shape[1] for part in lora]
    first = ranks[0] + ranks[1]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(0) if recompute else x.new_empty(m, 2 * i),
        x.new_empty(m, first) if first else x.new_empty(0),
        x.new_empty(m, ranks[2]) if ranks[2] else x.new_empty(0),
    )


def _setup(ctx, inputs, output):
    x, w_gate, w_up, w_down, gates, *rest = inputs
    ctx.save_for_backward(x, *output[1:], w_gate, w_up, w_down, gates, *rest[:10])
    ctx.tokens, ctx.activation = rest[10:12]


def _backward(
    dy: Tensor,
    x: Tensor,
    gu: Tensor,
    s_gate_up: Tensor,
    s_down: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gates: Tensor | None,
    gate_a: Tensor | None,
    gate_b: Tensor | None,
    gate_scaling: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    up_scaling: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    down_scaling: Tensor | None,
    ids: Tensor | None,
    tokens: int,
    activation: str,
    needs: list[bool],
) -> list[Tensor]:
    lora = _lora(
        (gate_a, gate_b, gate_scaling, up_a, up_b, up_scaling, down_a, down_b, down_scaling)
    )
    kept = Kept(*(None if part.dim() == 1 else part for part in (gu, s_gate_up, s_down)))
    flags = needs[0], needs[1], [needs[k : k + 3] for k in (2, 5, 8)]
    layer = Layer((w_gate, w_up, w_down), gates, lora, Rows(ids, tokens), activation)
    return wanted(mlp_backward(dy, x, kept, layer, flags))


def _backward_fake(dy, x, gu, s_gate_up, s_down, w_gate, w_up, w_down, gates, *rest):
    needs, inputs = rest[-1], (x, gates, *rest[:9])
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in zip(inputs, needs, strict=True)
        if need
    ]


def _gradients(run, ctx, dy):
    needs = [ctx.needs_input_grad[k] for k in (0, 4, *range(5, 14))]
    found = run(dy.contiguous(), *ctx.saved_tensors, ctx.tokens, ctx.activation, needs)
    dx, dz, *matrices = spread(found, needs)
    return dx, None, None, None, dz, *matrices, None, None, None, None


_OPERATION = operation("gated_mlp", _forward, _fake, _setup, _backward, _backward_fake, _gradients)
_INFERENCE = inference("gated_mlp", _inference, _forward, _fake_inference)


def run(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    gates: Tensor | None,
    lora: GatedMLPLoRA | None,
    memory_ids: Tensor | None,
    activation: str,
) -> Tensor:
    """See ``koffkernels.gated_mlp``; without gates and LoRA, and in fp64, the plain way."""
    dtype = dispatch.compute_dtype(x, weights[0])
    parts = [t for part in lora or (None, None, None) for t in part or (None, None, None)]
    if (gates is None and all(t is None for t in parts)) or dtype == torch.float64:
        return plain.run(x, weights, gates, lora, memory_ids, activation)
    ids, tokens = rows_of(x, memory_ids)
    trains = needs_grad(x, gates, *parts)
    parts = [dense(part) for part in (gates, *parts)]
    with torch.autocast(x.device.type, enabled=False):
        inputs = flat(x.to(dtype)), *(unit_stride(w.to(dtype)) for w in weights), *parts
        inputs = *inputs, ids, tokens, activation, dispatch.recomputes()
        y = _OPERATION(*inputs)[0] if trains else _INFERENCE(*inputs)
    return y.view(x.shape)
