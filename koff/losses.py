"""Losses of single positions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def next_token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """-log p(token t + 1 | tokens up to t) of each position but the last.

    Args:
        logits: [B, T, V].
        ids: int64 [B, T].

    Returns:
        fp32 [B, T - 1], nats.
    """
    labels = F.pad(
        ids[:, 1:], (0, 1), value=-100
    )  # ignore the last position instead of copying the logits
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none"
    )
    return losses.view(ids.shape)[:, :-1]


def distillation_losses(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) = sum_v p_v (log p_v - log q_v) of each position but the last.

    Args:
        logits: [B, T, V] of the student.
        teacher: [B, T, V], no gradient.

    Returns:
        fp32 [B, T - 1], nats.

    Source: Hinton et al. 2015 (arXiv 1503.02531), temperature 1.
    """
    log_q = F.log_softmax(logits[:, :-1].float(), -1)
    log_p = F.log_softmax(teacher[:, :-1].float(), -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
