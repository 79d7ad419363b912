"""Launching a kernel that is compiled already, without Triton's binding of arguments.

At each launch Triton types every argument anew, spells the result out as text and looks that up,
which takes it longer than many of our kernels run. Here the first launch of a kind goes Triton's
own way, which compiles and hands the compiled kernel back. Later ones of that kind call the
compiled kernel as Triton would, with the same arguments.

The kind must tell apart everything that Triton compiles differently; otherwise a launch would run
code that was made for other arguments, and nothing would say so. So numbers count by their value,
which is finer than what Triton asks of them (are they 1, or a multiple of 16?). The price is that
every new shape goes Triton's way once. ``tests/kernels/test_direct.py`` holds our kinds against
Triton's own. Whatever is not known here goes Triton's way, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

# Of these versions it was read what ``JITFunction.run`` compiles in, and how it calls what it has
# compiled. ROCm's backend also compiles in whether a tensor fits 2 GB, which is not looked at here.
KNOWN = ("3.6.", "3.7.", "3.8.", "3.9.")
ENABLED = (
    os.environ.get("KOFF_DIRECT_LAUNCH", "1") != "0"
    and triton.__version__.startswith(KNOWN)
    and not knobs.runtime.interpret
    and torch.version.hip is None
)

_LEAST, _MOST = -(2**31), 2**31 - 1  # of a number that Triton passes in 32 bits
_MISALIGNED = object()  # behind the dtype of a tensor whose address is no multiple of 16
_MOST_VARIANTS = 1024  # of a kernel: shapes that are ever new must not fill the memory
_FIELDS = (int, float, bool, type(None), Tensor, Parameter)
_CONSTANTS = (int, bool, str, type(None))

# num_warps, num_stages, the registers of a thread, None for as many as ptxas likes, and whether the
# kernel may begin before the last one has ended.
Options = tuple[int, int, int | None, bool]


class Variant(NamedTuple):
    """A compiled kernel: its launcher, two things which that wants, and all of it, which is held
    since Triton, from 3.8 on, unloads the function of one that nobody holds."""

    run: Callable[..., None]
    function: Any
    metadata: Any
    compiled: CompiledKernel


class Kernel:
    """A jitted function: how each of its arguments counts, and what was compiled of it."""

    def __init__(self, kernel: triton.JITFunction):
        self.kernel = kernel  # held, so that no other can get its id
        params = kernel.params
        free = [p.name for p in params if p.do_not_specialize and not p.is_constexpr]
        self.count = len(params)
        self.names = getter(p.name for p in params)
        self.constants = getter(p.name for p in params if p.is_constexpr)
        self.free = getter(free)
        self.others = getter(p.name for p in params if not p.is_constexpr and p.name not in free)
        self.variants: dict[tuple, Variant] = {}


def getter(keys: Iterable[Any]) -> Callable[[Any], tuple]:
    """Return what picks these out of a launch's arguments, or out of a tape's slots: itemgetter,
    but always a tuple."""
    keys = list(keys)
    if len(keys) > 1:
        return itemgetter(*keys)
    return lambda values: tuple([values[key] for key in keys])


_kernels: dict[int, Kernel] = {}  # by id: to hash a jitted function takes long
_driver: Any = None  # for whose devices they were compiled


def key_of(kernel: Kernel, args: dict[str, Any], options: tuple) -> tuple | None:
    """Return the kind of a launch, None if only Triton can tell.

    Args:
        kernel: what is launched.
        args: all of its arguments.
        options: what is compiled in beside them, and the device.
    """
    for value in kernel.free(args):
        # Only the width of these numbers is compiled in, so that they may change at each launch.
        if type(value) is not int or not _LEAST <= value <= _MOST:
            return None
    constants = kernel.constants(args)
    key = [*options, *constants, *map(type, constants)]  # True == 1, but not for Triton
    _add(key, kernel.others(args))
    return tuple(key)


def _add(key: list, values: tuple) -> None:
    """Append what Triton may compile in of some arguments, or of an operand's fields."""
    for value in values:
        kind = type(value)
        if kind is int or value is None:
            key.append(value)
        elif kind is Tensor or kind is Parameter:
            key.append(value.dtype)
            if value.data_ptr() & 15:
                key.append(_MISALIGNED)
        else:  # of a float or bool nothing else counts; any other kind is not remembered
            key.append(kind)
            if isinstance(value, tuple):
                _add(key, value)


def _says_all(kernel: Kernel, args: dict[str, Any]) -> bool:
    """Return whether the kind of a launch says all about its arguments."""
    return all(type(value) in _CONSTANTS for value in kernel.constants(args)) and all(
        type(field) in _FIELDS
        for value in kernel.others(args)
        for field in (value if isinstance(value, tuple) else (value,))
    )


def observed(kernels: Iterable[triton.JITFunction]) -> bool:
    """Return whether somebody debugs, instruments or profiles kernels: then all of Triton's code
    has to run. (A chain of hooks is always there, and mostly empty.)"""
    runtime = knobs.runtime
    return bool(
        runtime.debug
        or knobs.compilation.instrumentation_mode
        or runtime.add_stages_inspection_hook
        or getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        or any([kernel.debug or kernel.pre_run_hooks for kernel in kernels])
    )


def by_name(options: Options) -> dict[str, Any]:
    """Return options as Triton takes them."""
    num_warps, num_stages, registers, dependent = options
    found = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if registers is not None:
        found["maxnreg"] = registers
    if dependent:  # not said otherwise: not every backend has it
        found["launch_pdl"] = True
    return found


def launch(
    kernel: triton.JITFunction, grid: tuple[int, ...], args: dict[str, Any], options: Options
) -> Variant | None:
    """Run ``kernel[grid](**args, **by_name(options))``, on the current device.

    Returns:
        What ran, if later launches of this kind will run it; None where they go Triton's way.
    """
    global _driver
    if not ENABLED:
        kernel[grid](**args, **by_name(options))
        return None
    active = driver.active
    if active is not _driver:
        _kernels.clear()
        _driver = active
    known = _kernels.get(id(kernel))
    if known is None:
        known = _kernels[id(kernel)] = Kernel(kernel)
    key = None
    if len(args) == known.count and not observed((kernel,)):
        device = active.get_current_device()
        key = key_of(known, args, (device, *options))
        found = known.variants.get(key)
        if found is not None:
            x, y, z = (*grid, 1, 1)[:3]
            # No hooks, and nothing to tell them.
            nobody = None, None, None
            stream = active.get_current_stream(device)
            found.run(x, y, z, stream, found.function, found.metadata, *nobody, *known.names(args))
            return found
    compiled = kernel[grid](**args, **by_name(options))
    if key is None or not isinstance(compiled, CompiledKernel) or not _says_all(known, args):
        return None
    if len(known.variants) >= _MOST_VARIANTS:
        known.variants.clear()
    variant = Variant(compiled.run, compiled.function, compiled.packed_metadata, compiled)
    known.variants[key] = variant
    return variant
