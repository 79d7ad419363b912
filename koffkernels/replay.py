"""Calls of a kind that was made twice are replayed: what they allocate, launch and ask of torch,
with none of the Python that decides it.

Checks, the choice of a backend, of a route and of tiles, and the arguments of every launch take
longer on the host than small kernels run. All of it follows from the *kind* of a call: its
arguments but for what is in the tensors, and the settings that ours look at. So the first call of a
kind runs as it is written, which compiles; the second is recorded on a tape
(``_triton.shared.tape``); later ones replay it with their own tensors.

Where autograd records, what lies around an operation's ``autograd.Function`` is skipped alike: from
the third call of a kind on the Function is called straight away, and replays its forward.

A kind must hold all that anything of ours decides by, bad arguments included: a call is replayed
unchecked because one of its kind has passed every check. ``tests/kernels/test_replay.py`` holds
replays against calls as they are written.
"""

from __future__ import annotations

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

from . import checks, dispatch, routes

# Where kernels are launched: nowhere without CUDA, or without Triton, which not every torch with
# CUDA brings.
_launches = torch.version.cuda is not None and importlib.util.find_spec("triton") is not None
DEVICES = ["cuda"] if _launches and os.environ.get("KOFF_REPLAY", "1") != "0" else []
_MOST_KINDS = 1024  # of a function: shapes that are ever new must not fill the memory
_PLAIN = (int, float, bool, str, torch.dtype)
_forgetters: list[Callable[[], None]] = []


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
    return dispatch.forced(), dispatch.recomputes(), *routes.settings()


def kind_of(values: tuple) -> tuple[tuple | None, list[Tensor], bool]:
    """Return the kind of a call with these arguments, the tensors among them, in order, and whether
    autograd records it.

    The kind is None if it has none: autocast changes it, ids are to be looked at, or an argument is
    of a type that is not known here.
    """
    kind, tensors = [*_settings()], []
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


class Differentiable:
    """Calls of one kind that autograd records: how their tensors become the arguments of an
    operation's ``autograd.Function``, whose forward is replayed under this very object as its kind.

    Args:
        settings: that the kind has.
        tensors: of the call from which this is to be learned.
    """

    def __init__(self, settings: tuple, tensors: list[Tensor]):
        self.settings = settings
        self._given = [*map(id, tensors)]  # only while that call lasts
        self._functions: list[type[torch.autograd.Function]] = []
        self._made: tuple = ()

    def takes(self, function: type[torch.autograd.Function], args: tuple) -> bool:
        """Return whether the Function's arguments are what the call was given, and what is the same
        in every call of the kind; not if something was cast or laid out anew."""
        self._functions.append(function)
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

    def gave(self, results: tuple) -> None:
        """Take down what the Function returned."""
        self._made = results  # held until ``is_all``, so that no other tensor gets the id of one

    def is_all(self, returned: Any) -> bool:
        """Return whether the call did nothing else, by what it returned."""
        self._single = isinstance(returned, Tensor)
        wanted = [id(y) for y in ((returned,) if self._single else returned)]
        made, self._made = [*map(id, self._made)], ()
        if len(self._functions) != 1 or not {*wanted} <= {*made}:
            return False
        self._results = [*map(made.index, wanted)]
        return True

    def __call__(self, tensors: list[Tensor]) -> Any:
        """Return what the call returns for these tensors."""
        made = self._functions[0].apply(*self._pick(tensors + self._constants), self)
        if self._single:
            return made[self._results[0]]
        return tuple([made[i] for i in self._results])


def apply(function: type[torch.autograd.Function], *args: Any) -> tuple[Tensor, ...]:
    """Call the Function of an operation, which takes its kind, or None, behind its arguments."""
    notes = _thread.notes
    if notes is None or not notes.takes(function, args):
        return function.apply(*args, None)
    results = function.apply(*args, notes)
    notes.gave(results)
    return results


def replayed(function: Callable) -> Callable:
    """Let calls of a function be replayed from the third of their kind on.

    Args:
        function: its arguments are tensors, numbers, words, and tuples or lists of these, the first
            a tensor or None. What it does beside launching kernels are functions of torch.

    Returns:
        The same function, and as its ``of_kind`` one that takes a ``Differentiable`` in front, or
        None: calls with the same one are of one kind, which has been called before.
    """
    # A tape or a Differentiable; False: seen once; True: never to be replayed.
    known: dict[Any, Any] = {}
    _forgetters.append(known.clear)

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
            know(kind, False)
            return function(*args, **options)
        if found is True:
            return function(*args, **options)
        if not records:
            return play(kind, found, tensors, args, options)
        if found is not False:
            return found(tensors)
        before, notes = _thread.notes, Differentiable(_settings(), tensors)
        try:
            _thread.notes = notes
            result = function(*args, **options)
        finally:
            _thread.notes = before
        if notes.settings == _settings():  # else another thread has forced a route meanwhile
            know(kind, notes if notes.is_all(result) else True)
        return result

    def of_kind(kind: Differentiable | None, *args: Any) -> Any:
        if kind is None:
            return call(*args)
        found = known.get(kind, False)
        if found is True:
            return function(*args)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        return play(kind, found, tensors, args, {})

    def play(kind: Any, tape: Any, tensors: list[Tensor], args: tuple, options: dict) -> Any:
        if tape is not False:
            return tape.play(tensors) if tape.usable() else function(*args, **options)
        # By name, as dispatch loads what not everybody has.
        tapes = importlib.import_module("._triton.shared.tape", __package__)
        settings = kind.settings if isinstance(kind, Differentiable) else _settings()
        try:
            _thread.records = True
            result, tape = tapes.record(lambda: function(*args, **options), tensors)
        finally:
            _thread.records = False
        if settings == _settings():
            know(kind, True if tape is None else tape)
        return result

    def know(kind: Any, what: Any) -> None:
        if kind not in known and len(known) >= _MOST_KINDS:
            known.clear()
        known[kind] = what

    call.of_kind = of_kind
    return call


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
    for clear in _forgetters:
        clear()
