"""Models with adapters of PEFT that do something."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn


def with_adapters(model: nn.Module, settings: dict[str, LoraConfig]) -> PeftModel:
    """Put a LoRA of each name into a model, in place, with random matrices; the first is active."""
    (name, first), *more = settings.items()
    out = get_peft_model(model, first, adapter_name=name)
    for name, other in more:
        out.add_adapter(name, other)
    generator = torch.Generator().manual_seed(1)
    for key, p in out.named_parameters():
        if "lora_" in key:
            p.data.normal_(std=0.2, generator=generator)
    return out.eval()
