"""Gated MLP on Triton, as an operation of torch: see ``mlp`` for what it computes.

An operator takes and returns single tensors, so a layer travels as the arguments that ``_LAYER``
names: three weights, the gates, a, b and scaling of gate, up and down, and who uses which memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import dispatch
from ..._torch import gated_mlp as plain
from ...types import GatedMLPLoRA, LoRA
from ..lora.op import flat, rows_of
from ..shared.launch import Rows, cast, dense, unit_stride
from ..shared.torch_operator import inference, needs_grad, operation, shaped, spread, wanted
from .mlp import Layer, Saved, mlp_backward, mlp_forward, mlp_inference

_LORA = ", ".join(
    f"Tensor? {layer}_{part}" for layer in GatedMLPLoRA._fields for part in LoRA._fields
)
_LAYER = (
    f"Tensor w_gate, Tensor w_up, Tensor w_down, Tensor? gates, {_LORA}, "
    "Tensor? ids, SymInt tokens, str activation"
)
_ARGUMENTS = f"Tensor x, {_LAYER}, bool recompute"
_SAVED = "Tensor? gu, Tensor? s_gate_up, Tensor? s_down"
_BACKWARD = f"Tensor dy, Tensor x, {_SAVED}, {_LAYER}, bool[] needs"


def _in_threes(flags: Sequence[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Yield what belongs to a, b and scaling of gate, then of up, then of down."""
    return zip(flags[0::3], flags[1::3], flags[2::3], strict=True)


def _nine(lora: GatedMLPLoRA | None) -> list[Tensor | None]:
    """Return a, b and scaling of gate, up and down, None for those of a LoRA that is not there."""
    return [t for part in lora or GatedMLPLoRA() for t in part or (None, None, None)]


def _layer(w_gate, w_up, w_down, gates, *rest) -> Layer:
    """Return the layer of the arguments that ``_LAYER`` names."""
    *nine, ids, tokens, activation = rest
    triples = _in_threes(nine)
    lora = GatedMLPLoRA(
        *(None if triple[0] is None else LoRA(*triple).stacked() for triple in triples)
    )
    return Layer((w_gate, w_up, w_down), gates, lora, Rows(ids, tokens), activation)


def _forward(x, *rest):
    *arguments, recompute = rest
    y, saved = mlp_forward(flat(x), _layer(*arguments), not recompute)
    return shaped(y, x.shape), *saved


def _fake(x, *rest):
    *arguments, recompute = rest
    layer, m = _layer(*arguments), math.prod(x.shape[:-1])
    r_gate, r_up, r_down = (0 if part is None else part.a.shape[1] for part in layer.lora)
    widths = (0 if recompute else 2 * layer.weights[0].shape[0], r_gate + r_up, r_down)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        *(x.new_empty(m, width) if width else None for width in widths),
    )


def _inference(x, *rest):
    *arguments, _ = rest
    return mlp_inference(flat(x), _layer(*arguments)).view(x.shape)


def _fake_inference(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    x, *arguments, recompute = inputs
    *tensors, tokens, activation = arguments
    ctx.constants = tokens, activation
    _, gu, s_gate_up, s_down = output
    (a_gate, *_), (a_up, *_), (a_down, *_) = _in_threes(arguments[4:13])
    ctx.save_for_backward(
        x,
        None if recompute else gu,
        None if a_gate is None and a_up is None else s_gate_up,
        None if a_down is None else s_down,
        *tensors,
    )


def _backward(dy, x, gu, s_gate_up, s_down, *rest):
    *arguments, needs = rest
    given = zip(arguments[4:13], needs[2:], strict=True)
    trained = list(_in_threes([part if need else None for part, need in given]))
    saved, layer = Saved(gu, s_gate_up, s_down), _layer(*arguments)
    dx, *others = mlp_backward(flat(dy), flat(x), saved, layer, tuple(needs[:2]), trained)
    return wanted([None if dx is None else dx.view(x.shape), *others])


def _backward_fake(dy, x, gu, s_gate_up, s_down, *rest):
    *arguments, needs = rest
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in zip((x, *arguments[3:13]), needs, strict=True)
        if need
    ]


def _gradients(run, ctx, dy):
    # Of x, then, behind three weights that are frozen, of the gates and the nine tensors of LoRA.
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:14]]
    found = run(dy.contiguous(), *ctx.saved_tensors, *ctx.constants, needs)
    dx, dz, *nine = spread(found, needs)
    return dx, None, None, None, dz, *nine, None, None, None, None


_OPERATION = operation(
    "gated_mlp",
    _ARGUMENTS,
    "Tensor, Tensor, Tensor, Tensor",
    _BACKWARD,
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
    backward_fake=_backward_fake,
    gradients=_gradients,
)
_INFERENCE = inference("gated_mlp", _ARGUMENTS, forward=_inference, fake=_fake_inference)


def run(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    gates: Tensor | None,
    lora: GatedMLPLoRA | None,
    memory_ids: Tensor | None,
    activation: str,
) -> Tensor:
    """See ``koffkernels.gated_mlp``; without gates and LoRA, in fp64, and of no width the plain
    way."""
    dtype = dispatch.compute_dtype(x, weights[0])
    trained = gates, *_nine(lora)
    if all(t is None for t in trained) or dtype == torch.float64 or not weights[0].numel():
        return plain.run(x, weights, gates, lora, memory_ids, activation)
    ids, tokens = rows_of(x, memory_ids)
    with dispatch.without_autocast(x.device):
        inputs = (
            cast(x, dtype),
            *(unit_stride(cast(weight, dtype)) for weight in weights),
            *(dense(t) for t in trained),
            ids,
            tokens,
            activation,
            dispatch.recomputes(),
        )
        return _OPERATION(*inputs)[0] if needs_grad(x, *trained) else _INFERENCE(*inputs)
