"""What one call uses: which memory each row has, and the gate values.

A ``ForwardContext`` is made once, at the model's boundary, and travels with the call as an argument
down to the decoder layers. So a layer that is recomputed (in whatever thread backward runs), a
second forward before the first one's backward, and forwards that run side by side in other threads
all see the call that they belong to.

The modules of a layer get no such argument from transformers. While a layer runs, they find its
context in ``Running``, which every thread has of its own.

The checks here run in every forward, also in a compiled one: they are told who asks (``where``) and
do not look it up.
"""

from __future__ import annotations

import contextlib
import enum
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import Cache

from koffkernels import RowGroups

from .gates import Gates
from .memories import Memory, Roster, Stacks

if TYPE_CHECKING:
    from .decode_graph import Decoding


class Unnamed(enum.Enum):
    """What a ``memory`` argument can say beside names and None, which asks for no memory."""

    ACTIVE = "the memory of use_memory, or none"
    BASE = "the base model: no memory, and every gate open"

    def __repr__(self) -> str:
        return f"<{self.value}>"


ACTIVE = Unnamed.ACTIVE  # the default of every ``memory`` argument
BASE = Unnamed.BASE  # for a model that is its own teacher, and to fill a learned cache
MemoryArgument = str | Sequence[str | None] | Tensor | Unnamed | None
# What a call said: one memory for all rows, or the name of each row's. ACTIVE: it cannot be known.
Said = str | tuple[str | None, ...] | Unnamed | None


@dataclass
class ForwardContext:
    """State of one forward.

    Args:
        memories: those in use, in stacking order; () for none. The memories themselves: whatever is
            added to the model or taken out of it meanwhile, this forward ends with what it began.
        rows: each row's index into ``memories``, sorted out once for all layers; None if every row
            uses the first.
        gates: z [I] of each layer, or None for all open.
        kept_first: gates that are fixed, where layers' kept neurons stand first: only these are
            computed. ``gates`` is None then.
        stacks: where layers find what earlier forwards stacked; None: they stack for themselves.
        said: what a cache that this forward fills was filled under; see ``said_by``.
        masks: attention masks built on demand, shared by the layers.
    """

    memories: tuple[Memory, ...] = ()
    rows: RowGroups | None = None
    gates: list[Tensor] | None = None
    kept_first: Gates | None = None
    stacks: Stacks | None = None
    said: Said = None
    masks: dict = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether this is a forward of the base model: no memory, and nothing masked."""
        none = len(self.memories) == 0  # torch.compile cannot trace `not`
        return none and self.gates is None and self.kept_first is None

    @property
    def ids(self) -> Tensor | None:
        """int64 [B], each row's index into ``memories`` or -1; None if every row uses the first."""
        return None if self.rows is None else self.rows.ids


@dataclass
class Ahead:
    """What linear layers will return for an input that another one was called with just before:
    it computed them together.

    Args:
        x: the input; they are for this very tensor.
        layer: number of the decoder layer.
        outputs: of each such linear layer that was not called yet, by its name.
    """

    x: Tensor
    layer: int
    outputs: dict[str, Tensor]


@dataclass
class Generation:
    """What lasts one ``generate``.

    Args:
        memory: of its rows: what a forward that says nothing uses.
        roster: the model's memories at its beginning, by which names and ids are understood.
        rooms: of each row, how many tokens the positions have room for behind prefix and prompt;
            None for a row without a prefix.
        ends: where rows end for that reason, each at its own length of ``input_ids``, int64 [B].
        static_cache: the static cache that it was given.
        decoding: its decode steps, where they may be captured.
        prompt_cache: the static cache that the prompt was read into.
        first_keys: the first visible key of each row of the prompt, int64 [B, 1, 1, 1]; every later
            one is visible too. None: to be looked up in the mask.
    """

    memory: MemoryArgument
    roster: Roster
    rooms: tuple[int | None, ...] = ()
    ends: Tensor | None = None
    static_cache: Cache | None = None
    decoding: Decoding | None = None
    prompt_cache: Cache | None = None
    first_keys: Tensor | None = None


class Calls:
    """The calls of one model that run, in all threads, so that it is not changed beneath them.

    Calls take no lock for it. Each thread counts its own and then looks whether a change is under
    way; whoever changes the model says so and then looks at the counts. One of them sees the other.

    Attributes:
        lock: held while a thread is added, and while one changes the model.
        threads: the counts.
        change: what is being done to the model, or None.
    """

    class OfThread:
        """The count of one thread; ``Running`` holds it, so it dies with the thread."""

        running = 0

    def __init__(self):
        self.lock = threading.Lock()
        self.threads: WeakSet[Calls.OfThread] = WeakSet()
        self.change: str | None = None

    def __reduce__(self) -> tuple:
        return Calls, ()  # none runs of a copy


