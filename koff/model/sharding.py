"""Models that FSDP spreads over processes: whole tensors, and a whole model, out of the shards."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from accelerate.utils import str_to_bool
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from .attach import install
from .memory_argument import KoffModelMixin


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP spreads the parameters over several processes."""
    # Not by the parameters: those of the last layers stay whole for a while after a forward.
    return any(isinstance(module, FSDPModule) for module in model.modules())


def accelerate_shards() -> bool:
    """Return whether ``accelerate launch`` asks for FSDP, which it does in the environment."""
    return bool(str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")))


def in_shards(processes: int) -> dict[str, Any]:
    """Return the argument by which ``from_pretrained`` reads a model in shards, one per process:
    each reads its own part of every weight from the file, and never holds the whole.

    The process group must be there. Everything that follows, ``attach`` first, then finds the
    shards: caches are filled and gates started on them, and nothing is sharded again.

    Args:
        processes: how many share the model.
    """
    return {"distributed_config": DistributedConfig(fsdp_size=processes)}


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that is all here: itself, or what every process gathers of it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return an attached model that is all here: itself, or, if FSDP shards it, a copy on the CPU.

    Every process gets the copy, and all of them have to call this. Each needs as much memory as it
    took to load the model in the first place.

    Args:
        model: an attached model.
    """
    if not is_sharded(model):
        return model
    # A sharded model cannot be copied, so a new one is made of its class as it was before attach.
    classes = type(model).__mro__
    base = classes[classes.index(KoffModelMixin) + 1]
    config = copy.deepcopy(model.config)
    # The copy is in no shards: transformers would wait for the others whenever it is saved.
    vars(config).pop("distributed_config", None)
    with torch.device("meta"):
        copied = base(config)
    tensors = {
        name: whole(tensor).cpu()
        for name, tensor in model.state_dict().items()
        if not name.startswith("koff.")
    }
    copied.load_state_dict(tensors, assign=True)
    for name, buffer in copied.named_buffers():  # those that no state_dict has
        if buffer.is_meta:
            place, _, own = name.rpartition(".")
            value = model.get_buffer(name).cpu().clone()
            copied.get_submodule(place).register_buffer(own, value, persistent=False)
    copied.tie_weights()
    copied.generation_config = copy.deepcopy(model.generation_config)
    # Its hooks are of the sharded model; the copy gets its own.
    state = copy.deepcopy(model.koff, {id(model.koff.hooks): []})
    trainable = state.trainable
    install(copied, state.to("cpu"))
    state.trainable = trainable
    return copied.train(model.training)
