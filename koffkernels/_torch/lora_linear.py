"""LoRA linear layers over one x: each delta is added in place to its base output, and backward
needs only x and s = x A^T. The gradients of x are added up in place, too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import compute_dtype, without_autocast
from ..types import LoRA, RowGroups
from .rows import (
    add_delta,
    add_delta_by_memory,
    as_rows,
    known_rows,
    linear_backward,
    lora_gradients,
    traced_linear,
)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class _LoRALinears(torch.autograd.Function):
    """x [B, T, K] -> every y [B, T, N]. No gradient for weights and biases.

    ``matrices`` are a, b and scaling of each layer, None for those of a LoRA that is not there.
    """

    @staticmethod
    def forward(ctx, x, weights, biases, rows, *matrices):
        ys, narrow = [], []
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            y, lora = _linear(x, weight, bias), matrices[3 * i : 3 * i + 3]
            narrow.append(None if lora[0] is None else add_delta(y, x, lora, rows))
            ys.append(y)
        ctx.trains = [any(ctx.needs_input_grad[4 + 3 * i : 7 + 3 * i]) for i in range(len(ys))]
        ctx.rows = rows
        # Of an output that nobody used there is no gradient at all, or its update would get zeros,
        # under which weight decay and momentum still move it.
        ctx.set_materialize_grads(False)
        narrow = [s if trains else None for s, trains in zip(narrow, ctx.trains, strict=True)]
        ctx.save_for_backward(x if any(ctx.trains) else None, *weights, *narrow, *matrices)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, *saved = ctx.saved_tensors
        count, rows, dx = len(dys), ctx.rows, None
        weights, narrow, matrices = saved[:count], saved[count : 2 * count], saved[2 * count :]
        grads: list[Tensor | None] = [None] * (3 * count)
        with without_autocast(weights[0].device):
            for i, (dy, weight, s) in enumerate(zip(dys, weights, narrow, strict=True)):
                if dy is None:
                    continue
                of = slice(3 * i, 3 * i + 3)
                lora = None if matrices[3 * i] is None else matrices[of]
                dx, t = linear_backward(dy, weight, lora, rows, ctx.needs_input_grad[0], onto=dx)
                if ctx.trains[i]:
                    parts = torch.bmm(t.transpose(1, 2), x), torch.bmm(dy.transpose(1, 2), s)
                    grads[of] = lora_gradients(lora, rows, *parts)
        return dx, None, None, None, *grads


def _forward(x, weights, biases, rows, loras):
    """Return the same where nothing has a gradient."""
    ys = []
    for weight, bias, lora in zip(weights, biases, loras, strict=True):
        y = _linear(x, weight, bias)
        if lora is not None:
            add_delta_by_memory(y, x, lora, rows)
        ys.append(y)
    return ys


def _apply(x, weights, biases, rows, loras):
    matrices = [part for lora in loras for part in lora or (None, None, None)]
    return _LoRALinears.apply(x, weights, biases, rows, *matrices)


def _traced(x, weights, biases, rows, loras):
    return [
        traced_linear(x, weight, bias, lora, rows)
        for weight, bias, lora in zip(weights, biases, loras, strict=True)
    ]


def run(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    loras: Sequence[LoRA | None],
    memory_ids: Tensor | RowGroups | None,
) -> tuple[Tensor, ...]:
    """See ``koffkernels.lora_linears``."""
    loras = [lora and lora.stacked() for lora in loras]
    memories = next((lora.a.shape[0] for lora in loras if lora is not None), 0)
    if not memories:
        return tuple(F.linear(x, *layer) for layer in zip(weights, biases, strict=True))
    rows = known_rows(memory_ids, memories)
    if torch.compiler.is_compiling():
        op = _traced
    else:
        op = _apply if torch.is_grad_enabled() else _forward
    wide = as_rows(x, rows is None).to(compute_dtype(x, weights[0]))
    with without_autocast(x.device):
        ys = op(wide, weights, biases, rows, loras)
    lead = x.shape[:-1]
    return tuple(y.view(*lead, weight.shape[0]) for y, weight in zip(ys, weights, strict=True))