class Running(threading.local):
    """What the current thread runs at this moment, of one model.

    A thread runs one layer at a time and one ``generate`` at a time, also under asyncio: neither
    gives way to another task. Whoever enters one puts the outer one back when it ends.

    Attributes:
        context: of the decoder layer that runs; None outside of layers, and in one that somebody
            calls on its own.
        ahead: outputs of linear layers of the decoder layer that runs, computed before they are
            called; None for none.
        generation: the ``generate`` that runs, or None.
        calls: those of all threads.
    """

    # In __init__, which every thread runs at its first look: torch.compile would take a default of
    # the class for the value.
    def __init__(self, calls: Calls):
        self.context: ForwardContext | None = None
        self.ahead: Ahead | None = None
        self.generation: Generation | None = None
        self.calls = calls
        self._own = Calls.OfThread()
        with calls.lock:
            calls.threads.add(self._own)

    def __reduce__(self) -> tuple:
        return Running, (self.calls,)  # a copy of a model runs nothing

    def begin(self) -> None:
        """Count a call of this thread, which must ``end`` once for it; wait for a change of the
        model to end first."""
        while True:
            self._own.running += 1
            if self.calls.change is None:
                return
            self._own.running -= 1
            with self.calls.lock:
                pass

    def end(self) -> None:
        """Count a call of this thread that has ended."""
        self._own.running -= 1

    @contextlib.contextmanager
    def changing(self, what: str) -> Iterator[None]:
        """Change the model inside the ``with`` block; calls that would begin in it wait.

        Args:
            what: who asks.

        Raises:
            RuntimeError: a call runs, in another thread or (as in a hook) in this one.
        """
        with self.calls.lock:
            self.calls.change = what
            try:
                running = sum(thread.running for thread in self.calls.threads)
                if running:
                    raise RuntimeError(
                        f"{what}: no call of the model must run meanwhile, got {running} that do; "
                        "wait for them"
                    )
                yield
            finally:
                self.calls.change = None


class ActiveMemory:
    """The memory that ``use_memory`` set, of each thread and each asyncio task its own."""

    def __init__(self):
        # Taken out of the context again at the end of each block, so it does not outlive the model.
        self._memory: ContextVar[MemoryArgument] = ContextVar("koff_active", default=ACTIVE)
        self._lock = threading.Lock()
        self._blocks = 0
        # Whether any thread is in a block. torch.compile can follow this, but no context variable.
        self.anywhere = False

    def __reduce__(self) -> tuple:
        return ActiveMemory, ()  # a copy of a model is in no block

    def get(self) -> MemoryArgument:
        """Return the memory of the current thread or task; None if it set none."""
        if not self.anywhere:
            return None
        memory = self._memory.get()
        if memory is not ACTIVE:
            return memory
        warnings.warn(
            "koff: a call that names no memory runs without one, while use_memory holds in another "
            "thread or task only; pass memory= to the call, or call use_memory where it runs",
            RuntimeWarning,
            stacklevel=2,
        )
        return None

    @contextlib.contextmanager
    def set(self, memory: MemoryArgument) -> Iterator[None]:
        """Make ``memory`` the one of the current thread or task inside the ``with`` block."""
        self._count(1)
        token = self._memory.set(memory)
        try:
            yield
        finally:
            self._count(-1)
            self._memory.reset(token)

    def _count(self, by: int) -> None:
        with self._lock:
            self._blocks += by
            self.anywhere = self._blocks > 0


def check_names(memory: object, names: Sequence[str], where: str) -> None:
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


def said_by(memory: MemoryArgument, roster: Roster) -> Said:
    """Return what a memory argument said, to be compared with what another call said.

    Args:
        memory: a valid one; not ``ACTIVE``.
        roster: the model's memories.
    """
    if isinstance(memory, Tensor):
        if not _on_host(memory):
            return ACTIVE
        memory = [None if i < 0 else roster.names[i] for i in memory.tolist()]
    if memory is None or isinstance(memory, (str, Unnamed)):
        return memory
    return memory[0] if len(set(memory)) == 1 else tuple(memory)


def goes_on(before: Said, now: Said, rows: int) -> bool:
    """Return whether a call may go on with a cache that another one filled.

    Args:
        before, now: what was said for the cache, and by the call.
        rows: B of the call.
    """
    if before == now or ACTIVE in (before, now):
        return True
    each_before, each = (s if isinstance(s, tuple) else (s,) * rows for s in (before, now))
    # Of other rows than there were (some have ended, or were multiplied), all that can be said is
    # whether their memories are among those of the cache.
    return each == each_before or (len(each) != len(each_before) and {*each} <= {*each_before})


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
    memory: MemoryArgument, rows: int, names: Sequence[str], where: str
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
