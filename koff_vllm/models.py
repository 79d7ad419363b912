"""vLLM's own models with one MLP width per layer. Nothing of their code is copied: each is built
with MLPs of the smallest width, which then make room for others of the same class."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.granite import GraniteForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer

from .configs import widths_of


class NarrowMixin:
    """Gives each layer an MLP of its own width."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any):
        config = vllm_config.model_config.hf_config
        sizes = widths_of(config)
        widest, config.intermediate_size = config.intermediate_size, min(sizes)
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        finally:
            config.intermediate_size = widest  # the config is not ours to change
        for index, (layer, size) in enumerate(zip(self.model.layers, sizes, strict=True)):
            if not isinstance(layer, PPMissingLayer):  # of another pipeline-parallel rank
                layer.mlp = type(layer.mlp)(
                    hidden_size=config.hidden_size,
                    intermediate_size=size,
                    hidden_act=config.hidden_act,
                    quant_config=vllm_config.quant_config,
                    prefix=f"{prefix and prefix + '.'}model.layers.{index}.mlp",
                )


class KoffLlamaForCausalLM(NarrowMixin, LlamaForCausalLM):
    """LlamaForCausalLM with narrow MLPs."""


class KoffQwen2ForCausalLM(NarrowMixin, Qwen2ForCausalLM):
    """Qwen2ForCausalLM with narrow MLPs."""


class KoffQwen3ForCausalLM(NarrowMixin, Qwen3ForCausalLM):
    """Qwen3ForCausalLM with narrow MLPs."""


class KoffMistralForCausalLM(NarrowMixin, MistralForCausalLM):
    """MistralForCausalLM with narrow MLPs."""


class KoffGraniteForCausalLM(NarrowMixin, GraniteForCausalLM):
    """GraniteForCausalLM with narrow MLPs."""


class KoffPhi3ForCausalLM(NarrowMixin, Phi3ForCausalLM):
    """Phi3ForCausalLM with narrow MLPs."""
