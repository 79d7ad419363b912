"""The arguments of a training run: transformers' and koff's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from .settings import Settings


@dataclass
class KoffTrainingArguments(Settings, TrainingArguments):
    """transformers' ``TrainingArguments`` with koff's ``Settings``.

    ``learning_rate`` is not used: gates, LoRA, KV and the multiplier have rates of their own. The
    learning-rate scheduler acts on LoRA and KV; gates and multiplier keep theirs. ``max_grad_norm``
    clips each group by itself.

    koff's own settings, which ``koff.training.settings.Settings`` describes at more length:

    Args:
        gate_learning_rate: of the gates; 0.1.
        lora_learning_rate: of the LoRA matrices; 1e-3.
        kv_learning_rate: of the learned caches; 1e-2.
        multiplier_learning_rate: of the multiplier that pulls the gates to the target; 0.01.
        sparsity_penalty: weight of the squared distance from the target; 10.
        sparsity_warmup_ratio: share of the steps over which the target rises from 0, where gates
            start all alike; 0.2.
        saliency_batches: batches that say how much a neuron matters, which its gate starts by; 16.
            0: gates start all alike, open.
        general_every: every n-th step runs on the general mixture; 4. 0: never.
        batching: "mixed", the default (each row its own memory), or "single" (each batch one
            domain).
        no_memory_rows: share of the rows without a memory, until the mask is fixed; 0.3.
        distractor_rows: share of the domains' rows with the memory of another domain; 0.
        mask: "learned", the default; or fixed before the first step, "random", by "magnitude" or by
            "saliency".
        fix_mask_at: share of the steps after which a learned mask is fixed; 0.5. None: left to
            ``koff.binarize``.
        width_multiple_of: of what each layer's kept neurons are a multiple; 64. 1: the target is
            met exactly.
        block_size: tokens of a row; 512.
        distillation_weight: w of the loss (1 - w) cross-entropy + w divergence from the unpruned
            model; None is 0.7, but 0 for a compacted model. 0: no second forward.
    """

    # transformers' 0.999 averages over a thousand gradients, more than a small run has steps; this,
    # usual for LLMs, over twenty.
    adam_beta2: float = 0.95
    # transformers reports to every service that it finds installed.
    report_to: None | str | list[str] = "none"

    @property
    def device(self) -> torch.device:
        """As transformers', but one CPU has no index: torch 2.11 cannot load an optimiser to the
        "cpu:0" that ranks without an accelerator get."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device
