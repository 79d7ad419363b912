"""Models with one MLP width per layer (``config.intermediate_sizes``); everything else is
transformers' own code.

This file is saved beside such a model, so that it also loads where koff is not installed:
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. With koff installed,
``import koff`` registers these classes and this copy is not run. So it imports transformers alone.
"""

from __future__ import annotations

import copy

from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)


class NarrowMixin:
    """Gives each layer an MLP of its own width."""

    def __init__(self, config):
        sizes = config.intermediate_sizes
        limit = config.intermediate_size
        if (
            not isinstance(sizes, list)
            or len(sizes) != config.num_hidden_layers
            or not all(isinstance(s, int) and 1 <= s <= limit for s in sizes)
        ):
            raise ValueError(
                f"{config.model_type} config: intermediate_sizes must hold "
                f"{config.num_hidden_layers} widths in 1..{limit}, got {sizes}; load the config "
                "that was saved with the model"
            )
        super().__init__(config)  # with MLPs as wide as the dense model's, which go again
        for layer, width in zip(self.model.layers, sizes, strict=True):
            own = copy.copy(config)
            own.intermediate_size = width
            layer.mlp = self.make_mlp(type(layer.mlp), own)
        self.init_weights()  # of the new MLPs; the rest is marked as done

    @staticmethod
    def make_mlp(cls, config):
        """Return an MLP as wide as a config says."""
        return cls(config)


class KoffLlamaConfig(LlamaConfig):
    """LlamaConfig with one MLP width per layer."""

    model_type = "koff_llama"
    intermediate_sizes: list | None = None


class KoffLlamaForCausalLM(NarrowMixin, LlamaForCausalLM):
    """LlamaForCausalLM with narrow MLPs."""

    config_class = KoffLlamaConfig


class KoffQwen2Config(Qwen2Config):
    """Qwen2Config with one MLP width per layer."""

    model_type = "koff_qwen2"
    intermediate_sizes: list | None = None


class KoffQwen2ForCausalLM(NarrowMixin, Qwen2ForCausalLM):
    """Qwen2ForCausalLM with narrow MLPs."""

    config_class = KoffQwen2Config


class KoffQwen3Config(Qwen3Config):
    """Qwen3Config with one MLP width per layer."""

    model_type = "koff_qwen3"
    intermediate_sizes: list | None = None


class KoffQwen3ForCausalLM(NarrowMixin, Qwen3ForCausalLM):
    """Qwen3ForCausalLM with narrow MLPs."""

    config_class = KoffQwen3Config


class KoffMistralConfig(MistralConfig):
    """MistralConfig with one MLP width per layer."""

    model_type = "koff_mistral"
    intermediate_sizes: list | None = None


class KoffMistralForCausalLM(NarrowMixin, MistralForCausalLM):
    """MistralForCausalLM with narrow MLPs."""

    config_class = KoffMistralConfig


class KoffOlmo2Config(Olmo2Config):
    """Olmo2Config with one MLP width per layer."""

    model_type = "koff_olmo2"
    intermediate_sizes: list | None = None


class KoffOlmo2ForCausalLM(NarrowMixin, Olmo2ForCausalLM):
    """Olmo2ForCausalLM with narrow MLPs."""

    config_class = KoffOlmo2Config


class KoffGraniteConfig(GraniteConfig):
    """GraniteConfig with one MLP width per layer."""

    model_type = "koff_granite"
    intermediate_sizes: list | None = None


class KoffGraniteForCausalLM(NarrowMixin, GraniteForCausalLM):
    """GraniteForCausalLM with narrow MLPs."""

    config_class = KoffGraniteConfig


class KoffSmolLM3Config(SmolLM3Config):
    """SmolLM3Config with one MLP width per layer."""

    model_type = "koff_smollm3"
    intermediate_sizes: list | None = None


class KoffSmolLM3ForCausalLM(NarrowMixin, SmolLM3ForCausalLM):
    """SmolLM3ForCausalLM with narrow MLPs."""

    config_class = KoffSmolLM3Config


class KoffPhi3Config(Phi3Config):
    """Phi3Config with one MLP width per layer."""

    model_type = "koff_phi3"
    intermediate_sizes: list | None = None


class KoffPhi3ForCausalLM(NarrowMixin, Phi3ForCausalLM):
    """Phi3ForCausalLM with narrow MLPs."""

    config_class = KoffPhi3Config


class KoffQwen3_5TextConfig(Qwen3_5TextConfig):
    """Qwen3_5TextConfig with one MLP width per layer."""

    model_type = "koff_qwen3_5_text"
    intermediate_sizes: list | None = None


class KoffQwen3_5ForCausalLM(NarrowMixin, Qwen3_5ForCausalLM):
    """Qwen3_5ForCausalLM with narrow MLPs."""

    config_class = KoffQwen3_5TextConfig

    @staticmethod
    def make_mlp(cls, config):
        """Return an MLP as wide as a config says."""
        return cls(config, config.intermediate_size)
