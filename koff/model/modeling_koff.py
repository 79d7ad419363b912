"""Models with one MLP width per layer (``config.intermediate_sizes``); everything else is
transformers' own code.

This file is saved beside such a model, so that it also loads where koff is not installed:
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. With koff installed,
``import koff`` registers these classes and this copy is not run. So it imports transformers alone.

Each family has a causal language model and its base model, without the head: engines such as vLLM
build the latter (``AutoModel``) and put their own layers into it.
"""

from __future__ import annotations

import copy

from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    GraniteModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo2Model,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3Model,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3_5TextModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    SmolLM3Model,
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
        for layer, width in zip(self.base_model.layers, sizes, strict=True):
            own = copy.copy(config)
            own.intermediate_size = width
            layer.mlp = self.make_mlp(type(layer.mlp), own)
        self.init_weights()  # of the new MLPs; the rest is marked as done

    @staticmethod
    def make_mlp(cls, config):
        """Return an MLP as wide as a config says."""
        return cls(config)

    def save_pretrained(self, *args, **kwargs):
        """Save as transformers does, which would name the class of this model alone."""
        base = type(self.config).__name__.replace("Config", "Model")
        known = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = known | {"AutoModel": f"modeling_koff.{base}"}
        return super().save_pretrained(*args, **kwargs)


class KoffLlamaConfig(LlamaConfig):
    """LlamaConfig with one MLP width per layer."""

    model_type = "koff_llama"
    intermediate_sizes: list | None = None


class KoffLlamaModel(NarrowMixin, LlamaModel):
    """LlamaModel with narrow MLPs."""

    config_class = KoffLlamaConfig


class KoffLlamaForCausalLM(NarrowMixin, LlamaForCausalLM):
    """LlamaForCausalLM with narrow MLPs."""

    config_class = KoffLlamaConfig


class KoffQwen2Config(Qwen2Config):
    """Qwen2Config with one MLP width per layer."""

    model_type = "koff_qwen2"
    intermediate_sizes: list | None = None


class KoffQwen2Model(NarrowMixin, Qwen2Model):
    """Qwen2Model with narrow MLPs."""

    config_class = KoffQwen2Config


class KoffQwen2ForCausalLM(NarrowMixin, Qwen2ForCausalLM):
    """Qwen2ForCausalLM with narrow MLPs."""

    config_class = KoffQwen2Config


class KoffQwen3Config(Qwen3Config):
    """Qwen3Config with one MLP width per layer."""

    model_type = "koff_qwen3"
    intermediate_sizes: list | None = None


class KoffQwen3Model(NarrowMixin, Qwen3Model):
    """Qwen3Model with narrow MLPs."""

    config_class = KoffQwen3Config


class KoffQwen3ForCausalLM(NarrowMixin, Qwen3ForCausalLM):
    """Qwen3ForCausalLM with narrow MLPs."""

    config_class = KoffQwen3Config


class KoffMistralConfig(MistralConfig):
    """MistralConfig with one MLP width per layer."""

    model_type = "koff_mistral"
    intermediate_sizes: list | None = None


class KoffMistralModel(NarrowMixin, MistralModel):
    """MistralModel with narrow MLPs."""

    config_class = KoffMistralConfig


class KoffMistralForCausalLM(NarrowMixin, MistralForCausalLM):
    """MistralForCausalLM with narrow MLPs."""

    config_class = KoffMistralConfig


class KoffOlmo2Config(Olmo2Config):
    """Olmo2Config with one MLP width per layer."""

    model_type = "koff_olmo2"
    intermediate_sizes: list | None = None


class KoffOlmo2Model(NarrowMixin, Olmo2Model):
    """Olmo2Model with narrow MLPs."""

    config_class = KoffOlmo2Config


class KoffOlmo2ForCausalLM(NarrowMixin, Olmo2ForCausalLM):
    """Olmo2ForCausalLM with narrow MLPs."""

    config_class = KoffOlmo2Config


class KoffGraniteConfig(GraniteConfig):
    """GraniteConfig with one MLP width per layer."""

    model_type = "koff_granite"
    intermediate_sizes: list | None = None


class KoffGraniteModel(NarrowMixin, GraniteModel):
    """GraniteModel with narrow MLPs."""

    config_class = KoffGraniteConfig


class KoffGraniteForCausalLM(NarrowMixin, GraniteForCausalLM):
    """GraniteForCausalLM with narrow MLPs."""

    config_class = KoffGraniteConfig


class KoffSmolLM3Config(SmolLM3Config):
    """SmolLM3Config with one MLP width per layer."""

    model_type = "koff_smollm3"
    intermediate_sizes: list | None = None


class KoffSmolLM3Model(NarrowMixin, SmolLM3Model):
    """SmolLM3Model with narrow MLPs."""

    config_class = KoffSmolLM3Config


class KoffSmolLM3ForCausalLM(NarrowMixin, SmolLM3ForCausalLM):
    """SmolLM3ForCausalLM with narrow MLPs."""

    config_class = KoffSmolLM3Config


class KoffPhi3Config(Phi3Config):
    """Phi3Config with one MLP width per layer."""

    model_type = "koff_phi3"
    intermediate_sizes: list | None = None


class KoffPhi3Model(NarrowMixin, Phi3Model):
    """Phi3Model with narrow MLPs."""

    config_class = KoffPhi3Config


class KoffPhi3ForCausalLM(NarrowMixin, Phi3ForCausalLM):
    """Phi3ForCausalLM with narrow MLPs."""

    config_class = KoffPhi3Config


class KoffQwen3_5TextConfig(Qwen3_5TextConfig):
    """Qwen3_5TextConfig with one MLP width per layer."""

    model_type = "koff_qwen3_5_text"
    intermediate_sizes: list | None = None


class Qwen3_5Narrow(NarrowMixin):
    """NarrowMixin for MLPs that are told their width beside the config."""

    @staticmethod
    def make_mlp(cls, config):
        """Return an MLP as wide as a config says."""
        return cls(config, config.intermediate_size)


class KoffQwen3_5TextModel(Qwen3_5Narrow, Qwen3_5TextModel):
    """Qwen3_5TextModel with narrow MLPs."""

    config_class = KoffQwen3_5TextConfig


class KoffQwen3_5ForCausalLM(Qwen3_5Narrow, Qwen3_5ForCausalLM):
    """Qwen3_5ForCausalLM with narrow MLPs."""

    config_class = KoffQwen3_5TextConfig
