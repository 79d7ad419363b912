"""Remove the neurons whose gate is 0: narrow matrices, narrow LoRA, the same function.

Of a base in few bits the weights come from the checkpoint that it was quantised from.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import asked_by
from ..model import arch
from ..model.arch import Site
from ..model.attach import require_own, set_base_class, take_linear
from ..model.class_swap import unswap
from ..model.few_bits import dense_weight, forget_quantizer, is_plain, make_plain
from ..model.narrow import narrow_classes
from ..model.neuron_order import positions
from ..model.sharding import is_sharded, whole_model
from ..model.state import the_attached
from .binarize import binarize
from .original import Original

logger = logging.getLogger("koff")

# (module, parameter name, narrowed parameter)
Narrowed = tuple[nn.Module, str, nn.Parameter]


def _parameter(data: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=like.requires_grad)


def _narrow_layer(
    module: nn.Module, index: int, model: PreTrainedModel, kept: Tensor
) -> Iterator[Narrowed]:
    """The narrowed parameters of one layer's MLP, and of each memory's LoRA on it."""
    # The weights are in the order of a fixed mask, LoRA is in the original one.
    now, width = positions(model, index, kept), arch.width(module)
    for name, linear in arch.mlp_linears(module).items():
        dim, rows = arch.NEURON_DIM[name], arch.along_neurons(name, now, width)
        if is_plain(linear):
            yield linear, "weight", _parameter(linear.weight.index_select(dim, rows), linear.weight)
        rows = arch.along_neurons(name, kept, width)
        for memory in model.koff.memories:
            lora = memory.lora_at(Site(index, name))
            if lora is None:
                continue
            if dim == 0:  # the neurons are what comes out: rows of B
                yield lora, "b", _parameter(lora.b[rows], lora.b)
            else:
                yield lora, "a", _parameter(lora.a[:, rows], lora.a)


@torch.no_grad()
@asked_by("compact")
def compact(
    model: PreTrainedModel,
    *,
    inplace: bool = False,
    base: str | Path | None = None,
    revision: str | None = None,
    dequantize: bool = False,
) -> PreTrainedModel:
    """Remove exactly the neurons whose gate is 0; the result computes what the masked model does.

    A base in few bits becomes a plain one on the way, with gates or without: the weights of its
    linear layers are read from the checkpoint that it was quantised from, in the dtype they have
    there, one at a time. The result is then nearer to that checkpoint than the masked model was.

    Args:
        model: an attached model with gates. If ``binarize`` has not run, it is called with its
            defaults, which fixes the mask of this model in any case. Or one without gates, in few
            bits.
        inplace: narrow the given model layer by layer, freeing as it goes, and return it; otherwise
            a new model is returned, the given one keeps all its weights, and two models are never
            held (only the new, narrow one beside it). A model that FSDP shards is gathered on
            every process, all of which call this, and the new one is on the CPU in any case.
        base: of a model in few bits: folder or hub id of the checkpoint, in safetensors; None:
            where the model was loaded from.
        revision: of a hub id; None: that which the model was loaded from.
        dequantize: of a model in few bits: take its own weights, rounded as they are, instead of
            those of the checkpoint.

    Returns:
        A model with narrow MLPs, the same memories and no gates. With equal widths in all layers it
        is of the stock class; otherwise its config's ``model_type`` is "koff_<architecture>" with
        one width per layer.

    Raises:
        TypeError, ValueError: koff is not attached, there are no gates, an adapter lies around a
            layer, or there is no checkpoint of the model at ``base``; the model is as it was.

    Source: KOFF (arXiv 2605.29075), removal of masked neurons.
    """
    model = the_attached(model)
    state, few = model.koff, arch.is_few_bits(model)
    if state.gates is None and not few:
        raise ValueError(
            "compact: the model must have gates, got none; it is compact already, or was attached "
            "with target_sparsity=0"
        )
    if not few and (base is not None or dequantize):
        raise ValueError(
            "compact: base and dequantize must be left out for a plain model, got one of them; it "
            "has its own weights"
        )
    for module in arch.mlps(model):
        require_own(arch.mlp_linears(module).values())
    with contextlib.ExitStack() as held:
        original = None
        if few:
            require_own(linear for _, linear in arch.sites(model))
            if not dequantize:
                original = held.enter_context(Original(model, base, revision))
        if state.gates is not None and not state.gates.fixed:
            logger.warning(
                "koff: compact fixes the mask of the model, by koff.binarize with its defaults, "
                "since nobody has"
            )
            binarize(model)
        if is_sharded(model):
            model, inplace = whole_model(model), True
            state = model.koff
        kept = None
        if state.gates is not None:
            kept = [mask.nonzero()[:, 0] for mask in state.gates.masks]
        # A copy leaves the model alone, and its calls too.
        if inplace:
            held.enter_context(state.running.changing("compact"))
        # What a deep copy is to put in the place of a parameter, by the parameter's id: the copy is
        # then narrow from the beginning, and the wide weights are never copied.
        memo: dict[int, object] = {}
        for index, module in enumerate(arch.mlps(model) if kept is not None else ()):
            for owner, name, narrow in _narrow_layer(module, index, model, kept[index]):
                if inplace:
                    setattr(owner, name, narrow)
                else:
                    memo[id(getattr(owner, name))] = narrow
        if not inplace:
            model = copy.deepcopy(model, memo)
        if few:
            _make_plain(model, original, kept)
        if kept is not None:
            for module, rows in zip(arch.mlps(model), kept, strict=True):
                arch.set_width(module, len(rows))
            model.koff.kept = [rows.cpu() for rows in kept]
            model.koff.gates = None
            _set_config(model, [len(rows) for rows in kept])
    return model


def _make_plain(
    model: PreTrainedModel, original: Original | None, kept: list[Tensor] | None
) -> None:
    """Make the linear layers of a model in few bits plain, in place, one by one.

    Args:
        model: attached.
        original: where weights come from; None: the layers themselves.
        kept: the kept neurons of each layer, or None for all.
    """
    device, before, widths = model.device, model.dtype, arch.widths(model)
    dtype = before if original is None else original.dtype
    for site, linear in arch.sites(model):
        path, bias = arch.site_path(site, model), linear.bias
        if original is None:
            weight = dense_weight(linear, dtype)
        else:
            weight = original.read(f"{path}.weight")
            bias = None if bias is None else original.read(f"{path}.bias")
        if kept is not None and site.linear in arch.NEURON_DIM:
            dim, neurons = arch.NEURON_DIM[site.linear], kept[site.layer].to(weight.device)
            rows = arch.along_neurons(site.linear, neurons, widths[site.layer])
            weight = weight.index_select(dim, rows)
        link = linear._koff
        unswap(linear)
        make_plain(linear, *(t if t is None else t.to(device, dtype) for t in (weight, bias)))
        take_linear(linear, link)
        # As in a plain model, where ``detach`` gives them back the gradients they had; those in few
        # bits had none.
        model.koff.trainable += [f"{path}.{name}" for name, _ in linear.named_parameters()]
    if original is not None and dtype != before:
        # Embeddings, norms and the head, too, were loaded in another dtype than theirs.
        linears = {id(p) for _, linear in arch.sites(model) for p in linear.parameters()}
        for name, p in model.named_parameters():
            if not name.startswith("koff.") and id(p) not in linears and p.dtype == before:
                p.data = original.read(name).to(device, dtype)
    model.config.dtype = dtype
    forget_quantizer(model)
    logger.warning(
        "koff: the base was in few bits and is plain now, in %s: its weights are %s",
        str(dtype).removeprefix("torch."),
        "its own, dequantised" if original is None else f"those of {original.source}",
    )


def _set_config(model: PreTrainedModel, widths: list[int]) -> None:
    """Make class and config say what the widths are.

    With equal widths the model is a stock one, which every tool that reads such checkpoints opens;
    nothing in it names koff.
    """
    config = model.config
    stock = config.model_type.removeprefix(arch.NARROW_PREFIX)
    if len(set(widths)) > 1:
        config_class, model_class = narrow_classes(stock)
        config.intermediate_sizes = widths
    else:
        config_class, model_class = arch.stock_classes(stock)
        config.intermediate_size = widths[0]
        for name in ("intermediate_sizes", "auto_map"):  # of a backbone that was narrow before
            vars(config).pop(name, None)
    vars(config).pop("model_type", None)  # the class says it
    if type(config) is not config_class:
        # In place, and not a new config: the decoder and every layer hold this one.
        config.__class__ = config_class
        set_base_class(model, model_class)
