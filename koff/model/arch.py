"""Where things are in transformers' models: the only file that knows the names of their modules.

A new architecture is one entry in ``ARCHITECTURES`` and its narrow class in ``modeling_koff.py``
(which is saved beside models and runs without koff, so it cannot ask here). Everybody else asks for
the MLP of a layer, for the dimension that counts neurons, or for the path of a ``Site``.

Recipes and ``koff info`` need the names alone, so torch and transformers are imported by the
functions that look at a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..errors import asker
from .few_bits import check_format, check_quantizer, dense_weight, kind

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
# Those of them that read the same hidden states, in the order in which transformers calls them.
SAME_INPUT = ("q_proj", "k_proj", "v_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
# Phi-3 has gate and up in one weight [2 I, H]: the rows of gate, then those of up. This is where
# either of them, and its LoRA, is then found: as which half of what.
GATE_UP = "gate_up_proj"
HALVES = {"gate_proj": (GATE_UP, 0), "up_proj": (GATE_UP, 1)}
# The dimension of each MLP weight [out, in] that counts neurons: gate and up have a row for each,
# down a column. A LoRA B A on them follows: it has that row in B [N, r], that column in A [r, K].
NEURON_DIM = {"gate_proj": 0, "up_proj": 0, GATE_UP: 0, "down_proj": 1}
# transformers' hidden_act -> the kernels' name. The kernels have no other activation.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
# RoPE whose frequencies never change: only then is a stored key at another position a rotation of
# itself. Dynamic NTK and longrope choose the frequencies by the length of the sequence.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Before the model_type of a backbone whose layers differ in width: "koff_llama".
NARROW_PREFIX = "koff_"


@dataclass(frozen=True)
class Architecture:
    """Where things are in one family of models.

    Args:
        model_type: transformers' ``config.model_type``.
        causal_lm: class name of the causal language model in transformers.
        config: class name of its config.
        attention_linears, mlp_linears: names of the linear layers of a decoder layer, which are
            also PEFT's names for a LoRA on them.
        decoder, layers, attention, mlp, rotary: attribute names.
        recurrent: name of the module that some layers have in the place of attention: it keeps a
            state instead of keys and values. None: every layer has attention.
        recurrent_linears: as ``attention_linears``, of such layers.
        logits_divisor, logits_cap: names of the config's entries by which logits are divided, and
            under which a tanh keeps their size; None: nothing of the kind.
    """

    model_type: str
    causal_lm: str
    config: str
    attention_linears: tuple[str, ...] = ATTENTION_LINEARS
    mlp_linears: tuple[str, ...] = MLP_LINEARS
    decoder: str = "model"
    layers: str = "layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    rotary: str = "rotary_emb"
    recurrent: str | None = None
    recurrent_linears: tuple[str, ...] = ()
    logits_divisor: str | None = None
    logits_cap: str | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """The linear layers of a decoder layer, whichever kind it is of."""
        return self.attention_linears + self.recurrent_linears + self.mlp_linears


ARCHITECTURES = {
    entry.model_type: entry
    for entry in (
        Architecture("llama", "LlamaForCausalLM", "LlamaConfig"),
        Architecture("qwen2", "Qwen2ForCausalLM", "Qwen2Config"),
        Architecture("qwen3", "Qwen3ForCausalLM", "Qwen3Config"),
        Architecture(
            "qwen3_5_text",  # what AutoModelForCausalLM takes out of a multimodal Qwen3.5
            "Qwen3_5ForCausalLM",
            "Qwen3_5TextConfig",
            recurrent="linear_attn",
            recurrent_linears=("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
        ),
        Architecture("mistral", "MistralForCausalLM", "MistralConfig"),
        Architecture("olmo2", "Olmo2ForCausalLM", "Olmo2Config"),
        Architecture(
            "granite", "GraniteForCausalLM", "GraniteConfig", logits_divisor="logits_scaling"
        ),
        Architecture("smollm3", "SmolLM3ForCausalLM", "SmolLM3Config"),
        Architecture(
            "phi3",  # Phi-4 and Phi-4-mini, too
            "Phi3ForCausalLM",
            "Phi3Config",
            attention_linears=("qkv_proj", "o_proj"),
            mlp_linears=(GATE_UP, "down_proj"),
        ),
    )
}
# Model types whose attention calls SAME_INPUT with one tensor, in every layer and every forward; a
# cross attention does not, nor do layers that share another's keys and values (Gemma 3n, Gemma 4).
_ONE_INPUT = {name for name, entry in ARCHITECTURES.items() if "q_proj" in entry.linears}
_ONE_INPUT |= set(
    "apertus arcee cohere cohere2 ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4 glm4_moe "
    "gpt_oss granitemoe helium hunyuan_v1_dense llama4_text ministral ministral3 mixtral nemotron "
    "olmo olmo3 olmoe opt phi qwen2_moe qwen3_moe qwen3_next seed_oss stablelm starcoder2".split()
)
# Every name that a LoRA's target may have, on one architecture or another.
LINEARS = tuple(dict.fromkeys(n for entry in ARCHITECTURES.values() for n in entry.linears))


class Site(NamedTuple):
    """One linear layer of the model, as a place where a memory may have a LoRA.

    Args:
        layer: number of the decoder layer.
        linear: which of its linear layers.
    """

    layer: int
    linear: str

    def __str__(self) -> str:
        return site_key(self)


class KVShape(NamedTuple):
    """Of a layer with attention: Hkv heads of keys and of values, each of width D."""

    heads: int
    width: int


class StateShape(NamedTuple):
    """Of a recurrent layer: its state [Hv, Dk, Dv], and the last inputs of its convolution
    [C, K - 1]."""

    state: tuple[int, int, int]
    conv: tuple[int, int]


def site_key(site: Site) -> str:
    """Return a site as text, "0_q_proj": its key in ``Memory.lora``, and so a part of parameters'
    names in checkpoints. A dot, the natural thing to write, would be taken for a path."""
    return f"{site.layer}_{site.linear}"


def site_of(key: str) -> Site:
    """Return the site of a ``site_key``."""
    layer, linear = key.split("_", 1)
    return Site(int(layer), linear)


def architecture(model_type: str, model: nn.Module | None = None) -> Architecture:
    """Return the entry of a model type ("llama", or "koff_llama" for layers of unequal width).

    Args:
        model_type: as in transformers, or of a narrow backbone.
        model: of that type, for the message.

    Raises:
        ValueError: not supported; the message names what is, and what the model has instead.
    """
    found = ARCHITECTURES.get(model_type.removeprefix(NARROW_PREFIX))
    if found is None:
        reason = "use a model of one of these" if model is None else _what_is_missing(model)
        raise ValueError(
            f"{asker()}: the model type must be one of {', '.join(ARCHITECTURES)}, "
            f"got {model_type!r}; {reason}"
        )
    return found


def _what_is_missing(model: nn.Module) -> str:
    """Why a model of another type cannot have koff attached, by the names of its modules."""
    names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    if names & {"experts", "block_sparse_moe", "router"}:
        return "its MLPs are mixtures of experts, and gates are for one MLP in a layer"
    if not (names.issuperset(MLP_LINEARS) or names.issuperset({GATE_UP, "down_proj"})):
        return "its MLPs are not gated by a gate_proj beside up_proj and down_proj"
    if not names.issuperset(ATTENTION_LINEARS):
        return f"its attention has no {', '.join(sorted({*ATTENTION_LINEARS} - names))}"
    return "its layers look alike, but nobody has checked it: see docs/models.md for a new entry"


def stock_classes(model_type: str) -> tuple[type, type]:
    """Return transformers' own (config class, model class) of an architecture."""
    import transformers

    entry = ARCHITECTURES[model_type]
    return getattr(transformers, entry.config), getattr(transformers, entry.causal_lm)


