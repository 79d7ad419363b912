"""One training step as a user would write it today with transformers and PEFT.

LoRA by ``peft.get_peft_model``; hard-concrete gates by forward pre-hooks on ``down_proj``; a
learned cache as parameters that every row of the batch gets through a ``DynamicCache``, whose
update concatenates it in front of the sequence's own keys; sdpa attention. One memory.
"""

from __future__ import annotations

import math

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ..stepper import Stepper

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BETA, LOW, HIGH = 2.0 / 3.0, -0.1, 1.1


class PeftStep(Stepper):
    """A model with LoRA, gates and a learned cache, and its optimiser.

    Args:
        model: a Llama-like causal LM of transformers; changed in place.
        rank: LoRA rank, alpha is twice that.
        prefix: tokens of the learned cache.
        target: share of the MLP neurons to remove.
    """

    def __init__(self, model: PreTrainedModel, rank: int, prefix: int, target: float):
        config = model.config
        self.layers = model.model.layers
        self.model = get_peft_model(
            model,
            LoraConfig(
                r=rank,
                lora_alpha=2 * rank,
                lora_dropout=0.0,
                target_modules=LINEARS,
                task_type="CAUSAL_LM",
            ),
        )
        self.target, self.prefix = target, prefix
        self.log_alpha = nn.ParameterList(
            2.5 + 0.01 * torch.randn(config.intermediate_size) for _ in self.layers
        )
        shape = (config.num_key_value_heads, prefix, config.head_dim)
        self.keys = nn.ParameterList(0.02 * torch.randn(shape) for _ in self.layers)
        self.values = nn.ParameterList(0.02 * torch.randn(shape) for _ in self.layers)
        self.gates: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            layer.mlp.down_proj.register_forward_pre_hook(self._gate(index))
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.log_alpha), "lr": 0.1, "weight_decay": 0.0},
                {"params": [*self.keys, *self.values], "lr": 2e-2, "weight_decay": 0.0},
                {"params": [p for p in self.model.parameters() if p.requires_grad], "lr": 1e-3},
            ],
            betas=(0.9, 0.95),
            fused=True,  # as transformers' Trainer does by default
        )

    def _gate(self, index: int):
        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            return (args[0] * self.gates[index],)

        return hook

    def _sample(self, log_alpha: Tensor) -> Tensor:
        u = torch.empty_like(log_alpha).uniform_(1e-6, 1.0 - 1e-6)
        s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / BETA)
        return (s * (HIGH - LOW) + LOW).clamp(0.0, 1.0)

    def _penalty(self) -> Tensor:
        shift = BETA * math.log(-LOW / HIGH)
        kept = torch.sigmoid(torch.cat(list(self.log_alpha)) - shift).mean()
        return 10.0 * (1.0 - kept - self.target) ** 2

    def loss(self, ids: Tensor) -> Tensor:
        """Cross-entropy of [B, T] tokens plus the sparsity penalty."""
        rows, tokens = ids.shape
        self.gates = [self._sample(log_alpha) for log_alpha in self.log_alpha]
        cache = DynamicCache()
        for index, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1), index)
        mask = torch.ones(rows, self.prefix + tokens, dtype=torch.long)
        out = self.model(
            input_ids=ids, attention_mask=mask, labels=ids, past_key_values=cache, use_cache=True
        )
        return out.loss + self._penalty()
