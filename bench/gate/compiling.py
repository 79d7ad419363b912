"""Compiling recorded launches for a chip that is not there, and what the result must look like.

triton's own launch code decides which variant a launch needs, so what is compiled here is what a
GPU would run. Only the driver, which would name the chip, is replaced.
"""

from __future__ import annotations

import collections
import contextlib
import io
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from koffkernels._triton.shared.launch import Launch, cdiv, leaves_of, multiprocessors, tensors_of

from .order import WAIT, order_problems

# Shared memory that one block may use, in bytes: 163 KB and 227 KB (CUDA C++ Programming Guide,
# table "Technical Specifications per Compute Capability").
SHARED_LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}
SHARED_LIMITS["gfx942"] = 65_536  # LDS of a workgroup (CDNA 3 instruction set, 2.2.2)
TENSOR_COLUMNS = 512  # tensor memory of an sm_100 multiprocessor, the same guide
_RESERVED = 1024  # of the shared memory of a multiprocessor, for each block: it has so much more
_PARTITIONS = 4  # of a multiprocessor, each with warps, and 16384 registers, of its own
_WARPS_PER_SM, _CTAS_PER_SM = 64, 32  # at most

_INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async\b",
    "mma.sync": r"\bmma\.sync\b",
    "tcgen05": r"\btcgen05\.mma\b",
    "mfma": r"\bv_mfma_",
}
# Numbers of devices whose kernels are only named, never compiled, and of those that are compiled.
_NAMED, _COMPILED = 1000, 2000
_FULL_TILE = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
_COPY = r"\bcp\.async\.c[ag]\.shared\.global(?:\.L2::\w+)? \[[^]]*\], \[[^]]*\], 0x10\b"  # 16 bytes
_EARLIEST = 90  # compute capability from which on a kernel can begin early
_MEASURED = (
    "registers",
    "spill_bytes",
    "stack_bytes",
    "shared_bytes",
    "tensor_columns",
    "wide_copies",
    "mma",
    "waits",
    "ctas_per_sm",
    "warps_per_sm",
    "waves",
)


class Contract(NamedTuple):
    """What a kernel's file promises of its machine code.

    Args:
        tensor_cores: "dot": tiles of at least 64 rows, so the chip's widest instruction (wgmma on
            sm_90, tcgen05 on sm_100, mma.sync on sm_80); "dot16": any tensor-core instruction;
            None: none.
        accumulators: of a prefill GEMM, whose tile must be at least 128 x 128, or 128 x 64 with
            two accumulators; None for any other kernel.
    """

    tensor_cores: str | None
    accumulators: int | None = None


class Chip:
    """What triton asks of its driver before it compiles."""

    def __init__(self, arch: str, device: int):
        amd = arch.startswith("gfx")
        target = ("hip", arch, 64) if amd else ("cuda", int(arch.removeprefix("sm_")), 32)
        self.target = GPUTarget(*target)
        self.device = device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _chip(arch: str, caches: int) -> Iterator[Chip]:
    """Let triton take ``arch`` ("sm_90") for the current device; no GPU or driver is touched.

    triton keeps a kernel's variants per number of a device: ``caches`` is one that no GPU has.
    """
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(Chip(arch, caches + int(arch[3:])))
    try:
        yield driver.active
    finally:
        driver._active = before


def name_of(launch: Launch) -> str:
    """Return the name of the kernel's function."""
    return launch.kernel.fn.__name__


def module_of(launch: Launch) -> str:
    """Return the file that defines the kernel, folder and file: "lora.shrink"."""
    return launch.kernel.fn.__module__.partition("._triton.")[2]


def contract_of(launch: Launch) -> Contract:
    """Return what the kernel's file declares in EXPECTS and, for prefill GEMMs, PREFILL.

    ``EXPECTS[kernel]`` is a kind, or a function of the launch's arguments that returns one, for a
    kernel that multiplies only under some of them. ``PREFILL[kernel]`` is a number of accumulators.

    Raises:
        ValueError: the file declares nothing for this kernel, or what is not known.
    """
    module, name = sys.modules[launch.kernel.fn.__module__], name_of(launch)
    if name not in getattr(module, "EXPECTS", {}):
        raise ValueError(
            f"{module.__name__}: EXPECTS must name every kernel, got no {name}; add it"
        )
    kind = module.EXPECTS[name]
    if callable(kind):
        kind = kind(launch.args)
    if kind not in ("dot", "dot16", None):
        rule = "be 'dot', 'dot16' or None"
        raise ValueError(f"{module.__name__}: EXPECTS[{name!r}] must {rule}, got {kind!r}; fix it")
    return Contract(kind, getattr(module, "PREFILL", {}).get(name))


