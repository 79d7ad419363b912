"""Causal language models whose layers have MLPs of different widths, registered with transformers'
Auto classes.

For every architecture of ``arch.py`` there is a config ("koff_llama", ...) with one more field,
``intermediate_sizes``, and a model that builds each layer's MLP from it. Everything else is
transformers' own code.
"""

from __future__ import annotations

import copy
import functools

import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from . import arch
from .errors import require


def _check_sizes(config) -> None:
    sizes, layers = config.intermediate_sizes, config.num_hidden_layers
    good = isinstance(sizes, list) and len(sizes) == layers
    good = good and all(isinstance(s, int) and 1 <= s <= config.intermediate_size for s in sizes)
    require(
        good,
        f"{config.model_type} config",
        "intermediate_sizes",
        f"hold {layers} widths in 1..{config.intermediate_size}",
        sizes,
        "load the config that koff saved",
    )


class NarrowMixin:
    """Gives each layer an MLP of its own width."""

    def __init__(self, config):
        _check_sizes(config)
        super().__init__(config)
        architecture = arch.architecture(config.model_type, "koff.modeling")
        for layer, width in zip(arch.layers(self), config.intermediate_sizes, strict=True):
            own = copy.copy(config)
            own.intermediate_size = width
            wide: nn.Module = getattr(layer, architecture.mlp)
            setattr(layer, architecture.mlp, type(wide)(own))


@functools.cache
def narrow_classes(model_type: str) -> tuple[type, type]:
    """(config class, model class) of an architecture's narrow form.

    Args:
        model_type: "llama", "qwen2", ...
    """
    entry = arch.ARCHITECTURES[model_type]
    config_base = getattr(transformers, entry.config)
    model_base = getattr(transformers, entry.causal_lm)
    body = {
        "model_type": arch.NARROW_PREFIX + model_type,
        "intermediate_sizes": None,
        "__annotations__": {"intermediate_sizes": "list | None"},
        "__module__": __name__,
        "__doc__": f"{entry.config} with one MLP width per layer.",
    }
    config = type(f"Koff{entry.config}", (config_base,), body)
    doc = f"{entry.causal_lm} with narrow MLPs."
    body = {"config_class": config, "__module__": __name__, "__doc__": doc}
    model = type(f"Koff{entry.causal_lm}", (NarrowMixin, model_base), body)
    return config, model


def register() -> None:
    """Register the narrow classes of every architecture with AutoConfig and
    AutoModelForCausalLM."""
    for model_type in arch.ARCHITECTURES:
        config, model = narrow_classes(model_type)
        globals()[config.__name__], globals()[model.__name__] = config, model
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


register()
