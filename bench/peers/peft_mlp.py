"""A gated MLP with PEFT's LoRA on its three linear layers: transformers' MLP, or Liger's.

The adapters are in the base's dtype: PEFT's default, fp32 adapters, runs their products in fp32
unless autocast is on, and would be slower.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

NAMES = ("gate_proj", "up_proj", "down_proj")


def liger_mlp() -> type[nn.Module] | None:
    """Liger's SwiGLU MLP, None where liger-kernel is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    return importlib.import_module("liger_kernel.transformers.swiglu").LigerSwiGLUMLP


@torch.no_grad()
def peft_mlp(
    weights: tuple[Tensor, Tensor, Tensor], rank: int, kind: type[nn.Module] = LlamaMLP
) -> nn.Module:
    """An MLP that shares ``weights`` and has random adapters.

    Args:
        weights: gate [I, H], up [I, H], down [H, I], frozen.
        rank: LoRA rank; alpha is twice that.
        kind: ``LlamaMLP``, or Liger's class with the same constructor and names.
    """
    width, hidden = weights[0].shape
    config = LlamaConfig(hidden_size=hidden, intermediate_size=width, mlp_bias=False)
    with torch.device("meta"):
        mlp = kind(config)
    for name, weight in zip(NAMES, weights, strict=True):
        getattr(mlp, name).weight = nn.Parameter(weight, requires_grad=False)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(NAMES))
    mlp = inject_adapter_in_model(lora, mlp)
    for name, parameter in mlp.named_parameters():
        if "lora_B" in name:  # zero at first: real data moves it
            parameter.normal_(std=0.1 * rank**-0.5)
    return mlp.train()