def signatures(launches: list[Launch], arch: str = "sm_90") -> list[tuple[str, str]]:
    """Return the compiled variant that each launch needs, without compiling any.

    Args:
        launches: from ``common.recording``.
        arch: the chip.

    Returns:
        One (kernel, key) per launch; the key holds types, constants, divisibility and options.
    """
    found: list[tuple[str, str]] = []

    def note(*, key: str, fn: Any, **_: Any) -> bool:
        found.append((f"{fn.module}.{fn.name}", key))
        return True  # already dealt with: triton does not compile

    with _chip(arch, _NAMED), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = note
        for launch in launches:
            launch.kernel.warmup(grid=launch.grid, **launch.args, **launch.options)
    return found


def variants(launches: list[Launch], arch: str = "sm_90") -> dict[str, int]:
    """Return how many variants of each kernel ("file.kernel") these launches would compile."""
    return dict(collections.Counter(kernel for kernel, _ in set(signatures(launches, arch))))


def config_of(launch: Launch, name: str) -> dict[str, Any]:
    """Return the shipped configuration's name, and everything that is fixed at compile time."""
    constants = {p.name: launch.args[p.name] for p in launch.kernel.params if p.is_constexpr}
    options = {key: launch.options[key] for key in ("num_warps", "num_stages")}
    absent = [
        key for key, value in leaves_of(launch.args) if value is None and key not in constants
    ]
    return {"name": name, **constants, **options, "absent": absent}


def _numbers(pattern: str, log: str) -> list[int]:
    return [int(number) for number in re.findall(pattern, log)]


def _resources(log: str) -> dict[str, int]:
    """Return registers, spills and stack as ``ptxas -v`` wrote them; calls inside a kernel add
    up."""
    registers = _numbers(r"Used (\d+) registers", log)
    if not registers:
        raise RuntimeError(f"ptxas -v must report registers, got {log[-500:]!r}")
    return {
        "registers": max(registers),
        "spill_bytes": sum(_numbers(r"(\d+) bytes spill (?:stores|loads)", log)),
        "stack_bytes": sum(_numbers(r"(\d+) bytes stack frame", log)),
    }


def _amd_resources(text: str) -> dict[str, int]:
    """Return the same of a kernel for CDNA, from its assembler's metadata. Registers are those of
    vectors, accumulators included; a lane spills four bytes at a time."""

    def of(name: str) -> int:
        return max(_numbers(rf"\.{name}:\s+(\d+)", text), default=0)

    return {
        "registers": of("vgpr_count"),
        "spill_bytes": 4 * of("vgpr_spill_count"),
        "stack_bytes": of("private_segment_fixed_size"),
    }


