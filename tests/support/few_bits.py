"""Tiny models in few bits, from checkpoints of their own, and the same models dequantised."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from support.models import tiny
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import koff
from koff.model import arch
from koff.model.few_bits import dense_weight

# As a recipe has them, and bitsandbytes' int8, which quantises what goes into a layer, too.
FORMATS = ("nf4", "int8", "llm_int8")


def quantization(name):
    """transformers' config of a format."""
    if name == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    if name == "llm_int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@functools.cache
def checkpoint(architecture="llama", dtype=torch.float32):
    """A folder with a tiny model, which stays until the tests end."""
    folder = tempfile.TemporaryDirectory()
    _folders.append(folder)
    tiny(architecture).to(dtype).save_pretrained(folder.name)
    return Path(folder.name)


_folders: list[tempfile.TemporaryDirectory] = []


def quantised(name, architecture="llama", dtype=torch.float32, folder=None):
    """A tiny model in few bits, in training mode (it has no dropout): there bitsandbytes computes
    all of its layers by their dequantised weights."""
    folder = folder or checkpoint(architecture, dtype)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization(name), dtype=dtype, device_map={"": "cpu"}
    )
    return model.train()


def dequantised(model, architecture="llama"):
    """A plain model with the dequantised weights of one in few bits."""
    plain = tiny(architecture).to(model.dtype).train()
    with torch.no_grad():
        linears = dict(arch.sites(model))
        for site, linear in arch.sites(plain):
            linear.weight.copy_(dense_weight(linears[site], linear.weight.dtype))
            if linear.bias is not None:
                linear.bias.copy_(linears[site].bias)
    return plain


def with_koff(model, **config):
    """koff on it, memories perturbed."""
    from support.models import perturb

    config = {
        "memories": ("en", "fr"),
        "lora": koff.LoRAConfig(r=4, target_modules="all-linear"),
        "kv": koff.KVConfig(num_tokens=5, init="tokens"),
        "target_sparsity": 0.3,
        **config,
    }
    mode = model.training
    return perturb(koff.attach(model, koff.KoffConfig(**config)), 0.05).train(mode)
