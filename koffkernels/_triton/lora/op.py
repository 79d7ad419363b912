"""LoRA linear layers on Triton, as an operation of torch: see ``linear`` for what it computes.

An operator takes and returns single tensors, so layers travel as the arguments that ``_LAYERS``
names: weight, bias, a, b and scaling of each, and who uses which memory. torch.compile's operator
always has three, some of them None; eager calls have as many as there are, since every argument of
an autograd.Function takes time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._torch import lora_linear as plain
from ...dispatch import compute_dtype, without_autocast
from ...types import LoRA
from ..shared.launch import Rows, cast, dense, unit_stride
from ..shared.torch_operator import inference, needs_grad, operation, shaped, spread, wanted
from .linear import Linear, linears_backward, linears_forward, linears_inference

MOST = 3  # layers of a call: q, k and v
_PARTS = len(("weight", "bias", *LoRA._fields))
_LAYERS = ", ".join(
    f"Tensor{'?' * (i > 0)} weight{i}, Tensor? bias{i}, Tensor? a{i}, Tensor? b{i}, "
    f"Tensor? scaling{i}"
    for i in range(MOST)
)
_LAYERS += ", Tensor? ids, SymInt tokens"
_ARGUMENTS = f"Tensor x, {_LAYERS}"
_DYS = ", ".join(f"Tensor? dy{i}" for i in range(MOST))
_BACKWARD = f"{_DYS}, Tensor? x, Tensor? s, {_LAYERS}, bool[] needs"


def rows_of(x: Tensor, ids: Tensor | None) -> Rows:
    """Return the memory of each token of x [B, T, K] (ids [B]) or [M, K] (ids [M])."""
    ids = None if ids is None else ids.contiguous()
    return Rows(ids, max(1, x.shape[1]) if x.dim() == 3 else 1)


def flat(x: Tensor) -> Tensor:
    """Return x [..., K] as [M, K] that kernels can read."""
    return unit_stride(x.reshape(-1, x.shape[-1]))


def _of_each(parts: Sequence[Any], size: int = _PARTS) -> Iterator[Sequence[Any]]:
    """Yield what belongs to each layer."""
    return (parts[i : i + size] for i in range(0, len(parts), size))


def _layers(*arguments: Any) -> tuple[list[Linear], Rows]:
    """Return what the arguments that ``_LAYERS`` names stand for."""
    *parts, ids, tokens = arguments
    layers = [
        Linear(weight, bias, None if lora[0] is None else LoRA(*lora).stacked())
        for weight, bias, *lora in _of_each(parts)
        if weight is not None
    ]
    return layers, Rows(ids, tokens)


def _filled(ys: list[Tensor], arguments: tuple) -> list[Tensor | None]:
    """Return an output for each layer that there are arguments of."""
    return [*ys, *[None] * (len(arguments) // _PARTS - len(ys))]


def _forward(x, *arguments):
    layers, rows = _layers(*arguments)
    ys, s = linears_forward(flat(x), layers, rows)
    ys = [shaped(y, [*x.shape[:-1], y.shape[1]]) for y in ys]
    return *_filled(ys, arguments), s


def _fake(x, *arguments):
    layers, _ = _layers(*arguments)
    ys = _fake_inference(x, *arguments)
    width = sum(layer.lora.a.shape[1] for layer in layers if layer.lora is not None)
    return *_filled(ys, arguments), x.new_empty(math.prod(x.shape[:-1]), width)


def _inference(x, *arguments):
    ys = linears_inference(flat(x), *_layers(*arguments))
    return [y.view(*x.shape[:-1], y.shape[1]) for y in ys]


def _fake_inference(x, *arguments):
    layers, _ = _layers(*arguments)
    return [x.new_empty(*x.shape[:-1], layer.weight.shape[0]) for layer in layers]


def _matrices(parts: Sequence[Any]) -> list[Any]:
    """Return what belongs to a, b and scaling of each layer."""
    return [part for _, _, *lora in _of_each(parts) for part in lora]


def _needs(ctx) -> tuple[bool, ...]:
    """Return what needs a gradient: x, then a, b and scaling of each layer."""
    # Of x, the layers, ids and tokens, and of some calls one more.
    flags = ctx.needs_input_grad
    return flags[0], *_matrices(flags[1 : 1 + len(flags) // _PARTS * _PARTS])


def _setup(ctx, inputs, output):
    x, *parts, ids, tokens = inputs
    ctx.constants = (tokens,)
    # They are read for a, b and scaling alone.
    x, s = (x, output[-1]) if any(_needs(ctx)[1:]) else (None, None)
    ctx.save_for_backward(x, s, *parts, ids)


def _backward_arguments(arguments: tuple) -> tuple[tuple, Tensor, Tensor, tuple, Sequence[bool]]:
    """Return dy of each layer, x, s, the arguments that ``_LAYERS`` names, and ``needs``."""
    count = (len(arguments) - len(("x", "s", "ids", "tokens", "needs"))) // (1 + _PARTS)
    x, s, *parts, needs = arguments[count:]
    return arguments[:count], x, s, parts, needs


def _backward(*arguments):
    dys, x, s, parts, needs = _backward_arguments(arguments)
    layers, rows = _layers(*parts)
    dys = dys[: len(layers)]
    given = zip(_matrices(parts[:-2]), needs[1:], strict=True)
    trained = list(_of_each([part if need else None for part, need in given], 3))[: len(layers)]
    x, flat_dys = None if x is None else flat(x), [flat(dy) for dy in dys]
    dx, *matrices = linears_backward(flat_dys, x, s, layers, rows, needs[0], trained)
    return wanted([None if dx is None else dx.view(*dys[0].shape[:-1], dx.shape[1]), *matrices])


def _backward_fake(*arguments):
    (dy, *_), _, _, parts, needs = _backward_arguments(arguments)
    dx = dy.new_empty(*dy.shape[:-1], parts[0].shape[1])
    return [
        like if like is dx else torch.empty_like(like, memory_format=torch.contiguous_format)
        for like, need in zip((dx, *_matrices(parts[:-2])), needs, strict=True)
        if need
    ]


def _gradients(run, ctx, *dys):
    needs = list(_needs(ctx))
    x, s, *parts, ids = ctx.saved_tensors
    leading = next(dy.shape[:-1] for dy in dys if dy is not None and dy.dim() > 1)
    given = []
    for i, (dy, (weight, *_)) in enumerate(zip(dys, _of_each(parts), strict=True)):
        if weight is None:
            given.append(None)
        elif dy is None:  # nobody used this output: its update has no gradient, which is not zeros
            given.append(weight.new_zeros(*leading, weight.shape[0]))
            needs[1 + 3 * i : 4 + 3 * i] = [False] * 3
        else:
            given.append(dy.contiguous())
    dx, *matrices = spread(run(*given, x, s, *parts, ids, *ctx.constants, needs), needs)
    found = [(None, None, *three) for three in _of_each(matrices, 3)]
    return dx, *(gradient for five in found for gradient in five), None, None


_OPERATION = operation(
    "lora_linear",
    _ARGUMENTS,
    ", ".join(["Tensor"] * (MOST + 1)),
    _BACKWARD,
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
    backward_fake=_backward_fake,
    gradients=_gradients,
    outputs=-1,
)
_INFERENCE = inference(
    "lora_linear", _ARGUMENTS, "Tensor[]", forward=_inference, fake=_fake_inference
)


def run(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    loras: Sequence[LoRA | None],
    memory_ids: Tensor | None,
) -> tuple[Tensor, ...]:
    """See ``koffkernels.lora_linears``; without LoRA, in fp64, and of no width the plain way."""
    dtype = compute_dtype(x, weights[0])
    plainly = all(lora is None for lora in loras) or dtype == torch.float64
    if plainly or not all(weight.numel() for weight in weights):
        return plain.run(x, weights, biases, loras, memory_ids)
    ids, tokens = rows_of(x, memory_ids)
    parts: list[Tensor | None] = []
    trained = False
    with without_autocast(x.device):
        for weight, bias, lora in zip(weights, biases, loras, strict=True):
            bias = None if bias is None else dense(cast(bias, dtype))
            matrices = (None, None, None) if lora is None else tuple(map(dense, lora))
            parts += (unit_stride(cast(weight, dtype)), bias, *matrices)
            trained = trained or needs_grad(*matrices)
        if torch.compiler.is_compiling():
            parts += [None] * (_PARTS * MOST - len(parts))
        inputs = cast(x, dtype), *parts, ids, tokens
        ys = (_OPERATION if trained or needs_grad(x) else _INFERENCE)(*inputs)
    return tuple(ys[: len(weights)])