def ctas_per_sm(row: dict[str, Any], num_warps: int) -> int:
    """Return how many blocks of a compiled kernel a multiprocessor holds at once.

    Registers are given out to a warp by 256 at a time, out of those of its partition (CUDA C++
    Programming Guide, "Technical Specifications per Compute Capability").
    """
    registers = cdiv(32 * row["registers"], 256) * 256
    warps = min(_WARPS_PER_SM, _PARTITIONS * (65536 // _PARTITIONS // registers))
    by_shared = (SHARED_LIMITS[row["arch"]] + _RESERVED) // (row["shared_bytes"] + _RESERVED)
    limits = [_CTAS_PER_SM, warps // num_warps, by_shared]
    if row["tensor_columns"]:
        limits.append(TENSOR_COLUMNS // row["tensor_columns"])
    return min(limits)


def _occupancy(row: dict[str, Any], num_warps: int) -> dict[str, Any]:
    """Return ctas_per_sm and warps_per_sm, and for an H100, whose grids are recorded, by shape how
    many times its multiprocessors are filled."""
    ctas = ctas_per_sm(row, num_warps)
    found = {"ctas_per_sm": ctas, "warps_per_sm": ctas * num_warps}
    if row["arch"] == "sm_90":
        at_once = max(1, ctas) * multiprocessors(torch.device("meta"))
        found["waves"] = {at: round(count / at_once, 2) for at, count in row["programs"].items()}
    return found


def for_chip(launch: Launch, arch: str) -> Launch:
    """Return a launch that was recorded for no chip as it would be made on ``arch``."""
    options, args = dict(launch.options), launch.args
    if arch.startswith("gfx"):
        options.pop("maxnreg", None)
    if arch.startswith("gfx") or int(arch.removeprefix("sm_")) < _EARLIEST:
        options.pop("launch_pdl", None)
        args = args | {"PDL": False} if "PDL" in args else args
    return launch._replace(args=args, options=options)


def compile_launch(launch: Launch, arch: str) -> dict[str, Any]:
    """Compile one launch for ``arch``, from scratch.

    Returns:
        registers per thread, spill_bytes (stores + loads), stack_bytes, shared_bytes,
        tensor_columns, wide_copies (16-byte copies to shared memory in the PTX), mma: how often
        each tensor-core instruction stands there, waits: how often a wait for the kernel before it,
        and order: what is wrong with that.
    """
    launch = for_chip(launch, arch)
    log = io.StringIO()
    knobs = triton.knobs
    with _chip(arch, _COMPILED) as chip, knobs.compilation.scope(), knobs.nvidia.scope():
        # A cached cubin comes without ptxas' report, the only place that counts spills.
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        launch.kernel.device_caches.pop(chip.device, None)
        with contextlib.redirect_stdout(log):
            done = launch.kernel.warmup(grid=launch.grid, **launch.args, **launch.options)
    amd = done.asm.get("amdgcn")
    ptx = amd or done.asm["ptx"]
    return {
        **(_amd_resources(amd) if amd else _resources(log.getvalue())),
        "shared_bytes": done.metadata.shared,
        "tensor_columns": getattr(done.metadata, "tmem_size", 0) or 0,
        "wide_copies": len(re.findall(_COPY, ptx)),
        "mma": {kind: len(re.findall(p, ptx)) for kind, p in _INSTRUCTIONS.items()},
        "waits": ptx.count(WAIT),
        "order": [] if amd else order_problems(done, launch),
    }


def blank_row(launch: Launch, arch: str, **labels: Any) -> dict[str, Any]:
    """Return one row of the gate's table before anything is compiled: its numbers are None.

    Args:
        launch: from ``common.recording``.
        arch: "sm_80", "sm_90", "sm_100" or "gfx942".
        labels: what else the row says (dtype, config, and programs of each shape).
    """
    return {
        "kernel": name_of(launch),
        "arch": arch,
        "programs": {},
        **labels,
        "shapes": list(labels.get("programs", ())),
        **dict.fromkeys(_MEASURED),
        "shared_limit": SHARED_LIMITS[arch],
        "triton": triton.__version__,
        "problems": [],
    }


def row_of(launch: Launch, arch: str, **labels: Any) -> dict[str, Any]:
    """Compile and check one launch: a filled row, or a blank one that says what went wrong."""
    row = blank_row(launch, arch, **labels)
    try:
        row |= compile_launch(launch, arch)
        if not arch.startswith("gfx"):
            row |= _occupancy(row, launch.options["num_warps"])
        contract = contract_of(launch)
        row["problems"] = problems_of(row, contract, launch.args)
        if contract.accumulators is not None and not arch.startswith("gfx"):
            row["problems"] += copy_problems(row["wide_copies"], contract.accumulators, launch)
    except Exception as error:  # whatever the compiler raises is the row's finding
        text = " ".join(str(error).split())
        row["problems"] = [f"does not compile: {type(error).__name__}: {text[:500]}"]
    return row


def problems_of(row: dict[str, Any], contract: Contract, args: dict[str, Any]) -> list[str]:
    """Return what is wrong with a compiled row; an empty list if nothing is.

    Args:
        row: from ``row_of``.
        contract: what the kernel promises.
        args: the launch's arguments; a prefill GEMM has BLOCK_M and BLOCK_N.
    """
    found, arch = list(row["order"]), row["arch"]
    if row["spill_bytes"]:
        found.append(f"spills {row['spill_bytes']} bytes ({row['registers']} registers)")
    if row["shared_bytes"] > row["shared_limit"]:
        found.append(f"needs {row['shared_bytes']} of {row['shared_limit']} bytes shared memory")
    if row["tensor_columns"] > TENSOR_COLUMNS:
        found.append(f"needs {row['tensor_columns']} of {TENSOR_COLUMNS} tensor memory columns")
    present = {kind for kind, count in row["mma"].items() if count}
    wanted = {"dot": {_FULL_TILE[arch]}, "dot16": set(_INSTRUCTIONS)}.get(contract.tensor_cores)
    if wanted is not None and not present & wanted:
        got = ", ".join(sorted(present)) or "no tensor-core instruction"
        found.append(f"must use {' or '.join(sorted(wanted))}, got {got}")
    if contract.accumulators is not None:
        tile = args["BLOCK_M"], args["BLOCK_N"]
        least = 128, 64 if contract.accumulators == 2 else 128
        if tile[0] < least[0] or tile[1] < least[1]:
            found.append(
                f"prefill tile must be at least {least[0]}x{least[1]}, got {tile[0]}x{tile[1]}"
            )
    return found


def copy_problems(found: int, accumulators: int, launch: Launch) -> list[str]:
    """Return what is wrong with how a prefill GEMM loads: every stage of its pipeline must be
    filled with x and W by 16-byte copies. Addresses whose pattern the compiler loses are read in
    2-byte pieces, which no other column shows.

    Args:
        found: the row's wide_copies.
        accumulators: as declared.
        launch: x is its first tensor; it has BLOCK_M, BLOCK_N, BLOCK_K.
    """
    args, options = launch.args, launch.options
    tile = (args["BLOCK_M"] + accumulators * args["BLOCK_N"]) * args["BLOCK_K"]
    x = next(iter(tensors_of(args).values()))
    size = tile * x.element_size() // 16
    wanted = options["num_stages"] * size // (32 * options["num_warps"])
    return [] if found >= wanted else [f"must load by {wanted} copies of 16 bytes, got {found}"]
