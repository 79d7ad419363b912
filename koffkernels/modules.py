"""Drop-in modules over the functions, for models that do not come from transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import refuse
from .gated_mlp import gated_mlp
from .lora_linear import lora_linear
from .prefix_attention import prefix_attention
from .types import GatedMLPLoRA, LoRA, Prefix, RowBounds


class _LoRAParameters(nn.Module):
    """a ~ U(+-1/sqrt(K)) and b = 0 of n memories, fp32, with the scaling alpha / r."""

    def __init__(
        self, n: int, r: int, alpha: float, width_in: int, width_out: int, device: torch.device
    ):
        super().__init__()
        if n < 1 or r < 1:
            rule, got = "hold at least one memory and rank", f"memories={n}, r={r}"
            refuse("LoRA", "the updates", rule, got, "use the layer without koffkernels for none")
        self.a = nn.Parameter(
            torch.empty(n, r, width_in, device=device).uniform_(-1, 1) / width_in**0.5
        )
        self.b = nn.Parameter(torch.zeros(n, width_out, r, device=device))
        self.register_buffer("scaling", torch.full((n,), alpha / r, device=device))

    def lora(self) -> LoRA:
        return LoRA(self.a, self.b, self.scaling)


class LoRALinear(nn.Module):
    """A frozen ``nn.Linear`` with the LoRA updates of n memories.

    Args:
        linear: the layer to wrap; it is frozen.
        memories: number of memories n.
        r: rank.
        alpha: scaling numerator; the delta is scaled by alpha / r.
    """

    def __init__(self, linear: nn.Linear, memories: int = 1, r: int = 16, alpha: float = 32):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        device = linear.weight.device
        self.memories = _LoRAParameters(
            memories, r, alpha, linear.in_features, linear.out_features, device
        )

    def forward(self, x: Tensor, memory_ids: Tensor | None = None) -> Tensor:
        """x [B, T, K] -> [B, T, N]; memory_ids int64 [B], -1 for none."""
        linear = self.linear
        return lora_linear(
            x, linear.weight, linear.bias, lora=self.memories.lora(), memory_ids=memory_ids
        )


class GatedMLP(nn.Module):
    """A frozen gated MLP (gate, up, down without bias) with one gate per neuron and the LoRA of n
    memories.

    Args:
        gate, up, down: the bias-free linear layers to wrap; they are frozen.
        memories: number of memories n; 0 for none.
        r: rank.
        alpha: scaling numerator.
        activation: "silu", "gelu" or "gelu_tanh".
    """

    def __init__(
        self,
        gate: nn.Linear,
        up: nn.Linear,
        down: nn.Linear,
        *,
        memories: int = 1,
        r: int = 16,
        alpha: float = 32,
        activation: str = "silu",
    ):
        super().__init__()
        for name, layer in (("gate", gate), ("up", up), ("down", down)):
            if layer.bias is not None:
                refuse("GatedMLP", name, "have no bias", "one", "only bias-free layers fit here")
        self.layers = nn.ModuleDict({"gate": gate, "up": up, "down": down}).requires_grad_(False)
        device = gate.weight.device
        self.lora = nn.ModuleDict(
            {
                name: _LoRAParameters(
                    memories, r, alpha, layer.in_features, layer.out_features, device
                )
                for name, layer in self.layers.items()
                if memories
            }
        )
        self.activation = activation

    def forward(
        self, x: Tensor, gates: Tensor | None = None, memory_ids: Tensor | None = None
    ) -> Tensor:
        """x [B, T, H] -> [B, T, H]; gates fp32 [I] or None; memory_ids int64 [B], -1 for none."""
        weights = [self.layers[name].weight for name in ("gate", "up", "down")]
        lora = (
            GatedMLPLoRA(*(self.lora[name].lora() for name in ("gate", "up", "down")))
            if len(self.lora)
            else None
        )
        return gated_mlp(
            x, *weights, gates=gates, lora=lora, memory_ids=memory_ids, activation=self.activation
        )


class PrefixAttention(nn.Module):
    """Causal attention over the learned keys and values of n memories.

    Args:
        memories: number of memories n.
        kv_heads: key/value heads Hkv.
        length: prefix tokens P.
        head_dim: head width D.
        std: standard deviation of the random initial keys and values.
    """

    def __init__(self, memories: int, kv_heads: int, length: int, head_dim: int, std: float = 0.02):
        super().__init__()
        shape = (memories, kv_heads, length, head_dim)
        self.k = nn.Parameter(torch.randn(shape) * std)
        self.v = nn.Parameter(torch.randn(shape) * std)
        self.register_buffer("lengths", torch.full((memories,), length, dtype=torch.int64))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory_ids: Tensor | None = None,
        bounds: RowBounds | None = None,
    ) -> Tensor:
        """q [B, Hq, T, D], k, v [B, Hkv, S, D] -> [B, Hq, T, D]."""
        prefix = Prefix(self.k, self.v, self.lengths)
        return prefix_attention(q, k, v, prefix, memory_ids=memory_ids, bounds=bounds)
