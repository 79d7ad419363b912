"""Cross-entropy and divergence of all logits at once, as koff computed them before it went piece by
piece: autograd keeps the logits and the teacher's, and the backward makes a gradient as large."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 2**18  # logits, whose fp32 copies stay in a CPU core's cache


def loss_of_all_logits(
    states: Tensor, head: Tensor, labels: Tensor, teacher: Tensor, weight: float
) -> Tensor:
    """Return the sum over tokens of (1 - w) cross-entropy + w KL to the teacher.

    Args:
        states, teacher: last hidden states [B, T, d].
        head: [V, d], frozen.
        labels: int64 [B, T].
        weight: w.
    """
    with torch.no_grad():
        theirs = F.linear(teacher, head)
    logits = F.linear(states, head)
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    losses, divergences = _Losses.apply(
        logits.flatten(0, 1), targets.flatten().clamp(min=0), theirs.flatten(0, 1)
    )
    counts = (targets != -100).flatten()
    return (1 - weight) * (losses * counts).sum() + weight * (divergences * counts).sum()


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, teacher: Tensor):
        losses, divergences = logits.new_empty(2, len(logits), dtype=torch.float32).unbind()
        for rows in _pieces(logits):
            log_q = F.log_softmax(logits[rows].float(), -1)
            losses[rows] = -log_q.gather(1, labels[rows, None])[:, 0]
            log_p = F.log_softmax(teacher[rows].float(), -1)
            divergences[rows] = log_p.exp().mul_(log_p - log_q).sum(-1)
        ctx.save_for_backward(logits, labels, teacher)
        return losses, divergences

    @staticmethod
    @once_differentiable
    def backward(ctx, d_losses: Tensor, d_divergences: Tensor):
        logits, labels, teacher = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for rows in _pieces(logits):
            dl, dd = d_losses[rows, None], d_divergences[rows, None]
            d = F.softmax(logits[rows].float(), -1).mul_(dl + dd)
            d.addcmul_(F.softmax(teacher[rows].float(), -1), dd, value=-1)
            grad[rows] = d.scatter_add_(1, labels[rows, None], -dl)
        return grad, None, None


def _pieces(logits: Tensor) -> list[slice]:
    step = max(1, PIECE // logits.shape[1])
    return [slice(first, first + step) for first in range(0, len(logits), step)]
