"""Layers for Hugging Face's ``kernels``: forwards that replace those of other people's modules.

``kernels.kernelize`` puts such a ``forward`` on an existing module, which keeps its parameters. So
a layer here has no constructor and no state; it names the attributes that it expects instead.
"""

from __future__ import annotations

from torch import Tensor, nn

from .gated_mlp import gated_mlp


class SiluGatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) as one operation, for modules like transformers' ``LlamaMLP``.

    The module has ``gate_proj``, ``up_proj`` and ``down_proj``, ``nn.Linear`` without bias. Its
    weights get no gradient: for training they must be frozen.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        return gated_mlp(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


class GeluTanhGatedMLP(nn.Module):
    """down(gelu(gate(x)) * up(x)) with the tanh form of gelu, for modules like transformers'
    ``GemmaMLP``; otherwise like ``SiluGatedMLP``."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        return gated_mlp(x, *weights, activation="gelu_tanh")
