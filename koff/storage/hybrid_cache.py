"""The learned cache of a model with recurrent layers, in a format of koff's own: PEFT's CARTRIDGE
holds keys and values of every layer, and has no place for the states of such layers.

kv/cache.json         num_tokens, num_frozen_tokens, recurrent_state, as in ``KVConfig``
kv/cache.safetensors  layers.3.keys, layers.3.values [Hkv, P, D] of a layer with attention,
                      layers.0.state [Hv, Dk, Dv], layers.0.conv [C, K - 1] of a recurrent one
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import asker
from ..model import arch
from ..model.arch import KVShape
from ..model.config import KVConfig
from ..model.memories import Memory
from .layout import CACHE_CONFIG, CACHE_WEIGHTS

_FORMAT = 1
_SETTINGS = ("num_tokens", "num_frozen_tokens", "recurrent_state")


def write_cache(memory: Memory, directory: Path) -> None:
    """Write a memory's learned cache into an existing folder."""
    tensors = {
        _name(index, part): tensor.detach().cpu().contiguous()
        for index, weights in enumerate(memory.kv)
        for part, tensor in weights.parts().items()
    }
    save_file(tensors, str(directory / CACHE_WEIGHTS), metadata={"format": "pt"})
    settings = {name: getattr(memory.kv_config, name) for name in _SETTINGS}
    text = json.dumps({"format": _FORMAT, **settings}, indent=1)
    (directory / CACHE_CONFIG).write_text(text, encoding="utf-8")


def cache_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a ``KVConfig`` that a cache.json holds.

    Raises:
        ValueError: of another format, or incomplete.
    """
    found = values.get("format")
    if type(found) is not int or found != _FORMAT:  # True == 1
        raise ValueError(
            f"{asker()}: the format in {CACHE_CONFIG} must be {_FORMAT}, got {found!r}; update koff"
        )
    missing = [name for name in _SETTINGS if name not in values]
    if missing:
        raise ValueError(
            f"{asker()}: {CACHE_CONFIG} must hold {', '.join(_SETTINGS)}, got none of "
            f"{', '.join(missing)}; copy it again"
        )
    return {name: values[name] for name in _SETTINGS}


def cache_shapes(model: PreTrainedModel, config: KVConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor in the file of a cache."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, shape in enumerate(arch.cache_shapes(model)):
        if isinstance(shape, KVShape):
            size = (shape.heads, config.num_tokens, shape.width)
            shapes |= {_name(index, "keys"): size, _name(index, "values"): size}
        elif config.recurrent_state:
            shapes |= {_name(index, "state"): shape.state, _name(index, "conv"): shape.conv}
    return shapes


@torch.no_grad()
def fill_cache(memory: Memory, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a file into a memory, in place."""
    for index, weights in enumerate(memory.kv):
        weights.fill_(*(tensors[_name(index, part)] for part in weights.parts()))


def _name(layer: int, part: str) -> str:
    return f"layers.{layer}.{part}"
