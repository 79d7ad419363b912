"""One training step of koff against what a user would pick instead.

Case "offloading": gates and memories, against the same written by hand with transformers and PEFT
(``bench.peers.peft_step``). Case "peft": a plain PEFT LoRA model under ``koff.apply_kernels``,
against the same model without it (``bench.peft_step``).

Both sides train the same random Llama in fp32 with the optimiser included. Each runs in processes
of its own, so that peak memory is its own; two at a time, which take their steps in turns.

    python -m bench.train_step [--case offloading] [--json FILE] [--runs 3] [--check]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace

from . import timing

SIDES = ("koff", "peer")
SETTINGS = {
    "offloading": {"rank": 16, "prefix": 64, "target": 0.25},
    "peft": {"rank": 16},
}
BOUNDS = {
    "offloading": {"time": 1.0, "peak_rss": 0.8, "saved_bytes": 0.8},
    "peft": {"time": 1.0, "peak_rss": 0.75, "saved_bytes": 0.75},
}
WHAT = {
    "offloading": "one training step, fp32, no checkpointing, AdamW included: koff with three"
    " memories in a mixed batch against PEFT LoRA + gate hooks + repeated KV, one memory",
    "peft": "one training step, fp32, no checkpointing, AdamW included: PEFT LoRA on all linear"
    " layers with koff.apply_kernels against the same without",
}


def _resident() -> int:
    """Bytes of resident memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def saved_bytes(stepper, ids) -> int:
    """Bytes that the graph of one loss keeps for backward: whole storages, each counted once,
    parameters and buffers excluded."""
    import torch

    model = stepper.model
    known = {
        t.untyped_storage().data_ptr()
        for group in stepper.optimizer.param_groups
        for t in group["params"]
    }
    known |= {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = stepper.loss(ids)  # alive while counting, or addresses could be used twice
    del loss
    return sum(found.values())


def _stepper(case: str, side: str, model):
    """The model of one side, with its optimiser."""
    if case == "peft":
        from .peft_step import PeftLoraStep

        return PeftLoraStep(model, **SETTINGS[case], kernels=side == "koff")
    if side == "koff":
        from .koff_step import KoffStep as Step
    else:
        from .peers.peft_step import PeftStep as Step
    return Step(model, **SETTINGS[case])


def child(case: str, side: str, layers: int, threads: int) -> None:
    """Answer requests on standard input, one a line: "step" takes one step, "end" reports."""
    import torch

    torch.set_num_threads(threads)
    from .models import Shape, batch, llama

    shape = replace(Shape(), layers=layers)
    imported = _resident()
    stepper = _stepper(case, side, llama(shape, torch.float32))
    built, losses = _resident(), []
    print(json.dumps({"ready": side}), flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        ids = batch(shape, seed=len(losses))
        start, cpu = time.perf_counter(), time.process_time()
        losses.append(stepper.step(ids))
        took = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        print(json.dumps(took), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = {"rss_imported": imported, "rss_before_steps": built, "peak_rss": peak}
    memory["saved_bytes"] = saved_bytes(stepper, batch(shape, seed=0))
    print(json.dumps({**memory, "losses": losses}), flush=True)


class Child:
    """A measuring process."""

    def __init__(self, case: str, side: str, layers: int, threads: int):
        command = [sys.executable, "-m", "bench.train_step", "--case", case, "--child", side]
        command += ["--layers", str(layers), "--threads", str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"bench.train_step: a child ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self, what: str) -> dict:
        """Send one request and wait for its answer."""
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self._read()

    def end(self) -> dict:
        """The process's memory numbers; it ends."""
        answer = self.ask("end")
        self.process.wait()
        return answer


def run_pair(args: argparse.Namespace, run: int) -> dict[str, dict]:
    """One process per side, steps in turns; which side goes first alternates from run to run."""
    order = SIDES if run % 2 == 0 else SIDES[::-1]
    children = {side: Child(args.case, side, args.layers, args.threads) for side in order}
    steps: dict[str, list[dict]] = {side: [] for side in order}
    for turn in range(args.warmup + args.steps):
        for side in order:
            took = children[side].ask("step")
            if turn >= args.warmup:
                steps[side].append(took)
    return {
        side: {
            "seconds": [s["seconds"] for s in steps[side]],
            "cpu_seconds": [s["cpu"] for s in steps[side]],
            **children[side].end(),
        }
        for side in order
    }


def summarise(runs: list[dict[str, dict]]) -> dict[str, object]:
    """Ratios koff / peer: time pair by pair over all steps, memory of each pair of processes."""
    pairs = [[x for run in runs for x in run[side]["seconds"]] for side in SIDES]
    summary: dict[str, object] = {
        "time": timing.paired_ratio(*pairs),
        "time_of_medians": [
            statistics.median(r["koff"]["seconds"]) / statistics.median(r["peer"]["seconds"])
            for r in runs
        ],
        "seconds": {s: timing.spread(p) for s, p in zip(SIDES, pairs, strict=True)},
        "cpu_time": timing.paired_ratio(
            *([x for run in runs for x in run[side]["cpu_seconds"]] for side in SIDES)
        ),
    }
    for what in ("peak_rss", "saved_bytes"):
        values = [[float(run[side][what]) for run in runs] for side in SIDES]
        summary[what] = timing.paired_ratio(*values)
    summary["peak_rss_over_start"] = timing.paired_ratio(
        *([float(r[s]["peak_rss"] - r[s]["rss_before_steps"]) for r in runs] for s in SIDES)
    )
    return summary


def _line(process: dict) -> str:
    mib = {name: process[name] / 2**20 for name in ("peak_rss", "rss_before_steps", "saved_bytes")}
    return (
        f"{statistics.median(process['seconds']):7.2f} s/step   peak {mib['peak_rss']:6.0f} MiB"
        f" (before the steps {mib['rss_before_steps']:5.0f})   saved {mib['saved_bytes']:6.0f} MiB"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.train_step", description=__doc__)
    parser.add_argument("--case", choices=SETTINGS, default="offloading", help="what is compared")
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    parser.add_argument("--runs", type=int, default=3, help="processes per side")
    parser.add_argument("--steps", type=int, default=4, help="timed steps per process")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps per process")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers of the model")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--check", action="store_true", help="exit 1 if a bound is missed")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure, print, write; 1 if ``--check`` finds a bound missed."""
    args = _arguments()
    if args.child:
        child(args.case, args.child, args.layers, args.threads)
        return 0
    runs = []
    for index in range(args.runs):
        runs.append(run_pair(args, index))
        for side in SIDES:
            r = runs[-1][side]
            print(f"run {index + 1} {side:5s} {_line(r)}", flush=True)
    summary = summarise(runs)
    bounds = BOUNDS[args.case]
    reached = {name: summary[name]["median"] for name in bounds}
    passed = all(reached[name] <= bound for name, bound in bounds.items())
    for name, bound in bounds.items():
        print(f"{name:12s} koff / peer {reached[name]:.3f}  (at most {bound})")
    from .models import Shape

    command = f"python -m bench.train_step --case {args.case} --runs {args.runs}"
    command += f" --steps {args.steps} --warmup {args.warmup} --layers {args.layers}"
    timing.write(
        args.json,
        {
            "what": WHAT[args.case],
            "command": command,
            "environment": timing.environment(args.threads),
            "model": replace(Shape(), layers=args.layers).record(),
            "settings": SETTINGS[args.case],
            "bounds": bounds,
            "passed": passed,
            "ratios": summary,
            "runs": runs,
        },
    )
    return 1 if args.check and not passed else 0


if __name__ == "__main__":
    sys.exit(main())
