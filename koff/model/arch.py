"""The only file that knows the names of transformers' modules. A new architecture is one entry in
ARCHITECTURES."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from ..errors import require

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION_LINEARS + MLP_LINEARS
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
NARROW_PREFIX = "koff_"


@dataclass(frozen=True)
class Architecture:
    """Where things are in one family of models.

    Args:
        model_type: transformers' ``config.model_type``.
        causal_lm: class name of the causal language model in transformers.
        config: class name of its config.
        decoder, layers, attention, mlp, rotary: attribute names.
    """

    model_type: str
    causal_lm: str
    config: str
    decoder: str = "model"
    layers: str = "layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    rotary: str = "rotary_emb"


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", "LlamaConfig"),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", "Qwen2Config"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", "Qwen3Config"),
}


def architecture(model_type: str, where: str) -> Architecture:
    """The entry of a model type ("llama", or "koff_llama" for a backbone with per-layer widths).

    Raises:
        ValueError: not supported; the message names what is.
    """
    found = ARCHITECTURES.get(model_type.removeprefix(NARROW_PREFIX))
    require(
        found is not None,
        where,
        "the model type",
        f"be one of {', '.join(ARCHITECTURES)}",
        repr(model_type),
        "add an entry to koff/arch.py if its MLP is gate/up/down",
    )
    return found


def decoder(model: PreTrainedModel) -> nn.Module:
    """The transformer without its language-model head."""
    return getattr(model, architecture(model.config.model_type, "koff").decoder)


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers."""
    arch = architecture(model.config.model_type, "koff")
    return getattr(getattr(model, arch.decoder), arch.layers)


def layers_path(model: PreTrainedModel) -> str:
    """Path of the decoder layers in the model: "model.layers"."""
    arch = architecture(model.config.model_type, "koff")
    return f"{arch.decoder}.{arch.layers}"


def attention(layer: nn.Module, model: PreTrainedModel) -> nn.Module:
    """The attention module of a layer."""
    return getattr(layer, architecture(model.config.model_type, "koff").attention)


def mlp(layer: nn.Module, model: PreTrainedModel) -> nn.Module:
    """The MLP of a layer."""
    return getattr(layer, architecture(model.config.model_type, "koff").mlp)


def mlps(model: PreTrainedModel) -> list[nn.Module]:
    """The MLPs of all layers."""
    return [mlp(layer, model) for layer in layers(model)]


