"""What the neurons of a model can be ranked by without any training: for masks to compare with."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..model import arch


@torch.no_grad()
def neuron_magnitude(model: PreTrainedModel) -> list[Tensor]:
    """Return the Euclidean norm of each MLP neuron's weights: of its rows of gate_proj and up_proj
    and its column of down_proj together.

    Args:
        model: of a supported architecture.

    Returns:
        fp32 [I] of each layer.

    Source: Li et al. 2017 (arXiv 1608.08710), whose norm is of a filter's weights.
    """
    found = []
    for mlp in arch.mlps(model):
        gate, up, down = (w.float() for w in arch.mlp_weights(mlp))
        found.append((gate.square().sum(1) + up.square().sum(1) + down.square().sum(0)).sqrt())
    return found


def random_scores(widths: list[int], seed: int) -> list[Tensor]:
    """Return uniform random numbers, fp32 [I] of each layer.

    Args:
        widths: number of MLP neurons of each layer.
        seed: the same numbers on every machine and process.
    """
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(width, generator=generator) for width in widths]
