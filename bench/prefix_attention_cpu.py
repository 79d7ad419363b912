"""Attention over a learned prefix on the CPU, against repeating the prefix over the batch,
concatenating, and torch's attention.

Both sides compute the same numbers (checked first). Times alternate and are compared pair by pair;
the memory that a side needs beyond its inputs is the growth of the peak resident set in a process
of its own. Two ways of writing the other side are measured: with the query heads' keys repeated, as
transformers does under a mask, and with ``enable_gqa``.

    python -m bench.prefix_attention_cpu [--json FILE] [--check]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from koffkernels import Prefix, prefix_attention

from . import timing

SHAPE = {"rows": 8, "heads": 32, "kv_heads": 8, "tokens": 512, "prefix": 512, "head_dim": 64}
PEERS = ("repeated", "gqa")
MODES = ("forward", "forward and backward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_TIME, MOST_MEMORY = 1.0, 0.5  # as shares of the peer's, heads repeated


def inputs(dtype: torch.dtype, grad: bool) -> list[Tensor]:
    """q, k, v, and the keys and values of one memory (fp32, as memories are kept)."""
    generator = torch.Generator().manual_seed(0)
    rows, heads, kv, t, p, d = SHAPE.values()
    sizes = ((rows, heads, t, d), (rows, kv, t, d), (rows, kv, t, d), (1, kv, p, d), (1, kv, p, d))
    tensors = [torch.randn(size, generator=generator) for size in sizes]
    tensors = [x.to(dtype) if i < 3 else x for i, x in enumerate(tensors)]
    return [x.requires_grad_(grad) for x in tensors]


def koff(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    """This library."""
    return prefix_attention(q, k, v, Prefix(pk, pv, torch.tensor([SHAPE["prefix"]])))


def peer(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, gqa: bool) -> Tensor:
    """The prefix repeated over the batch and concatenated, then scaled_dot_product_attention."""
    k, v = (
        torch.cat([x.to(q.dtype).expand(len(q), -1, -1, -1), own], 2)
        for x, own in ((pk, k), (pv, v))
    )
    mask = torch.ones(SHAPE["tokens"], k.shape[2], dtype=torch.bool).tril(SHAPE["prefix"])
    if not gqa:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


SIDES: dict[str, Callable[..., Tensor]] = {
    "koff": koff,
    "repeated": lambda *tensors: peer(*tensors, gqa=False),
    "gqa": lambda *tensors: peer(*tensors, gqa=True),
}


def step(side: str, tensors: list[Tensor], mode: str) -> Tensor:
    """One forward, with the backward where ``mode`` says so."""
    if mode == MODES[0]:
        with torch.no_grad():
            return SIDES[side](*tensors)
    for x in tensors:
        x.grad = None
    o = SIDES[side](*tensors)
    o.backward(o.detach())
    return o


def _status(name: str) -> int:
    """A number of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def peak_growth(side: str, dtype: str, mode: str) -> int:
    """Bytes by which one step raises this process's peak resident set (Linux)."""
    tensors = inputs(DTYPES[dtype], mode == MODES[1])
    small = [x[..., :1, :].detach().clone().requires_grad_(x.requires_grad) for x in tensors]
    warm = F.scaled_dot_product_attention(small[0], *(x.repeat(1, 4, 1, 1) for x in small[1:3]))
    if mode == MODES[1]:  # loads libraries and starts threads
        warm.sum().backward()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = _status("VmRSS")
    step(side, tensors, mode)
    return _status("VmHWM") - before


def memory(side: str, dtype: str, mode: str, threads: int) -> int:
    """``peak_growth`` in a process of its own."""
    command = [sys.executable, "-m", "bench.prefix_attention_cpu", "--threads", str(threads)]
    command += ["--child", side, dtype, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def agree(dtype: torch.dtype) -> dict[str, float]:
    """Largest difference between the sides, forward and gradients, over the largest number."""
    worst = {}
    for name in PEERS:
        ours, theirs = inputs(dtype, True), inputs(dtype, True)
        pairs = [(step("koff", ours, MODES[1]), step(name, theirs, MODES[1]))]
        pairs += [(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True)]
        worst[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    return worst


def measure(dtype: str, mode: str, rounds: int, threads: int) -> dict[str, object]:
    """Times and memory of every side, and the shares of the peers' that koff takes."""
    tensors = {side: inputs(DTYPES[dtype], mode == MODES[1]) for side in SIDES}
    times = timing.alternate(
        {side: lambda side=side: step(side, tensors[side], mode) for side in SIDES}, rounds
    )
    peaks = {side: memory(side, dtype, mode, threads) for side in SIDES}
    return {
        "time_share": {p: timing.paired_ratio(times["koff"], times[p]) for p in PEERS},
        "memory_share": {p: peaks["koff"] / peaks[p] for p in PEERS},
        "peak_extra_bytes": peaks,
        "seconds": {side: timing.spread(values) for side, values in times.items()},
        "raw_seconds": times,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.prefix_attention_cpu")
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls per side")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    limits = f"time {MOST_TIME} or memory {MOST_MEMORY}"
    parser.add_argument("--check", action="store_true", help=f"exit 1 if a share is above {limits}")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure, print, write; 1 if ``--check`` finds a bound missed."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    if args.child:
        print(peak_growth(*args.child))
        return 0
    results, passed = {}, True
    differences = {name: agree(dtype) for name, dtype in DTYPES.items()}
    for dtype in DTYPES:
        for mode in MODES:
            result = results[f"{dtype}, {mode}"] = measure(dtype, mode, args.rounds, args.threads)
            for name in PEERS:
                time, share = result["time_share"][name]["median"], result["memory_share"][name]
                print(f"{dtype}, {mode}, against {name}: time {time:.3f}, memory {share:.3f}")
            passed &= result["time_share"][PEERS[0]]["median"] <= MOST_TIME
            passed &= result["memory_share"][PEERS[0]] <= MOST_MEMORY
    what = "prefix_attention against repeat + concatenate + scaled_dot_product_attention"
    record = {
        "what": f"{what}; shares of the peer's time (median of pairs) and peak extra memory",
        "command": f"python -m bench.prefix_attention_cpu --rounds {args.rounds}",
        "environment": timing.environment(args.threads),
        "shape": SHAPE,
        "bounds": {"time": MOST_TIME, "memory": MOST_MEMORY, "against": PEERS[0]},
        "largest_relative_difference": differences,
        "passed": passed,
        "results": results,
    }
    timing.write(args.json, record)
    return 1 if args.check and not passed else 0


if __name__ == "__main__":
    sys.exit(main())
