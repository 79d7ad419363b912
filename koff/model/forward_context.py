"""What one forward uses: which memory each row has, and the gate values.

It is made once, at the model's boundary, and travels with the call as an argument, so that a
recomputed layer, a second forward before the first one's backward, and accumulation over different
memories all see the call that they belong to.

The checks here run in every forward, also in a compiled one: they are told who asks (``where``) and
do not look it up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .gates import Gates
from .memories import Stacks


class _Active:
    """Stands for "the memory set by use_memory, or none".

    The default of every ``memory`` argument. It cannot be None, which asks for no memory.
    """

    def __repr__(self) -> str:
        return "<active memory>"

    def __reduce__(self) -> str:
        return "ACTIVE"  # by its name, also when copied: it is recognised by ``is``


ACTIVE = _Active()
MemoryArgument = str | Sequence[str | None] | Tensor | _Active | None


@dataclass
class ForwardContext:
    """State of one forward.

    Args:
        slots: ids of the memories in use, in stacking order; () for none.
        ids: int64 [B], each row's index into ``slots`` or -1; None if every row uses ``slots[0]``.
        gates: z [I] of each layer, or None for all open.
        kept_first: gates that are fixed, where layers' kept neurons stand first: only these are
            computed. ``gates`` is None then.
        stacks: where layers find what earlier forwards stacked; None: they stack for themselves.
        masks: attention masks built on demand, shared by the layers.
    """

    slots: tuple[int, ...] = ()
    ids: Tensor | None = None
    gates: list[Tensor] | None = None
    kept_first: Gates | None = None
    stacks: Stacks | None = None
    masks: dict = field(default_factory=dict)


class LayerScope:
    """The context of the (re)computation that a decoder layer is in.

    The MLP and the linear layers get no keyword arguments in transformers; attention does, also
    when a checkpointed layer is recomputed. So attention, the first of a layer, leaves the context
    here, and the MLP, the last, takes it away again: a layer that is called on its own finds none.
    """

    def __init__(self, index: int):
        self.index = index
        self.idle = ForwardContext()
        self.context = self.idle

    def __deepcopy__(self, memo) -> LayerScope:
        return LayerScope(self.index)  # a copy of a model is in no forward


def check_names(memory: object, names: list[str], where: str) -> None:
    """Refuse a name that is not among the model's memories.

    Raises:
        KeyError, TypeError: unknown, or neither a name nor None.
    """
    if memory is None:
        return
    if not isinstance(memory, str):
        raise TypeError(
            f"{where}: a memory must be a name or None, got {memory!r}; pass a name, a list of "
            "names, or None"
        )
    if memory not in names:
        known = ", ".join(names) or "none: this model has no memories"
        raise KeyError(
            f"{where}: a memory must be one of the model's ({known}), got {memory!r}; check it"
        )


def _on_host(ids: Tensor) -> bool:
    """Whether ids can be looked at. Reading those of a GPU would wait for everything that it still
    has to do, in every step of a decode."""
    return ids.device.type == "cpu" and not torch.compiler.is_compiling()


def _resolve_tensor(memory: Tensor, rows: int, count: int, where: str) -> list[int] | Tensor:
    if memory.dtype != torch.int64 or tuple(memory.shape) != (rows,):
        raise ValueError(
            f"{where}: memory ids must be an int64 tensor of shape ({rows},), "
            f"got {memory.dtype} {tuple(memory.shape)}; pass one id per row"
        )
    if not _on_host(memory):
        return memory
    ids = memory.tolist()
    bad = [i for i in ids if not -1 <= i < count]
    if bad:
        raise KeyError(
            f"{where}: memory ids must lie in -1..{count - 1}, got {bad}; check the names"
        )
    return ids


def resolve_ids(
    memory: MemoryArgument, rows: int, names: list[str], where: str
) -> list[int] | int | Tensor:
    """Return the ids that a memory argument means.

    Args:
        memory: what the user gave; not ``ACTIVE``.
        rows: B.
        names: of the model's memories, in the order of their ids.
        where: who asks.

    Returns:
        One id for all rows, a list of one per row, or a tensor on a GPU as it is; -1 is none.

    Raises:
        KeyError, TypeError, ValueError: unknown names, wrong types, or not one entry per row.
    """
    if memory is None or isinstance(memory, str):
        check_names(memory, names, where)
        return -1 if memory is None else names.index(memory)
    if isinstance(memory, Tensor):
        return _resolve_tensor(memory, rows, len(names), where)
    if not isinstance(memory, Sequence):
        raise TypeError(
            f"{where}: memory must be a name, None, a list of these, or an int64 tensor, "
            f"got {type(memory).__name__}; see the documentation"
        )
    if len(memory) != rows:
        raise ValueError(
            f"{where}: memory must have one entry per row ({rows}), got {len(memory)}; match the "
            "batch"
        )
    for name in memory:
        check_names(name, names, where)
    return [-1 if name is None else names.index(name) for name in memory]


def choose_slots(
    ids: list[int] | int | Tensor, count: int, device: torch.device
) -> tuple[tuple[int, ...], Tensor | None]:
    """Return which memories a forward stacks, and each row's place among them.

    Only memories that some row uses are stacked, so that any other has ``grad is None`` after
    backward: under a gradient of zeros, momentum and weight decay would still move it.

    Args:
        ids: of ``resolve_ids``.
        count: number of the model's memories.
        device: where the local ids are needed.

    Returns:
        (slots, local ids) as in ``ForwardContext``.
    """
    if isinstance(ids, Tensor):
        # Not read back unless a gradient could be needed: without autograd all are stacked.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return (tuple(range(count)), ids) if count else ((), None)
        ids = ids.tolist()
    used = sorted({ids} if isinstance(ids, int) else set(ids))
    if used in ([], [-1]):
        return (), None
    if len(used) == 1:  # the same for every row: kernels then need no ids
        return (used[0],), None
    slots = tuple(i for i in used if i >= 0)
    local = {slot: position for position, slot in enumerate(slots)}
    return slots, torch.tensor([local.get(i, -1) for i in ids], device=device)
