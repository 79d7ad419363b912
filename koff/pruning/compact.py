"""Remove the neurons whose gate is 0: narrow matrices, narrow LoRA, the same function."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import asked_by
from ..model import arch
from ..model.arch import Site
from ..model.attach import require_own, set_base_class
from ..model.narrow import narrow_classes
from ..model.neuron_order import positions
from ..model.sharding import is_sharded, whole_model
from ..model.state import the_attached
from .binarize import binarize

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
def compact(model: PreTrainedModel, *, inplace: bool = False) -> PreTrainedModel:
    """Remove exactly the neurons whose gate is 0; the result computes what the masked model does.

    Args:
        model: an attached model with gates; ``binarize`` is called with its defaults if it has not
            run.
        inplace: narrow the given model layer by layer, freeing as it goes, and return it; otherwise
            a new model is returned, the given one keeps all its weights, and two models are never
            held (only the new, narrow one beside it). A model that FSDP shards is gathered on
            every process, all of which call this, and the new one is on the CPU in any case.

    Returns:
        A model with narrow MLPs, the same memories and no gates. With equal widths in all layers it
        is of the stock class; otherwise its config's ``model_type`` is "koff_<architecture>" with
        one width per layer.

    Raises:
        TypeError, ValueError: koff is not attached, there are no gates, or an adapter lies around a
            layer of an MLP.

    Source: KOFF (arXiv 2605.29075), removal of masked neurons.
    """
    model = the_attached(model)
    state = model.koff
    if state.gates is None:
        raise ValueError(
            "compact: the model must have gates, got none; it is compact already, or was attached "
            "with target_sparsity=0"
        )
    for module in arch.mlps(model):
        require_own(arch.mlp_linears(module).values())
    if not state.gates.fixed:
        binarize(model)
    if is_sharded(model):
        model, inplace = whole_model(model), True
        state = model.koff
    kept = [mask.nonzero()[:, 0] for mask in state.gates.masks]
    # A copy leaves the model alone, and its calls too.
    with state.running.changing("compact") if inplace else contextlib.nullcontext():
        # What a deep copy is to put in the place of a parameter, by the parameter's id: the copy is
        # then narrow from the beginning, and the wide weights are never copied.
        memo: dict[int, object] = {}
        for index, (module, rows) in enumerate(zip(arch.mlps(model), kept, strict=True)):
            for owner, name, narrow in _narrow_layer(module, index, model, rows):
                if inplace:
                    setattr(owner, name, narrow)
                else:
                    memo[id(getattr(owner, name))] = narrow
        if not inplace:
            model = copy.deepcopy(model, memo)
        for module, rows in zip(arch.mlps(model), kept, strict=True):
            arch.set_width(module, len(rows))
        model.koff.kept = [rows.cpu() for rows in kept]
        model.koff.gates = None
        _set_config(model, [len(rows) for rows in kept])
    return model


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
