"""How much each MLP neuron matters before anything is learned: where the gates start from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.losses import token_losses
from ..data.records import IGNORED


def neuron_saliency(
    model: PreTrainedModel,
    batches: Iterable[dict],
    over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> list[Tensor]:
    """Return the mean over batches of (d loss / d z)^2 of each neuron's gate z, at z = 1.

    That is the diagonal of the empirical Fisher information. At a minimum of the loss its half is
    the second-order Taylor estimate of what the loss rises by when z goes from 1 to 0.

    Args:
        model: an attached model whose gates are not fixed; unchanged.
        batches: rows as the trainer's ``collate`` makes them.
        over_ranks: adds a tensor up over the processes that share each batch; of one process, there
            is nothing to add.

    Returns:
        fp32 [I] of each layer.

    Source: Molchanov et al. 2019 (arXiv 1906.10771).
    """
    gates = model.koff.gates
    squares = [torch.zeros_like(p) for p in gates.log_alpha]
    count = 0
    for batch in batches:
        ids, labels = (batch[name].to(model.device) for name in ("input_ids", "labels"))
        with gates.held_open() as values:
            total, _ = model(
                input_ids=ids,
                memory=batch["memory"],
                use_cache=False,
                instead_of_logits=functools.partial(token_losses, labels=labels),
            )
            gradients = torch.autograd.grad(total, values)
        counted = over_ranks((labels[:, 1:] != IGNORED).sum())
        for sum_, gradient in zip(squares, gradients, strict=True):
            # Summed over processes before it is squared: together they see what one process with
            # as large a batch would.
            sum_ += (over_ranks(gradient.float()) / counted) ** 2
        count += 1
    return [sum_ / count for sum_ in squares]
