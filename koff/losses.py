"""Losses of single positions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
        Two fp32 [B, T - 1], nats; the second is None without a teacher.

    Source: Hinton et al. 2015 (arXiv 1503.02531), temperature 1.
    """
    # One log-softmax for both, over every position: leaving the last out would copy the logits.
    log_q = F.log_softmax(logits.float(), -1)
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    losses = F.nll_loss(log_q.flatten(0, 1), labels.flatten(), reduction="none").view(ids.shape)
    if teacher is None:
        return losses[:, :-1], None
    log_p = F.log_softmax(teacher.float(), -1)
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return losses[:, :-1], divergence[:, :-1]
