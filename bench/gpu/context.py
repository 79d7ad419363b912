"""What every measurement shares: the device, the shapes, random inputs, and the copy bandwidth."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import koffkernels
from koffkernels.clock import Clock, EventClock, Variant, WallClock, WarmClock, measure

from ..models import Shape
from . import device as devices

# Llama-3.1-8B, from its config.json; tokens per batch of the training and prefill rows: 8 x 1024.
LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128256, rows=8, tokens=1024)
TINY = Shape(64, 192, 2, 4, 2, 256, rows=2, tokens=16)
REMOVED = 0.17
RANK = 16


def pruned(width: int) -> int:
    """Neurons left of ``width`` when 17 % are removed, rounded to 64 as saved models are."""
    return max(64, round(width * (1 - REMOVED) / 64) * 64)


@dataclass(frozen=True)
class Bench:
    """Where and at what sizes a run measures.

    Args:
        device: "cuda", or "cpu" in a dry run.
        dry: tiny shapes and host time: the numbers mean nothing.
        shape: the model.
        clock: how calls are timed.
        l2: bytes of the L2 cache.
        rank: LoRA rank.
        dtype: of base weights and activations.
        warm: nothing is timed, everything is compiled.
    """

    device: torch.device
    dry: bool
    shape: Shape
    clock: Clock
    l2: int
    rank: int = RANK
    dtype: torch.dtype = torch.bfloat16
    warm: bool = False

    @property
    def dtype_name(self) -> str:
        """The dtype as result files and route tables call it."""
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Random normal values: zeros multiply faster than data does."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype) * scale

    def sets(self, size: int) -> int:
        """How many input sets of ``size`` bytes to rotate, for four times the L2 cache."""
        return min(256, max(2, math.ceil(4 * self.l2 / max(size, 1))))

    def measure(self, **variants: Variant) -> dict[str, list[float]]:
        """Microseconds per call of each variant; see ``koffkernels.clock.measure``."""
        return measure(self.clock, variants)

    def prefill(self) -> tuple[int, int]:
        """(rows, tokens per row) of the large batch: 8192 tokens."""
        return self.shape.rows, self.shape.tokens

    @functools.cached_property
    def copy_rate(self) -> float:
        """Bytes read plus bytes written per microsecond by a device-to-device copy.

        Not in a CUDA graph: there a copy is left to another engine, which on an H200 moved 2.75
        instead of 4.16 TB/s.
        """
        size = 1 << (16 if self.dry else 30)
        source = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        copy = Variant(lambda i: target.copy_(source), graph=False)
        return 2 * size / statistics.median(self.measure(copy=copy)["copy"])

    @functools.cached_property
    def gemm_rate(self) -> float:
        """Floating-point operations per microsecond of a large product by torch: the faster of the
        two products of the pruned MLP, since one shape alone can be an unlucky one."""
        m, hidden, width = (
            math.prod(self.prefill()),
            self.shape.hidden,
            pruned(self.shape.intermediate),
        )
        rates = []
        for k, n in ((hidden, 2 * width), (width, hidden)):
            x, w = self.normal(m, k), self.normal(n, k, scale=k**-0.5)
            gemm = Variant(lambda i, x=x, w=w: torch.nn.functional.linear(x, w), calls=4)
            rates.append(2 * m * k * n / statistics.median(self.measure(gemm=gemm)["gemm"]))
        return max(rates)

    def limits(self) -> dict[str, float]:
        """The two rates that shares are taken of, in bytes/s and operations/s."""
        return {
            "copy_bytes_per_second": self.copy_rate * 1e6,
            "gemm_operations_per_second": self.gemm_rate * 1e6,
        }


@contextlib.contextmanager
def bench(dry: bool, warm: bool = False) -> Iterator[Bench]:
    """The context of a run; a dry one keeps to the torch backend, a warm one times nothing."""
    torch.manual_seed(0)
    if warm:
        clock, shape = WarmClock(), TINY if dry else LLAMA_8B
        where = torch.device("cpu" if dry else "cuda")
        with koffkernels.force_backend("torch") if dry else contextlib.nullcontext():
            yield Bench(where, dry, shape, clock, 0, warm=True)
        return
    if not dry:
        l2 = int(devices.describe(False)["l2_bytes"])
        yield Bench(torch.device("cuda"), False, LLAMA_8B, EventClock(), l2)
        return
    with koffkernels.force_backend("torch"):
        yield Bench(torch.device("cpu"), True, TINY, WallClock(), 0)
