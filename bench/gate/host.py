"""Host time of operations and of a decoder layer: microseconds from the call to the driver.

Each runs on small CPU tensors through the Triton launchers, before a driver that launches nothing,
so that what Python, torch and Triton do before a GPU would is all that takes time. torch's own
matrix products are left out likewise: on a CPU they would take longer than everything else. In
turns, calls run as they are written with every launch going Triton's own way; with launches that go
past it (``koffkernels._triton.shared.direct``); and replayed (``koffkernels.replay``).

    python -m bench.gate.host [--rounds 15] [--only TEXT]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

import koffkernels
from koffkernels import GatedMLPLoRA, LoRA, Prefix, dispatch, replay, routes
from koffkernels._triton.shared import launch as common

from .. import launching
from .compiling import Chip
from .host_layer import Layer

_DEVICE = 3000  # a number that no GPU has: triton keeps what it compiled by it
WIDTH, ROWS, TOKENS, MEMORIES, RANK, LEARNED = 64, 8, 32, 8, 16, 4
OPERATIONS = ("lora_linear", "gated_mlp", "prefix_attention")
WAYS = launching.WAYS[:3]  # kernels that begin early take the host no less


class _NotCompiled(CompiledKernel):
    """What triton would have compiled; its launcher notes what it is given."""

    def __init__(self, function: JITFunction, key: str, note: Callable[..., None]):
        self.src, self.key = function, key
        self.name, self.metadata = function.__name__, None
        self.module, self.function, self.packed_metadata = object(), object(), object()
        self._run = note

    def __del__(self):
        """Unload nothing."""


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


@contextlib.contextmanager
def without_products() -> Iterator[None]:
    """Let torch's matrix products give memory that nobody has written to."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    def mm(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        return x.new_empty(x.shape[0], y.shape[1]) if out is None else out

    stubs = {
        (torch.nn.functional, "linear"): linear,
        (torch, "mm"): mm,
        (Tensor, "__matmul__"): mm,
        (Tensor, "addmm_"): lambda self, x, y: self,
    }
    before = {(holder, name): getattr(holder, name) for holder, name in stubs}
    try:
        for (holder, name), stub in stubs.items():
            setattr(holder, name, stub)
        yield
    finally:
        for (holder, name), product in before.items():
            setattr(holder, name, product)


class Case(NamedTuple):
    """What is called without arguments, and the route that it takes; None: the usual one."""

    name: str
    route: str | None
    call: Callable[[], object]


def _lora(trains: bool) -> LoRA:
    a, b = torch.zeros(MEMORIES, RANK, WIDTH), torch.zeros(MEMORIES, WIDTH, RANK)
    return LoRA(a.requires_grad_(trains), b.requires_grad_(trains), torch.ones(MEMORIES))


def _operations(tokens: int, trains: bool) -> tuple[dict[str, Callable[[], Any]], list[Tensor]]:
    """Return a call of each operation, and what gets gradients in them if they train."""

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, dtype=dtype).requires_grad_(trains)

    x = tensor(ROWS, tokens, WIDTH)
    weights = [torch.zeros(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(3)]
    ids, gates = torch.arange(ROWS) % MEMORIES, tensor(WIDTH, dtype=torch.float32)
    loras = [_lora(trains) for _ in range(3)]
    q, keys = tensor(ROWS, 4, tokens, WIDTH), max(tokens, 256 if tokens == 1 else 0)
    k, v = (tensor(ROWS, 2, keys, WIDTH) for _ in range(2))
    learned = [tensor(MEMORIES, 2, LEARNED, WIDTH, dtype=torch.float32) for _ in range(2)]
    prefix = Prefix(*learned, torch.full((MEMORIES,), LEARNED))
    calls = {
        "lora_linear": lambda: koffkernels.lora_linear(
            x, weights[0], lora=loras[0], memory_ids=ids
        ),
        "lora_linears": lambda: koffkernels.lora_linears(x, weights, lora=loras, memory_ids=ids),
        "gated_mlp": lambda: koffkernels.gated_mlp(
            x, *weights, gates=gates, lora=GatedMLPLoRA(*loras), memory_ids=ids
        ),
        "prefix_attention": lambda: koffkernels.prefix_attention(q, k, v, prefix, memory_ids=ids),
    }
    matrices = [part for lora in loras for part in (lora.a, lora.b)]
    return calls, [x, gates, q, k, v, *learned, *matrices]


def cases() -> list[Case]:
    """Return what is timed: decode, a prefill's forward, forward and backward of training."""

    def step(call: Callable[[], Any], leaves: list[Tensor]) -> Callable[[], None]:
        def outputs() -> tuple[Tensor, ...]:
            found = call()
            return found if isinstance(found, tuple) else (found,)

        dys = [torch.ones_like(y) for y in outputs()]

        def once() -> None:
            # As a step begins: where a gradient is there already, torch adds the new one to it,
            # which a CPU takes longer for than for all the rest.
            for leaf in leaves:
                leaf.grad = None
            torch.autograd.backward(outputs(), dys)

        return once

    found = []
    with triton_on_cpu(), empty_driver():
        for op, call in _operations(1, trains=False)[0].items():
            found.append(Case(f"{op} decode", "decode", call))
        for op, call in _operations(TOKENS, trains=False)[0].items():
            route = "fused" if op == "prefix_attention" else "vendor"
            found.append(Case(f"{op} prefill", route, call))
        calls, leaves = _operations(TOKENS, trains=True)
        for op, call in calls.items():
            route = "fused" if op == "prefix_attention" else "vendor"
            found.append(Case(f"{op} training", route, step(call, leaves)))
        for memories in (1, MEMORIES):
            of = f"of {memories}"
            found.append(Case(f"layer decode {of}", "decode", Layer(memories, 1).decode))
            found.append(Case(f"layer training {of}", None, Layer(memories, TOKENS).train))
        return found


def measure(case: Case, rounds: int, seconds: float = 0.002) -> dict[str, float]:
    """Return the launches of a case and the microseconds it takes each way, the least of ``rounds``
    readings in turns: what else the machine does can only add to one.

    A reading is of this thread's own time, over as many calls as take some ``seconds``, so that
    some readings fall between two turns of the others on this core.
    """
    forced = contextlib.nullcontext() if case.route is None else routes.force_route(case.route)
    least = dict.fromkeys(WAYS, float("inf"))
    with triton_on_cpu(), empty_driver(), without_products(), forced:
        replay.forget()
        with common.recording() as launches:
            case.call()
        for _ in range(rounds):
            for way in WAYS:
                with launching.launching(way, "cpu"):
                    for _ in range(3):  # what is new here compiles, and is written down
                        case.call()
                    calls, begun = 0, time.thread_time()
                    while (taken := time.thread_time() - begun) < seconds:
                        case.call()
                        calls += 1
                    least[way] = min(least[way], taken / calls * 1e6)
    replay.forget()
    return {"launches": len(launches), **least}


def main() -> int:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(prog="python -m bench.gate.host", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="readings of each way")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"triton {triton.__version__}, torch {torch.__version__}; microseconds")
    print(f"{'case':28s} {'launches':>8s} {'by triton':>10s} {'direct':>10s} {'replayed':>10s}")
    for case in cases():
        if args.only not in case.name:
            continue
        row = measure(case, args.rounds)
        times = " ".join(f"{row[way]:10.1f}" for way in WAYS)
        print(f"{case.name:28s} {row['launches']:8d} {times}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
