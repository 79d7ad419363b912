"""Order each MLP's neurons so that the kept ones come first, once the mask is fixed.

A masked MLP then runs on the leading rows and columns of its own weights, without a copy, and every
GEMM leaves the pruned neurons out. The function stays the same; a permutation of neurons changes
nothing but the order of a sum. LoRA keeps the original order and is gathered on the way.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from koffkernels import GatedMLPLoRA

from . import arch
from .few_bits import is_plain
from .gates import Gates

# Held while a layer is put back into its order within a forward: of several threads one does it.
_restoring = threading.Lock()


class KeptPart(NamedTuple):
    """The base weights and LoRA of the kept neurons alone."""

    weights: tuple[Tensor, Tensor, Tensor]
    lora: GatedMLPLoRA | None


def _can_reorder(module: nn.Module) -> bool:
    """Whether the weights can be reordered here: not sharded, not in few bits, not on the meta
    device, and each in a linear layer that koff was attached to. An adapter that somebody put
    around one counts neurons in the original order."""
    return all(
        "_koff" in vars(linear)
        and is_plain(linear)
        and type(linear.weight.data) is Tensor
        and linear.weight.device.type != "meta"
        for linear in arch.mlp_linears(module).values()
    )


def _reorder(module: nn.Module, order: Tensor) -> None:
    for name, linear in arch.mlp_linears(module).items():
        weight = linear.weight
        rows = arch.along_neurons(name, order, len(order)).to(weight.device)
        ordered = weight.index_select(arch.NEURON_DIM[name], rows)
        # The parameter stays the one that others hold. On a GPU its memory does too, since graphs
        # have recorded the address. On a CPU it may be a file's, mapped: pages that are written
        # there would be this process's own until the last tensor of that file is gone.
        if weight.device.type == "cpu":
            weight.data = ordered
        else:
            weight.copy_(ordered)


@torch.no_grad()
def move_kept_first(model: PreTrainedModel) -> None:
    """Move the neurons of the fixed mask to the front of every MLP, in place.

    Args:
        model: an attached model whose mask is fixed. Sharded weights stay as they are, and a layer
            with an adapter of somebody else's too: the mask is then multiplied in.
    """
    gates = model.koff.gates
    for index, (module, mask) in enumerate(zip(arch.mlps(model), gates.masks, strict=True)):
        if gates.width(index) is not None or not _can_reorder(module):
            continue
        order = torch.cat([mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]])
        _reorder(module, order)
        gates.set_order_(index, order, int(mask.sum()))


@torch.no_grad()
def restore_order(model: PreTrainedModel) -> None:
    """Undo ``move_kept_first``, in place and bit for bit; nothing happens if it did not run.

    Args:
        model: an attached model.
    """
    gates = model.koff.gates
    if gates is not None:
        for index, module in enumerate(arch.mlps(model)):
            restore_layer(module, gates, index)


@torch.no_grad()
def restore_layer(module: nn.Module, gates: Gates, index: int) -> None:
    """Undo ``move_kept_first`` of one layer, in place; nothing happens if it did not run there.

    Args:
        module: the layer's MLP.
        gates: of the model.
        index: of the layer.
    """
    with _restoring:
        if gates.width(index) is not None:
            _reorder(module, gates.order(index).argsort())
            gates.drop_order_(index)


@torch.no_grad()
def in_original_order(model: PreTrainedModel, tensors: dict[str, Tensor], prefix: str, _) -> None:
    """Hook of ``state_dict``: base weights as they were before ``move_kept_first``, in copies,
    since masks and LoRA beside them are in the original order too."""
    gates = model.koff.gates
    for index in range(0 if gates is None else len(gates.masks)):
        if gates.width(index) is None:
            continue
        back = gates.order(index).argsort()
        for name in arch.architecture(model.config.model_type).mlp_linears:
            key = f"{prefix}{arch.site_path(arch.Site(index, name), model)}.weight"
            rows = arch.along_neurons(name, back, len(back)).to(tensors[key].device)
            tensors[key] = tensors[key].index_select(arch.NEURON_DIM[name], rows)


def before_load(model: PreTrainedModel, tensors: dict[str, Tensor], prefix: str, *_) -> None:
    """Hook of ``load_state_dict``: what comes is in the original order."""
    model.koff.check_loadable(tensors, f"{prefix}koff.")
    with model.koff.running.changing("load_state_dict"):
        restore_order(model)


def after_load(model: PreTrainedModel, _) -> None:
    """Hook of ``load_state_dict``: reorder anew, by the mask that came."""
    if model.koff.gates is not None and model.koff.gates.fixed:
        move_kept_first(model)


def positions(model: PreTrainedModel, index: int, neurons: Tensor) -> Tensor:
    """Return where neurons of a layer (original numbers) are in its weights now."""
    gates = model.koff.gates
    if gates.width(index) is None:
        return neurons
    return gates.order(index).argsort()[neurons]


def kept_part(
    gates: Gates, index: int, weights: tuple[Tensor, Tensor, Tensor], lora: GatedMLPLoRA | None
) -> KeptPart:
    """Return the leading part of a reordered layer's weights, and the matching rows and columns of
    its LoRA.

    Args:
        gates: of the model.
        index: of a layer whose kept neurons stand first.
        weights: gate [I, H], up [I, H], down [H, I].
        lora: of the three layers, in the original order, or None.
    """
    width = gates.width(index)
    gate, up, down = weights
    narrow = gate[:width], up[:width], down[:, :width]  # views: nothing is copied
    if lora is None:
        return KeptPart(narrow, None)
    # LoRA is gathered in every call: it is small, it trains, and on disk and in checkpoints it is
    # in the original order, whatever the mask.
    rows = gates.order(index)[:width]
    gate_lora, up_lora = (
        None if part is None else part._replace(b=part.b.index_select(-2, rows))
        for part in (lora.gate, lora.up)
    )
    down_lora = lora.down
    if down_lora is not None:
        down_lora = down_lora._replace(a=down_lora.a.index_select(-1, rows))
    return KeptPart(narrow, GatedMLPLoRA(gate_lora, up_lora, down_lora))