def mlp_weights(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """gate [I, H], up [I, H] and down [H, I] of an MLP."""
    return module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight


def widths(model: PreTrainedModel) -> list[int]:
    """Number of MLP neurons of each layer."""
    return [module.gate_proj.weight.shape[0] for module in mlps(model)]


def set_width(module: nn.Module, width: int) -> None:
    """Make an MLP's bookkeeping agree with weights of a new width."""
    module.gate_proj.out_features = module.up_proj.out_features = module.down_proj.in_features = (
        width
    )
    module.intermediate_size = width


def linear_path(name: str, model: PreTrainedModel) -> str:
    """Path of a linear layer within its decoder layer, e.g. "self_attn.q_proj"."""
    arch = architecture(model.config.model_type, "koff")
    return f"{arch.attention if name in ATTENTION_LINEARS else arch.mlp}.{name}"


def linears(layer: nn.Module, model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """(name, module) of the seven linear layers of a decoder layer."""
    for name in LINEARS:
        yield name, layer.get_submodule(linear_path(name, model))


def activation(model: PreTrainedModel) -> str:
    """The kernels' name of the MLP's activation."""
    return ACTIVATIONS[model.config.hidden_act]


def inverse_frequencies(model: PreTrainedModel) -> torch.Tensor:
    """RoPE inverse frequencies [D / 2] as the model uses them."""
    return getattr(decoder(model), architecture(model.config.model_type, "koff").rotary).inv_freq


def kv_shape(model: PreTrainedModel) -> tuple[int, int]:
    """(Hkv, D)."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, head_dim


def check_supported(model: object, with_kv: bool, where: str = "attach") -> Architecture:
    """Refuse a model that koff cannot attach to.

    Raises:
        TypeError, ValueError: not a transformers causal LM, an unsupported architecture, quantised
            weights, an MLP that is not gate/up/down of plain linear layers, or (with KV memories)
            RoPE or attention kinds under which a prefix cannot be exact.
    """
    require(
        isinstance(model, PreTrainedModel),
        where,
        "the model",
        "be a transformers PreTrainedModel",
        type(model).__name__,
        "load it with AutoModelForCausalLM (unwrap PEFT and DDP first)",
        TypeError,
    )
    config = model.config
    arch = architecture(config.model_type, where)
    require(
        hasattr(model, arch.decoder) and model.get_output_embeddings() is not None,
        where,
        "the model",
        f"be a causal language model like {arch.causal_lm}",
        type(model).__name__,
        "load it with AutoModelForCausalLM",
        TypeError,
    )
    quantised = getattr(config, "quantization_config", None) or getattr(model, "hf_quantizer", None)
    require(
        not quantised,
        where,
        "the base model",
        "not be quantised (the gates and the pruned weights need plain matrices)",
        type(quantised).__name__,
        "load it in bfloat16, float16 or float32",
    )
    _check_layers(model, where)
    if with_kv:
        check_prefix(model, where)
    return arch


def _check_layers(model: PreTrainedModel, where: str) -> None:
    act = model.config.hidden_act
    require(
        act in ACTIVATIONS,
        where,
        "hidden_act",
        f"be one of {', '.join(ACTIVATIONS)}",
        repr(act),
        "see arch.py",
    )
    for index, layer in enumerate(layers(model)):
        module = mlp(layer, model)
        plain = all(isinstance(getattr(module, name, None), nn.Linear) for name in MLP_LINEARS)
        require(
            plain,
            where,
            f"the MLP of layer {index}",
            f"have the linear layers {', '.join(MLP_LINEARS)}",
            type(module).__name__,
            "mixtures of experts and fused gate_up layers are not supported",
            TypeError,
        )
        biased = any(getattr(module, name).bias is not None for name in MLP_LINEARS)
        require(
            not biased,
            where,
            f"the MLP of layer {index}",
            "have no bias",
            "mlp_bias=True",
            "use another model",
        )
        _check_unpatched(layer, index, model, where)
        for name, linear in linears(layer, model):
            require(
                type(linear) is nn.Linear,
                where,
                f"{name} of layer {index}",
                "be a plain torch.nn.Linear",
                type(linear).__name__,
                "detach other adapters and quantisation first",
                TypeError,
            )


def _check_unpatched(layer: nn.Module, index: int, model: PreTrainedModel, where: str) -> None:
    """A forward bound to an instance (as Liger does) would bypass the gates without a word."""
    modules = [mlp(layer, model), attention(layer, model), *(m for _, m in linears(layer, model))]
    patched = [type(m).__name__ for m in modules if "forward" in m.__dict__]
    rule, step = "use their classes' own forward", "load the model without kernel patches"
    if any(hasattr(m, "_hf_hook") for m in modules):
        step = "load the model onto one device: a device_map that spreads or offloads it moves data"
        step += " inside forward"
    require(not patched, where, f"the modules of layer {index}", rule, patched, step)


def stock_classes(model_type: str) -> tuple[type, type]:
    """transformers' own (config class, model class) of an architecture."""
    entry = ARCHITECTURES[model_type]
    return getattr(transformers, entry.config), getattr(transformers, entry.causal_lm)


def check_prefix(model: PreTrainedModel, where: str) -> None:
    """Refuse a model under which a KV memory could not be exact.

    Raises:
        ValueError: the kind of RoPE or attention.
    """
    config = model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    require(
        rope in ROPE_TYPES,
        where,
        "the RoPE type (for KV memories)",
        f"be one of {', '.join(ROPE_TYPES)}",
        repr(rope),
        "use kv=None",
    )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    require(
        kinds == {"full_attention"},
        where,
        "the attention layers (for KV memories)",
        "all be full attention",
        sorted(kinds),
        "use kv=None: stock caches truncate a prefix in sliding and chunked layers",
    )
    frequencies, (_, head_dim) = inverse_frequencies(model), kv_shape(model)
    require(
        2 * frequencies.numel() == head_dim,
        where,
        "RoPE (for KV memories)",
        "rotate the whole head",
        f"{2 * frequencies.numel()} of {head_dim} dimensions",
        "use kv=None",
    )
