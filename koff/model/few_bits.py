"""Linear layers in few bits, as bitsandbytes and torchao make them: how one is known, what its
weight is, and what koff does not take.

Neither package is imported here before a layer of its own is found.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from ..errors import asker

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

# What a recipe calls them, and who makes them.
FORMATS = ("nf4", "int8")
# torchao leaves a layer an ``nn.Linear`` and puts a tensor of a class of its own into it. Of these
# classes, the one that is proved; others hold int4 in layouts that only a GPU's kernel reads, or
# fp8.
_TORCHAO_TENSORS = ("Int8Tensor",)
_KNOWN = (
    "bitsandbytes' Linear4bit (NF4, FP4) or Linear8bitLt, or torchao's Int8WeightOnlyConfig make it"
)


def kind(linear: nn.Module) -> str | None:
    """Return the format of a linear layer: "4bit", "8bit" (bitsandbytes) or "torchao"; None for one
    that is in no format that koff knows."""
    # By names along the classes: koff's own and bitsandbytes' LinearNF4 are subclasses.
    for cls in type(linear).__mro__:
        if cls.__module__.startswith("bitsandbytes."):
            found = {"Linear4bit": "4bit", "Linear8bitLt": "8bit"}.get(cls.__name__)
            if found is not None:
                return found
    weight = type(linear.weight.data) if hasattr(linear, "weight") else None
    if weight is not None and weight.__module__.startswith("torchao."):
        return "torchao" if weight.__name__ in _TORCHAO_TENSORS else None
    return None


def is_plain(linear: nn.Module) -> bool:
    """Return whether the weight of a linear layer is an ordinary matrix."""
    import torch
    from torch.distributed.tensor import DTensor

    return kind(linear) is None and type(linear.weight.data) in (torch.Tensor, DTensor)


def size(linear: nn.Module) -> tuple[int, int]:
    """Return (out, in) of a linear layer, however its weight is laid out in memory."""
    return linear.out_features, linear.in_features


def dense_weight(linear: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """Return the weight of a linear layer as a plain matrix, dequantised where it is in few bits.

    Args:
        linear: any that ``attach`` takes.
        dtype: of the matrix; None: what it was before it was quantised, as far as the layer knows.

    Returns:
        [out, in]; the layer's own tensor if that is plain and of this dtype.
    """
    import torch

    found, weight = kind(linear), linear.weight
    if found == "4bit":
        from bitsandbytes.functional import dequantize_4bit

        # Dequantised into the dtype itself, as the layer's own forward does: by way of its own
        # dtype it would be rounded twice.
        state = copy.copy(weight.quant_state)
        state.dtype = dtype or state.dtype
        return dequantize_4bit(weight.data, state)
    if found == "8bit":
        # bitsandbytes moves the scales from the parameter to the layer in its first forward.
        scales = weight.SCB if linear.state.SCB is None else linear.state.SCB
        wide = weight.data.to(dtype or torch.float16)
        return wide.mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
    if found == "torchao":
        return weight.data.dequantize(dtype or weight.dtype)
    return weight if dtype is None else weight.to(dtype)


def check_format(linear: nn.Module, whose: str) -> None:
    """Refuse a layer that is neither plain nor in a format that koff knows.

    Args:
        linear: of the model, not None.
        whose: the first words of the error, which name it.

    Raises:
        TypeError: so.
        ValueError: a format that koff knows, in a state that it cannot use.
    """
    from torch import nn

    found = kind(linear)
    if type(linear).__module__.startswith("peft."):
        raise TypeError(
            f"{whose} must be a plain torch.nn.Linear, got {type(linear).__module__}."
            f"{type(linear).__name__}; take the adapter off first (merge_and_unload() or unload())"
        )
    if found is None and (type(linear) is not nn.Linear or not is_plain(linear)):
        got = type(linear.weight.data) if type(linear) is nn.Linear else type(linear)
        raise TypeError(
            f"{whose} must be a plain torch.nn.Linear, or in few bits that koff knows, got "
            f"{got.__module__}.{got.__name__}; load it in bfloat16, float16 or float32, or as "
            f"{_KNOWN}"
        )
    if found == "8bit" and linear.state.has_fp16_weights:
        raise ValueError(
            f"{whose} must hold int8 weights, got has_fp16_weights=True (they stay in 16 bits, and "
            "train); load the model with load_in_8bit=True alone"
        )
    state = getattr(linear.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        # bitsandbytes rounds the scales to bfloat16 for it, and finds the way back only roughly.
        raise ValueError(
            f"{whose} must be as it was loaded, got one that bitsandbytes packed anew for this "
            "processor in a forward in eval mode; load the model again and attach before its first "
            "forward"
        )


def hold_still(linear: nn.Module) -> None:
    """Keep bitsandbytes from packing a 4-bit layer anew for processors with AVX512-BF16.

    It does so in the first forward in eval mode, in place. From then on the layer computes in
    bfloat16, whatever its input is, and gives no gradient: training after an evaluation would
    learn nothing from what lies before the layer, without a word.
    """
    if hasattr(linear, "support_avx512bf16_for_cpu"):
        linear.support_avx512bf16_for_cpu = False


def let_go(linear: nn.Module) -> None:
    """Undo ``hold_still``."""
    if hasattr(linear, "support_avx512bf16_for_cpu"):
        from bitsandbytes.functional import has_avx512bf16

        linear.support_avx512bf16_for_cpu = has_avx512bf16()


def check_quantizer(model: PreTrainedModel) -> None:
    """Refuse a model that transformers quantised in a way that koff does not know.

    Raises:
        ValueError: the method.
    """
    config = getattr(model.config, "quantization_config", None)
    quantizer = getattr(model, "hf_quantizer", None)
    if config is None and quantizer is None:
        return
    config = getattr(quantizer, "quantization_config", config)
    method = getattr(config, "quant_method", None)
    if method is None and isinstance(config, dict):
        method = config.get("quant_method")
    method = getattr(method, "value", method)
    if method not in ("bitsandbytes", "torchao"):
        raise ValueError(
            f"{asker()}: the base model must be plain, or quantised by bitsandbytes or torchao, "
            f"got {method or type(config).__name__}; load it in bfloat16, float16 or float32, or "
            f"as {_KNOWN}"
        )
    for name in ("input", "output"):
        table = getattr(model, f"get_{name}_embeddings")()
        if not is_plain(table):
            raise ValueError(
                f"{asker()}: the {name} embeddings must not be quantised, got "
                f"{type(table).__module__}.{type(table).__name__} of "
                f"{type(table.weight.data).__name__}; leave transformers' default, which keeps "
                "them out"
            )


def is_few_bits(model: PreTrainedModel) -> bool:
    """Return whether some linear layer of a supported model is in few bits."""
    from . import arch

    return any(kind(linear) is not None for _, linear in arch.sites(model))


def forget_quantizer(model: PreTrainedModel) -> None:
    """Make a model whose layers are plain again say so, in place."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "hf_device_map"):
        vars(model).pop(name, None)
