"""vLLM's Qwen3.5 with one MLP width per layer. A file of its own, since vLLM's imports torchvision,
for the pictures that other models of its file take."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3_5 import Qwen3_5ForCausalLM

from .models import NarrowMixin


class KoffQwen3_5ForCausalLM(NarrowMixin, Qwen3_5ForCausalLM):
    """Qwen3_5ForCausalLM with narrow MLPs."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any):
        config = vllm_config.model_config.hf_config
        # By it vLLM's layers tell a dense MLP from experts.
        narrow, config.model_type = config.model_type, config.model_type.removeprefix("koff_")
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        finally:
            config.model_type = narrow
