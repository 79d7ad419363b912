"""Which way a Triton operation takes: vendor GEMM and small kernels, fused GEMM, or decode kernels.

The choice is a look-up in a measured table, one JSON file per GPU in ``configs/``; the nearest
measured shape counts. A GPU without a table takes the decode kernels for few tokens and the
vendor's GEMMs for many, and says so.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .checks import refuse

ROUTES = ("vendor", "fused", "decode")
DECODE_TOKENS = 64  # the decode kernels hold all tokens of a call in one tile
FOLDER = Path(__file__).parent / "configs"
_LIMITS = {"prefix_attention": "; other head_dims than 64 and 128, and fp64, in plain torch"}
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Shape(NamedTuple):
    """What a route is chosen by.

    Args:
        op: "lora_linear", "gated_mlp" or "prefix_attention".
        stage: "forward" or "backward".
        m, k, n: tokens, input and output width (H and I of an MLP; T, D and S of an attention).
        dtype: the compute dtype.
    """

    op: str
    stage: str
    m: int
    k: int
    n: int
    dtype: torch.dtype


class Route(NamedTuple):
    """A route, the launcher's config (None: its default), why, and whether by ``force_route``."""

    name: str
    config: str | None
    reason: str
    forced: bool = False


# A plain global, set by force_route for the whole process.
_FORCED: Route | None = None


@contextlib.contextmanager
def force_route(route: str) -> Iterator[None]:
    """Use one route for every Triton operation inside the ``with`` block, in the whole process.

    Args:
        route: "vendor", "fused" or "decode"; a config of the launcher may follow: "fused:NAME".
            Where a call cannot take it (decode with over 64 tokens or with gradients) it takes the
            vendor's.

    Raises:
        ValueError: unknown route.
    """
    name, _, config = route.partition(":")
    if name not in ROUTES:
        rule, step = f"be one of {', '.join(ROUTES)}", "a config may follow a colon"
        refuse("force_route", "route", rule, repr(route), step)
    global _FORCED
    before, _FORCED = _FORCED, Route(name, config or None, "set by force_route", forced=True)
    try:
        yield
    finally:
        _FORCED = before


def table_path(gpu: str) -> Path:
    """Return where the table of a GPU is, by the name that CUDA gives it."""
    return FOLDER / (re.sub(r"[^A-Za-z0-9]+", "_", gpu).strip("_") + ".json")


@functools.cache
def table(gpu: str) -> tuple[dict, ...]:
    """Return the measured rows of a GPU; empty where it was never measured."""
    path = table_path(gpu)
    return tuple(json.loads(path.read_text(encoding="utf-8"))["rows"]) if path.is_file() else ()


def describe(op: str) -> str:
    """Return what ``backends()`` says of an operation's routes on the current GPU."""
    if _FORCED is not None:
        return f"route {_FORCED.name} {_FORCED.reason}"
    gpu = _gpu(torch.cuda.current_device())
    rows = sum(row["op"] == op for row in table(gpu))
    if rows:
        found = f"{rows} measured routes on {gpu}"
    elif op == "prefix_attention":
        found = f"vendor route, unmeasured on {gpu}"
    else:
        found = (
            f"decode kernels up to {DECODE_TOKENS} tokens, else vendor route, unmeasured on {gpu}"
        )
    return found + _LIMITS.get(op, "")


@functools.cache
def _gpu(index: int) -> str:
    return torch.cuda.get_device_name(index)


def _distance(row: dict, shape: Shape) -> float:
    """Return how far a measured shape is, in powers of two, over tokens and both widths."""
    return sum(abs(math.log2(row[x] / max(getattr(shape, x), 1))) for x in "mkn")


# Thousands, because the shapes of attention grow by a key with every token that is generated.
@functools.lru_cache(maxsize=4096)
def _nearest(gpu: str, shape: Shape) -> Route:
    names = (shape.op, shape.stage, _DTYPES.get(shape.dtype))
    same = [r for r in table(gpu) if (r["op"], r["pass"]) == names[:2]]
    rows = [r for r in same if r["dtype"] == names[2]]
    if not rows and shape.dtype.itemsize == 2:
        rows = same  # 16-bit dtypes cost the same
    if not rows:
        return Route(_usual(shape), None, f"unmeasured on {gpu}")
    best = min(rows, key=lambda row: (_distance(row, shape), row["us"]))
    return Route(best["route"], best.get("config"), f"measured on {gpu} at {best['m']} tokens")


def _usual(shape: Shape) -> str:
    """Return the route of a call that no table knows.

    With few tokens the weights' bytes are all that counts. The vendor's GEMM reads them as fast,
    but leaves the low-rank updates to four more launches: on an H200 a pruned MLP of Llama-3.1-8B
    took 96 us instead of 106 for one token, and 124 instead of 178 for 64 tokens of eight memories
    (docs/gpu.md).
    """
    few = shape.stage == "forward" and shape.m <= DECODE_TOKENS and shape.dtype.itemsize == 2
    return "decode" if few and shape.op in ("lora_linear", "gated_mlp") else "vendor"


def find(configs: dict[str, Any], route: Route) -> Any:
    """Return a route's config among a launcher's; None, the default, where it names none.

    Raises:
        ValueError: ``force_route`` named one that is not there.
    """
    if route.forced and route.config is not None and route.config not in configs:
        rule, step = f"be one of {', '.join(configs)}", "choose one of these"
        refuse("force_route", "the config", rule, repr(route.config), step)
    return configs.get(route.config)


def choose(shape: Shape, device: torch.device) -> Route:
    """Return the route of a call; never raises, never times anything."""
    if _FORCED is not None:
        found = _FORCED
    elif device.type == "cuda":
        found = _nearest(_gpu(device.index or 0), shape)
    else:
        found = Route("vendor", None, "not a GPU")
    if found.name == "decode" and (shape.m > DECODE_TOKENS or shape.stage == "backward"):
        return Route("vendor", None, f"over {DECODE_TOKENS} tokens, or a backward")
    return found
