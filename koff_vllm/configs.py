"""Configs of backbones whose layers differ in width: ``intermediate_sizes`` has one width a layer.

Classes of a module, since vLLM pickles configs from process to process. koff has the same ones in
``modeling_koff.py``; where that is imported, its own come first.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


class KoffLlamaConfig(LlamaConfig):
    """LlamaConfig with one MLP width per layer."""

    model_type = "koff_llama"
    intermediate_sizes: list | None = None


class KoffQwen2Config(Qwen2Config):
    """Qwen2Config with one MLP width per layer."""

    model_type = "koff_qwen2"
    intermediate_sizes: list | None = None


class KoffQwen3Config(Qwen3Config):
    """Qwen3Config with one MLP width per layer."""

    model_type = "koff_qwen3"
    intermediate_sizes: list | None = None


class KoffMistralConfig(MistralConfig):
    """MistralConfig with one MLP width per layer."""

    model_type = "koff_mistral"
    intermediate_sizes: list | None = None


class KoffGraniteConfig(GraniteConfig):
    """GraniteConfig with one MLP width per layer."""

    model_type = "koff_granite"
    intermediate_sizes: list | None = None


class KoffPhi3Config(Phi3Config):
    """Phi3Config with one MLP width per layer."""

    model_type = "koff_phi3"
    intermediate_sizes: list | None = None


CONFIGS = (
    KoffLlamaConfig,
    KoffQwen2Config,
    KoffQwen3Config,
    KoffMistralConfig,
    KoffGraniteConfig,
    KoffPhi3Config,
)


def register() -> None:
    """Have transformers, and so vLLM, know the model types."""
    for config in CONFIGS:
        if config.model_type not in CONFIG_MAPPING:
            AutoConfig.register(config.model_type, config)
