"""Attach gates and memories to a transformers model in place, and take them off again.

Classes are swapped for subclasses of the same name (linear layers, MLPs, attention, the model
itself), parameters keep their names, and everything learned lives in one submodule, ``model.koff``.
Base weights are frozen and never changed, but for the order of the MLP's neurons once the mask is
fixed (``neuron_order``), which ``detach`` undoes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from koffkernels import GatedMLPLoRA, gated_mlp, lora_linear

from ..errors import asked_by
from . import arch, attention
from .arch import Site
from .config import KoffConfig, KVConfig, LoRAConfig
from .forward_context import ForwardContext, LayerScope, MemoryArgument
from .memories import Memory, MemoryBank
from .memory_argument import Boundary, KoffModelMixin, tag_cache
from .neuron_order import after_load, before_load, in_original_order, kept_part, restore_order
from .prefill import fill_from_random_tokens
from .state import KoffState, is_attached, require_attached


@dataclass
class Link:
    """How a swapped module of a layer reaches what a forward needs.

    Args:
        bank: the model's memories.
        scope: the layer's current context.
        site: of a linear layer: where its LoRA is.
        activation: of an MLP: the kernels' name of it.
    """

    bank: MemoryBank
    scope: LayerScope
    site: Site | None = None
    activation: str | None = None


class _LinearMixin:
    """A frozen linear layer plus the LoRA of each row's memory."""

    _koff: Link

    def forward(self, x: Tensor) -> Tensor:
        link = self._koff
        context, lora = link.scope.context, None
        if context.slots:
            lora = link.bank.lora(link.site, context.slots, context.stacks)
        if lora is None:
            return super().forward(x)
        return lora_linear(x, self.weight, self.bias, lora=lora, memory_ids=context.ids)


class _MLPMixin:
    """The gated MLP with gates and memories; the last user of its layer's context.

    Its three linear layers are not called: one operation takes their weights.
    """

    _koff: Link

    def forward(self, x: Tensor) -> Tensor:
        link = self._koff
        context, index = link.scope.context, link.scope.index
        weights, lora = arch.mlp_weights(self), None
        if context.slots:
            lora = GatedMLPLoRA(
                *(
                    link.bank.lora(Site(index, name), context.slots, context.stacks)
                    for name in arch.MLP_LINEARS
                )
            )
        gates = None if context.gates is None else context.gates[index]
        if context.kept_first is not None:
            weights, lora = kept_part(context.kept_first, index, weights, lora)
        y = gated_mlp(
            x,
            *weights,
            gates=gates,
            lora=lora,
            memory_ids=context.ids,
            activation=link.activation,
        )
        # Not left for the next call: a layer that somebody calls on its own has no memory, and
        # nothing keeps this forward's tensors alive.
        link.scope.context = link.scope.idle
        return y


class _AttentionMixin:
    """Attention that takes the forward's context and makes it the layer's: it is the first of its
    layer to run, also when a checkpointed layer is recomputed in backward."""

    _koff: Link

    def forward(self, *args, koff_context=None, **kwargs):
        self._koff.scope.context = koff_context or ForwardContext()
        return super().forward(*args, **kwargs)


@functools.cache
def _subclass(mixin: type, cls: type) -> type:
    """``cls`` with ``mixin`` in front, under the same name: transformers looks classes up by their
    string. Cached, so that modules of one class are of one class afterwards, too."""
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    if mixin is KoffModelMixin:
        body["forward"] = KoffModelMixin.forward_with_signature(cls)
    return type(cls.__name__, (mixin, cls), body)


def _swap(module: nn.Module, mixin: type, link: Link | None) -> None:
    module.__class__ = _subclass(mixin, type(module))
    if link is not None:
        module._koff = link


def _unswap(module: nn.Module) -> None:
    module.__class__ = type(module).__mro__[2]  # behind the subclass and the mixin
    module.__dict__.pop("_koff", None)


def attach(model: PreTrainedModel, config: KoffConfig) -> PreTrainedModel:
    """Add gates and memories to a model, in place; until they are trained it computes what it did
    before.

    Args:
        model: a causal LM of a supported architecture, loaded by transformers as usual.
        config: what to learn.

    Returns:
        The same object, with ``model.koff``, and a ``memory`` argument on ``forward`` and
        ``generate``.

    Raises:
        TypeError, ValueError: unsupported or already attached model, or a target that cannot be
            reached.

    Source: KOFF (arXiv 2605.29075).
    """
    if is_attached(model):
        raise ValueError(
            "attach: the model must not have koff attached, got an attached one; detach it"
        )
    if not isinstance(config, KoffConfig):
        raise TypeError(
            f"attach: config must be a koff.KoffConfig, got {type(config).__name__}; pass one"
        )
    with asked_by("attach"):
        arch.check_supported(model, config.kv is not None and bool(config.memories))
    generator = torch.Generator().manual_seed(config.seed)
    state = KoffState(model, config, generator)
    for name in config.memories:
        state.memories.add(new_memory(model, name, config.lora, config.kv, generator))
    install(model, state)
    if config.kv is not None and config.kv.init == "tokens":
        for name in config.memories:
            fill_from_random_tokens(model, name, generator)
    return model


