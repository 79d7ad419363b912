"""One training step of koff: gates, and three memories in one mixed batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import koff

from .stepper import Stepper

MEMORIES = ("first", "second", "third")


class KoffStep(Stepper):
    """A model with gates and memories, and its optimiser.

    Args:
        model: a supported causal LM; changed in place.
        rank: LoRA rank, alpha is twice that.
        prefix: tokens of each memory's learned cache.
        target: share of the MLP neurons to remove.
    """

    def __init__(self, model: PreTrainedModel, rank: int, prefix: int, target: float):
        config = koff.KoffConfig(
            memories=MEMORIES,
            target_sparsity=target,
            lora=koff.LoRAConfig(r=rank, alpha=2 * rank, target_modules="all-linear"),
            kv=koff.KVConfig(num_tokens=prefix, init="normal"),
        )
        self.model = koff.attach(model, config).train()
        self.target = target
        state = self.model.koff
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(state.gates.log_alpha), "lr": 0.1, "weight_decay": 0.0},
                {"params": self._memory(".kv."), "lr": 2e-2, "weight_decay": 0.0},
                {"params": self._memory(".lora."), "lr": 1e-3},
            ],
            betas=(0.9, 0.95),
            fused=True,  # as transformers' Trainer does by default
        )

    def _memory(self, part: str) -> list[nn.Parameter]:
        return [p for name, p in self.model.koff.memories.named_parameters() if part in name]

    def loss(self, ids: Tensor) -> Tensor:
        """Cross-entropy of [B, T] tokens, rows cycling over the memories, plus the penalty."""
        memory = [MEMORIES[row % len(MEMORIES)] for row in range(ids.shape[0])]
        out = self.model(input_ids=ids, labels=ids, use_cache=False, memory=memory)
        sparsity = self.model.koff.gates.expected_sparsity()
        return out.loss + 10.0 * (sparsity - self.target) ** 2
