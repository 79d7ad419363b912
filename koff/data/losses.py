"""Losses of single positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# So many logits at a time: in fp32 a piece fits a core's cache, or fills a GPU. All at once they
# would be held in fp32 several times over: for large vocabularies more than everything else.
PIECE_CPU, PIECE_GPU = 2**18, 2**25


def _pieces(logits: Tensor) -> range:
    """First rows of the pieces of [N, V], and their number of rows as step."""
    elements = PIECE_CPU if logits.device.type == "cpu" else PIECE_GPU
    return range(0, len(logits), max(1, elements // logits.shape[1]))


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy and divergence of the rows of [N, V], piece by piece; nothing of that size is
    kept but the inputs."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, teacher: Tensor | None):
        losses = logits.new_empty(len(logits), dtype=torch.float32)
        divergences = None if teacher is None else torch.empty_like(losses)
        pieces = _pieces(logits)
        for first in pieces:
            rows = slice(first, first + pieces.step)
            log_q = F.log_softmax(logits[rows].float(), -1)
            losses[rows] = -log_q.gather(1, labels[rows, None])[:, 0]
            if teacher is not None:
                log_p = F.log_softmax(teacher[rows].float(), -1)
                gap = log_p - log_q  # not vecdot: autocast would take it in half precision
                divergences[rows] = log_p.exp().mul_(gap).sum(-1)
        ctx.save_for_backward(logits, labels, teacher)
        return losses, divergences

    @staticmethod
    @once_differentiable
    def backward(ctx, d_losses: Tensor, d_divergences: Tensor | None):
        """d logits = (dl + dd) q - dl onehot(label) - dd p."""
        logits, labels, teacher = ctx.saved_tensors
        grad = torch.empty_like(logits)
        pieces = _pieces(logits)
        for first in pieces:
            rows = slice(first, first + pieces.step)
            scale, label = d_losses[rows, None], labels[rows, None]
            down = -scale
            if teacher is not None:
                scale = scale + d_divergences[rows, None]
            d = F.softmax(logits[rows].float(), -1).mul_(scale)
            if teacher is not None:
                p = F.softmax(teacher[rows].float(), -1)
                d.addcmul_(p, d_divergences[rows, None], value=-1)
            grad[rows] = d.scatter_add_(1, label, down)
        return grad, None, None


def token_losses(
    logits: Tensor, ids: Tensor, teacher: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """-log q(token t + 1) and KL(p || q) = sum_v p_v (log p_v - log q_v) of each position t but the
    last, q the model's distribution given the tokens up to t and p the teacher's.

    Args:
        logits: [B, T, V].
        ids: int64 [B, T].
        teacher: logits [B, T, V] without gradient, or None.

    Returns:
        Two fp32 [B, T - 1], nats; the second is None without a teacher. Differentiable once.

    Source: Hinton et al. 2015 (arXiv 1503.02531), temperature 1.
    """
    # Every position is computed: leaving the last out would copy the logits.
    labels = F.pad(ids[:, 1:], (0, 1), value=0).flatten()
    flat = None if teacher is None else teacher.flatten(0, 1)
    losses, divergences = _TokenLosses.apply(logits.flatten(0, 1), labels, flat)
    losses = losses.view(ids.shape)[:, :-1]
    return losses, None if divergences is None else divergences.view(ids.shape)[:, :-1]
