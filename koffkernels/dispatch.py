"""The one place that decides which implementation of an operation runs.

``KOFF_BACKEND`` (torch | triton | interpret | reference) is read once, here, before triton could be
imported: Triton's interpreter cannot be switched on later in a process. Without it the choice is
automatic.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .checks import refuse, require

BACKENDS = ("torch", "triton", "interpret", "reference")

# op -> backend -> "module:function". A backend that an op lacks here is not available for it.
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "gated_mlp": {
        "torch": "koffkernels._torch.gated_mlp:run",
        "reference": "koffkernels.reference:gated_mlp",
    },
    "lora_linear": {
        "torch": "koffkernels._torch.lora_linear:run",
        "reference": "koffkernels.reference:lora_linear",
    },
    "prefix_attention": {
        "torch": "koffkernels._torch.prefix_attention:run",
        "reference": "koffkernels.reference:prefix_attention",
    },
    "hard_concrete": {
        "torch": "koffkernels.reference:hard_concrete",
        "reference": "koffkernels.reference:hard_concrete",
    },
}


def _read_environment() -> str | None:
    value = os.environ.get("KOFF_BACKEND") or None
    require(
        value is None or value in BACKENDS,
        "KOFF_BACKEND",
        "the backend",
        f"be one of {', '.join(BACKENDS)}",
        repr(value),
        "unset it for the automatic choice",
    )
    return value


_ENVIRONMENT = _read_environment()
# A plain global, because torch.compile guards on it: a compiled function follows force_backend.
_FORCED: str | None = None
_LOADED: dict[tuple[str, str], Callable] = {}


class BackendChoice(NamedTuple):
    """Which backend an operation uses, and why."""

    op: str
    backend: str
    reason: str


def choose(op: str) -> BackendChoice:
    """The backend that ``op`` would use now, with the reason.

    Raises:
        ValueError: a backend was asked for that has no implementation of ``op``.
    """
    asked, reason = _FORCED, "force_backend"
    if asked is None:
        asked, reason = _ENVIRONMENT, "KOFF_BACKEND"
    if asked is None:
        return BackendChoice(op, "torch", "the only backend of this operation in this version")
    if asked not in IMPLEMENTATIONS[op]:
        rule = f"be one of {', '.join(IMPLEMENTATIONS[op])} for this operation"
        refuse(op, f"the backend ({reason})", rule, repr(asked), "choose one of these or unset it")
    return BackendChoice(op, asked, f"set by {reason}")


def _load(op: str, backend: str) -> Callable:
    module, name = IMPLEMENTATIONS[op][backend].split(":")
    found = _LOADED[op, backend] = getattr(importlib.import_module(module), name)
    return found


def preload(backend: str) -> None:
    """Import a backend's implementation of every operation that has one.

    torch.compile cannot trace an import, so this runs before the first call may be traced: for the
    backends in plain torch when koffkernels is imported, for any other in ``force_backend``.
    """
    for op, found in IMPLEMENTATIONS.items():
        if backend in found and (op, backend) not in _LOADED:
            _load(op, backend)


def implementation(op: str) -> Callable:
    """The function that runs ``op`` under the current choice."""
    backend = choose(op).backend
    found = _LOADED.get((op, backend))
    return _load(op, backend) if found is None else found


@contextlib.contextmanager
def force_backend(backend: str) -> Iterator[None]:
    """Use one backend for every operation inside the ``with`` block, in the whole process.

    Args:
        backend: "torch", "triton" or "reference".

    Raises:
        ValueError: unknown backend, or one that some operation called inside does not have.
    """
    require(
        backend in BACKENDS and backend != "interpret",
        "force_backend",
        "backend",
        "be one of torch, triton, reference",
        repr(backend),
        "the interpreter is chosen before start-up by KOFF_BACKEND=interpret",
    )
    global _FORCED
    preload(backend)
    before, _FORCED = _FORCED, backend
    try:
        yield
    finally:
        _FORCED = before


def backends() -> list[BackendChoice]:
    """Print, and return, which backend each operation would use now and why."""
    choices = [choose(op) for op in IMPLEMENTATIONS]
    for choice in choices:
        print(f"{choice.op:18s} {choice.backend:10s} {choice.reason}")
    return choices


def compute_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype matmuls run in: autocast's where it is on (fp64 stays), else the weight's."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype
