"""What one forward uses: which memory each row has, and the gate values. It is made once, at the
model's boundary, and travels with the call as an argument, so that recomputed layers and later
forwards cannot mix it up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import require
from .gates import Gates


class _Active:
    """Stands for "the memory set by use_memory, or none"; the default of every ``memory``
    argument."""

    def __repr__(self) -> str:
        return "<active memory>"

    def __deepcopy__(self, memo) -> _Active:
        return self


ACTIVE = _Active()
MemoryArgument = str | Sequence[str | None] | Tensor | _Active | None


@dataclass
class ForwardContext:
    """State of one forward.

    Args:
        slots: ids of the memories in use, in stacking order; () for none.
        ids: int64 [B], each row's index into ``slots`` or -1; None if every row uses ``slots[0]``.
        gates: z [I] of each layer, or None for all open.
        packed: gates that are fixed and whose kept neurons stand first: only these are computed.
        masks: attention masks built on demand, shared by the layers.
    """

    slots: tuple[int, ...] = ()
    ids: Tensor | None = None
    gates: list[Tensor] | None = None
    packed: Gates | None = None
    masks: dict = field(default_factory=dict)


class LayerScope:
    """The context of the (re)computation that a decoder layer is in: set on entering its attention,
    cleared by its MLP.

    The MLP and the linear layers get no keyword arguments in transformers; attention does, also
    when a checkpointed layer is recomputed.
    """

    def __init__(self, index: int):
        self.index = index
        self.idle = ForwardContext()
        self.context = self.idle

    def __deepcopy__(self, memo) -> LayerScope:
        return LayerScope(self.index)


def check_names(memory: object, names: list[str], where: str) -> None:
    """Refuse a name that is not among the model's memories."""
    if memory is None:
        return
    require(
        isinstance(memory, str),
        where,
        "a memory",
        "be a name or None",
        repr(memory),
        "pass a name, a list of names, or None",
        TypeError,
    )
    known = ", ".join(names) or "none: this model has no memories"
    require(
        memory in names,
        where,
        "a memory",
        f"be one of the model's ({known})",
        repr(memory),
        "check it",
        KeyError,
    )


def _resolve_tensor(memory: Tensor, rows: int, count: int, where: str) -> list[int] | Tensor:
    """A tensor of ids: read and checked on the CPU, left alone on a GPU and while compiling."""
    good = memory.dtype == torch.int64 and tuple(memory.shape) == (rows,)
    rule, got = f"be an int64 tensor of shape ({rows},)", f"{memory.dtype} {tuple(memory.shape)}"
    require(good, where, "memory ids", rule, got, "pass one id per row")
    if memory.device.type != "cpu" or torch.compiler.is_compiling():
        return memory
    ids = memory.tolist()
    bad = [i for i in ids if not -1 <= i < count]
    rule = f"lie in -1..{count - 1}"
    require(not bad, where, "memory ids", rule, bad, "check the names", KeyError)
    return ids


def resolve_ids(
    memory: MemoryArgument, rows: int, names: list[str], where: str
) -> list[int] | int | Tensor:
    """Memory argument -> one id for all rows, or a list of one per row, or a device tensor as it
    is.

    Raises:
        KeyError, TypeError, ValueError: unknown names, wrong types, or not one entry per row.
    """
    if memory is None or isinstance(memory, str):
        check_names(memory, names, where)
        return -1 if memory is None else names.index(memory)
    if isinstance(memory, Tensor):
        return _resolve_tensor(memory, rows, len(names), where)
    require(
        isinstance(memory, Sequence),
        where,
        "memory",
        "be a name, None, a list of these, or an int64 tensor",
        type(memory).__name__,
        "see the documentation",
        TypeError,
    )
    require(
        len(memory) == rows,
        where,
        "memory",
        f"have one entry per row ({rows})",
        len(memory),
        "match the batch",
    )
    for name in memory:
        check_names(name, names, where)
    return [-1 if name is None else names.index(name) for name in memory]


def choose_slots(
    ids: list[int] | int | Tensor, count: int, device: torch.device
) -> tuple[tuple[int, ...], Tensor | None]:
    """(slots, local ids) of a forward: only the memories that some row uses are stacked, so others
    get no gradient.

    A tensor on a GPU is not read back unless a gradient could be needed: without autograd all
    memories are stacked.
    """
    if isinstance(ids, Tensor):
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return (tuple(range(count)), ids) if count else ((), None)
        ids = ids.tolist()
    used = sorted({ids} if isinstance(ids, int) else set(ids))
    if used in ([], [-1]):
        return (), None
    if len(used) == 1:
        return (used[0],), None
    slots = tuple(i for i in used if i >= 0)
    local = {slot: position for position, slot in enumerate(slots)}
    return slots, torch.tensor([local.get(i, -1) for i in ids], device=device)
