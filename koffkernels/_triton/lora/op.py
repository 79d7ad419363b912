"""LoRA linear on Triton, as an operation of torch: see ``linear`` for what it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._torch import lora_linear as plain
from ...dispatch import compute_dtype, without_autocast
from ...types import LoRA
from ..shared.launch import Rows, dense, unit_stride
from ..shared.torch_operator import inference, needs_grad, operation, spread, wanted
from .linear import linear_backward, linear_forward, linear_inference

_LORA = "Tensor a, Tensor b, Tensor scaling, Tensor? ids, SymInt tokens"
_ARGUMENTS = f"Tensor x, Tensor weight, Tensor? bias, {_LORA}"
_BACKWARD = f"Tensor dy, Tensor? x, Tensor? s, Tensor weight, {_LORA}, bool[] needs"


def rows_of(x: Tensor, ids: Tensor | None) -> Rows:
    """Return the memory of each token of x [B, T, K] (ids [B]) or [M, K] (ids [M])."""
    ids = None if ids is None else ids.contiguous()
    return Rows(ids, max(1, x.shape[1]) if x.dim() == 3 else 1)


def flat(x: Tensor) -> Tensor:
    """Return x [..., K] as [M, K] with last stride 1."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(x, weight, bias, a, b, scaling, ids, tokens):
    return linear_forward(x, weight, bias, (a, b, scaling), Rows(ids, tokens))


def _inference(x, weight, bias, a, b, scaling, ids, tokens):
    return linear_inference(x, weight, bias, (a, b, scaling), Rows(ids, tokens))


def _fake(x, weight, bias, a, b, scaling, ids, tokens):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[1])


def _setup(ctx, inputs, output):
    x, weight, _, a, b, scaling, ids, tokens = inputs
    trains = any(ctx.needs_input_grad[3:6])
    x, s = (x, output[1]) if trains else (None, None)  # read for a, b and scaling alone
    ctx.save_for_backward(x, s, weight, a, b, scaling, ids)
    ctx.tokens = tokens


def _backward(dy, x, s, weight, a, b, scaling, ids, tokens, needs):
    rows = Rows(ids, tokens)
    return wanted(linear_backward(dy, x, s, weight, (a, b, scaling), rows, tuple(needs)))


def _backward_fake(dy, x, s, weight, a, b, scaling, ids, tokens, needs):
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    return [
        like if like is dx else torch.empty_like(like, memory_format=torch.contiguous_format)
        for like, need in zip((dx, a, b, scaling), needs, strict=True)
        if need
    ]


def _gradients(run, ctx, dy):
    needs = [ctx.needs_input_grad[i] for i in (0, 3, 4, 5)]  # of x, a, b and scaling
    x, s, weight, a, b, scaling, ids = ctx.saved_tensors
    found = run(dy.contiguous(), x, s, weight, a, b, scaling, ids, ctx.tokens, needs)
    dx, *matrices = spread(found, needs)
    return dx, None, None, *matrices, None, None


_OPERATION = operation(
    "lora_linear",
    _ARGUMENTS,
    "Tensor, Tensor",
    _BACKWARD,
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
    backward_fake=_backward_fake,
    gradients=_gradients,
)
_INFERENCE = inference(
    "lora_linear", _ARGUMENTS, forward=_inference, fake=lambda *args: _fake(*args)[0]
)


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA | None, memory_ids: Tensor | None
) -> Tensor:
    """See ``koffkernels.lora_linear``; without LoRA, and in fp64, the plain way."""
    dtype = compute_dtype(x, weight)
    if lora is None or dtype == torch.float64:
        return plain.run(x, weight, bias, lora, memory_ids)
    ids, tokens = rows_of(x, memory_ids)
    bias = None if bias is None else dense(bias.to(dtype))
    parts = tuple(dense(part) for part in lora)
    with without_autocast(x.device):
        inputs = flat(x.to(dtype)), unit_stride(weight.to(dtype)), bias, *parts, ids, tokens
        y = _OPERATION(*inputs)[0] if needs_grad(x, *lora) else _INFERENCE(*inputs)
    return y.view(*x.shape[:-1], weight.shape[0])
