"""Modules that keep everything and change their class: a mixin goes in front of it, and off again.

A swapped module is still an instance of its own class, under the same name, and can be copied and
pickled like any other.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from . import attention
from .memory_argument import KoffModelMixin


def swap(module: nn.Module, mixin: type, link: Any = None) -> None:
    """Put a mixin in front of a module's class, in place.

    Args:
        module: any.
        mixin: whose methods are to come first.
        link: what these find as ``_koff``; None for nothing.
    """
    module.__class__ = subclass(mixin, type(module))
    if link is not None:
        module._koff = link


def unswap(module: nn.Module) -> None:
    """Give a swapped module its own class back, in place."""
    module.__class__ = type(module).__mro__[2]  # behind the subclass and the mixin
    module.__dict__.pop("_koff", None)


@functools.cache
def subclass(mixin: type, cls: type) -> type:
    """Return ``cls`` with ``mixin`` in front, under the same name: transformers looks classes up by
    their string. Cached, so that modules of one class are of one class afterwards, too."""
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    body["__reduce_ex__"] = _reduce
    if mixin is KoffModelMixin:
        body["forward"] = KoffModelMixin.forward_with_signature(cls)
    return type(cls.__name__, (mixin, cls), body)


def _reduce(module: nn.Module, protocol: int) -> tuple:
    """How a module is pickled and copied: its class is found under no name, but made of two that
    are."""
    _, mixin, cls = type(module).__mro__[:3]
    _, _, *state = object.__reduce_ex__(module, protocol)
    return _blank, (mixin, cls), *state


def _blank(mixin: type, cls: type) -> nn.Module:
    """A module of a swapped class that waits for its state."""
    if mixin is KoffModelMixin:
        attention.register()  # by whoever attached it; this may be another process
    return nn.Module.__new__(subclass(mixin, cls))
