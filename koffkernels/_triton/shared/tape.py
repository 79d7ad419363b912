"""What a call does to its tensors, written down: see ``koffkernels.replay`` for when it is played.

On a tape stand the functions of torch that were called, most of them for views and empty tensors,
and the launches. Each value that they take or give has a slot: the call's own tensors first, then
whatever is the same in every call of its kind, and what steps make.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.runtime import driver

from ... import dispatch
from ...replay import reads
from . import direct
from . import launch as launches

# They give memory that nobody has written to: on the tape stands how it lies.
_EMPTY = {torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty}
# They give the tensor itself where it is as it is asked for, which is then so in every call.
_CASTS = {Tensor.to, Tensor.contiguous}
# They give part of a tensor's own memory, unless they must copy.
_VIEWS = {
    Tensor.__getitem__, Tensor.chunk, Tensor.narrow, Tensor.reshape, Tensor.split,
    Tensor.split_with_sizes, Tensor.t, Tensor.transpose, Tensor.unsqueeze, Tensor.view,
}  # fmt: skip

Slots = list  # of values, by number
Step = Callable[[Slots, Any], None]  # the second is the stream


class _Noted(NamedTuple):
    """A step as it was done.

    Args:
        step: that does it again.
        touched: slots that it reads as they are, or makes.
        views: of these, what it makes if that is nothing but views of a tensor that is there.
    """

    step: Step
    touched: list[int]
    views: Sequence[int]


class Tape:
    """The steps of a call.

    Args:
        slots: what each holds before the first step.
        steps: each with the slots that no later one takes. They are emptied behind it, so that
            memory comes free as early as where the call runs as it is written.
        result: of the slots, what the call returns.
        kernels: those launched.
    """

    def __init__(
        self,
        slots: Slots,
        steps: list[tuple[Step, tuple[int, ...]]],
        result: Callable[[Slots], Any],
        kernels: Iterable[Any],
    ):
        self.slots, self.steps, self.result, self.kernels = slots, steps, result, kernels
        self.programmatic = dispatch.is_programmatic()
        # For whom the kernels were compiled; nobody, where they are interpreted.
        self.driver = driver.active if direct.ENABLED else None
        self.device = self.driver.get_current_device() if direct.ENABLED else None

    def usable(self) -> bool:
        """Return whether launches may go now where they went when they were recorded."""
        if launches.collecting() or dispatch.is_programmatic() != self.programmatic:
            return False
        if self.driver is None or not direct.ENABLED:
            return self.driver is None and not direct.ENABLED
        return (
            driver.active is self.driver
            and self.driver.get_current_device() == self.device
            and not direct.observed(self.kernels)
        )

    def play(self, tensors: list[Tensor]) -> Any:
        """Return what the call returns for these tensors."""
        slots = self.slots.copy()
        slots[: len(tensors)] = tensors
        stream = None if self.driver is None else self.driver.get_current_stream(self.device)
        for step, last in self.steps:
            step(slots, stream)
            for slot in last:
                slots[slot] = None
        return self.result(slots)


def record(call: Callable[[], Any], tensors: Sequence[Tensor]) -> tuple[Any, Tape | str | bool]:
    """Make a call that was made before, with other tensors.

    Args:
        call: what is called.
        tensors: all that it takes.

    Returns:
        What it returns, and a tape that does the same to others; in words why there can be none;
        False while there is none: somebody wants to see launches as they are written, or each would
        have to change the device.
    """
    if launches.collecting() or direct.observed(()):
        return call(), False
    if any(t.is_cuda and t.get_device() != torch.cuda.current_device() for t in tensors):
        return call(), False
    with _Recorder(tensors) as recorder:
        result = call()
    return result, recorder.tape(result)


class _Recorder(TorchFunctionMode):
    """Writes down what is done in the ``with`` block."""

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        self.given = len(tensors)
        self.slots: Slots = [None] * self.given
        # The weak reference says whether it is still that tensor that has this id.
        self.known = {id(t): (slot, weakref.ref(t)) for slot, t in enumerate(tensors)}
        self.steps: list[_Noted] = []
        # Slot of a view -> the slot of whose memory it is a part, and where that begins, in bytes.
        self.parts: dict[int, tuple[int, int]] = {}
        self.addresses: dict[int, int] = {}  # slot of a view -> that of where it begins
        self.kernels: set[Any] = set()
        self.refused: str | None = None  # why there can be no tape

    def __enter__(self) -> _Recorder:
        super().__enter__()
        launches.noted_by(self.launch)
        return self

    def __exit__(self, *exception: Any) -> None:
        launches.noted_by(None)
        super().__exit__(*exception)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not self.refused:
            self._operator(function, args, kwargs, result)
        return result

    def _operator(self, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        name = getattr(function, "__name__", str(function))
        if reads(function, result):
            self.refused = f"{name} reads a tensor"
            return
        results = result if isinstance(result, (tuple, list)) else (result,)
        if not results or not all(isinstance(part, Tensor) for part in results):
            return
        # Which of the vendors' attentions runs is chosen by more than a kind holds.
        if "attention" in name:
            self.refused = f"{name} chooses for itself what runs"
            return
        if function in _CASTS and result is args[0]:
            return
        touched: list[int] = []
        if function in _EMPTY:
            self._add(_empty(result, self._new(result, touched)), touched)
            return
        pick = self._picker(args, touched)
        pick_options = self._options(kwargs, touched)
        new = [self._slot(part, touched, makes=True) for part in results]
        target = new[0] if result is results[0] else tuple(new)
        views: Sequence[int] = ()
        # What has no elements has no address.
        if function in _VIEWS and all(
            part.numel() > 0 and _share_memory(part, args[0]) for part in results
        ):
            base = self._slot(args[0], touched)
            root, begin = self.parts.get(base, (base, 0))
            for slot, part in zip(new, results, strict=True):
                offset = part.data_ptr() - args[0].data_ptr()
                self.parts[slot] = root, begin + offset
            views = new
        self._add(_operator(function, pick, pick_options, target), touched, views)

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        args: dict[str, Any],
        options: direct.Options,
        variant: direct.Variant | None,
    ) -> None:
        """Write a launch down; ``variant`` is what ran, if that can run without Triton."""
        if direct.ENABLED and variant is None:
            self.refused = f"{kernel.__name__} goes Triton's way"
        if self.refused:
            return
        touched: list[int] = []
        self.kernels.add(kernel)
        if variant is None:
            pick = self._picker(tuple(args.values()), touched)
            self._add(_launch(kernel, grid, tuple(args), pick, options), touched)
        else:
            in_order = tuple(args[p.name] for p in kernel.params)
            pick = self._picker(in_order, touched, for_kernel=True)
            self._add(_direct(variant, grid, pick), touched)

    def tape(self, result: Any) -> Tape | str:
        """Return the tape of a call that returned ``result``, or why there is none."""
        kept: list[int] = []
        pick = self._picker((result,), kept)
        if self.refused:
            return self.refused
        if not self.kernels:
            return "it launches nothing"
        # Backwards: views that only kernels read, which got their addresses, are not made.
        read, steps = set(kept), []
        for step, touched, views in reversed(self.steps):
            if views and read.isdisjoint(views):
                continue
            read.update(touched)
            steps.append((step, touched))
        made = {slot for slot in read if slot >= self.given}
        made.difference_update(kept)
        emptied = []
        for step, touched in steps:
            emptied.append((step, tuple(made.intersection(touched))))
            made.difference_update(touched)
        return Tape(self.slots, emptied[::-1], lambda slots: pick(slots)[0], self.kernels)

    def _add(self, step: Step, touched: list[int], views: Sequence[int] = ()) -> None:
        self.steps.append(_Noted(step, touched, views))

    def _new(self, tensor: Tensor, touched: list[int]) -> int:
        """Return a slot for what a step makes."""
        self.slots.append(None)
        slot = len(self.slots) - 1
        self.known[id(tensor)] = slot, weakref.ref(tensor)
        touched.append(slot)
        return slot

    def _slot(self, value: Any, touched: list[int], makes: bool = False) -> int:
        """Return the slot of a value, which is a new one of a tensor only where a step makes it."""
        if not isinstance(value, Tensor):
            self.slots.append(value)
            return len(self.slots) - 1
        slot, tensor = self.known.get(id(value), (0, lambda: None))
        if tensor() is value:
            touched.append(slot)
            return slot
        if not makes:
            self.refused = "it takes a tensor that it was not given"
        return self._new(value, touched)

    def _address(self, value: Any, touched: list[int]) -> int:
        """Return the slot of a value as kernels take it. For them a view is an address: of the
        tensor whose memory that is, or where in it the view begins."""
        slot = self._slot(value, touched)
        if slot not in self.parts:
            return slot
        touched.remove(slot)
        root, offset = self.parts[slot]
        touched.append(root)  # whose memory must be there
        if offset == 0:
            return root
        if slot not in self.addresses:
            self.slots.append(None)
            self.addresses[slot] = len(self.slots) - 1
            self._add(_address(root, offset, self.addresses[slot]), [root, self.addresses[slot]])
        touched.append(self.addresses[slot])
        return self.addresses[slot]

    def _picker(
        self, values: tuple, touched: list[int], for_kernel: bool = False
    ) -> Callable[[Slots], tuple]:
        """Return what picks these values out of the slots; tuples and lists of tensors, as operands
        are, are put together anew, for a compiled kernel as tuples."""
        slots: list[int] = []
        groups: list[tuple[int, Callable | None, Callable[[Slots], tuple]]] = []
        for value in values:
            if isinstance(value, (tuple, list)) and _has_tensors(value):
                slots.append(self._slot(None, touched))
                touched.append(slots[-1])
                make = None if for_kernel else getattr(type(value), "_make", type(value))
                groups.append((slots[-1], make, self._picker(tuple(value), touched, for_kernel)))
            else:
                slots.append((self._address if for_kernel else self._slot)(value, touched))
        flat = direct.getter(slots)
        if not groups:
            return flat

        def pick(values: Slots) -> tuple:
            for slot, make, parts in groups:
                values[slot] = parts(values) if make is None else make(parts(values))
            return flat(values)

        return pick

    def _options(
        self, options: dict[str, Any], touched: list[int]
    ) -> Callable[[Slots], dict[str, Any]]:
        """Return what gives these options of a function; mostly none is a tensor."""
        if not _has_tensors(options.values()):
            return lambda slots: options
        names, pick = tuple(options), self._picker(tuple(options.values()), touched)
        return lambda slots: dict(zip(names, pick(slots), strict=True))


def _share_memory(x: Tensor, y: Tensor) -> bool:
    return x is not y and x.untyped_storage()._cdata == y.untyped_storage()._cdata


def _has_tensors(values: Iterable[Any]) -> bool:
    return any(
        isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and _has_tensors(value))
        for value in values
    )


def _empty(like: Tensor, slot: int) -> Step:
    """Return a step that makes memory which lies like that of ``like``."""
    size, stride, dtype, device = like.shape, like.stride(), like.dtype, like.device

    def step(slots: Slots, stream: Any) -> None:
        slots[slot] = torch.empty_strided(size, stride, dtype=dtype, device=device)

    return step


def _address(root: int, offset: int, slot: int) -> Step:
    """Return a step that says where a part of a tensor's memory begins."""

    def step(slots: Slots, stream: Any) -> None:
        slots[slot] = slots[root].data_ptr() + offset

    return step


