"""koffkernels: masked gated MLPs, LoRA deltas and attention over a learned prefix, usable on their
own."""

from . import layers
from .dispatch import backends, force_backend, preload_defaults, recompute_hidden
from .gated_mlp import gated_mlp
from .group_rows import group_rows
from .hard_concrete import hard_concrete, open_probability
from .lora_linear import add_lora, lora_linear, lora_linears
from .modules import GatedMLP, LoRALinear, PrefixAttention
from .prefix_attention import prefix_attention
from .routes import force_route
from .types import GatedMLPLoRA, LoRA, Prefix, RowBounds, RowGroups
from .warmup import LayerShape, warmup

__all__ = [
    "GatedMLP",
    "GatedMLPLoRA",
    "LayerShape",
    "LoRA",
    "LoRALinear",
    "Prefix",
    "PrefixAttention",
    "RowBounds",
    "RowGroups",
    "add_lora",
    "backends",
    "force_backend",
    "force_route",
    "gated_mlp",
    "group_rows",
    "hard_concrete",
    "layers",
    "lora_linear",
    "lora_linears",
    "open_probability",
    "prefix_attention",
    "recompute_hidden",
    "warmup",
]

preload_defaults()
del preload_defaults
