"""Which way a Triton operation takes: vendor GEMM and small kernels, fused GEMM, or decode kernels.

A rule decides: the decode kernels for few tokens, the vendor's GEMMs for many. Measured tables
refine it, one JSON file per GPU: the user's own, which ``python -m koffkernels.tune`` writes into
the cache folder, before the one that is shipped in ``configs/``. The nearest measured shape counts,
where one is near.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import os
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
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# A row says nothing about a call further away than this, in powers of two over tokens and both
# widths; a row with memory ids is this far from a call without, and one of q, k and v as one
# operation from a linear layer on its own, and the other way round.
_FAR, _OTHER_IDS, _OTHER_COUNT = 4.0, 2.0, 2.0


class Shape(NamedTuple):
    """What a route is chosen by.

    Args:
        op: "lora_linear", "gated_mlp" or "prefix_attention".
        stage: "forward" or "backward".
        m, k, n: tokens, input and output width (H and I of an MLP; T, D and S of an attention). Of
            several linear layers the outputs side by side.
        dtype: the compute dtype.
        mixed: whether the call has memory ids.
        several: whether it has several linear layers, q, k and v.
    """

    op: str
    stage: str
    m: int
    k: int
    n: int
    dtype: torch.dtype
    mixed: bool = False
    several: bool = False


class Route(NamedTuple):
    """A route, the launcher's config (None: its default), why, and whether by ``force_route``."""

    name: str
    config: str | None
    reason: str
    forced: bool = False


# Plain globals, set by force_route for the whole process: of every operation, and of single ones.
_FORCED: Route | None = None
_FORCED_FOR: dict[str, Route] = {}
_readings = 0  # how often the tables were forgotten


@contextlib.contextmanager
def force_route(route: str, op: str | None = None) -> Iterator[None]:
    """Use one route for every Triton operation inside the ``with`` block, in the whole process.

    Args:
        route: "vendor", "fused" or "decode"; a config of the launcher may follow: "fused:NAME".
            Where a call cannot take it (decode with over 64 tokens or with gradients) it takes the
            vendor's. Attention is "fused" in one pass; its vendor may be named ("vendor:cudnn",
            "vendor:flash").
        op: only this operation; the down projection of a gated MLP is a "lora_linear". None: all.

    Raises:
        ValueError: unknown route.
    """
    name, _, config = route.partition(":")
    if name not in ROUTES:
        rule, step = f"be one of {', '.join(ROUTES)}", "a config may follow a colon"
        refuse("force_route", "route", rule, repr(route), step)
    global _FORCED
    forced = Route(name, config or None, "set by force_route", forced=True)
    before = _FORCED, dict(_FORCED_FOR)
    if op is None:
        _FORCED = forced
    else:
        _FORCED_FOR[op] = forced
    try:
        yield
    finally:
        _FORCED = before[0]
        _FORCED_FOR.clear()
        _FORCED_FOR.update(before[1])


def settings() -> tuple:
    """Return what choices depend on beside the call: what ``force_route`` has set, and which
    reading of the tables they are by."""
    return _readings, _FORCED, *_FORCED_FOR.items()


def _file(gpu: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", gpu).strip("_") + ".json"


def table_path(gpu: str) -> Path:
    """Return where the shipped table of a GPU is, by the name that CUDA gives it."""
    return FOLDER / _file(gpu)


def own_table_path(gpu: str) -> Path:
    """Return where the user's own table of a GPU is: in ``routes`` of $KOFF_CACHE or, where that is
    not set, of the folder ``koff`` in the user's cache directory."""
    cache = os.environ.get("KOFF_CACHE")
    if not cache:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "koff"
    return Path(cache) / "routes" / _file(gpu)


def versions() -> dict[str, str | None]:
    """Return torch's and triton's version, without what says how they were built."""
    found: dict[str, str | None] = {"torch": torch.__version__.split("+")[0]}
    try:
        found["triton"] = importlib.metadata.version("triton").split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = None
    return found


_TYPES = {"op": str, "pass": str, "route": str, "dtype": str, "torch": str, "triton": str}
_TYPES |= {"m": int, "k": int, "n": int, "mixed": bool, "us": float}


def _is_row(row: object) -> bool:
    """Return whether a row of a table has what a choice needs: who reads one trusts nobody."""
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(name), kind) for name, kind in _TYPES.items())
        and min(row["m"], row["k"], row["n"]) > 0
        and row["route"] in ROUTES
        and isinstance(row.get("config"), str | None)
        and isinstance(row.get("heads", 0), int)
    )


