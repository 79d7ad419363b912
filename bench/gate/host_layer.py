"""What koff does in a decoder layer, for ``host``: its hooks at the decoder's boundary, then linear
layers, attention and MLP of the layer, and the bank's stacks of memories for them.

What transformers does between these is left out: norms, rotary embeddings, residuals and the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import koff
from koff.model import arch
from koff.model.attention import koff_attention

ROWS, WIDTH, HEAD_DIM, HEADS, KV_HEADS = 8, 64, 64, 4, 2
RANK, LEARNED, PAST = 16, 4, 256  # few learned tokens: to stack and turn many takes a CPU long


def _model(memories: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
    )
    what = koff.KoffConfig(
        memories=tuple(f"m{i}" for i in range(memories)),
        target_sparsity=0,
        lora=koff.LoRAConfig(r=RANK, target_modules="all-linear"),
        kv=koff.KVConfig(num_tokens=LEARNED, init="normal"),
    )
    return koff.attach(LlamaForCausalLM(config).to(torch.bfloat16), what)


class Layer:
    """A Llama model of one layer with memories.

    Args:
        memories: of the model; rows take them in turn.
        tokens: T of a row.
    """

    def __init__(self, memories: int, tokens: int):
        self.model, self.tokens = _model(memories), tokens
        self.memory = [f"m{row % memories}" for row in range(ROWS)]
        self.ids = torch.zeros(ROWS, tokens, dtype=torch.int64)
        self.x = torch.zeros(ROWS, tokens, WIDTH, dtype=torch.bfloat16)
        cache = (ROWS, KV_HEADS, PAST, HEAD_DIM)
        self.cache = [torch.zeros(cache, dtype=torch.bfloat16) for _ in range(2)]
        self.leaves = [self.x, *self.model.koff.parameters()]

    def _forward(self) -> Tensor:
        decoder = arch.decoder(self.model)
        args, kwargs = (), {"input_ids": self.ids, "memory": self.memory}
        for number, hook in decoder._forward_pre_hooks.items():
            if number in decoder._forward_pre_hooks_with_kwargs:
                args, kwargs = hook(decoder, args, kwargs)
            else:
                hook(decoder, args)
        (layer,) = arch.layers(self.model)
        running, attention = layer._koff.running, layer.self_attn
        running.context = kwargs["koff_context"]
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        q, k, v = (
            linear.forward(self.x).view(ROWS, self.tokens, -1, HEAD_DIM).transpose(1, 2)
            for linear in projections
        )
        if self.tokens == 1:
            k, v = self.cache
        o, _ = koff_attention(attention, q, k, v, None, scaling=HEAD_DIM**-0.5)
        y = layer.mlp.forward(attention.o_proj.forward(o.reshape(ROWS, self.tokens, -1)))
        running.context = None
        return y

    def decode(self) -> None:
        """One token of each row."""
        with torch.no_grad():
            self._forward()

    def train(self) -> None:
        """Forward and backward, from the gradients that a step begins with: none."""
        self.x.requires_grad_(True)
        for leaf in self.leaves:
            leaf.grad = None
        y = self._forward()
        y.backward(torch.ones_like(y))
