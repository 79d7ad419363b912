"""What every kernel shares: launching, matmul precision, the memory of a token, activations.

The interpreter cannot multiply bf16 (it multiplies the raw bits), so ``dot`` widens there.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch
from . import direct

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton without programmatic dependent launch
    gdc_launch_dependents = gdc_wait = None


def _find_cache() -> None:
    """Give Triton a folder it can write compiled kernels to, where the home folder is read-only."""
    if "TRITON_CACHE_DIR" in os.environ or "TRITON_HOME" in os.environ:
        return
    folder = Path(os.environ.get("HOME", "~")).expanduser() / ".triton" / "cache"  # Triton's own
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError:
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="koff-triton-")


_find_cache()

ROCM = torch.version.hip is not None  # whose backend of Triton has no ``maxnreg``
INTERPRETED = bool(triton.knobs.runtime.interpret)
_WIDEN = tl.constexpr(INTERPRETED)
_NO_MEMORY = tl.constexpr(1 << 30)  # above every id, so that a minimum passes over it
# Ids read at a time: eight for each thread of four warps, so that a chunk of some thousand tokens
# takes a handful of loads.
_IDS_BLOCK = tl.constexpr(1024)

_REGISTERS = 65536  # of a multiprocessor, on every chip that is supported

_TOO_FAR = 2**31 // 256  # of one row from the next, as no tile has more than 256

# tl.dot takes no side below 16, the height of the tensor cores' smallest tile.
SMALLEST_TILE = 16


class Rows(NamedTuple):
    """Which memory each token of x [M, K] uses: what ``token_memory`` needs in a kernel.

    Kernels take the two fields as two arguments: ``tokens`` is 1 while decoding and the length of
    the batch otherwise, and inside of an operand each kind of length would be compiled anew.

    Args:
        ids: int64 [M / tokens], -1 for none; None: every token uses memory 0.
        tokens: consecutive tokens that share one entry of ids.
    """

    ids: Tensor | None
    tokens: int


def leaves_of(args: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the arguments of a launch by name, the fields of an operand x as "x.ptr" and so on."""
    for name, value in args.items():
        if isinstance(value, tuple):
            yield from ((f"{name}.{field}", part) for field, part in value._asdict().items())
        else:
            yield name, value