def read(path: Path) -> list[dict]:
    """Return the rows of a table; none where there is no file or it cannot be read."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return [row for row in rows if _is_row(row)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


@functools.cache
def table(gpu: str) -> tuple[dict, ...]:
    """Return the measured rows of a GPU, the user's own first; empty where it was never measured.

    What another torch or triton measured says little about this one: such rows count only for
    operations of which there are no others.
    """
    own, shipped = read(own_table_path(gpu)), read(table_path(gpu))
    rows = [row | {"own": True} for row in own] + [row | {"own": False} for row in shipped]
    now = versions()
    same = [row for row in rows if _of(row, now)]
    known = {(row["op"], row["pass"]) for row in same}
    others = [row for row in rows if not _of(row, now) and (row["op"], row["pass"]) not in known]
    return tuple(same + others)


def _of(row: dict, now: dict[str, str | None]) -> bool:
    """Return whether a row is of these versions."""
    return all(row[name] == version for name, version in now.items())


def forget() -> None:
    """Read the tables anew at the next choice."""
    global _readings
    _readings += 1
    table.cache_clear()
    _nearest.cache_clear()


def describe(op: str) -> str:
    """Return what ``backends()`` says of an operation's routes on the current GPU."""
    forced = _FORCED_FOR.get(op, _FORCED)
    if forced is not None:
        return f"route {forced.name} {forced.reason}"
    gpu = _gpu(torch.cuda.current_device())
    rows = [row for row in table(gpu) if row["op"] == op]
    if not rows and op == "prefix_attention":
        return f"vendor route, unmeasured on {gpu}" + _LIMITS.get(op, "")
    rule = f"decode kernels up to {DECODE_TOKENS} tokens, else vendor route"
    if not rows:
        return f"{rule}, unmeasured on {gpu}" + _LIMITS.get(op, "")
    parts = []
    for own, path in ((True, own_table_path(gpu)), (False, table_path(gpu))):
        mine = [row for row in rows if row["own"] == own]
        if mine:
            parts.append(f"{len(mine)} routes of {path}")
    foreign = next((row for row in rows if not _of(row, versions())), None)
    if foreign is not None:
        told = f"torch {foreign['torch']} and triton {foreign['triton']}"
        parts.append(f"measured with {told}: run python -m koffkernels.tune")
    return f"{', '.join(parts)}; measured on {gpu}" + _LIMITS.get(op, "")


@functools.cache
def _gpu(index: int) -> str:
    return torch.cuda.get_device_name(index)


def _distance(row: dict, shape: Shape) -> float:
    """Return how far a measured shape is, in powers of two, over tokens and both widths."""
    far = sum(abs(math.log2(row[x] / max(getattr(shape, x), 1))) for x in "mkn")
    # Over DECODE_TOKENS a row knows nothing of the decode kernels, and up to them not much else.
    if (row["m"] <= DECODE_TOKENS) != (shape.m <= DECODE_TOKENS):
        return math.inf
    # Linear layers have heads in a table if they are those of an attention, q, k and v.
    several = row["op"] == "lora_linear" and row.get("heads", 0) > 0
    far += (several != shape.several) * _OTHER_COUNT
    return far + (row["mixed"] != shape.mixed) * _OTHER_IDS


# Thousands, because the shapes of attention grow by a key with every token that is generated.
@functools.lru_cache(maxsize=4096)
def _nearest(gpu: str, shape: Shape) -> Route:
    names = (shape.op, shape.stage, DTYPES.get(shape.dtype))
    same = [r for r in table(gpu) if (r["op"], r["pass"]) == names[:2]]
    rows = [r for r in same if r["dtype"] == names[2]]
    if not rows and shape.dtype.itemsize == 2:
        rows = same  # 16-bit dtypes cost the same
    rows = [row for row in rows if _distance(row, shape) <= _FAR]
    if not rows:
        return Route(usual(shape), None, f"unmeasured on {gpu}")
    best = min(rows, key=lambda row: (_distance(row, shape), not row["own"], row["us"]))
    return Route(best["route"], best.get("config"), f"measured on {gpu} at {best['m']} tokens")


def usual(shape: Shape) -> str:
    """Return the route of a call that no table knows.

    With few tokens the weights' bytes are all that counts. The vendor's GEMM reads them as fast,
    but leaves the low-rank updates to four more launches: on an H200 a pruned MLP of Llama-3.1-8B
    took 96 us instead of 106 for one token, and 124 instead of 178 for 64 tokens of eight memories
    (docs/gpu.md).
    """
    if torch.version.hip is not None:
        return "vendor"  # the decode kernels' tiles do not fit the local memory of an MI300
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
    forced = _FORCED_FOR.get(shape.op, _FORCED)
    if forced is not None:
        found = forced
    elif device.type == "cuda":
        found = _nearest(_gpu(device.index or 0), shape)
    else:
        found = Route("vendor", None, "not a GPU")
    if found.name == "decode" and (shape.m > DECODE_TOKENS or shape.stage == "backward"):
        return Route("vendor", None, f"over {DECODE_TOKENS} tokens, or a backward")
    return found
