"""A gated MLP with one LoRA as a careful user would write it on cuBLAS: an autograd.Function that
saves x, g, u and the narrow products, computes no gradient of base weights, recomputes h, and adds
every delta in place by addmm_."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float):
    """(x W^T + scaling s b^T, s = x a^T); x [M, K]."""
    s = x @ a.T
    return (x @ weight.T).addmm_(s, b.T, alpha=scaling), s


class _LoRAMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_gate, w_up, w_down, a_gate, b_gate, a_up, b_up, a_down, b_down, scaling):
        g, s_gate = _linear(x, w_gate, a_gate, b_gate, scaling)
        u, s_up = _linear(x, w_up, a_up, b_up, scaling)
        y, s_down = _linear(F.silu(g).mul_(u), w_down, a_down, b_down, scaling)
        ctx.save_for_backward(
            x, g, u, s_gate, s_up, s_down,
            w_gate, w_up, w_down, a_gate, b_gate, a_up, b_up, a_down, b_down,
        )  # fmt: skip
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, g, u, s_gate, s_up, s_down, *rest = ctx.saved_tensors
        w_gate, w_up, w_down, a_gate, b_gate, a_up, b_up, a_down, b_down = rest
        t_down = (dy @ b_down).mul_(ctx.scaling)
        db_down = (dy.T @ s_down).mul_(ctx.scaling)
        dh = (dy @ w_down).addmm_(t_down, a_down)
        act = F.silu(g)
        da_down = t_down.T @ (act * u)
        du = dh * act
        dg = torch.ops.aten.silu_backward(dh.mul_(u), g)
        t_gate, t_up = (dg @ b_gate).mul_(ctx.scaling), (du @ b_up).mul_(ctx.scaling)
        dx = (dg @ w_gate).addmm_(du, w_up).addmm_(t_gate, a_gate).addmm_(t_up, a_up)
        db_gate = (dg.T @ s_gate).mul_(ctx.scaling)
        db_up = (du.T @ s_up).mul_(ctx.scaling)
        grads = (t_gate.T @ x, db_gate, t_up.T @ x, db_up, da_down, db_down)
        return dx, None, None, None, *grads, None


def lora_mlp(
    x: Tensor, weights: tuple[Tensor, Tensor, Tensor], lora: list[Tensor], scaling: float
) -> Tensor:
    """y = down(silu(gate(x)) * up(x)), each with its LoRA.

    Args:
        x: [B, T, H].
        weights: gate [I, H], up [I, H], down [H, I], frozen.
        lora: a and b of gate, up and down, in x's dtype: a [r, K], b [N, r].
        scaling: alpha / r of all three.

    Returns:
        [B, T, H], with gradients for x and lora.
    """
    flat = x.reshape(-1, x.shape[-1])
    return _LoRAMLP.apply(flat, *weights, *lora, scaling).view(x.shape)
