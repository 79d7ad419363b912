"""Losses of single positions: cross-entropy, and the divergence from a teacher.

They are computed from the last hidden states. All logits at once would be more than anything else
in training: 2 GiB in bf16 at 8 x 1024 tokens of a vocabulary of 128,256, three times over (the
model's, the teacher's, and the gradient). The head is frozen, so a piece of them is enough: its
losses are taken, its gradient goes back through the head at once, and the next piece takes its
place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from koffkernels.dispatch import compute_dtype

from .records import IGNORED

# Logits that one product makes, of each model: 256 rows of a vocabulary of 128,256. Fewer rows
# would read the head's weight for too little arithmetic, more would only take more memory.
AT_ONCE = 2**25
# Of those, as many as softmax and its gradient go through at a time, since they need several fp32
# copies: 2^18 of them are 1 MiB, which stays in a CPU core's cache; 2^24 are 64 MiB, enough work to
# fill a GPU.
PIECE_CPU, PIECE_GPU = 2**18, 2**24


class Head(NamedTuple):
    """How a model makes logits of a hidden state h: z = scale (W h + b), and, of a model that caps
    them, cap tanh(z / cap).

    Args:
        weight: W [V, d]. No loss here has a gradient for it.
        bias: b [V], or None.
        scale: of all logits.
        cap: what their size stays below, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits [..., V] of hidden states [..., d], all at once."""
        return self.shape(F.linear(states, self.weight, self.bias))

    def shape(self, products: Tensor) -> Tensor:
        """Return W h + b scaled and capped."""
        z = products if self.scale == 1 else products * self.scale
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)

    def unshape_(self, gradient: Tensor, logits: Tensor) -> None:
        """Turn a gradient for logits into that for W h + b, in place."""
        if self.cap is not None:
            gradient.mul_(1 - (logits / self.cap) ** 2)
        if self.scale != 1:
            gradient.mul_(self.scale)

    def to(self, dtype: torch.dtype) -> Head:
        """Return the head with weight and bias in a dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._replace(weight=self.weight.to(dtype), bias=bias)


