"""transformers' own models with one MLP width per layer, for the families that vLLM takes from
transformers: it builds the base model (``AutoModel``) and puts its layers into it.

koff has the same classes in ``modeling_koff.py``, which lies beside a saved backbone; these need no
``trust_remote_code``.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoModel, Olmo2Model, SmolLM3Model
from vllm.model_executor.models.transformers import TransformersForCausalLM

from .configs import KoffOlmo2Config, KoffSmolLM3Config, widths_of


class NarrowMixin:
    """Gives each layer an MLP of its own width."""

    def __init__(self, config: Any):
        sizes = widths_of(config)
        super().__init__(config)
        for layer, width in zip(self.layers, sizes, strict=True):
            own = copy.copy(config)
            own.intermediate_size = width
            layer.mlp = type(layer.mlp)(own)


class KoffOlmo2Model(NarrowMixin, Olmo2Model):
    """Olmo2Model with narrow MLPs."""

    config_class = KoffOlmo2Config


class KoffSmolLM3Model(NarrowMixin, SmolLM3Model):
    """SmolLM3Model with narrow MLPs."""

    config_class = KoffSmolLM3Config


for model in (KoffOlmo2Model, KoffSmolLM3Model):
    AutoModel.register(model.config_class, model, exist_ok=True)

# As vLLM has it for these families: one class for all, which builds what the config says.
KoffOlmo2ForCausalLM = KoffSmolLM3ForCausalLM = TransformersForCausalLM
