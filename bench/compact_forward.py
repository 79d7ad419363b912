"""The forward of a compacted model against the dense one, as a share of what its FLOPs promise.

A random Llama loses a quarter of its MLP neurons, equally many in all layers or a different number
in each; dense and compacted forward then run in turns. The share is the measured speed-up over the
ratio of the FLOPs of every matmul of the forward (attention's linear layers and scores, MLP, head)
at the widths kept.

    python -m bench.compact_forward [--json FILE] [--check]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
from dataclasses import replace

import torch
from transformers import PreTrainedModel

import koff

from . import timing
from .models import Shape, batch, forward_flops, llama, vary

BOUND = 0.95
REMOVED = 0.25
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDTHS = {"equal": "uniform", "different": "global"}


@torch.no_grad()
def compacted(
    dense: PreTrainedModel, per_layer: str, seed: int
) -> tuple[PreTrainedModel, list[int]]:
    """A copy of ``dense`` without the neurons of the lowest (random) log_alpha, and its widths."""
    config = koff.KoffConfig(memories=(), target_sparsity=REMOVED, lora=None, kv=None)
    model = koff.attach(copy.deepcopy(dense), config)
    vary(model, seed)
    koff.binarize(model, per_layer=per_layer)
    small = koff.compact(model, inplace=True)
    return small, koff.sparsity(small).widths


def measure(shape: Shape, dtype: torch.dtype, per_layer: str, rounds: int) -> dict[str, object]:
    """Times, FLOP ratio and share of one dtype and one spread of the widths."""
    dense = llama(shape, dtype).eval()
    small, widths = compacted(dense, per_layer, seed=0)
    ids = batch(shape, seed=0)
    with torch.inference_mode():
        times = timing.alternate(
            {
                "dense": lambda: dense(input_ids=ids, use_cache=False),
                "compacted": lambda: small(input_ids=ids, use_cache=False),
            },
            rounds,
            warmup=2,
        )
    flops = forward_flops(shape, [shape.intermediate] * shape.layers)
    ideal = flops / forward_flops(shape, widths)
    speedup = timing.paired_ratio(times["dense"], times["compacted"])
    return {
        "widths": widths,
        "kept_share_of_neurons": sum(widths) / (shape.intermediate * shape.layers),
        "flop_ratio": ideal,
        "dense_tflop": flops / 1e12,
        "speedup": speedup,
        "share_of_ideal": speedup["median"] / ideal,
        "share_of_ideal_by_minimum": min(times["dense"]) / min(times["compacted"]) / ideal,
        "dense_tflops_per_second": flops / 1e12 / statistics.median(times["dense"]),
        "seconds": {name: timing.spread(values) for name, values in times.items()},
        "raw_seconds": times,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.compact_forward", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    parser.add_argument("--rounds", type=int, default=15, help="timed forwards per side")
    parser.add_argument("--rows", type=int, default=4, help="rows of the batch")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per row")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--check", action="store_true", help=f"exit 1 if a share is under {BOUND}")
    return parser.parse_args()


def main() -> int:
    """Measure, print, write; 1 if ``--check`` finds the bound missed."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    shape = replace(Shape(), rows=args.rows, tokens=args.tokens)
    results = {}
    for (kind, dtype), (widths, per_layer) in itertools.product(DTYPES.items(), WIDTHS.items()):
        name = f"{kind}-{widths}"
        result = results[name] = measure(shape, dtype, per_layer, args.rounds)
        print(
            f"{name}: dense {result['seconds']['dense']['median']:.3f} s, compacted"
            f" {result['seconds']['compacted']['median']:.3f} s, speed-up"
            f" {result['speedup']['median']:.3f} of {result['flop_ratio']:.3f}:"
            f" share {result['share_of_ideal']:.3f} (at least {BOUND})",
            flush=True,
        )
    passed = all(result["share_of_ideal"] >= BOUND for result in results.values())
    command = f"python -m bench.compact_forward --rounds {args.rounds}"
    timing.write(
        args.json,
        {
            "what": "forward of a compacted model against the dense one, alternating; share ="
            " measured speed-up / ratio of the matmul FLOPs at the widths kept",
            "command": f"{command} --rows {args.rows} --tokens {args.tokens}",
            "environment": timing.environment(args.threads),
            "model": shape.record(),
            "removed": REMOVED,
            "bound": BOUND,
            "passed": passed,
            "results": results,
        },
    )
    return 1 if args.check and not passed else 0


if __name__ == "__main__":
    sys.exit(main())
