"""Linear layers in few bits, as bitsandbytes and torchao make them: how one is known, what its
weight is, and what koff does not take.

Neither package is imported here before a layer of its own is found, and torch only where it is
there already.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

from ..errors import asker

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

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
    # torchao leaves a layer an ``nn.Linear`` and puts a tensor of a class of its own into it. Known
    # is the one of int8 weights; others hold int4 in layouts that only a GPU's kernel reads, or
    # fp8. A layer that rounds or scales what comes in, too, is more than its weight.
    weight = getattr(linear, "weight", None)
    if type(weight).__name__ == "Int8Tensor" and (
        type(weight).__module__.startswith("torchao.")
        and weight.act_quant_kwargs is None
        and weight.act_pre_scale is None
    ):
        return "torchao"
    return None


def is_plain(module: nn.Module) -> bool:
    """Return whether the weight of a linear layer or an embedding is an ordinary matrix, sharded
    or not."""
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    weight = module.weight
    return (
        kind(module) is None
        and weight.is_floating_point()
        and (isinstance(weight, DTensor) or not is_traceable_wrapper_subclass(weight.data))
    )


def dense_weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] of a linear layer as a plain matrix in ``dtype``: dequantised
    where it is in few bits, else the layer's own tensor if it has this dtype."""
    found, weight = kind(linear), linear.weight
    if found == "4bit":
        from bitsandbytes.functional import dequantize_4bit

        # Dequantised into the dtype itself, as the layer's own forward does: by way of its own
        # dtype it would be rounded twice.
        state = copy.copy(weight.quant_state)
        state.dtype = dtype
        return dequantize_4bit(weight.data, state)
    if found == "8bit":
        # bitsandbytes moves the scales from the parameter to the layer in its first forward.
        scales = weight.SCB if linear.state.SCB is None else linear.state.SCB
        return weight.data.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
    if found == "torchao":
        return weight.data.dequantize(dtype)
    return weight.to(dtype)


def stored_bytes(linear: nn.Linear, quantization: str, dtype: torch.dtype) -> int:
    """Return the bytes that the weight of a linear layer takes once it is quantised.

    Args:
        linear: not quantised.
        quantization: of a recipe, "nf4" or "int8".
        dtype: of the model.
    """
    numbers = linear.out_features * linear.in_features
    if quantization == "int8":
        return numbers + linear.out_features * dtype.itemsize  # a scale for each row
    # Half a byte for each, a scale for each 64, rounded to a byte, and for each 256 of these one
    # in fp32.
    scales = math.ceil(numbers / 64)
    return math.ceil(numbers / 2) + scales + 4 * math.ceil(scales / 256)


def check_format(linear: nn.Module, whose: str) -> None:
    """Refuse a layer that is neither plain nor in a format that koff knows.

    Args:
        linear: of the model.
        whose: the first words of the error, which name it.

    Raises:
        TypeError: so.
        ValueError: a format that koff knows, in a state that it cannot use.
    """
    from torch import nn

    found = kind(linear)
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


def make_plain(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Make a linear layer in few bits an ``nn.Linear``, in place: others hold this very object.

    Args:
        linear: of its own class again.
        weight, bias: what it is to have, frozen.
    """
    from torch import nn

    plain = nn.Linear(*weight.shape[::-1], bias=bias is not None, device="meta")
    plain.train(linear.training)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias, requires_grad=False)
    linear.__class__, linear.__dict__ = nn.Linear, plain.__dict__


def check_quantizer(model: PreTrainedModel) -> None:
    """Refuse a model that transformers quantised in a way that koff does not know.

    Raises:
        ValueError: the method, or embeddings in few bits.
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


def forget_quantizer(model: PreTrainedModel) -> None:
    """Make a model whose layers are plain again say so, in place."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "hf_device_map"):
        vars(model).pop(name, None)
