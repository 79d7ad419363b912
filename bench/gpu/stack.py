"""A stack of decoder layers with random weights, one decode step at a fixed context.

Norms, rotary embedding, attention over a static cache and residuals are plain torch and the same
for every path; embedding and head are left out. So paths differ in their linear layers alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layers
from .context import Bench
from .layers import Layer, Path


class Stack:
    """Layers, their norms, and a cache of ``context`` tokens of which a step writes the last.

    Args:
        bench: where and at what shape.
        memories: memories of each layer's LoRA.
        rows: the largest batch.
        context: tokens that a step attends to, its own included.
    """

    def __init__(self, bench: Bench, memories: int, rows: int, context: int):
        shape = bench.shape
        self.shape, self.context = shape, context
        self.layers = [
            layers.random_layer(bench, shape.intermediate, memories) for _ in range(shape.layers)
        ]
        self.norm = torch.rand(shape.hidden, device=bench.device).to(bench.dtype) + 0.5
        size = (rows, shape.kv_heads, context, shape.head_dim)
        self.caches = [(bench.normal(*size), bench.normal(*size)) for _ in range(shape.layers)]
        self.x = bench.normal(rows, 1, shape.hidden)
        angles = torch.rand(shape.head_dim // 2, device=bench.device) * 6.28
        self.cos = torch.cat([angles.cos()] * 2).to(bench.dtype)
        self.sin = torch.cat([angles.sin()] * 2).to(bench.dtype)

    def prune(self, width: int) -> None:
        """Drop the neurons from ``width`` on, in every layer."""
        for index, layer in enumerate(self.layers):
            self.layers[index] = layers.prune(layer, width)

    def step(self, path: Path, rows: int, chosen: list[Layer]) -> Tensor:
        """One token for each of the first ``rows`` rows through ``chosen``: [rows, 1, H]."""
        h = self.x[:rows]
        for layer, (keys, values) in zip(chosen, self.caches, strict=True):
            x = self._normalise(h)
            q, k, v = (self._heads(part) for part in path.qkv(layer, x))
            cache = keys[:rows], values[:rows]
            cache[0][:, :, -1:] = self._rotate(k)
            cache[1][:, :, -1:] = v
            o = F.scaled_dot_product_attention(self._rotate(q), *cache, enable_gqa=True)
            h = h + path.linear(layer, "o", o.transpose(1, 2).reshape(rows, 1, -1))
            h = h + path.mlp(layer, self._normalise(h))
        return self._normalise(h)

    def _normalise(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.norm, 1e-5)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)

    def _rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin

    def bytes(self, rows: int, used: int) -> int:
        """Bytes that a step must read: weights, LoRA of ``used`` memories, the caches."""
        total = sum(layers.weight_bytes(layer) for layer in self.layers)
        total += sum(layers.lora_bytes(layer, used) for layer in self.layers)
        return total + sum(k[:rows].nbytes + v[:rows].nbytes for k, v in self.caches)
