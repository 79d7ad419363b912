"""Models whose layers keep different numbers of neurons."""

import torch
from support.models import attached

import koff


def spread(model):
    """Gates that differ enough for layers of different widths."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for index, p in enumerate(model.koff.gates.log_alpha):
            p.copy_(torch.randn(p.shape, generator=generator) + 0.3 * index)
    return model


def compacted(architecture="qwen3", **config):
    """A tiny model at 40 % sparsity, compacted."""
    model = spread(attached(architecture, target_sparsity=0.4, **config))
    koff.binarize(model, multiple_of=1)
    return koff.compact(model, inplace=True)
