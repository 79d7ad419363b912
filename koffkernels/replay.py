"""Calls of a kind that was made twice are replayed: what they allocate, launch and ask of torch,
with none of the Python that decides it.

Checks, the choice of a backend, of a route and of tiles, and the arguments of every launch take
longer on the host than small kernels run. All of it follows from the *kind* of a call: its
arguments but for what is in the tensors, and the settings that ours look at. So the first call of a
kind runs as it is written, which compiles; the second is recorded on a tape
(``_triton.shared.tape``); later ones replay it with their own tensors.

A kind must hold all that anything of ours decides by, bad arguments included: a call is replayed
unchecked because one of its kind has passed every check. ``tests/kernels/test_replay.py`` holds
replays against calls as they are written.
"""

from __future__ import annotations

import functools
import importlib.util
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
    """Whether this thread records a call: what that calls in turn then belongs on its tape."""

    records = False


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
    return dispatch.forced(), *routes.settings()


def kind_of(values: tuple) -> tuple[tuple | None, list[Tensor]]:
    """Return the kind of a call with these arguments, and the tensors among them, in order.

    None if it has none: autograd would record it, autocast changes it, ids are to be looked at, or
    an argument is of a type that is not known here.
    """
    kind, tensors = [*_settings()], []
    try:
        known = _add(kind, tensors, values) and not checks.CHECK_IDS
    except RuntimeError:  # a tensor without an address, of torch.func
        known = False
    if (
        not known
        or (torch.is_grad_enabled() and any([t.requires_grad for t in tensors]))
        or torch.is_autocast_enabled(tensors[0].device.type)
    ):
        return None, tensors
    # A tensor that is given twice is one on the tape, and in its place two others might come.
    ids = [*map(id, tensors)]
    if len({*ids}) < len(ids):
        kind += map(ids.index, ids)
    return tuple(kind), tensors


def replayed(function: Callable) -> Callable:
    """Let calls of a function be replayed from the third of their kind on.

    Args:
        function: its arguments are tensors, numbers, words, and tuples or lists of these, the first
            a tensor or None. What it does beside launching kernels are functions of torch.
    """
    known: dict[tuple, Any] = {}  # a tape; False: seen once; True: never to be replayed
    _forgetters.append(known.clear)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if not DEVICES or torch.compiler.is_compiling() or not _is_worth_it(args):
            return function(*args, **options)
        kind, tensors = kind_of((*args, *options.values()))
        if kind is None:
            return function(*args, **options)
        kind = (*kind, *options)
        tape = known.get(kind)
        if tape is None:
            if len(known) >= _MOST_KINDS:
                known.clear()
            known[kind] = False
        elif tape is False:
            # By name, as dispatch loads what not everybody has.
            tapes = importlib.import_module("._triton.shared.tape", __package__)
            _thread.records, settings = True, _settings()
            try:
                result, tape = tapes.record(lambda: function(*args, **options), tensors)
            finally:
                _thread.records = False
            if settings == _settings():  # else another thread has forced a route meanwhile
                known[kind] = True if tape is None else tape
            return result
        elif tape is not True and tape.usable():
            return tape.play(tensors)
        return function(*args, **options)

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
        and not (first.requires_grad and torch.is_grad_enabled())
        and not _thread.records
    )


def forget() -> None:
    """Forget every tape."""
    for clear in _forgetters:
        clear()
