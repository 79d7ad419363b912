"""Losses of single positions: cross-entropy, and the divergence from a teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .records import IGNORED

# Logits of one piece. All at once they would lie in fp32 several times over (log-softmax, softmax,
# the teacher's): for large vocabularies more than everything else. 2^18 of them are 1 MiB in fp32,
# which stays in a CPU core's cache; 2^25 are 128 MiB, enough work to fill a GPU.
PIECE_CPU, PIECE_GPU = 2**18, 2**25


def token_losses(
    logits: Tensor, labels: Tensor, teacher: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return -log q(token t + 1) and KL(p || q) = sum_v p_v (log p_v - log q_v) of each position t
    but the last, q the model's distribution given the tokens up to t and p the teacher's; 0 where
    token t + 1 does not count.

    Both count at the same positions: what the labels leave out is given and never written, and a
    divergence there would teach the model to write it.

    Args:
        logits: [B, T, V], any floating dtype.
        labels: int64 [B, T], the tokens; -100 at those that do not count.
        teacher: logits [B, T, V] without gradient, or None.

    Returns:
        Two fp32 [B, T - 1], nats; the second is None without a teacher. Differentiable once.

    Source: Hinton et al. 2015 (arXiv 1503.02531), temperature 1.
    """
    # Every position is computed: leaving some out would copy the logits. Labels that are none are
    # placeholders, and their losses are masked below, so that they get no gradient either.
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    flat = None if teacher is None else teacher.flatten(0, 1)
    losses, divergences = _TokenLosses.apply(
        logits.flatten(0, 1), targets.flatten().clamp(min=0), flat
    )
    counts = targets != IGNORED
    losses = (losses.view(labels.shape) * counts)[:, :-1]
    if divergences is not None:
        divergences = (divergences.view(labels.shape) * counts)[:, :-1]
    return losses, divergences


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy and divergence of the rows of [N, V], piece by piece. The backward computes the
    probabilities anew: of that size, autograd holds nothing but the inputs."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, teacher: Tensor | None):
        losses = logits.new_empty(len(logits), dtype=torch.float32)  # [N]
        divergences = None if teacher is None else torch.empty_like(losses)
        for rows in _pieces(logits):
            log_q = F.log_softmax(logits[rows].float(), -1)  # [rows, V]
            losses[rows] = -log_q.gather(1, labels[rows, None])[:, 0]
            if teacher is not None:
                log_p = F.log_softmax(teacher[rows].float(), -1)
                gap = log_p - log_q
                # Not vecdot: autocast would take it in half precision.
                divergences[rows] = log_p.exp().mul_(gap).sum(-1)
        ctx.save_for_backward(logits, labels, teacher)
        return losses, divergences

    @staticmethod
    @once_differentiable
    def backward(ctx, d_losses: Tensor, d_divergences: Tensor | None):
        """d logits = (dl + dd) q - dl onehot(label) - dd p, with dl, dd the rows' gradients."""
        logits, labels, teacher = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for rows in _pieces(logits):
            dl = d_losses[rows, None]  # [rows, 1]
            if teacher is None:
                d = F.softmax(logits[rows].float(), -1).mul_(dl)
            else:
                dd = d_divergences[rows, None]
                d = F.softmax(logits[rows].float(), -1).mul_(dl + dd)
                p = F.softmax(teacher[rows].float(), -1)
                d.addcmul_(p, dd, value=-1)
            grad[rows] = d.scatter_add_(1, labels[rows, None], -dl)
        return grad, None, None


def _pieces(logits: Tensor) -> list[slice]:
    """Return the rows of each piece of [N, V]."""
    elements = PIECE_CPU if logits.device.type == "cpu" else PIECE_GPU
    step = max(1, elements // logits.shape[1])
    return [slice(first, first + step) for first in range(0, len(logits), step)]
