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
