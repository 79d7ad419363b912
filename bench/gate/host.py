"""Host time of operations: microseconds from the call to the driver, which is left out.

Each operation runs on small CPU tensors through the Triton launchers, before a driver that launches
nothing, so that what Python, torch and Triton do before a GPU would is all that takes time; torch's
own operators take what they take on a CPU. In turns, every launch goes Triton's own way, or
``koffkernels._triton.shared.direct``, or nowhere, which leaves what lies around the launches.

    python -m bench.gate.host [--rounds 15] [--only TEXT]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

import koffkernels
from koffkernels import GatedMLPLoRA, LoRA, Prefix, dispatch, routes
from koffkernels._triton.shared import direct
from koffkernels._triton.shared import launch as common

from .. import timing
from .compiling import Chip

_DEVICE = 3000  # a number that no GPU has: triton keeps what it compiled by it
WIDTH, ROWS, TOKENS, MEMORIES, RANK, LEARNED = 64, 8, 16, 8, 16, 32
OPERATIONS = ("lora_linear", "gated_mlp", "prefix_attention")
WAYS = ("triton", "direct", "none")


class _NotCompiled(CompiledKernel):
    """What triton would have compiled; its launcher notes what it is given."""

    def __init__(self, function: JITFunction, key: str, note: Callable[..., None]):
        self.src, self.key = function, key
        self.name, self.metadata = function.__name__, None
        self.module, self.function, self.packed_metadata = object(), object(), object()
        self._run = note


@contextlib.contextmanager
def empty_driver(note: Callable[..., None] = lambda *args: None) -> Iterator[None]:
    """Let triton take a GPU for the current device that launches nothing; none is touched.

    Args:
        note: is called in place of a launch, with all that the launcher is given.
    """
    seen = set()

    def compile_nothing(self: JITFunction, key: str, signature: dict, device: int, *rest: Any):
        seen.add(self)
        made = self.device_caches[device][0][key] = _NotCompiled(self, key, note)
        return made

    driver, compile_really = triton.runtime.driver, JITFunction._do_compile
    before = driver._active
    driver.set_active(Chip("sm_90", _DEVICE))
    JITFunction._do_compile = compile_nothing
    try:
        yield
    finally:
        JITFunction._do_compile = compile_really
        driver._active = before
        for kernel in seen:
            kernel.device_caches.pop(_DEVICE, None)


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Let operations on CPU tensors take the Triton launchers."""
    before = dict(dispatch._LOADED)
    try:
        for op in OPERATIONS:
            dispatch._LOADED[op, "torch"] = dispatch._load(op, "triton")
        yield
    finally:
        dispatch._LOADED.clear()
        dispatch._LOADED.update(before)


class Case(NamedTuple):
    """An operation, called without arguments, and the route that it takes."""

    name: str
    route: str
    call: Callable[[], object]


def _lora(trains: bool) -> LoRA:
    a, b = torch.zeros(MEMORIES, RANK, WIDTH), torch.zeros(MEMORIES, WIDTH, RANK)
    return LoRA(a.requires_grad_(trains), b.requires_grad_(trains), torch.ones(MEMORIES))


def _operations(tokens: int, trains: bool) -> dict[str, Callable[[], Tensor]]:
    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, dtype=dtype).requires_grad_(trains)

    x, weight = tensor(ROWS, tokens, WIDTH), torch.zeros(WIDTH, WIDTH, dtype=torch.bfloat16)
    ids, gates = torch.arange(ROWS) % MEMORIES, tensor(WIDTH, dtype=torch.float32)
    loras = [_lora(trains) for _ in range(3)]
    q, keys = tensor(ROWS, 4, tokens, WIDTH), max(tokens, 256 if tokens == 1 else 0)
    k, v = (tensor(ROWS, 2, keys, WIDTH) for _ in range(2))
    learned = [tensor(MEMORIES, 2, LEARNED, WIDTH, dtype=torch.float32) for _ in range(2)]
    prefix = Prefix(*learned, torch.full((MEMORIES,), LEARNED))
    return {
        "lora_linear": lambda: koffkernels.lora_linear(x, weight, lora=loras[0], memory_ids=ids),
        "gated_mlp": lambda: koffkernels.gated_mlp(
            x, weight, weight, weight, gates=gates, lora=GatedMLPLoRA(*loras), memory_ids=ids
        ),
        "prefix_attention": lambda: koffkernels.prefix_attention(q, k, v, prefix, memory_ids=ids),
    }


def cases() -> list[Case]:
    """Return what is timed: decode, a prefill's forward, forward and backward of training."""

    def step(call: Callable[[], Tensor]) -> Callable[[], object]:
        dy = torch.ones_like(call())
        return lambda: call().backward(dy)

    with triton_on_cpu(), empty_driver():
        found = []
        for op, call in _operations(1, trains=False).items():
            found.append(Case(f"{op} decode", "decode", call))
        for op, call in _operations(TOKENS, trains=False).items():
            route = "fused" if op == "prefix_attention" else "vendor"
            found.append(Case(f"{op} prefill", route, call))
        for op, call in _operations(TOKENS, trains=True).items():
            route = "fused" if op == "prefix_attention" else "vendor"
            found.append(Case(f"{op} training", route, step(call)))
        return found


@contextlib.contextmanager
def launching(way: str) -> Iterator[None]:
    """Let launches go one of ``WAYS``."""
    before = direct.ENABLED, direct.launch
    direct.ENABLED = way == "direct"
    if way == "none":
        direct.launch = lambda *args: None
    try:
        yield
    finally:
        direct.ENABLED, direct.launch = before


def measure(case: Case, rounds: int, calls: int = 100) -> dict[str, float]:
    """Return the launches of a case and the microseconds it takes each way, the least of ``rounds``
    readings of ``calls`` calls: what else the machine does can only add to one."""

    def reading(way: str) -> Callable[[], None]:
        def run() -> None:
            with launching(way):
                for _ in range(calls):
                    case.call()

        return run

    with triton_on_cpu(), empty_driver(), routes.force_route(case.route):
        with common.recording() as launches:
            case.call()
        times = timing.alternate({way: reading(way) for way in WAYS}, rounds)
    row = {way: min(seconds) / calls * 1e6 for way, seconds in times.items()}
    return {"launches": len(launches), **row}


def main() -> int:
    """Print a line for each operation."""
    parser = argparse.ArgumentParser(prog="python -m bench.gate.host", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="readings of each way")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"triton {triton.__version__}, torch {torch.__version__}; microseconds")
    print(
        f"{'operation':28s} {'launches':>8s} {'around':>8s} {'by triton':>10s} {'direct':>8s}"
        f" {'a launch':>16s} {'ratio':>6s}"
    )
    for case in cases():
        if args.only not in case.name:
            continue
        row = measure(case, args.rounds)
        each = [(row[way] - row["none"]) / row["launches"] for way in ("triton", "direct")]
        print(
            f"{case.name:28s} {row['launches']:8d} {row['none']:8.1f} {row['triton']:10.1f}"
            f" {row['direct']:8.1f} {each[0]:7.1f} -> {each[1]:5.1f} {each[1] / each[0]:6.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
