"""LoRA linear: the delta is added in place to the base output, and backward needs only x and s = x
A^T."""

from __future__ import annotations

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
    delta_backward,
    known_rows,
    lora_gradients,
    traced_linear,
)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class _LoRALinear(torch.autograd.Function):
    """x [B, T, K] -> y [B, T, N]. No gradient for weight and bias."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling, rows):
        y = _linear(x, weight, bias)
        s = add_delta(y, x, (a, b, scaling), rows)
        needs_lora = any(ctx.needs_input_grad[3:6])
        ctx.rows = rows
        ctx.save_for_backward(
            x if needs_lora else None, s if needs_lora else None, weight, a, b, scaling
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, s, weight, *lora), rows = ctx.saved_tensors, ctx.rows
        with without_autocast(dy.device):
            dx = dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
            t = delta_backward(dy, lora, rows, dx)
            da = db = dscaling = None
            if x is not None:
                da_rows, db_rows = torch.bmm(t.transpose(1, 2), x), torch.bmm(dy.transpose(1, 2), s)
                da, db, dscaling = lora_gradients(lora, rows, da_rows, db_rows)
        return dx, None, None, da, db, dscaling, None


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA, rows: RowGroups | None
) -> Tensor:
    """Return the same where nothing has a gradient."""
    y = _linear(x, weight, bias)
    add_delta_by_memory(y, x, lora, rows)
    return y


def _apply(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA, rows: RowGroups | None
) -> Tensor:
    return _LoRALinear.apply(x, weight, bias, *lora, rows)


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoRA | None,
    memory_ids: Tensor | RowGroups | None,
) -> Tensor:
    """See ``koffkernels.lora_linear``."""
    if lora is None:
        return F.linear(x, weight, bias)
    rows = known_rows(memory_ids, lora.a.shape[0])
    if torch.compiler.is_compiling():
        op = traced_linear
    else:
        op = _apply if torch.is_grad_enabled() else _forward
    wide = as_rows(x, rows is None).to(compute_dtype(x, weight))
    with without_autocast(x.device):
        y = op(wide, weight, bias, lora, rows)
    return y.view(*x.shape[:-1], weight.shape[0])
