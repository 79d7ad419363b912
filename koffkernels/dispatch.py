"""The one place that decides which implementation of an operation runs.

``KOFF_BACKEND`` (torch | triton | interpret | reference) is read once, here, before triton could be
imported: Triton's interpreter cannot be switched on later in a process. Without it the choice is
automatic: Triton for tensors on a CUDA GPU, plain torch elsewhere. Which way a Triton operation
then takes is looked up in ``routes``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from . import routes
from .checks import refuse
from .types import RowGroups

BACKENDS = ("torch", "triton", "interpret", "reference")

# op -> backend -> "module:function", seen from this package: a copy loaded from a hub has another
# name. A backend that an op lacks here is not available for it.
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "gated_mlp": {
        "torch": "._torch.gated_mlp:run",
        "triton": "._triton.mlp.op:run",
        "interpret": "._triton.mlp.op:run",
        "reference": ".reference:gated_mlp",
    },
    "lora_linear": {
        "torch": "._torch.lora_linear:run",
        "triton": "._triton.lora.op:run",
        "interpret": "._triton.lora.op:run",
        "reference": ".reference:lora_linears",
    },
    "prefix_attention": {
        "torch": "._torch.prefix_attention:run",
        "triton": "._triton.attention.op:run",
        "interpret": "._triton.attention.op:run",
        "reference": ".reference:prefix_attention",
    },
    "hard_concrete": {
        "torch": ".reference:hard_concrete",
        "reference": ".reference:hard_concrete",
    },
}


def _read_environment() -> str | None:
    value = os.environ.get("KOFF_BACKEND") or None
    if value is not None and value not in BACKENDS:
        rule, step = f"be one of {', '.join(BACKENDS)}", "unset it for the automatic choice"
        refuse("KOFF_BACKEND", "the backend", rule, repr(value), step)
    return value


def _switch_interpreter_on() -> None:
    """Make triton, when it is imported, interpret kernels on the CPU."""
    on = os.environ.get("TRITON_INTERPRET") == "1"
    if not on and "triton" in sys.modules:
        rule = "be chosen before triton is imported"
        step = "import koffkernels first, or set TRITON_INTERPRET=1 too"
        refuse("KOFF_BACKEND", "interpret", rule, "an imported triton", step)
    os.environ["TRITON_INTERPRET"] = "1"


_ENVIRONMENT = _read_environment()
if _ENVIRONMENT == "interpret":
    _switch_interpreter_on()
# Plain globals, because torch.compile guards on them: a compiled function follows force_backend.
_FORCED: str | None = None
_RECOMPUTE = False
# Programmatic dependent launch, off until a GPU has shown it right and faster (docs/kernels.md).
_PROGRAMMATIC = os.environ.get("KOFF_PDL", "0") == "1"
_LOADED: dict[tuple[str, str], Callable] = {}
_OLDEST = (8, 0)  # compute capability: bf16 on tensor cores


class BackendChoice(NamedTuple):
    """Which backend an operation uses, and why."""

    op: str
    backend: str
    reason: str


def _missing() -> str | None:
    """Return why no Triton kernel can run in this process, None if one can. CUDA is not
    initialised."""
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    if torch.version.hip is not None:
        return 'a ROCm GPU, on which no kernel has run yet; force_backend("triton") runs them'
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


# Found once, since torch.compile cannot trace the question.
_WITHOUT_TRITON = _missing()


@functools.cache
def _too_old(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index) < _OLDEST


def tf32() -> bool:
    """Return whether torch lets products of fp32 be computed in TF32."""
    # allow_tf32 and get_float32_matmul_precision() raise once a program has set fp32_precision;
    # this can be read after either.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# torch.compile cannot trace the question. torch.compiler.assume_constant_result would set this, but
# to look it up imports torch.compile's machinery, and with it triton.
tf32._dynamo_marked_constant = True


def _automatic(op: str, device: torch.device | None, dtype: torch.dtype | None) -> BackendChoice:
    if "triton" not in IMPLEMENTATIONS[op]:
        return BackendChoice(op, "torch", "it has no Triton kernel")
    if device is not None and device.type != "cuda":
        return BackendChoice(op, "torch", f"tensors on {device.type}")
    if _WITHOUT_TRITON is not None:
        return BackendChoice(op, "torch", _WITHOUT_TRITON)
    if not torch.compiler.is_compiling() and _too_old(None if device is None else device.index):
        return BackendChoice(op, "torch", "a GPU older than compute capability 8.0")
    if dtype == torch.float32 and not tf32():
        # Without tensor cores a tile of fp32 takes more registers than there are.
        return BackendChoice(op, "torch", "fp32, and TF32 is not allowed")
    return BackendChoice(op, "triton", "tensors on a CUDA GPU")


def preload_defaults() -> None:
    """Import, by ``preload``, what may be chosen without being asked for."""
    automatic = () if _WITHOUT_TRITON else ("triton",)
    for backend in ("torch", "reference", *automatic):
        preload(backend)
    if _ENVIRONMENT is not None:
        preload(_ENVIRONMENT)


def choose(
    op: str, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> BackendChoice:
    """Return the backend that ``op`` would use now, with the reason.

    Args:
        op: a key of ``IMPLEMENTATIONS``.
        device: of the tensors; None: the GPU if there is one.
        dtype: in which it computes; None: any of 16 bits.

    Raises:
        ValueError: Triton was asked for, and the tensors are where it cannot run.
    """
    asked, reason = _FORCED, "force_backend"
    if asked is None:
        asked, reason = _ENVIRONMENT, "KOFF_BACKEND"
    if asked is None:
        return _automatic(op, device, dtype)
    if asked not in IMPLEMENTATIONS[op]:
        return BackendChoice(op, "torch", f"{asked} was set by {reason}, but has no {op}")
    if asked == "triton" and device is not None and device.type != "cuda":
        rule, step = "fit tensors on " + device.type, "move them to a GPU, or choose torch"
        refuse(op, f"the backend ({reason})", rule, repr(asked), step)
    return BackendChoice(op, asked, f"set by {reason}")


def _without_groups(run: Callable) -> Callable:
    """Let an implementation that sorts no rows take rows that are grouped: by their ids."""

    @functools.wraps(run)
    def by_ids(*args):
        return run(*[arg.ids if isinstance(arg, RowGroups) else arg for arg in args])

    return by_ids


def _load(op: str, backend: str) -> Callable:
    module, name = IMPLEMENTATIONS[op][backend].split(":")
    found = getattr(importlib.import_module(module, __package__), name)
    found = _LOADED[op, backend] = found if backend == "torch" else _without_groups(found)
    return found


def preload(backend: str) -> None:
    """Import a backend's implementation of every operation that has one.

    torch.compile cannot trace an import, so this runs before the first call may be traced: for the
    backends in plain torch, and for Triton where it would be chosen, when koffkernels is imported;
    for any other in ``force_backend``.
    """
    for op, found in IMPLEMENTATIONS.items():
        if backend in found and (op, backend) not in _LOADED:
            _load(op, backend)


def implementation(op: str, device: torch.device, dtype: torch.dtype | None = None) -> Callable:
    """Return the function that runs ``op`` on tensors of a device, in a dtype, under the current
    choice."""
    backend = choose(op, device, dtype).backend
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
    if backend not in BACKENDS or backend == "interpret":
        rule = "be one of torch, triton, reference"
        step = "the interpreter is chosen before start-up by KOFF_BACKEND=interpret"
        refuse("force_backend", "backend", rule, repr(backend), step)
    global _FORCED
    preload(backend)
    before, _FORCED = _FORCED, backend
    try:
        yield
    finally:
        _FORCED = before


def forced() -> str | None:
    """Return what ``force_backend`` has set."""
    return _FORCED


@contextlib.contextmanager
def recompute_hidden(enabled: bool = True) -> Iterator[None]:
    """Let ``gated_mlp`` save x [M, H] for backward inside the ``with`` block, and compute the two
    [M, I] of the gate and up layers again there.

    Args:
        enabled: False: save them, as outside.
    """
    global _RECOMPUTE
    before, _RECOMPUTE = _RECOMPUTE, enabled
    try:
        yield
    finally:
        _RECOMPUTE = before


def recomputes() -> bool:
    """Return whether ``recompute_hidden`` is on."""
    return _RECOMPUTE


@contextlib.contextmanager
def programmatic(on: bool) -> Iterator[None]:
    """Turn programmatic dependent launch on or off, whatever ``KOFF_PDL`` says."""
    global _PROGRAMMATIC
    before, _PROGRAMMATIC = _PROGRAMMATIC, on
    try:
        yield
    finally:
        _PROGRAMMATIC = before


def is_programmatic() -> bool:
    """Return whether programmatic dependent launch is on, where Triton and the GPU know it."""
    return _PROGRAMMATIC


def backends() -> list[BackendChoice]:
    """Print, and return, which backend each operation would use now and why; for Triton also
    whether this GPU's routes were measured."""
    choices = [_with_route(choose(op)) for op in IMPLEMENTATIONS]
    for choice in choices:
        print(f"{choice.op:18s} {choice.backend:10s} {choice.reason}")
    return choices


def _with_route(choice: BackendChoice) -> BackendChoice:
    if choice.backend != "triton" or not torch.cuda.is_available():
        return choice
    return choice._replace(reason=f"{choice.reason}; {routes.describe(choice.op)}")


def compute_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Return the dtype of matmuls: autocast's where it is on (fp64 stays), else the weight's."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which autocast is off. Entering autocast's own takes as long as a small
    product, so where it is off already nothing is entered."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
