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
from ..shared.launch import dot, precision, unit_stride
from ..shared.operands import PrefixOperand

HEAD_DIMS = (64, 128)  # a tile is a whole head wide; other widths run in plain torch
LOG2E = tl.constexpr(1.4426950408889634)  # log2(e): exp(x) = exp2(x LOG2E)
LN2 = tl.constexpr(0.6931471805599453)  # log(2): log(x) = log2(x) LN2


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
        """Return the same with dense last dimensions and a contiguous prefix.

        The prefix is cast to ``dtype`` if one is given: it is small and shared by the batch, so one
        cast a call spares one per tile.
        """
        prefix = self.prefix
        if prefix is not None:
            k, v = (x.contiguous().to(dtype or x.dtype) for x in prefix[:2])
            prefix = Prefix(k, v, prefix.lengths.contiguous())
        q, k, v = (unit_stride(x) for x in self[:3])
        ids = None if self.ids is None else self.ids.contiguous()
        bounds = self.bounds and RowBounds(*(x.contiguous() for x in self.bounds))
        return Call(q, k, v, prefix, ids, bounds, self.scale)

    def sizes(self) -> dict[str, Any]:
        """Return sizes of q, the scale and what depends on the dtype."""
        _, heads, queries, width = self.q.shape
        return {
            "heads": heads,
            "group": self.group,
            "T": queries,
            "scale": self.scale,
            "D": width,
            "PRECISION": precision(self.q.dtype),
        }

    def prefix_args(self) -> dict[str, Any]:
        """Return the learned keys and values as an operand, and which of them each row sees."""
        if self.prefix is None:
            return {"prefix": None, "ids_ptr": None}
        k, v, lengths = self.prefix
        operand = PrefixOperand(k, v, lengths, k.shape[0], k.shape[2])
        return {"prefix": operand, "ids_ptr": self.ids}


@triton.jit
def memory_length(prefix, memory):
    """How many learned keys a memory has: 0 for an id that is none."""
    known = (memory >= 0) & (memory < prefix.memories)
    length = tl.load(prefix.lengths + memory, mask=known, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(length, 0), prefix.P).to(tl.int32)


@triton.jit
def row_prefix(prefix, ids_ptr, b):
    """(memory, its length) of row b; memory 0 of length 0 where it has none."""
    memory = tl.zeros((), tl.int64)
    length = tl.zeros((), tl.int32)
    if prefix is not None:
        if ids_ptr is not None:
            memory = tl.load(ids_ptr + b).to(tl.int64)
        length = memory_length(prefix, memory)
        memory = tl.where(length > 0, memory, 0)
    return memory, length


@triton.jit
def row_bounds(bounds, b, T, S):
    """(start, end, first): query t of row b sees the own keys start <= j < end, j <= first + t.

    No key behind the row's last query is inside start..end, so what lies there is never read.
    """
    if bounds is not None:
        start = tl.load(bounds.key_start + b).to(tl.int64)
        end = tl.load(bounds.key_end + b).to(tl.int64)
        first = tl.load(bounds.query_start + b).to(tl.int64)
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
def _attend_tiles(
    acc, total, peak, q, k_ptr, v_ptr, stride_k, stride_v, begin, end, limit, scale_log2,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``attend`` for the keys begin..end, all of them MASKED or none, k_ptr and v_ptr at the first.

    Unmasked, every query must see every one of these keys, and they must be whole tiles.
    """
    offs_n = tl.arange(0, BLOCK_N)
    k_tile = tile_offsets(stride_k, BLOCK_N, acc.shape[1])
    v_tile = tile_offsets(stride_v, BLOCK_N, acc.shape[1])
    for j in range(begin, end, BLOCK_N):
        # q [BLOCK_M, D], k and v [BLOCK_N, D], score and p [BLOCK_M, BLOCK_N]
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
        k_ptr += BLOCK_N * stride_k
        v_ptr += BLOCK_N * stride_v
    return acc, total, peak


@triton.jit
def attend(
    acc, total, peak, q, k_ptr, v_ptr, stride_k, stride_v, begin, full, end, limit, scale_log2,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys begin..end; a query sees key j iff j < limit [BLOCK_M, 1].

    Args:
        acc, total, peak: fp32 sum of p v, sum of p, and largest score so far (log2 units).
        k_ptr, v_ptr: at key ``begin``; stride_k, stride_v: from key to key.
        full: up to here, a whole number of tiles, every query sees every key, and no mask is
            needed.
    """
    acc, total, peak = _attend_tiles(
        acc, total, peak, q, k_ptr, v_ptr, stride_k, stride_v, begin, full, limit, scale_log2,
        BLOCK_N, False, PRECISION,
    )  # fmt: skip
    k_ptr += (full - begin).to(tl.int64) * stride_k
    v_ptr += (full - begin).to(tl.int64) * stride_v
    return _attend_tiles(
        acc, total, peak, q, k_ptr, v_ptr, stride_k, stride_v, full, end, limit, scale_log2,
        BLOCK_N, True, PRECISION,
    )  # fmt: skip
