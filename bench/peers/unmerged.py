"""Linear layers with LoRA as PEFT runs them unmerged: base product, then two small products and
two elementwise passes per adapter; rows of several adapters are gathered and scattered back.

PEFT itself indexes with Python lists in a mixed batch, which a CUDA graph cannot capture; here the
indices are made once. That, and adapters in the base's dtype, are in the peer's favour.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

Adapter = tuple[Tensor, Tensor, float]  # a [r, K], b [N, r], scaling


def adapters_of(lora: tuple[Tensor, Tensor, Tensor], like: Tensor) -> list[Adapter]:
    """The memories of a stacked LoRA (a, b, scaling) in the dtype of ``like``."""
    a, b, scaling = lora
    factors = scaling.tolist()
    return [(a[m].to(like.dtype), b[m].to(like.dtype), factors[m]) for m in range(len(factors))]


class Unmerged:
    """Plain torch with unmerged adapters; stands beside ``bench.gpu.layers.Plain`` and ``Koff``.

    Args:
        adapters: layer's identity -> linear layer -> its adapters, by ``adapters_of``.
        rows: rows [B_m] of each adapter; None: the first adapter on every row.
    """

    def __init__(self, adapters: dict[int, dict[str, list[Adapter]]], rows: list[Tensor] | None):
        self.adapters, self.rows = adapters, rows

    def linear(self, layer, name: str, x: Tensor) -> Tensor:
        """y = x W^T + scaling (x a^T) b^T."""
        y = F.linear(x, layer.weights[name])
        adapters = self.adapters[id(layer)][name]
        if self.rows is None:
            a, b, scaling = adapters[0]
            return y + F.linear(F.linear(x, a), b) * scaling
        for (a, b, scaling), rows in zip(adapters, self.rows, strict=True):
            y.index_add_(0, rows, F.linear(F.linear(x.index_select(0, rows), a), b) * scaling)
        return y

    def qkv(self, layer, x: Tensor) -> list[Tensor]:
        """Each on its own."""
        return [self.linear(layer, name, x) for name in ("q", "k", "v")]

    def mlp(self, layer, x: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x)), each with its adapters."""
        g, u = self.linear(layer, "gate", x), self.linear(layer, "up", x)
        return self.linear(layer, "down", F.silu(g) * u)