# ---- modules of a model ----


def decoder(model: PreTrainedModel) -> nn.Module:
    """Return the transformer without its language-model head."""
    return getattr(model, architecture(model.config.model_type).decoder)


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers."""
    return getattr(decoder(model), architecture(model.config.model_type).layers)


def is_recurrent(layer: nn.Module, model: PreTrainedModel) -> bool:
    """Return whether a layer keeps a recurrent state instead of keys and values."""
    name = architecture(model.config.model_type).recurrent
    return name is not None and hasattr(layer, name)


def is_hybrid(model: PreTrainedModel) -> bool:
    """Return whether some layers of a model are recurrent."""
    return any(is_recurrent(layer, model) for layer in layers(model))


def mixer(layer: nn.Module, model: PreTrainedModel) -> nn.Module:
    """Return the first module of a layer, which mixes its tokens: attention or a recurrence."""
    entry = architecture(model.config.model_type)
    return getattr(layer, entry.recurrent if is_recurrent(layer, model) else entry.attention)


def has_one_input(module: nn.Module) -> bool:
    """Return whether a module is an attention of transformers that is known to call ``SAME_INPUT``
    with one tensor."""
    if not type(module).__module__.startswith("transformers.models."):
        return False  # somebody's own class may do anything, under a config of these
    # The attention's own config: in a model of several parts each is of another type.
    found = getattr(getattr(module, "config", None), "model_type", None)
    return isinstance(found, str) and found.removeprefix(NARROW_PREFIX) in _ONE_INPUT


def mlp(layer: nn.Module, model: PreTrainedModel) -> nn.Module:
    """Return the MLP of a layer."""
    return getattr(layer, architecture(model.config.model_type).mlp)


def mlps(model: PreTrainedModel) -> list[nn.Module]:
    """Return the MLPs of all layers."""
    return [mlp(layer, model) for layer in layers(model)]


def mlp_linears(module: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of an MLP by name: gate, up and down, or gate_up and down."""
    names = (GATE_UP, "down_proj") if GATE_UP in module._modules else MLP_LINEARS
    return {name: module._modules[name] for name in names}