def tensors_of(args: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors among ``leaves_of``."""
    return {name: value for name, value in leaves_of(args) if isinstance(value, Tensor)}


class Launch(NamedTuple):
    """One kernel launch: what ``recording`` collects instead of running it."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, Any]


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of running them: the compile gate runs launchers on meta tensors."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def collecting() -> bool:
    """Return whether launches are collected instead of run."""
    return _recorded is not None


class _Noted(threading.local):
    """What is told of every launch of this thread."""

    by: Callable[..., None] | None = None


_noted = _Noted()


def noted_by(note: Callable[..., None] | None) -> None:
    """Let ``note(kernel, grid, args, options, variant)`` hear of every launch of this thread, with
    what ``direct.launch`` returned; None: nobody."""
    _noted.by = note


@functools.cache
def _several_gpus() -> bool:
    return torch.cuda.is_available() and torch.cuda.device_count() > 1


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; those of an H100 for a device that is none."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def has_pdl(device: torch.device) -> bool:
    """Return whether Triton and the GPU know programmatic dependent launch; True for a device that
    is no GPU, of which the compile gate knows better."""
    if gdc_wait is None or INTERPRETED or ROCM:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def pdl(device: torch.device) -> bool:
    """Return whether the second of two dependent launches may begin while the first one runs.

    Both kernels take it as ``PDL``, the second launch also as ``dependent``.
    """
    return dispatch.is_programmatic() and has_pdl(device)


def launch(kernel: Any, grid: tuple[int, ...], /, **args: Any) -> None:
    """Run ``kernel`` over ``grid``; an empty grid runs nothing.

    Python compares every keyword of a call with every parameter that can be one, so what is no
    argument of the kernel is taken out of ``args`` here: 2 us of a launch.

    Args:
        kernel: a ``triton.jit`` function.
        grid: one to three sizes.
        args: the kernel's arguments: tensors, numbers, None, or operands (see ``operands``). Beside
            them ``num_warps`` of a program (4), ``num_stages`` of the software pipeline (2),
            ``dependent`` (False) of a kernel that may begin before the one launched before it has
            ended, and waits for that by itself (``pdl``), and ``most_registers`` that a thread may
            use. 255 is all, and what is not said: kernels with large tiles are compiled with it,
            since ptxas, left to itself (None), spills a few bytes of theirs to reach a higher
            occupancy. Streaming kernels live by occupancy and leave it to ptxas.
    """
    num_warps = args.pop("num_warps", 4)
    num_stages = args.pop("num_stages", 2)
    most_registers = args.pop("most_registers", 255)
    dependent = args.pop("dependent", False)
    if 0 in grid:
        return
    registers = None
    if most_registers is not None and not ROCM:
        registers = min(most_registers, _REGISTERS // (32 * num_warps))
    options = num_warps, num_stages, registers, dependent
    if _recorded is not None:
        # Looked at here, for the gate and the tests, since a real launch has no time for it.
        for name, value in args.items():
            absent = isinstance(value, tuple) and any(field is None for field in value)
            assert not absent, f"{name}: a field of an operand must not be None (see operands.py)"
        _recorded.append(Launch(kernel, grid, args, direct.by_name(options)))
        return
    if _noted.by is None:
        run(kernel, grid, args, options)
        return
    with torch._C.DisableTorchFunction():  # what Triton asks of torch is part of the launch
        variant = run(kernel, grid, args, options)
    _noted.by(kernel, grid, args, options, variant)


def run(
    kernel: Any, grid: tuple[int, ...], args: dict[str, Any], options: direct.Options
) -> direct.Variant | None:
    """Launch where the tensors are, and return what ``direct.launch`` does."""
    if not _several_gpus():
        return direct.launch(kernel, grid, args, options)
    # Triton launches on the current GPU, wherever the tensors are.
    with torch.cuda.device(_device_of(args)):
        return direct.launch(kernel, grid, args, options)


def _device_of(args: dict[str, Any]) -> torch.device:
    """Return where the first tensor of a launch is; an operand begins with one."""
    for value in args.values():
        first = value[0] if isinstance(value, tuple) else value
        if isinstance(first, Tensor):
            return first.device
    raise TypeError("a launch must have a tensor among its arguments, got none")


def precision(dtype: torch.dtype) -> str:
    """Return how ``dot`` multiplies fp32: as torch is set to; other dtypes have one way only."""
    return "tf32" if dtype == torch.float32 and dispatch.tf32() else "ieee"


def cdiv(x: int, y: int) -> int:
    """Return x / y rounded up; triton's own takes a hundred times as long on the host."""
    return -(-x // y)


def power_of_2(x: int) -> int:
    """Return the smallest power of two that is at least x; 1 for 0."""
    return 1 << max(x - 1, 0).bit_length()


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a dtype; to ask ``x.to`` for nothing takes a microsecond."""
    return x if x.dtype == dtype else x.to(dtype)


def dense(x: Tensor | None) -> Tensor | None:
    """Return x, copied unless it is contiguous: for small tensors, whose strides kernels do not
    take."""
    return x if x is None else x.contiguous()


def unit_stride(x: Tensor) -> Tensor:
    """Return x [..., rows, width], copied if its last dimension is not the dense one, or if its
    rows lie so far apart that the offsets inside a tile pass 32 bits: kernels take the other
    strides."""
    near = x.shape[-2] <= 1 or x.stride(-2) < _TOO_FAR
    return x if near and x.stride(-1) == 1 else x.contiguous()


@functools.cache
def rank_block(r: int, limit: int = 64) -> int:
    """Return the tile width for a rank r: a power of two in 16..limit; larger ranks go in several
    steps."""
    return min(limit, max(SMALLEST_TILE, power_of_2(r)))


@triton.jit
def wait_for_primary(PDL: tl.constexpr):
    """Wait until the kernel before this one has ended and all that it wrote can be read.

    It comes before a kernel's first load or store, and in no loop: there Triton's pipeline would
    put loads ahead of it.
    """
    if PDL:
        gdc_wait()


@triton.jit
def start_dependent(PDL: tl.constexpr):
    """Let the next kernel begin once every program has come here: it waits for this one's end.

    A kernel that waits itself does so before, so that whoever begins early runs beside this one
    kernel alone.
    """
    if PDL:
        gdc_launch_dependents()


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, added up in fp32."""
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def token_memory(ids_ptr, memories, offs_m, mask_m, tokens):
    """Memory of each token [BLOCK_M]; -1 for none, and for tokens outside the mask."""
    if ids_ptr is not None:
        # An id that is none of the memories means none: it must not become an address.
        id = tl.load(ids_ptr + offs_m // tokens, mask=mask_m, other=-1)
        return tl.where((id >= 0) & (id < memories), id, -1).to(tl.int32)
    return tl.where(mask_m, 0, -1)


@triton.jit
def memory_range(memory):
    """(first, last + 1) of the memories in a tile; an empty range where no token has one."""
    first = tl.min(tl.where(memory < 0, _NO_MEMORY, memory), 0)
    return first, tl.max(memory, 0) + 1


@triton.jit
def token_span(ids_ptr, begin, end, tokens, m):
    """(first, last + 1) of the tokens begin..end-1 that use memory m; an empty range for none."""
    first = begin
    last = end
    if ids_ptr is not None:
        first = tl.full((), _NO_MEMORY, tl.int32)
        last = tl.full((), 0, tl.int32)
        for start in tl.range(begin, end, _IDS_BLOCK, num_stages=1):
            offs = start + tl.arange(0, _IDS_BLOCK)
            inside = offs < end
            mine = inside & (tl.load(ids_ptr + offs // tokens, mask=inside, other=-1) == m)
            first = tl.minimum(first, tl.min(tl.where(mine, offs, _NO_MEMORY), 0))
            last = tl.maximum(last, tl.max(tl.where(mine, offs + 1, 0), 0))
    return first, last


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in fp32, within a few units in the last place, as ``tl.sigmoid``.

    1 / y = rsqrt(y)^2 takes two instructions for y >= 1, of which there is nothing to guard; a
    division takes nine, a sixth of what the hidden layer's backward did for an element.
    """
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))  # log2(e)
    return root * root


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):
    """act(g) in fp32."""
    if ACTIVATION == "silu":
        return g * sigmoid(g)
    elif ACTIVATION == "gelu":
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))  # sqrt(1/2)
    else:  # gelu_tanh; 0.5 (1 + tanh(v)) = sigmoid(2 v), and 2 sqrt(2 / pi) = 1.5957691...
        inner = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        return g * sigmoid(inner)


@triton.jit
def activate_grad(g, ACTIVATION: tl.constexpr):
    """(act(g), act'(g)) in fp32."""
    if ACTIVATION == "silu":
        s = sigmoid(g)
        act = g * s
        return act, s + act * (1.0 - s)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        return g * cdf, cdf + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)  # 1 / sqrt(2 pi)
    else:  # 3 * 0.044715 = 0.134145
        s = sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
        return g * s, s + g * s * (1.0 - s) * slope
