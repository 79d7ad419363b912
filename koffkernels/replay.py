"""Calls of a kind that was made twice are replayed: what they allocate, launch and ask of torch,
with none of the Python that decides it.

Checks, the choice of a backend, of a route and of tiles, and the arguments of every launch take
longer on the host than small kernels run. All of it follows from the *kind* of a call: its
arguments but for what is in the tensors, and the settings that ours look at. So the first call of a
kind runs as it is written, which compiles; the second is recorded on a tape
(``_triton.shared.tape``); later ones replay it with their own tensors.

Where autograd records, what lies around an operation's ``autograd.Function`` is skipped alike: from
the third call of a kind on the Function is called straight away, and replays its forward, and
later its backward.

A kind must hold all that anything of ours decides by, bad arguments included: a call is replayed
unchecked because one of its kind has passed every check. ``tests/kernels/test_replay.py`` holds
replays against calls as they are written.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import operator
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from . import checks, dispatch, routes

# Where kernels are launched: nowhere without CUDA, or without Triton, which not every torch with
# CUDA brings.
_launches = torch.version.cuda is not None and importlib.util.find_spec("triton") is not None
DEVICES = ["cuda"] if _launches and os.environ.get("KOFF_REPLAY", "1") != "0" else []
_MOST_KINDS = 1024  # of a function: shapes that are ever new must not fill the memory
_PLAIN = (int, float, bool, str, torch.dtype)
# Name of each function whose calls are replayed, and its kinds: of each a tape or a Differentiable,
# False where it was seen once, or in words why it is never replayed.
_known: list[tuple[str, dict[Any, Any]]] = []
# They say of a tensor what its kind says, as its attributes do. Whatever else is no tensor was read
# out of one, and may differ from call to call.
_OF_KIND = {
    Tensor.data_ptr, Tensor.dim, Tensor.element_size, Tensor.get_device, Tensor.is_contiguous,
    Tensor.numel, Tensor.size, Tensor.stride, Tensor.__len__,
}  # fmt: skip


class _Thread(threading.local):
    """What this thread is about, whose calls in turn know of it.

    Attributes:
        records: whether it records a call: what that calls then belongs on its tape.
        notes: what becomes known of a call that autograd records, or None.
    """

    records = False
    notes: Differentiable | None = None


_thread = _Thread()


def _add(kind: list, tensors: list[Tensor], values: tuple | list) -> bool:
    """Append what counts of arguments, and the tensors among them; return whether all are known."""
    for value in values:
        if value is None:
            kind.append(None)
            continue
        cls = type(value)
        if cls is Tensor or cls is Parameter:
            tensors.append(value)
            kind += (
                value.dtype,
                value.shape,
                value.stride(),
                value.get_device(),
                value.data_ptr() & 15,  # kernels are compiled for aligned addresses
            )
        elif cls in _PLAIN:
            kind += (cls, value)  # True == 1, but not for Triton
        elif isinstance(value, (tuple, list)):
            kind += (cls, len(value))
            if not _add(kind, tensors, value):
                return False
        else:
            return False
    return True


def _settings() -> tuple:
    """Return what ours decide by beside the arguments."""
    return (
        dispatch.forced(),
        dispatch.recomputes(),
        dispatch.is_programmatic(),
        *routes.settings(),
    )


def kind_of(values: tuple) -> tuple[tuple | None, list[Tensor], bool]:
    """Return the kind of a call with these arguments, which begins with the settings, the tensors
    among them, in order, and whether autograd records it.

    The kind is None if it has none: autocast changes it, ids are to be looked at, or an argument is
    of a type that is not known here.
    """
    kind, tensors = [_settings()], []
    try:
        known = _add(kind, tensors, values) and not checks.CHECK_IDS
    except RuntimeError:  # a tensor without an address, of torch.func
        known = False
    if not known or torch.is_autocast_enabled(tensors[0].device.type):
        return None, tensors, False
    # A tensor that is given twice is one on the tape, and in its place two others might come.
    ids = [*map(id, tensors)]
    if len({*ids}) < len(ids):
        kind += ("again", *map(ids.index, ids))
    trained = [t.requires_grad for t in tensors] if torch.is_grad_enabled() else ()
    records = True in trained
    if records:
        kind += ("trained", *trained)
    return tuple(kind), tensors, records


def reads(function: Callable, result: Any) -> bool:
    """Return whether what a function of torch gave was read out of a tensor, so that it need not be
    the same in every call of a kind."""
    results = result if isinstance(result, (tuple, list)) else (result,)
    if results and all(isinstance(part, Tensor) for part in results):
        return False
    return getattr(function, "__name__", "") != "__get__" and function not in _OF_KIND


class Differentiable(TorchFunctionMode):
    """Calls of one kind that autograd records: how their tensors become the arguments of an
    operation's ``autograd.Function``, whose forward is replayed under this very object as its kind.

    The call from which this is to be learned is made in the ``with`` block.

    Args:
        settings: that the kind has.
        tensors: of the call from which this is to be learned.
    """

    def __init__(self, settings: tuple, tensors: list[Tensor]):
        super().__init__()
        self.settings = settings
        self.refused: str | None = None  # why no call of the kind can be replayed
        self._given = [*map(id, tensors)]  # only while that call lasts
        self._function: type[torch.autograd.Function] | None = None
        self._applies = False
        self._made: tuple = ()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # The Function's forward is recorded apart.
        if not self.refused and not self._applies and reads(function, result):
            self.refused = f"{getattr(function, '__name__', function)} reads a tensor"
        return result

    def apply(self, function: type[torch.autograd.Function], args: tuple) -> tuple[Tensor, ...]:
        """Call the Function, and take down what it is given and what it returns."""
        if self._function is not None:
            self.refused = "it calls several autograd.Functions"
        elif not self.refused and not self._takes(args):
            self.refused = "it casts or lays out anew what it is given"
        if self.refused:
            return function.apply(*args, None)
        self._function, self._applies = function, True
        try:
            self._made = function.apply(*args, self)  # held, or another tensor might get an id
        finally:
            self._applies = False
        return self._made

    def _takes(self, args: tuple) -> bool:
        """Return whether the Function's arguments are what the call was given, and what is the same
        in every call of the kind."""
        slots: list[int] = []
        self._constants: list[Any] = []  # behind the tensors
        for arg in args:
            if not isinstance(arg, Tensor):
                slots.append(len(self._given) + len(self._constants))
                self._constants.append(arg)
            elif id(arg) in self._given:
                slots.append(self._given.index(id(arg)))
            else:
                return False
        self._pick = operator.itemgetter(*slots)
        return True

    def returned(self, result: Any) -> None:
        """Take down what the call returned, which is to be what the Function gave, or part of
        it."""
        self._single = isinstance(result, Tensor)
        wanted = [id(y) for y in ((result,) if self._single else result)]
        made, self._made = [*map(id, self._made)], ()
        if {*wanted} <= {*made}:
            self._results = [*map(made.index, wanted)]
        elif not self.refused:
            self.refused = "it returns what no operation's autograd.Function gave"

    def __call__(self, tensors: list[Tensor]) -> Any:
        """Return what the call returns for these tensors."""
        made = self._function.apply(*self._pick(tensors + self._constants), self)
        if self._single:
            return made[self._results[0]]
        return tuple([made[i] for i in self._results])


def apply(function: type[torch.autograd.Function], *args: Any) -> tuple[Tensor, ...]:
    """Call the Function of an operation, which takes its kind, or None, behind its arguments."""
    notes = _thread.notes
    return function.apply(*args, None) if notes is None else notes.apply(function, args)


def replayed(function: Callable, name: str | None = None) -> Callable:
    """Let calls of a function be replayed from the third of their kind on.

    Args:
        function: its arguments are tensors, numbers, words, and tuples or lists of these, the first
            a tensor or None. What it does beside launching kernels are functions of torch.
        name: under which ``kinds`` counts its calls; None: its own.

    Returns:
        The same function, and as its ``of_kind`` one that takes a ``Differentiable`` in front, or
        None: calls with the same one are of one kind, which has been called before.
    """
    known: dict[Any, Any] = {}
    _known.append((name or function.__name__, known))

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if not DEVICES or torch.compiler.is_compiling() or not _is_worth_it(args):
            return function(*args, **options)
        kind, tensors, records = kind_of((*args, *options.values()))
        if kind is None:
            return function(*args, **options)
        kind = (*kind, *options)
        found = known.get(kind)
        if found is None:
            _remember(known, kind, False)
            return function(*args, **options)
        if type(found) is str:
            return function(*args, **options)
        if not records:
            return _play(known, kind, found, tensors, lambda: function(*args, **options))
        if found is not False:
            return found(tensors)
        before, notes = _thread.notes, Differentiable(kind[0], tensors)
        try:
            _thread.notes = notes
            with notes:
                result = function(*args, **options)
        finally:
            _thread.notes = before
        notes.returned(result)
        if notes.settings == _settings():  # else another thread has forced a route meanwhile
            _remember(known, kind, notes.refused or notes)
        return result

    def of_kind(kind: Differentiable | None, *args: Any) -> Any:
        if kind is None:
            return call(*args)
        found = known.get(kind, False)
        if type(found) is str:
            return function(*args)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        return _play(known, kind, found, tensors, lambda: function(*args))

    call.of_kind = of_kind
    return call


def _play(
    known: dict[Any, Any], kind: Any, tape: Any, tensors: list[Tensor], call: Callable[[], Any]
) -> Any:
    """Return what a call returns, by its tape; False: make the tape.

    Args:
        known: of the function.
        kind, tensors: of the call.
        call: makes it as it is written.
    """
    if tape is not False:
        return tape.play(tensors) if tape.usable() else call()
    # By name, as dispatch loads what not everybody has.
    tapes = importlib.import_module("._triton.shared.tape", __package__)
    settings = kind.settings if isinstance(kind, Differentiable) else kind[0]
    try:
        _thread.records = True
        result, tape = tapes.record(call, tensors)
    finally:
        _thread.records = False
    if settings == _settings():  # else another thread has forced a route meanwhile
        _remember(known, kind, tape)
    return result


def _remember(known: dict[Any, Any], kind: Any, what: Any) -> None:
    if kind not in known and len(known) >= _MOST_KINDS:
        known.clear()
    known[kind] = what


class _Unpacked:
    """The context of a backward with its saved tensors, unpacked once: of what the forward returned
    torch makes a new object whenever it is asked."""

    def __init__(self, ctx: Any, saved: tuple[Tensor | None, ...]):
        self.saved_tensors, self.constants = saved, ctx.constants
        self.needs_input_grad = ctx.needs_input_grad


def replayed_backward(name: str) -> Callable[[Callable[..., tuple]], Callable[..., tuple]]:
    """Return a decorator that lets the backward of an ``autograd.Function`` be replayed from the
    third of its kind on.

    What it decorates: (ctx, dy of each output or None) -> a gradient or None for each input. Of ctx
    it reads ``saved_tensors``, ``needs_input_grad`` and ``constants``: a tuple of what else the
    forward left for it, numbers, words, dtypes and None, each always of the same type. It is not
    called where every dy is None.

    Args:
        name: under which ``kinds`` counts its calls.
    """
    known: dict[Any, Any] = {}
    _known.append((name, known))

    def replays(function: Callable[..., tuple]) -> Callable[..., tuple]:
        @functools.wraps(function)
        def call(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
            if all(dy is None for dy in dys):  # what was saved need not be there any more
                return (None,) * len(ctx.needs_input_grad)
            tensors = *dys, *(saved := ctx.saved_tensors)

            def as_written() -> tuple[Tensor | None, ...]:
                return function(_Unpacked(ctx, saved), *dys)

            if not DEVICES or torch.compiler.is_compiling() or not _is_worth_it(tensors):
                return as_written()
            kind, given, _ = kind_of(tensors)
            if kind is None:
                return as_written()
            kind = *kind, ctx.constants, ctx.needs_input_grad
            found = known.get(kind)
            if found is None:
                _remember(known, kind, False)
            if found is None or type(found) is str:
                return as_written()
            return _play(known, kind, found, given, as_written)

        return call

    return replays


def _is_worth_it(args: tuple) -> bool:
    """Return whether to ask for the kind of a call, which takes longer than this."""
    first = args[0] if args else None
    if first is None:  # the gradient of an output that nobody used
        first = next((arg for arg in args if arg is not None), None)
    return (
        isinstance(first, Tensor)
        and first.device.type in DEVICES
        and first.dtype != torch.float32  # computed as settings of torch's say, and rarely here
        and not _thread.records
    )


def forget() -> None:
    """Forget every tape."""
    for _, known in _known:
        known.clear()


def kinds() -> dict[str, dict[str, int]]:
    """Return what has become of the kinds of calls, by the name of the function: how many are
    "replayed", were "seen once", or are never replayed, by the reason."""
    found = collections.defaultdict(collections.Counter)
    for name, known in _known:
        for state in known.values():
            words = state if type(state) is str else "replayed" if state else "seen once"
            found[name][words] += 1
    return {name: dict(counts) for name, counts in found.items()}