def mlp_weights(module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Return gate [I, H], up [I, H] and down [H, I] of an MLP: its parameters, or views of them
    where gate and up are one."""
    modules = module._modules  # every forward of every layer asks, and torch's getattr is slow
    fused, down = modules.get(GATE_UP), modules["down_proj"].weight
    if fused is not None:
        return (*fused.weight.chunk(2), down)
    return modules["gate_proj"].weight, modules["up_proj"].weight, down


def dense_mlp_weights(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as plain matrices of a dtype, dequantised where they are in few bits."""
    *first, down = [dense_weight(linear, dtype) for linear in mlp_linears(module).values()]
    gate, up = first if len(first) == 2 else first[0].chunk(2)
    return gate, up, down


def along_neurons(linear: str, neurons: Tensor, width: int) -> Tensor:
    """Return where neurons are found along the ``NEURON_DIM`` of a linear layer of an MLP.

    Args:
        linear: its name.
        neurons: int64 [n], numbers of neurons.
        width: I, of the MLP that they are numbered in.

    Returns:
        int64 [n]; [2 n] where gate and up are one, which has two rows for each neuron.
    """
    import torch

    return torch.cat([neurons, neurons + width]) if linear == GATE_UP else neurons


def _linear_names(layer: nn.Module, model: PreTrainedModel) -> tuple[str, ...]:
    entry = architecture(model.config.model_type)
    first = entry.recurrent_linears if is_recurrent(layer, model) else entry.attention_linears
    return first + entry.mlp_linears


def linears(layer: nn.Module, model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """Yield (name, module) of the linear layers of a decoder layer."""
    for name in _linear_names(layer, model):
        yield name, layer.get_submodule(linear_path(name, model))


def sites(model: PreTrainedModel) -> Iterator[tuple[Site, nn.Linear]]:
    """Yield every linear layer of the model with its site, layer by layer."""
    for index, layer in enumerate(layers(model)):
        for name, linear in linears(layer, model):
            yield Site(index, name), linear


# ---- names of tensors ----


def layers_path(model: PreTrainedModel) -> str:
    """Return the path of the decoder layers in the model: "model.layers"."""
    arch = architecture(model.config.model_type)
    return f"{arch.decoder}.{arch.layers}"


def linear_path(name: str, model: PreTrainedModel) -> str:
    """Return the path of a linear layer within its decoder layer: "self_attn.q_proj"."""
    arch = architecture(model.config.model_type)
    if name in arch.mlp_linears:
        return f"{arch.mlp}.{name}"
    return f"{arch.recurrent if name in arch.recurrent_linears else arch.attention}.{name}"


def site_path(site: Site, model: PreTrainedModel) -> str:
    """Return the path of a site in the model: "model.layers.0.self_attn.q_proj"."""
    return f"{layers_path(model)}.{site.layer}.{linear_path(site.linear, model)}"


def count_layers(names: Iterable[str], model_type: str) -> int:
    """Return how many decoder layers the tensors of a checkpoint belong to, by their names."""
    number = re.compile(rf"\.{architecture(model_type).layers}\.(\d+)\.")
    return len({found[1] for found in map(number.search, names) if found})


# ---- facts about a model ----


def is_few_bits(model: PreTrainedModel) -> bool:
    """Return whether some linear layer of a model is in few bits."""
    return any(kind(linear) is not None for _, linear in sites(model))


def width(module: nn.Module) -> int:
    """Return the number of neurons of an MLP."""
    return module.down_proj.in_features


def widths(model: PreTrainedModel) -> list[int]:
    """Return the number of MLP neurons of each layer."""
    return [width(module) for module in mlps(model)]


def set_width(module: nn.Module, width: int) -> None:
    """Make an MLP's bookkeeping agree with weights of a new width, in place."""
    for linear in mlp_linears(module).values():
        linear.out_features, linear.in_features = linear.weight.shape
    if hasattr(module, "intermediate_size"):
        module.intermediate_size = width


def activation(model: PreTrainedModel) -> str:
    """Return the kernels' name of the MLP's activation."""
    return ACTIVATIONS[model.config.hidden_act]


def inverse_frequencies(model: PreTrainedModel) -> Tensor:
    """Return the RoPE inverse frequencies [R / 2] as the model uses them: those of the R dimensions
    of a head that it rotates, all D of them or, with partial RoPE, the first."""
    return getattr(decoder(model), architecture(model.config.model_type).rotary).inv_freq


def layers_without_rope(model: PreTrainedModel) -> frozenset[int]:
    """Return the numbers of the layers whose attention knows no positions (SmolLM3 has some)."""
    modules = [mixer(layer, model) for layer in layers(model)]
    return frozenset(i for i, module in enumerate(modules) if not getattr(module, "use_rope", True))


def kv_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Return (Hkv, D): the number of kv heads and their width."""
    config = model.config
    # Qwen2's config has no head_dim; Qwen3's is not hidden_size / heads.
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, head_dim


def cache_shapes(model: PreTrainedModel) -> list[KVShape | StateShape]:
    """Return, of each layer, the shapes of what a cache holds of a text."""
    return [
        _state_shape(model) if is_recurrent(layer, model) else KVShape(*kv_shape(model))
        for layer in layers(model)
    ]


def _state_shape(model: PreTrainedModel) -> StateShape:
    config = model.config
    heads, width = config.linear_num_value_heads, config.linear_value_head_dim
    key_width = config.linear_key_head_dim
    keys = config.linear_num_key_heads * key_width
    channels = 2 * keys + heads * width  # queries, keys and values go through the convolution
    return StateShape((heads, key_width, width), (channels, config.linear_conv_kernel_dim - 1))


# ---- what koff cannot attach to ----


def check_supported(model: object, with_kv: bool) -> None:
    """Refuse a model that koff cannot attach to.

    Args:
        model: any object.
        with_kv: whether it is to have memories with a KV part.

    Raises:
        TypeError, ValueError: not a transformers causal LM, an unsupported architecture, weights in
            a format that koff does not know, an MLP that is not gate/up/down of linear layers, or
            (with KV memories) RoPE or attention kinds under which a prefix cannot be exact.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        step = "load it with AutoModelForCausalLM, and wrap it (torch.compile, DDP) afterwards"
        if _is_pefts(model):
            step = f"take the adapter off first ({_TAKE_OFF})"
        raise TypeError(
            f"{asker()}: the model must be a transformers PreTrainedModel, "
            f"got {type(model).__name__}; {step}"
        )
    config = model.config
    if config.get_text_config() is not config:
        raise ValueError(
            f"{asker()}: the model must be a language model alone, got the multimodal "
            f"{type(model).__name__}; load it with AutoModelForCausalLM, which leaves the other "
            "parts out"
        )
    arch = architecture(config.model_type, model)
    if not hasattr(model, arch.decoder) or model.get_output_embeddings() is None:
        raise TypeError(
            f"{asker()}: the model must be a causal language model like {arch.causal_lm}, "
            f"got {type(model).__name__}; load it with AutoModelForCausalLM"
        )
    check_quantizer(model)
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"{asker()}: hidden_act must be one of {', '.join(ACTIVATIONS)}, "
            f"got {config.hidden_act!r}; see arch.py"
        )
    for index, layer in enumerate(layers(model)):
        _check_layer(index, layer, model)
    # Around the head or the embeddings it would compute, frozen, but could not be saved.
    adapted = [path for path, module in model.named_modules() if _is_pefts(module)]
    if adapted:
        raise TypeError(
            f"{asker()}: the model must have no adapters, got one of PEFT's on {adapted[0]}; take "
            f"it off first ({_TAKE_OFF}), or load the model again"
        )
    if getattr(config, "quantization_config", None) is not None and not is_few_bits(model):
        raise ValueError(  # it would be saved with the model, which then could not be loaded
            f"{asker()}: a model whose config has a quantization_config must have linear layers in "
            "few bits, got plain ones; delete model.config.quantization_config"
        )
    if with_kv:
        check_prefix(model)


_TAKE_OFF = "merge_and_unload() or unload()"


def _is_pefts(module: object) -> bool:
    return type(module).__module__.startswith("peft.")


def _check_layer(index: int, layer: nn.Module, model: PreTrainedModel) -> None:
    names = _linear_names(layer, model)
    inside = {path for path, _ in layer.named_modules()}
    missing = [name for name in names if linear_path(name, model) not in inside]
    if missing:
        raise TypeError(
            f"{asker()}: layer {index} must have the linear layers {', '.join(names)}, got "
            f"a {type(layer).__name__} without {', '.join(missing)}; load the model without "
            "patches that replace them"
        )
    for name, linear in linears(layer, model):
        whose = f"{asker()}: {name} of layer {index}"
        if _is_pefts(linear):
            raise TypeError(
                f"{whose} must be a plain torch.nn.Linear, got {type(linear).__module__}."
                f"{type(linear).__name__}; take the adapter off first ({_TAKE_OFF})"
            )
        check_format(linear, whose)
    module = mlp(layer, model)
    if any(linear.bias is not None for linear in mlp_linears(module).values()):
        raise ValueError(
            f"{asker()}: the MLP of layer {index} must have no bias, got mlp_bias=True; use "
            "another model"
        )
    modules = [layer, module, mixer(layer, model)]
    modules += [linear for _, linear in linears(layer, model)]
    refuse_patched(modules, f"{asker()}: the modules of layer {index}")


def refuse_patched(modules: list[nn.Module], whose: str) -> None:
    """Refuse modules with a forward of their own.

    One that is bound to an instance, as Liger does it, comes before the class's: it would bypass
    the gates without a word. accelerate's hooks for a device_map are bound like this too.

    Args:
        modules: of decoder layers.
        whose: the first words of the error.

    Raises:
        ValueError: the classes of those that have one.
    """
    patched = [m for m in modules if "forward" in m.__dict__]
    if not patched:
        return
    step = "load the model without kernel patches, and patch nothing after attach"
    if any(hasattr(m, "_hf_hook") for m in patched):
        step = "load the model onto one device: a device_map that spreads or offloads it moves "
        step += "data inside forward"
    raise ValueError(
        f"{whose} must use their classes' own forward, got another in "
        f"{sorted({type(m).__name__ for m in patched})}; {step}"
    )


def check_dropout(model: PreTrainedModel) -> None:
    """Refuse to train a KV memory under attention dropout, which attention over one does not have.

    Raises:
        ValueError: the layers' dropout.
    """
    # The layers took it over when they were made: changing the config would do nothing.
    dropout = max(getattr(module, "attention_dropout", 0.0) for module in decoder(model).modules())
    if dropout > 0:
        raise ValueError(
            f"{asker()}: attention dropout must be 0 with KV memories, got {dropout}; load the "
            "model with attention_dropout=0.0"
        )


def check_prefix(model: PreTrainedModel) -> None:
    """Refuse a model under which a KV memory could not be exact.

    Raises:
        ValueError: the kind of RoPE or attention.
    """
    config = model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise ValueError(
            f"{asker()}: the RoPE type (for KV memories) must be one of {', '.join(ROPE_TYPES)}, "
            f"got {rope!r}; use kv=None"
        )
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if window is not None and not kinds:  # Mistral and Phi-3 slide in every layer, or in none
        raise ValueError(
            f"{asker()}: the attention layers (for KV memories) must all be full attention, "
            f"got sliding_window={window}; use kv=None, or set config.sliding_window = None if "
            "prefix and text together are never longer than that, where both are the same"
        )
    known = {"full_attention"}
    if architecture(config.model_type).recurrent is not None:
        known.add("linear_attention")
    if kinds - known:
        raise ValueError(
            f"{asker()}: the attention layers (for KV memories) must all be full attention, "
            f"got {sorted(kinds)}; use kv=None: stock caches truncate a prefix in sliding and "
            "chunked layers"
        )
