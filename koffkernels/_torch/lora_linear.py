"""LoRA linear: the delta is added in place to the base output, and backward needs only x and s = x
A^T."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import compute_dtype
from ..types import LoRA
from .rows import add_delta, known_ids, lora_gradients, row_matrices, traced_linear


class _LoRALinear(torch.autograd.Function):
    """x [B, T, K] -> y [B, T, N]. No gradient for weight and bias."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling, ids):
        w = weight.to(x.dtype)
        y = F.linear(x, w, None if bias is None else bias.to(x.dtype))
        a_rows, b_rows = row_matrices((a, b, scaling), ids, x.shape[0], x.dtype)
        s = add_delta(y, x, a_rows, b_rows)
        needs_lora = any(ctx.needs_input_grad[3:6])
        ctx.save_for_backward(
            x if needs_lora else None, s if needs_lora else None, weight, a, b, scaling, ids
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, s, weight, a, b, scaling, ids = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            a_rows, b_rows = row_matrices((a, b, scaling), ids, dy.shape[0], dy.dtype)
            t = torch.bmm(dy, b_rows)  # [B, T, r]
            dx = da = db = dscaling = None
            if ctx.needs_input_grad[0]:
                dx = dy @ weight.to(dy.dtype)
                dx.baddbmm_(t, a_rows)
            if x is not None:
                da_rows, db_rows = torch.bmm(t.transpose(1, 2), x), torch.bmm(dy.transpose(1, 2), s)
                da, db, dscaling = lora_gradients((a, b, scaling), ids, da_rows, db_rows)
        return dx, None, None, da, db, dscaling, None


def _apply(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA, ids: Tensor | None
) -> Tensor:
    return _LoRALinear.apply(x, weight, bias, *lora, ids)


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA | None, memory_ids: Tensor | None
) -> Tensor:
    """See ``koffkernels.lora_linear``."""
    if lora is None:
        return F.linear(x, weight, bias)
    if x.dim() == 3:
        rows = x
    else:
        rows = x[None] if memory_ids is None else x[:, None, :]
    rows = rows.to(compute_dtype(x, weight))
    op = traced_linear if torch.compiler.is_compiling() else _apply
    with torch.autocast(x.device.type, enabled=False):
        y = op(rows, weight, bias, lora, known_ids(memory_ids, lora.a.shape[0]))
    return y if x.dim() == 3 else y.reshape(x.shape[0], weight.shape[0])