def new_memory(
    model: PreTrainedModel,
    name: str,
    lora: LoRAConfig | None,
    kv: KVConfig | None,
    generator: torch.Generator,
) -> Memory:
    """Return a fresh memory that fits the model's layers (also a pruned model's).

    Args:
        model: attached or about to be.
        name: of the memory.
        lora, kv: its parts; not both None.
        generator: of the initial values.
    """
    shapes = {}
    if lora is not None:
        for site, module in arch.sites(model):
            if site.linear in lora.target_modules:
                width_out, width_in = module.weight.shape
                shapes[site] = (width_in, width_out)
    num_layers, (kv_heads, head_dim) = len(arch.layers(model)), arch.kv_shape(model)
    return Memory(name, lora, kv, shapes, num_layers, kv_heads, head_dim, model.device, generator)


def install(model: PreTrainedModel, state: KoffState) -> None:
    """Swap the classes, freeze the base and hook the boundary.

    Args:
        model: a supported model.
        state: made for it; becomes ``model.koff``.
    """
    state.trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    # No kernel has a gradient for a base weight, and each refuses one that asks for it: silently
    # giving none would train nothing without a word.
    model.requires_grad_(False)
    model.koff = state
    for index, layer in enumerate(arch.layers(model)):
        scope = LayerScope(index)
        for name, linear in arch.linears(layer, model):
            _swap(linear, _LinearMixin, Link(state.memories, scope, site=Site(index, name)))
        module = arch.mlp(layer, model)
        share_gate_up(module)
        link = Link(state.memories, scope, activation=arch.activation(model))
        _swap(module, _MLPMixin, link)
        _swap(arch.attention(layer, model), _AttentionMixin, Link(state.memories, scope))
    inner = arch.decoder(model)
    # The decoder and not the whole model: generate, Trainer and users' own heads all pass by it.
    boundary = Boundary(state, tuple(inspect.signature(inner.forward).parameters), model.config)
    state.hooks = [
        inner.register_forward_pre_hook(boundary, with_kwargs=True),
        inner.register_forward_hook(tag_cache),
        # Under the base's names, what goes out and comes in has the base's order of neurons.
        model.register_state_dict_post_hook(in_original_order),
        model.register_load_state_dict_pre_hook(before_load),
        model.register_load_state_dict_post_hook(after_load),
    ]
    _swap(model, KoffModelMixin, None)
    use_koff_attention(model)


def use_koff_attention(model: PreTrainedModel) -> None:
    """Switch to the attention implementation "koff" if some memory has a KV part."""
    state = model.koff
    # Only then, and once: without a prefix the user's own choice does, and ``detach`` restores it.
    if state.attention is None and any(memory.length for memory in state.memories):
        attention.register()
        state.attention = model.config._attn_implementation
        model.set_attn_implementation(attention.NAME)


@torch.no_grad()
def share_gate_up(module: nn.Module) -> None:
    """Lay gate and up out in one [2 I, H] buffer, so that kernels can run both as one GEMM; values
    and names stay."""
    gate, up, _ = arch.mlp_weights(module)
    if gate.device.type == "meta":
        return
    both = torch.cat([gate, up])
    gate.data, up.data = both[: gate.shape[0]], both[gate.shape[0] :]


@asked_by("detach")
def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take gates and memories off, in place; the base model is as before (a pruned one stays
    pruned).

    Args:
        model: an attached model.

    Returns:
        The same object.

    Raises:
        ValueError: koff is not attached.
    """
    state = require_attached(model)
    if type(model).__mro__[1] is not KoffModelMixin:
        raise ValueError(
            f"detach: the model must be as attach left it, got a {type(model).__name__}, which "
            "FSDP shards; detach what koff.compact or koff.load returns"
        )
    restore_order(model)  # while there is still somebody who knows it
    for layer in arch.layers(model):
        for _, linear in arch.linears(layer, model):
            _unswap(linear)
        _unswap(arch.mlp(layer, model))
        _unswap(arch.attention(layer, model))
    for hook in state.hooks:
        hook.remove()
    _unswap(model)
    if state.attention is not None:
        model.set_attn_implementation(state.attention)
    del model.koff
    for name, p in model.named_parameters():
        p.requires_grad_(name in state.trainable)
    return model


@contextlib.contextmanager
def use_memory(model: PreTrainedModel, memory: MemoryArgument) -> Iterator[PreTrainedModel]:
    """Make a memory the default of every forward inside the ``with`` block, for code that cannot
    pass it.

    Args:
        model: an attached model.
        memory: a name, None, or a list with one entry per row.

    Raises:
        KeyError, ValueError: unknown memory, or koff is not attached.
    """
    with asked_by("use_memory"):
        state = require_attached(model)
    state.check(memory, "use_memory")
    with state.using(memory):
        yield model


def set_base_class(model: PreTrainedModel, cls: type) -> None:
    """Give an attached model another base class (the narrow form of its own), in place."""
    model.__class__ = _subclass(KoffModelMixin, cls)
