"""What all kernels of prefix attention share: the arguments of one call, and which keys a row sees.

Shapes are those of ``koffkernels.prefix_attention``. log2 and exp2 take the place of log and exp
inside the kernels; what leaves them is in natural units.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...types import Prefix, RowBounds
from ..shared.launch import default_config, dot, precision, unit_stride

HEAD_DIMS = (64, 128)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Config(NamedTuple):
    """Tile sizes and launch options of one kernel.

    Args:
        block_m: queries of a tile.
        block_n: keys of a tile.
        warps, stages: per program; depth of the software pipeline.
        archs: compute capabilities it fits (80, 90, ...); None: all.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    archs: tuple[int, ...] | None = None

    def launch(self) -> dict[str, int]:
        """The arguments of ``common.launch`` that this fixes."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def choose_config(
    config: Config | None, configs: dict[str, Config], fp32: Config, q: Tensor
) -> Config:
    """The given config, else the file's for fp32, else the default of its others on q's GPU."""
    if config is not None:
        return config
    return fp32 if q.dtype == torch.float32 else default_config(configs, q.device)


def strides(name: str, x: Tensor) -> dict[str, int]:
    """The strides of x [B, H, T, D] as kernel arguments: row, head, token."""
    return dict(zip((f"{name}_b", f"{name}_h", f"{name}_t"), x.stride()[:3], strict=True))


class Call(NamedTuple):
    """One call of prefix attention.

    Args:
        q: [B, Hq, T, D].
        k, v: [B, Hkv, S, D].
        prefix: learned keys and values of n memories, or None.
        ids: int64 [B], or None: every row uses memory 0. An id outside 0..n-1 means no memory.
        bounds: which keys each row sees, or None (see ``koffkernels.prefix_attention``).
        scale: softmax scale, above 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prefix: Prefix | None
    ids: Tensor | None
    bounds: RowBounds | None
    scale: float

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.q.shape[1] // self.k.shape[1]

    def ready(self, dtype: torch.dtype | None) -> Call:
        """The same with dense last dimensions and a contiguous prefix, cast to ``dtype`` if one is
        given: it is small and shared by the batch, so one cast a call spares one per tile."""
        prefix = self.prefix
        if prefix is not None:
            k, v = (
                x.to(dtype or x.dtype, memory_format=torch.contiguous_format).contiguous()
                for x in prefix[:2]
            )
            prefix = Prefix(k, v, prefix.lengths.contiguous())
        q, k, v = (unit_stride(x) for x in self[:3])
        ids = None if self.ids is None else self.ids.contiguous()
        bounds = self.bounds and RowBounds(*(x.contiguous() for x in self.bounds))
        return Call(q, k, v, prefix, ids, bounds, self.scale)

    def sizes(self) -> dict[str, Any]:
        """Sizes of q, the scale and what depends on the dtype."""
        _, heads, queries, width = self.q.shape
        return {
            "heads": heads,
            "group": self.group,
            "T": queries,
            "scale": self.scale,
            "D": width,
            "PRECISION": precision(self.q.dtype),
        }

    def query_args(self) -> dict[str, Any]:
        """q and its strides."""
        return {"q_ptr": self.q, **strides("q", self.q)}

    def own_args(self) -> dict[str, Any]:
        """The rows' own keys and which of them each row sees."""
        start, end, first = self.bounds or (None, None, None)
        return {
            "k_ptr": self.k,
            "v_ptr": self.v,
            **strides("k", self.k),
            **strides("v", self.v),
            "start_ptr": start,
            "end_ptr": end,
            "first_ptr": first,
            "S": self.k.shape[2],
            "HAS_BOUNDS": self.bounds is not None,
        }

    def prefix_args(self) -> dict[str, Any]:
        """Learned keys and values, and which of them each row sees."""
        k, v, lengths = self.prefix or (None, None, None)
        return {
            "pk_ptr": k,
            "pv_ptr": v,
            "lengths_ptr": lengths,
            "ids_ptr": self.ids,
            "memories": 0 if k is None else k.shape[0],
            "P": 0 if k is None else k.shape[2],
            "HAS_IDS": self.ids is not None,
            "HAS_PREFIX": k is not None,
        }