def _operator(
    function: Callable,
    pick: Callable[[Slots], tuple],
    pick_options: Callable[[Slots], dict[str, Any]],
    target: int | tuple[int, ...],
) -> Step:
    """Return a step that calls a function of torch's; ``target`` is where its results go."""

    def step(slots: Slots, stream: Any) -> None:
        result = function(*pick(slots), **pick_options(slots))
        if type(target) is int:
            slots[target] = result
        else:
            for slot, part in zip(target, result, strict=True):
                slots[slot] = part

    return step


def _direct(variant: direct.Variant, grid: tuple[int, ...], pick: Callable[[Slots], tuple]) -> Step:
    """Return a step that launches a compiled kernel as ``direct.launch`` does."""
    run, function, metadata, compiled = variant
    x, y, z = (*grid, 1, 1)[:3]

    def step(slots: Slots, stream: Any) -> None:
        run(x, y, z, stream, function, metadata, None, None, None, *pick(slots))

    step.compiled = compiled  # held, see ``Variant``
    return step


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    names: tuple[str, ...],
    pick: Callable[[Slots], tuple],
    options: direct.Options,
) -> Step:
    """Return a step that launches a kernel as Triton does, which is how it is interpreted."""

    def step(slots: Slots, stream: Any) -> None:
        launches.run(kernel, grid, dict(zip(names, pick(slots), strict=True)), options)

    return step