@torch.compiler.disable  # it would unroll the loops, and has nothing to add to them
def token_losses(
    states: Tensor,
    head: Head | None,
    labels: Tensor,
    teacher: Tensor | None = None,
    weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the sum over all tokens of (1 - w) l + w k, and l of each token, where

        l_t = -log q(token t + 1),   k_t = KL(p || q) = sum_v p_v (log p_v - log q_v),

    q is the model's distribution given the tokens up to t and p the teacher's. Where token t + 1
    does not count both are 0: what the labels leave out is given and never written, and a
    divergence there would teach the model to write it.

    The gradient of the sum for the hidden states is computed beside it, if they need one, and the
    backward pass only scales it: no logits are kept, and none are computed twice.

    Args:
        states: last hidden states [B, T, d]; without a head, logits [B, T, V].
        head: of the model, frozen; None where the model has made the logits itself.
        labels: int64 [B, T], the tokens; -100 at those that do not count. From the CPU, whatever
            the states are on, they save the work for positions that do not count.
        teacher: as ``states``, of the teacher and without gradient. None: k is 0, and w must be.
        weight: w in 0..1.

    Returns:
        The sum, which has the gradient, and l, [B, T - 1], which has none. Nats in fp32; of fp64,
        fp64.

    Raises:
        ValueError: a head that is trained, which would get no gradient.

    Source: Hinton et al. 2015 (arXiv 1503.02531), temperature 1.
    """
    if head is not None and head.weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "token_losses: the head must be frozen, got one that requires a gradient; pass the "
            "model's logits, and None for the head"
        )
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()  # [N]
    states = states.flatten(0, 1)
    teacher = None if teacher is None else teacher.flatten(0, 1)
    counted = None
    # Of labels on a GPU one would have to wait for, to know which positions count: there all are
    # computed, under placeholders for labels, and taken out again.
    if labels.device.type == "cpu":
        counted = (targets != IGNORED).nonzero()[:, 0]
        targets = targets[counted].to(states.device, non_blocking=True)
        counted = counted.to(states.device, non_blocking=True)
        states = states[counted]
        teacher = None if teacher is None else teacher[counted]
    total, losses = _TokenLosses.apply(states, targets, head, teacher, weight)
    if counted is not None:
        losses = losses.new_zeros(labels.numel()).index_copy_(0, counted, losses)
    return total, losses.view(labels.shape)[:, :-1]


@torch.no_grad()
def logits_in_pieces(states: Tensor, head: Head | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, their logits [rows, V]) of hidden states [N, d]; without a head the states are
    logits. A piece is good until the next one, which takes its place."""
    if head is not None:
        head = head.to(compute_dtype(states, head.weight))
    for rows, products in _products(states, head):
        yield rows, products if head is None else head.shape(products)


def _products(states: Tensor, head: Head | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, their W h + b) in the dtype of W, each piece in the place of the one before;
    without a head, the states as they are."""
    size = states.shape[1] if head is None else len(head.weight)
    step = max(1, AT_ONCE // size)
    if step > 64:
        step -= step % 64  # so that no tile of a product is left half empty
    step = max(1, min(step, len(states)))
    out = None if head is None else head.weight.new_empty(step, size)
    for first in range(0, len(states), step):
        rows = slice(first, first + step)
        if head is None:
            yield rows, states[rows]
            continue
        h = states[rows].to(head.weight.dtype)
        products = torch.mm(h, head.weight.t(), out=out[: len(h)])
        yield rows, products if head.bias is None else products.add_(head.bias)


class _TokenLosses(torch.autograd.Function):
    """``token_losses`` of rows: states [N, d], labels [N], the teacher's states [N, d]."""

    @staticmethod
    def forward(
        ctx,
        states: Tensor,
        labels: Tensor,
        head: Head | None,
        teacher: Tensor | None,
        weight: float,
    ):
        dtype = states.dtype
        if head is not None:
            dtype = compute_dtype(states, head.weight)
            head = head.to(dtype)  # once: under autocast it is a copy of the whole weight
        precise = torch.promote_types(dtype, torch.float32)
        losses, mixed = states.new_empty(2, len(states), dtype=precise).unbind()
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = torch.empty_like(states, dtype=dtype)
        counts = labels != IGNORED
        labels = labels.clamp(min=0)[:, None]
        # Nothing below is to be lowered once more: the dtypes have been chosen.
        with torch.autocast(states.device.type, enabled=False):
            pieces = _products(states, head)
            taught = itertools.repeat(None) if teacher is None else _products(teacher, head)
            for (rows, products), others in zip(pieces, taught, strict=False):
                d_products = products  # written over as soon as it was read
                if head is None and gradient is not None:
                    d_products = gradient[rows]
                for part in _parts(products):
                    at = slice(rows.start + part.start, rows.start + part.stop)
                    z = _shaped(products[part].to(precise), head)
                    log_q = F.log_softmax(z, -1)  # [part, V]
                    loss = -log_q.gather(1, labels[at])[:, 0]
                    losses[at] = loss
                    if teacher is None:
                        mixed[at] = loss
                    else:
                        log_p = F.log_softmax(_shaped(others[1][part].to(precise), head), -1)
                        p = log_p.exp()
                        divergence = log_p.sub_(log_q).mul_(p).sum(-1)
                        mixed[at] = (1 - weight) * loss + weight * divergence
                    if gradient is None:
                        continue
                    # d logits = q - (1 - w) onehot(label) - w p
                    d = log_q.exp_()
                    if teacher is not None:
                        d.sub_(p, alpha=weight)
                    d.scatter_add_(1, labels[at], d.new_full((len(d), 1), weight - 1))
                    if head is not None:
                        head.unshape_(d, z)
                    d_products[part] = d
                if gradient is not None and head is not None:
                    torch.mm(products, head.weight, out=gradient[rows])
        losses.masked_fill_(~counts, 0)
        mixed.masked_fill_(~counts, 0)
        if gradient is not None:
            ctx.save_for_backward(gradient.masked_fill_(~counts[:, None], 0))
        ctx.dtype = states.dtype
        ctx.mark_non_differentiable(losses)
        return mixed.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total: Tensor, _):
        (gradient,) = ctx.saved_tensors
        return gradient.to(ctx.dtype) * d_total, None, None, None, None


def _shaped(products: Tensor, head: Head | None) -> Tensor:
    return products if head is None else head.shape(products)


def _parts(products: Tensor) -> Iterator[slice]:
    """Yield the rows of [rows, V] that softmax goes through at a time."""
    elements = PIECE_CPU if products.device.type == "cpu" else PIECE_GPU
    step = max(1, elements // products.shape[1])
    for first in range(0, len(products), step):
        yield slice(first, min(first + step, len(products)))
