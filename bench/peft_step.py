"""One training step of a plain PEFT LoRA model, as a user of PEFT has it, with or without
``koff.apply_kernels``."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from .stepper import Stepper


class PeftLoraStep(Stepper):
    """A model with one LoRA adapter on all linear layers, and its optimiser.

    Args:
        model: a causal LM of transformers; changed in place.
        rank: LoRA rank, alpha is twice that.
        kernels: whether koffkernels runs its MLPs and LoRA layers.
    """

    def __init__(self, model: PreTrainedModel, rank: int, kernels: bool):
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        self.model = get_peft_model(model, config).train()
        if kernels:
            import koff

            koff.apply_kernels(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        # Fused, as transformers' Trainer does by default.
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), fused=True)

    def loss(self, ids: Tensor) -> Tensor:
        """Cross-entropy of [B, T] tokens."""
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss
