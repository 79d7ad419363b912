"""Attach gates and memories to a transformers model in place, and take them off again.

Classes are swapped for subclasses of the same name (linear layers, MLPs, decoder layers, the model
itself), parameters keep their names, and everything learned lives in one submodule, ``model.koff``.
Base weights are frozen and never changed, but for the order of the MLP's neurons once the mask is
fixed (``neuron_order``), which ``detach`` undoes.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from koffkernels import GatedMLPLoRA, add_lora, gated_mlp, lora_linears
from koffkernels.dispatch import compute_dtype
from koffkernels.reference import ACTIVATIONS

from ..errors import asked_by, asker
from . import arch, attention, few_bits
from .arch import Site
from .class_swap import subclass, swap, unswap
from .config import KoffConfig, KVConfig, LoRAConfig
from .forward_context import Ahead, ForwardContext, MemoryArgument, Running
from .head import contiguous
from .memories import Memory, MemoryBank
from .memory_argument import Boundary, KoffModelMixin, tag_cache
from .neuron_order import (
    after_load,
    before_load,
    in_original_order,
    kept_part,
    restore_layer,
    restore_order,
)
from .prefill import fill_from_random_tokens
from .recurrent import has_begun, kept_in, run_from, start_of_rows
from .state import KoffState, is_attached, require_attached, the_attached


@dataclass
class Link:
    """How a module of a layer reaches what a forward needs.

    Args:
        bank: the model's memories.
        running: where it finds the context of the call that its layer is in.
        layer: number of the layer.
        site: of a linear layer: where its LoRA is.
        beside: of a linear layer: those that are called with the same x after it.
        activation: of an MLP: the kernels' name of it.
        state: of an MLP: the model's, whose gates say how its neurons are ordered.
    """

    bank: MemoryBank
    running: Running
    layer: int
    site: Site | None = None
    beside: tuple[nn.Module, ...] = ()
    activation: str | None = None
    state: KoffState | None = None


class _LayerMixin:
    """A decoder layer, whose modules find the context of its call while it runs.

    The layer and not the model sets it, since a checkpointed layer is recomputed in backward: later
    than other calls, and on a GPU in a thread of autograd's. transformers passes the decoder's
    keyword arguments on to its layers, and keeps them with what is to be recomputed.
    """

    _koff: Link

    def forward(self, *args, koff_context: ForwardContext | None = None, **kwargs):
        running = self._koff.running
        before, running.context = running.context, koff_context
        try:
            return super().forward(*args, **kwargs)
        finally:
            # Nothing is left for the next call: a layer that somebody calls on its own has no
            # memory, and nothing keeps this forward's tensors alive.
            running.context, running.ahead = before, None


class _LinearMixin:
    """A frozen linear layer plus the LoRA of each row's memory.

    q, k and v are one operation, though transformers calls three modules, with the same x: the
    first one computes all, and the others return what is there for this very tensor. Whoever calls
    one of them with another x gets that one alone.
    """

    _koff: Link

    def forward(self, x: Tensor) -> Tensor:
        link = self._koff
        running = link.running
        context, ahead = running.context, running.ahead
        if context is None or not context.memories:
            return super().forward(x)
        if ahead is not None and ahead.x is x and ahead.layer == link.layer:
            y = ahead.outputs.pop(link.site.linear, None)
            if len(ahead.outputs) == 0:
                running.ahead = None  # nothing is kept alive beyond its use
            if y is not None:
                return y
        linears = (self,)
        if link.beside and _is_plain(self) and all(map(_is_plain, link.beside)):
            linears = (self, *link.beside)
        dtype = compute_dtype(x, self.weight)
        lora = [
            link.bank.lora(linear._koff.site, context.memories, context.stacks, dtype)
            for linear in linears
        ]
        if all(part is None for part in lora):
            return super().forward(x)
        weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
        y, *others = lora_linears(x, weights, biases, lora=lora, memory_ids=context.rows)
        if others:
            names = [linear._koff.site.linear for linear in link.beside]
            running.ahead = Ahead(x, link.layer, dict(zip(names, others, strict=True)))
        return y


class _Frozen(torch.autograd.Function):
    """y = layer(x) of a frozen linear layer by its own code; dx = dy W, with W dequantised anew.

    torchao's forward would keep W for that, in 16 or 32 bits: all that few bits are to save.
    """

    @staticmethod
    def forward(ctx, x: Tensor, linear: nn.Module, own_forward: Callable[[Tensor], Tensor]):
        ctx.linear = linear
        return own_forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return dy @ few_bits.dense_weight(ctx.linear, dy.dtype), None, None


class FewBitsMixin:
    """A frozen linear layer in few bits plus the LoRA of each row's memory. The layer itself is
    computed by its own code."""

    _koff: Link

    def forward(self, x: Tensor) -> Tensor:
        link = self._koff
        context, lora = link.running.context, None
        x = x.to(compute_dtype(x, x))  # autocast's, as of any linear layer
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y = _Frozen.apply(x, self, super().forward)
        else:
            y = super().forward(x)
        if context is not None and context.memories:
            lora = link.bank.lora(link.site, context.memories, context.stacks, x.dtype)
        return y if lora is None else add_lora(y, x, lora, context.rows)


_OWN_LINEARS = (_LinearMixin, FewBitsMixin)


def _is_plain(linear: nn.Module) -> bool:
    """Whether its weight is all that a linear layer does: it is as attach left it, and nobody waits
    for its call."""
    return type(linear) is _PLAIN_LINEAR and not (
        linear._forward_pre_hooks
        or linear._forward_hooks
        or linear._backward_pre_hooks
        or linear._backward_hooks
        or "forward" in linear.__dict__
    )


class _MLPMixin:
    """The gated MLP with gates and memories.

    Its linear layers are not called: one operation takes their weights. Where they are in few bits,
    or somebody put an adapter around one, or hooks on it, they are called as in transformers.
    """

    _koff: Link

    def forward(self, x: Tensor) -> Tensor:
        link = self._koff
        context, index = link.running.context, link.layer
        if context is None or context.is_plain:
            return super().forward(x)
        kept, gates = context.kept_first, None if context.gates is None else context.gates[index]
        *first, down = arch.mlp_linears(self).values()
        if _is_plain(down) and all(map(_is_plain, first)):
            weights, lora = arch.mlp_weights(self), None
            if context.memories:
                dtype = compute_dtype(x, weights[0])
                lora = GatedMLPLoRA(
                    *(
                        link.bank.lora(Site(index, name), context.memories, context.stacks, dtype)
                        for name in arch.MLP_LINEARS
                    )
                )
            if kept is not None:
                if kept.width(index) is None:
                    gates = kept.factor(index)
                else:
                    weights, lora = kept_part(kept, index, weights, lora)
            y = gated_mlp(
                x,
                *weights,
                gates=gates,
                lora=lora,
                memory_ids=context.rows,
                activation=link.activation,
            )
        else:
            if kept is not None:
                restore_layer(self, kept, index)  # hooks see the neurons by their own numbers
                gates = kept.factor(index)
            outputs = [linear(x) for linear in first]
            gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
            h = ACTIVATIONS[link.activation](gate) * up
            y = down(h if gates is None else (h * gates).to(h.dtype))
        return y

    def __setattr__(self, name: str, value: object) -> None:
        """Put the neurons back into their order before an adapter is put around a linear layer: it
        may hold weights of the original order, or be merged before any forward."""
        link = self.__dict__.get("_koff")
        if link is not None and isinstance(value, nn.Module) and link.state.gates is not None:
            restore_layer(self, link.state.gates, link.layer)
        super().__setattr__(name, value)


class _RecurrentMixin:
    """A recurrent layer that starts where the memories of its rows say."""

    _koff: Link

    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        link = self._koff
        context, begun = link.running.context or ForwardContext(), has_begun(self, cache_params)
        start = None
        # Behind a cache that has begun, transformers' own forward goes on as it should, but for
        # padding, which wears a state down: that of rows whose text begins later.
        if context.memories and (not begun or attention_mask is not None):
            start = link.bank.start(link.layer, context.memories, context.stacks)
        if start is not None:
            if kwargs.get("cu_seq_lens_q") is not None:
                raise ValueError(
                    "forward: the rows must be one text each when a recurrent state is learned, "
                    "got packed documents; pass one document a row"
                )
            if begun:
                start = kept_in(self, cache_params)
            else:
                start = start_of_rows(start, context.ids, hidden_states.shape[0])
            return run_from(self, hidden_states, start, cache_params, attention_mask)
        return super().forward(
            hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs
        )


@dataclass
class Place:
    """Where a linear layer of koff's belongs.

    Args:
        parent: the module that has it.
        name: in ``parent``.
        seen: what was last found there: koff's linear layer, or an adapter around it.
    """

    parent: nn.Module
    name: str
    seen: nn.Module


@dataclass
class PatchCheck:
    """Forward pre-hook of the decoder: refuses what somebody put in the place of koff's modules
    after attach: a forward bound to one, or another linear layer.

    It would run instead, and leave the mask or the memories out without a word.

    Args:
        modules: every layer, with its MLP and attention.
        places: of their linear layers.
    """

    modules: list[nn.Module]
    places: list[Place]

    def __call__(self, decoder: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling():
            return
        arch.refuse_patched(self.modules, "forward: layers, MLPs and attention")
        for place in self.places:
            found = place.parent._modules[place.name]
            if found is not place.seen:
                if not any(isinstance(module, _OWN_LINEARS) for module in found.modules()):
                    raise TypeError(
                        f"forward: {place.name} must be the linear layer that koff was attached to,"
                        f" or lie around it, got a {type(found).__module__}.{type(found).__name__};"
                        " replace layers before koff.attach"
                    )
                place.seen = found


# What attach makes of ``nn.Linear``; looked at in every forward, where torch.compile can see it.
_PLAIN_LINEAR = subclass(_LinearMixin, nn.Linear)


def attach(model: PreTrainedModel, config: KoffConfig) -> PreTrainedModel:
    """Add gates and memories to a model, in place; until they are trained it computes what it did
    before.

    Args:
        model: a causal LM of a supported architecture, loaded by transformers as usual.
        config: what to learn.

    Returns:
        The same object, with ``model.koff``, and a keyword argument ``memory`` on ``forward`` and
        ``generate``. It says which memory the rows of this call use:

        - a name: all rows use that one;
        - None: no row uses any;
        - a list or tuple with a name or None for each row;
        - a tensor of ids, int64 [B], one for each row: places in ``model.koff.memory_names``, -1
          for none;
        - left out: the one of ``koff.use_memory`` around the call, else none.

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
    generator = torch.Generator().manual_seed(config.seed)
    with asked_by("attach"):
        with_kv = config.kv is not None and bool(config.memories)
        arch.check_supported(model, with_kv)
        if with_kv:
            arch.check_dropout(model)
        if config.lora is not None:  # under the names of this model, which is what is saved
            config = replace(config, lora=config.lora.on(model))
        state = KoffState(model, config, generator)
        for name in config.memories:
            state.memories.add(new_memory(model, name, config.lora, config.kv, generator))
    # A model from transformers is in evaluation mode: gates that were not would draw samples in it.
    state.train(model.training)
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

    Raises:
        ValueError: its learned tokens leave no position for a token.
    """
    limit = model.config.max_position_embeddings
    if kv is not None and kv.num_tokens >= limit:
        raise ValueError(
            f"{asker()}: num_tokens of the KV part must be less than max_position_embeddings "
            f"({limit}), got {kv.num_tokens}; shorten the memory"
        )
    shapes = {}
    if lora is not None:
        lora = lora.on(model)
        for site, module in arch.sites(model):
            if site.linear in lora.target_modules:
                shapes[site] = (module.in_features, module.out_features)
    return Memory(name, lora, kv, shapes, arch.cache_shapes(model), model.device, generator)


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
    computed = []  # modules whose forward is koff's alone
    places = []
    for index, layer in enumerate(arch.layers(model)):
        link = Link(state.memories, state.running, index)
        swap(layer, _LayerMixin, link)
        linears = dict(arch.linears(layer, model))
        for name, linear in linears.items():
            beside = ()
            if name == arch.SAME_INPUT[0]:
                beside = tuple(linears[other] for other in arch.SAME_INPUT[1:])
            take_linear(linear, replace(link, site=Site(index, name), beside=beside))
            parent, _, own = arch.linear_path(name, model).rpartition(".")
            places.append(Place(layer.get_submodule(parent), own, linear))
        module, mixer = arch.mlp(layer, model), arch.mixer(layer, model)
        swap(module, _MLPMixin, replace(link, activation=arch.activation(model), state=state))
        if arch.is_recurrent(layer, model):
            swap(mixer, _RecurrentMixin, link)
        else:
            mixer._koff = link  # for ``koff_attention``
        computed += [layer, module, mixer]
    inner = arch.decoder(model)
    # The decoder and not the whole model: generate, Trainer and users' own heads all pass by it.
    boundary = Boundary(state, tuple(inspect.signature(inner.forward).parameters), model.config)
    state.hooks = [
        inner.register_forward_pre_hook(PatchCheck(computed, places)),
        inner.register_forward_pre_hook(boundary, with_kwargs=True),
        inner.register_forward_hook(tag_cache, with_kwargs=True),
        model.get_output_embeddings().register_forward_pre_hook(contiguous),
        # Under the base's names, what goes out and comes in has the base's order of neurons.
        model.register_state_dict_post_hook(in_original_order),
        model.register_load_state_dict_pre_hook(before_load),
        model.register_load_state_dict_post_hook(after_load),
    ]
    swap(model, KoffModelMixin)
    use_koff_attention(model)


def take_linear(linear: nn.Module, link: Link) -> None:
    """Let a linear layer add the LoRA of each row's memory, in place.

    Args:
        linear: plain, or in a format that koff knows.
        link: with its site.
    """
    if few_bits.is_plain(linear):
        swap(linear, _LinearMixin, link)
    else:
        few_bits.hold_still(linear)
        swap(linear, FewBitsMixin, link)


def require_own(linears: Iterable[nn.Module]) -> None:
    """Refuse linear layers that are no longer those koff was attached to.

    Raises:
        TypeError: the first one that is not: an adapter's, for instance.
    """
    for linear in linears:
        if type(linear) is not _PLAIN_LINEAR and not isinstance(linear, FewBitsMixin):
            raise TypeError(
                f"{asker()}: the linear layers must be those that koff was attached to, got a "
                f"{type(linear).__module__}.{type(linear).__name__}; take adapters off first "
                "(PEFT: merge_and_unload() or unload())"
            )


def use_koff_attention(model: PreTrainedModel) -> None:
    """Switch to the attention implementation "koff" if some memory has a KV part."""
    state = model.koff
    # Only then, and once: without a prefix the user's own choice does, and ``detach`` restores it.
    if state.attention is None and any(memory.length for memory in state.memories):
        attention.register()
        with state.running.changing(asker()):
            state.attention = model.config._attn_implementation
            model.set_attn_implementation(attention.NAME)


@asked_by("detach")
def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take gates and memories off, in place; the base model is as before (a pruned one stays
    pruned).

    Args:
        model: an attached model.

    Returns:
        The same object.

    Raises:
        TypeError, ValueError: koff is not attached, or an adapter lies around a layer.
    """
    model = the_attached(model)
    state = model.koff
    if type(model).__mro__[1] is not KoffModelMixin:
        raise ValueError(
            f"detach: the model must be as attach left it, got a {type(model).__name__}, which "
            "FSDP shards; detach what koff.compact or koff.load returns"
        )
    require_own(linear for _, linear in arch.sites(model))
    with state.running.changing("detach"):
        restore_order(model)  # while there is still somebody who knows it
        for layer in arch.layers(model):
            for _, linear in arch.linears(layer, model):
                unswap(linear)
                few_bits.let_go(linear)
            unswap(arch.mlp(layer, model))
            mixer = arch.mixer(layer, model)
            if arch.is_recurrent(layer, model):
                unswap(mixer)
            else:
                vars(mixer).pop("_koff")
            unswap(layer)
        for hook in state.hooks:
            hook.remove()
        unswap(model)
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

    It holds for the thread or asyncio task that enters the block, as ``torch.no_grad`` does for a
    thread. A thread that is started inside sees nothing of it: pass ``memory=`` there, or start it
    with ``asyncio.to_thread`` or ``contextvars.copy_context().run``.

    Args:
        model: an attached model.
        memory: a name, None, or a list with one entry per row.

    Raises:
        KeyError, ValueError: unknown memory, or koff is not attached.
    """
    with asked_by("use_memory"):
        state = require_attached(model)
    state.check(memory, "use_memory")
    # Inside of a generate (in a callback), what is said here comes before what that was asked for.
    generation, state.running.generation = state.running.generation, None
    try:
        with state.active.set(memory):
            yield model
    finally:
        state.running.generation = generation


def set_base_class(model: PreTrainedModel, cls: type) -> None:
    """Give an attached model another base class (the narrow form of its own), in place."""
    model.__class__ = subclass(KoffModelMixin, cls)
