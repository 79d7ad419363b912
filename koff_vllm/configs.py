"""Configs of backbones whose layers differ in width: ``intermediate_sizes`` has one width a layer.

Classes of a module, since vLLM pickles configs from process to process. koff has the same ones in
``modeling_koff.py``; where that is imported, its own come first.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    SmolLM3Config,
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


class KoffOlmo2Config(Olmo2Config):
    """Olmo2Config with one MLP width per layer."""

    model_type = "koff_olmo2"
    intermediate_sizes: list | None = None


class KoffSmolLM3Config(SmolLM3Config):
    """SmolLM3Config with one MLP width per layer."""

    model_type = "koff_smollm3"
    intermediate_sizes: list | None = None


class KoffQwen3_5TextConfig(Qwen3_5TextConfig):
    """Qwen3_5TextConfig with one MLP width per layer."""

    model_type = "koff_qwen3_5_text"
    intermediate_sizes: list | None = None


CONFIGS = (
    KoffLlamaConfig,
    KoffQwen2Config,
    KoffQwen3Config,
    KoffMistralConfig,
    KoffGraniteConfig,
    KoffPhi3Config,
    KoffOlmo2Config,
    KoffSmolLM3Config,
    KoffQwen3_5TextConfig,
)


def register() -> None:
    """Have transformers, and so vLLM, know the model types."""
    for config in CONFIGS:
        if config.model_type not in CONFIG_MAPPING:
            AutoConfig.register(config.model_type, config)


def widths_of(config: Any) -> list[int]:
    """Return the MLP width of each layer.

    Args:
        config: of a backbone whose layers differ in width.

    Raises:
        ValueError: another number of widths than layers, or one that tensor parallelism cannot
            split.
    """
    from vllm.distributed import get_tensor_model_parallel_world_size

    sizes, ranks = config.intermediate_sizes, get_tensor_model_parallel_world_size()
    if any(size % ranks for size in sizes) or len(sizes) != config.num_hidden_layers:
        raise ValueError(
            f"koff_vllm: intermediate_sizes must hold {config.num_hidden_layers} widths that "
            f"{ranks} tensor-parallel ranks can share, got {sizes}; take fewer ranks, or prune "
            f"with multiple_of={64 * ranks}"
        )
    return sizes
