"""Backward of attention over a learned prefix: dk and dv of the rows' own keys.

A program holds a tile of keys of one key-value head and goes through the queries that see it, of
all query heads that share it, so that each result has one writer.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..shared.config import Config, choose_config
from ..shared.launch import cdiv, dot, launch
from ..shared.operands import per_head
from .call import LOG2E, Call, row_bounds, tile_offsets
from .dq import Upstream

EXPECTS = {"_prefix_attention_dkv_kernel": "dot"}

# A program holds k, v, dk and dv of its keys: the tiles of queries are the narrow ones here.
CONFIGS = {
    "32x64": Config(32, 64, warps=8, stages=2),
    "32x64s3": Config(32, 64, warps=8, stages=3),
    "64x64": Config(64, 64, warps=8, stages=2, archs=(90, 100)),
    "32x128": Config(32, 128, warps=8, stages=2, archs=(90, 100)),
    "64x128": Config(64, 128, warps=8, stages=2, archs=(100,)),
}
FP32 = Config(32, 32, warps=4, stages=1)


@triton.jit
def key_tiles(
    dk, dv, k, v, q, do, lse_ptr, delta_ptr, b, begin, end, tiles, needs, head, heads, group, T,
    scale_log2, WANT_K: tl.constexpr, WANT_V: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv + what ``tiles`` tiles of BLOCK_M queries from ``begin`` on, of ``group`` heads from
    ``head`` on, of row b, give to a tile of keys.

    Args:
        dk, dv: fp32 [BLOCK_N, D]; dk lacks the scale.
        k, v: tiles [BLOCK_N, D]; q and do are operands.
        end: queries from here on do not count.
        needs: int [BLOCK_N], the first query that sees each key (for MASKED).
    """
    offs_m = tl.arange(0, BLOCK_M)
    q_tile = tile_offsets(q.stride_token, BLOCK_M, k.shape[1])
    do_tile = tile_offsets(do.stride_token, BLOCK_M, k.shape[1])
    q_row = q.ptr + b * q.stride_row
    do_row = do.ptr + b * do.stride_row
    lse_row = lse_ptr + b * heads * T
    delta_row = delta_ptr + b * heads * T
    for i in range(0, group * tiles):
        h = head + i // tiles
        t = (begin + (i % tiles) * BLOCK_M).to(tl.int64)
        at = t.to(tl.int32) + offs_m
        inside = at < end
        # queries and upstream [BLOCK_M, D], p, dp and ds [BLOCK_N, BLOCK_M]
        q_ptrs = q_row + h * q.stride_head + t * q.stride_token + q_tile
        do_ptrs = do_row + h * do.stride_head + t * do.stride_token + do_tile
        queries = tl.load(q_ptrs, mask=inside[:, None], other=0.0)
        upstream = tl.load(do_ptrs, mask=inside[:, None], other=0.0)
        lse2 = tl.load(lse_row + h * T + at, mask=inside, other=0.0) * LOG2E
        zero = tl.zeros((k.shape[0], BLOCK_M), tl.float32)
        p = tl.exp2(dot(k, tl.trans(queries), zero, PRECISION) * scale_log2 - lse2[None, :])
        if MASKED:
            p = tl.where(at[None, :] >= needs[:, None], p, 0.0)
        if WANT_V:
            dv = dot(p.to(upstream.dtype), upstream, dv, PRECISION)
        if WANT_K:
            delta = tl.load(delta_row + h * T + at, mask=inside, other=0.0)
            dp = dot(v, tl.trans(upstream), zero, PRECISION)
            ds = p * (dp - delta[None, :])
            dk = dot(ds.to(queries.dtype), queries, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T", "S"])
def _prefix_attention_dkv_kernel(
    q,
    k,
    v,
    bounds,
    do,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    scale,
    heads,
    group,
    T,
    S,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_N own keys of one kv head of one row. dk and dv are contiguous, or None
    where they are not wanted."""
    blocks = tl.cdiv(S, BLOCK_N)
    pid = tl.program_id(0)
    kv_heads = heads // group
    block = pid % blocks  # the first keys are seen by the most queries
    kv = (pid // blocks % kv_heads).to(tl.int64)
    b = (pid // blocks // kv_heads).to(tl.int64)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D)[None, :]
    rows = offs_n.to(tl.int64)[:, None]
    start, end, first = row_bounds(bounds, b, T, S)
    seen = ((offs_n >= start) & (offs_n < end))[:, None]
    # k, v, dk and dv [BLOCK_N, D]
    k_rows = k.ptr + b * k.stride_row + kv * k.stride_head + rows * k.stride_token + offs_d
    v_rows = v.ptr + b * v.stride_row + kv * v.stride_head + rows * v.stride_token + offs_d
    k_tile = tl.load(k_rows, mask=seen, other=0.0)
    v_tile = tl.load(v_rows, mask=seen, other=0.0)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    scale_log2 = scale * LOG2E
    # From the diagonal on; none for a tile outside. Only the tiles on the diagonal need their mask,
    # but with a loop of their own, what both loops hold does not fit in registers (sm_90).
    begin = tl.maximum(block * BLOCK_N - first, 0)
    begin = tl.where((end > block * BLOCK_N) & (start < (block + 1) * BLOCK_N), begin, T)
    tiles = tl.maximum(tl.cdiv(T - begin, BLOCK_M), 0)
    dk, dv = key_tiles(
        dk, dv, k_tile, v_tile, q, do, lse_ptr, delta_ptr, b, begin, T, tiles, offs_n - first,
        kv * group, heads, group, T, scale_log2, dk_ptr is not None, dv_ptr is not None, BLOCK_M,
        True, PRECISION,
    )  # fmt: skip
    # What a key outside the bounds got is selected away: its column of p is not 0.
    at = ((b * kv_heads + kv) * S + rows) * D + offs_d
    inside = (offs_n < S)[:, None]
    if dk_ptr is not None:
        dk = tl.where(seen, dk * scale, 0.0)
        tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    if dv_ptr is not None:
        tl.store(dv_ptr + at, tl.where(seen, dv, 0.0).to(dv_ptr.dtype.element_ty), mask=inside)


def own_grads(
    call: Call, up: Upstream, needs: tuple[bool, bool], config: Config | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Return dk and dv [B, Hkv, S, D] in k's dtype, contiguous; None where ``needs`` has False."""
    shape, call = call.k.shape, call.ready(None)
    dk, dv = (call.k.new_empty(shape) if need else None for need in needs)
    if not any(needs):
        return dk, dv
    config = choose_config(config, CONFIGS, FP32, call.q)
    rows, kv_heads, keys, _ = shape
    launch(
        _prefix_attention_dkv_kernel,
        (cdiv(keys, config.block_n) * kv_heads * rows,),
        q=per_head(call.q),
        k=per_head(call.k),
        v=per_head(call.v),
        bounds=call.bounds,
        dk_ptr=dk,
        dv_ptr=dv,
        S=keys,
        **up.args(),
        **call.sizes(),
        **config.args(),
    )
    return dk, dv
