"""The loss of a distilling training step, forward and backward: piece by piece from hidden states
(``koff.data.losses``) against all logits at once (``bench.peers.loss_of_all_logits``).

Memory is what torch's allocator counts, above what is there before: not the hidden states, nor the
head. It is measured at the full size; time, in turns, on one row of it.

    python -m bench.loss [--rows 8] [--tokens 1024] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from koff.data.losses import Head, token_losses

from . import timing
from .memory import peak_bytes
from .peers.loss_of_all_logits import loss_of_all_logits

WEIGHT = 0.7  # of the divergence: koff's default
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def sides(
    rows: int, tokens: int, vocabulary: int, width: int, dtype: torch.dtype
) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Name -> a call that gives the loss and its gradient for the hidden states."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)

    states, teacher = random(rows, tokens, width), random(rows, tokens, width)
    weight = random(vocabulary, width).mul_(width**-0.5)
    labels = torch.randint(vocabulary, (rows, tokens), generator=generator)
    states.requires_grad_()

    def step(loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        states.grad = None
        total = loss()
        total.backward()
        return total.detach(), states.grad

    return {
        "all logits": lambda: step(
            lambda: loss_of_all_logits(states, weight, labels, teacher, WEIGHT)
        ),
        "in pieces": lambda: step(
            lambda: token_losses(states, Head(weight), labels, teacher, WEIGHT)[0]
        ),
    }


def difference(calls: dict[str, Callable[[], tuple[Tensor, Tensor]]]) -> tuple[float, float]:
    """Return how far apart the two sides' losses and gradients are, relative to the larger one's
    size (the gradients by their norms)."""
    (total, gradient), (other, other_gradient) = (call() for call in calls.values())
    gap = (gradient.float() - other_gradient.float()).norm() / gradient.float().norm()
    return float((total - other).abs() / total.abs()), float(gap)


def main() -> int:
    """Compare, print, and write the record where it is asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.loss", description=__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = (args.tokens, args.vocabulary, args.width, DTYPES[args.dtype])
    small = sides(1, *shape)
    loss, gradient = difference(small)
    # Logits, and their gradients, are rounded to the dtype on both sides; their sums differ.
    assert loss < 1e-4 and gradient < (2e-2 if args.dtype == "bf16" else 1e-5), (loss, gradient)
    times = timing.alternate(small, args.rounds)
    ratio = timing.paired_ratio(times["in pieces"], times["all logits"])
    del small
    peaks = {name: peak_bytes(call) for name, call in sides(args.rows, *shape).items()}
    size = f"{args.tokens} tokens of {args.vocabulary:,}, width {args.width}, {args.dtype}"
    for name, seconds in times.items():
        spread = timing.spread(seconds)
        print(
            f"{name:11s} {peaks[name] / 2**20:8,.0f} MiB at {args.rows} x {size};  "
            f"{spread['median']:.2f} s ({spread['min']:.2f} to {spread['max']:.2f}) at one row"
        )
    print(
        f"in pieces / all logits: memory 1/{peaks['all logits'] / peaks['in pieces']:.0f}, time "
        f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f}); the losses differ by "
        f"{loss:.1e}, the gradients by {gradient:.1e}"
    )
    record = {
        "what": __doc__.split("\n\n")[0],
        "command": f"python -m bench.loss --rows {args.rows} --tokens {args.tokens} --vocabulary "
        f"{args.vocabulary} --width {args.width} --dtype {args.dtype} --rounds {args.rounds}",
        "environment": timing.environment(args.threads),
        "rows": args.rows,
        "tokens": args.tokens,
        "vocabulary": args.vocabulary,
        "width": args.width,
        "dtype": args.dtype,
        "peak_bytes": peaks,
        "seconds_of_one_row": times,
        "time_ratio": ratio,
        "difference": {"loss": loss, "gradient": gradient},
    }
    timing.write(args.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