@triton.jit
def memory_length(lengths_ptr, memory, memories, P):
    """How many learned keys a memory has: 0 for an id that is none."""
    known = (memory >= 0) & (memory < memories)
    length = tl.load(lengths_ptr + memory, mask=known, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(length, 0), P).to(tl.int32)


@triton.jit
def row_prefix(
    ids_ptr, lengths_ptr, b, memories, P, HAS_PREFIX: tl.constexpr, HAS_IDS: tl.constexpr
):
    """(memory, its length) of row b; memory 0 of length 0 where it has none."""
    memory = tl.zeros((), tl.int64)
    length = tl.zeros((), tl.int32)
    if HAS_PREFIX:
        if HAS_IDS:
            memory = tl.load(ids_ptr + b).to(tl.int64)
        length = memory_length(lengths_ptr, memory, memories, P)
        memory = tl.where(length > 0, memory, 0)
    return memory, length


@triton.jit
def row_bounds(start_ptr, end_ptr, first_ptr, b, T, S, HAS_BOUNDS: tl.constexpr):
    """(start, end, first): query t of row b sees the own keys start <= j < end, j <= first + t.

    No key behind the row's last query is inside start..end, so what lies there is never read.
    """
    if HAS_BOUNDS:
        start = tl.load(start_ptr + b).to(tl.int64)
        end = tl.load(end_ptr + b).to(tl.int64)
        first = tl.load(first_ptr + b).to(tl.int64)
        start = tl.minimum(tl.maximum(start, 0), S).to(tl.int32)
        end = tl.minimum(tl.maximum(end, 0), S).to(tl.int32)
        first = tl.minimum(tl.maximum(first, -T), S).to(tl.int32)
    else:
        start = tl.zeros((), tl.int32)
        end = start + S
        first = end - T
    return start, tl.minimum(end, first + T), first


@triton.jit
def tile_offsets(stride, ROWS: tl.constexpr, D: tl.constexpr):
    """Offsets [ROWS, D] inside a tile. They are int32, and the tile's own address is a scalar:
    a tile of pointers would cost far more registers."""
    return tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, D)[None, :]


@triton.jit
def attend(
    acc,
    total,
    peak,
    q,
    k_ptr,
    v_ptr,
    k_t,
    v_t,
    begin,
    end,
    limit,
    scale_log2,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over the keys begin..end; a query sees key j iff j < limit [BLOCK_M, 1].

    Args:
        acc, total, peak: fp32 sum of p v, sum of p, and largest score so far (log2 units).
        k_ptr, v_ptr: at key ``begin``; k_t, v_t: strides from key to key.
        MASKED: without it, every query must see every key of begin..end, which must be a multiple
            of BLOCK_N long.
    """
    offs_n = tl.arange(0, BLOCK_N)
    k_tile, v_tile = (
        tile_offsets(k_t, BLOCK_N, acc.shape[1]),
        tile_offsets(v_t, BLOCK_N, acc.shape[1]),
    )
    for j in range(begin, end, BLOCK_N):
        if MASKED:
            inside = (j + offs_n < end)[:, None]
            k = tl.load(k_ptr + k_tile, mask=inside, other=0.0).to(q.dtype)
        else:
            k = tl.load(k_ptr + k_tile).to(q.dtype)
        zero = tl.zeros((q.shape[0], BLOCK_N), tl.float32)
        score = dot(q, tl.trans(k), zero, PRECISION)
        if MASKED:
            score = tl.where((j + offs_n)[None, :] < limit, score, float("-inf"))
        top = tl.maximum(peak, tl.max(score, 1) * scale_log2)
        if MASKED:  # -inf where nothing was seen so far, and -inf - -inf is NaN
            shift = tl.where(top == float("-inf"), 0.0, top)
        else:
            shift = top
        p = tl.exp2(score * scale_log2 - shift[:, None])
        shrink = tl.exp2(peak - shift)
        total = total * shrink + tl.sum(p, 1)
        peak = top
        if MASKED:
            v = tl.load(v_ptr + v_tile, mask=inside, other=0.0).to(q.dtype)
        else:
            v = tl.load(v_ptr + v_tile).to(q.dtype)
        acc = dot(p.to(q.dtype), v, acc * shrink[:, None], PRECISION)
        k_ptr += BLOCK_N * k_t
        v_ptr += BLOCK_N * v_t
    return acc, total, peak
