"""How much work a forward or a step is, in counts that no busy machine changes.

Times vary here by a third; these do not vary at all: calls of torch's operators, bytes that they
allocate, and Python calls inside koff and koffkernels. What transformers does by itself is taken
off, so that the numbers are koff's own. ``tests/bench/test_work.py`` holds them against
``bench/results/work.json``: a slow path that creeps in shows there.

    python -m bench.work [--write]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import timing
from .models import Shape, batch, llama

BASELINE = Path(__file__).parent / "results" / "work.json"
SMALL = Shape(64, 192, 3, 4, 2, 128, rows=4, tokens=12)
NAMES = ("en", "fr", "es")
OURS = ("koff", "koffkernels")


class Work(NamedTuple):
    """What one call does.

    Args:
        operators: calls of torch's operators, views included.
        allocated: bytes of their results that are no views, also what was freed again.
        python: calls of Python functions of koff and koffkernels.
    """

    operators: int
    allocated: int
    python: int


class _Operators(TorchDispatchMode):
    """Counts operators, and the bytes of results that lie in memory of their own."""

    def __init__(self):
        super().__init__()
        self.calls = self.allocated = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage().data_ptr() for t in tensors}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.allocated += 0 if storage.data_ptr() in known else storage.nbytes()
        return out


def work_of(call: Callable[[], object]) -> Work:
    """Return what a call does, after a first one that makes what is made once."""
    call()
    with _Operators() as operators:
        call()
    return Work(operators.calls, operators.allocated, _python_calls(call))


def _python_calls(call: Callable[[], object]) -> int:
    count = 0

    def profiler(frame, event, argument) -> None:
        nonlocal count
        if event == "call" and frame.f_globals.get("__name__", "").partition(".")[0] in OURS:
            count += 1

    sys.setprofile(profiler)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def cases() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Name -> (koff's call, the same by transformers alone)."""
    import koff

    base = llama(SMALL, torch.float32).eval().requires_grad_(False)
    config = koff.KoffConfig(
        memories=NAMES,
        target_sparsity=0.25,
        lora=koff.LoRAConfig(r=4, alpha=8, target_modules="all-linear"),
        kv=koff.KVConfig(num_tokens=6, init="normal"),
    )
    model = koff.attach(llama(SMALL, torch.float32), config).eval()
    fixed = koff.attach(llama(SMALL, torch.float32), config).eval()
    koff.binarize(fixed)
    pruned = koff.compact(fixed)
    ids = batch(SMALL, seed=0)
    mixed = ["en", "fr", "es", None]

    @torch.no_grad()
    def forward(model, **kwargs) -> None:
        model(input_ids=ids, **kwargs)

    def step(model, **kwargs) -> None:
        model.zero_grad(set_to_none=True)
        out = model(input_ids=ids, labels=ids, use_cache=False, **kwargs)
        out.loss.backward()

    def train_step() -> None:
        model.train()
        step(model, memory=mixed)
        model.eval()

    def base_step() -> None:
        # A forward and a backward to what stands in front of the layers: koff's base is frozen.
        embedded = base.get_input_embeddings()(ids).requires_grad_()
        base(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()

    def generate(model, **kwargs) -> None:
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, **kwargs)

    plain = (lambda: forward(base), lambda: step(base), lambda: generate(base))
    return {
        "forward without memory": (lambda: forward(model), plain[0]),
        "forward, one memory": (lambda: forward(model, memory="fr"), plain[0]),
        "forward, mixed memories": (lambda: forward(model, memory=mixed), plain[0]),
        "forward, pruned, one memory": (lambda: forward(pruned, memory="fr"), plain[0]),
        "forward and backward": (train_step, base_step),
        "generate 4 tokens": (lambda: generate(pruned, memory=mixed), plain[2]),
    }


def measure() -> dict[str, dict[str, int]]:
    """Return the work of each case beyond transformers' own."""
    torch.set_num_threads(1)
    found = {}
    for name, (ours, theirs) in cases().items():
        a, b = work_of(ours), work_of(theirs)
        found[name] = Work(*(x - y for x, y in zip(a, b, strict=True)))._asdict()
    return found


def main() -> int:
    """Print the table beside the baseline; write it where that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.work", description=__doc__)
    parser.add_argument("--write", action="store_true", help="make this the baseline")
    args = parser.parse_args()
    before = json.loads(BASELINE.read_text())["work"] if BASELINE.exists() else {}
    found = measure()
    print(
        f"{'beyond transformers alone':30s} {'operators':>14s} {'KiB':>14s} {'Python calls':>14s}"
    )
    for name, row in found.items():
        cells = []
        for key, value in row.items():
            was = before.get(name, {}).get(key)
            shown = value // 1024 if key == "allocated" else value
            change = "" if not was else f" {(value / was - 1):+.0%}"
            cells.append(f"{shown}{change}".rjust(14))
        print(f"{name:30s} " + " ".join(cells))
    if args.write:
        environment = timing.environment(1)
        environment.pop("load_average")
        timing.write(BASELINE, {"environment": environment, "work": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
