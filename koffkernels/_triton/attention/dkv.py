"""Backward of attention over a learned prefix: dk and dv of the rows' own keys.

A program holds a tile of keys of one key-value head and goes through the queries that see it, of
all query heads that share it, so that each result has one writer.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..shared.launch import cdiv, dot, launch
from .call import LOG2E, Call, Config, choose_config, row_bounds, tile_offsets
from .dq import Upstream

EXPECTS = {"_prefix_attention_dkv_kernel": "dot"}

CONFIGS = {
    "32x64": Config(32, 64, 8, 2),
    "32x64s3": Config(32, 64, 8, 3),
    "64x64": Config(64, 64, 8, 2, (90, 100)),
    "32x128": Config(32, 128, 8, 2, (90, 100)),
    "64x128": Config(64, 128, 8, 2, (100,)),
}
FP32 = Config(32, 32, 4, 1)


@triton.jit
def key_tiles(
    dk,
    dv,
    k,
    v,
    q_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    begin,
    end,
    tiles,
    needs,
    head,
    group,
    T,
    q_h,
    q_t,
    do_h,
    do_t,
    scale_log2,
    WANT_K: tl.constexpr,
    WANT_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk, dv + what ``tiles`` tiles of BLOCK_M queries from ``begin`` on, of ``group`` heads from
    ``head`` on, give to a tile of keys.

    Args:
        dk, dv: fp32 [BLOCK_N, D]; dk lacks the scale.
        q_ptr, do_ptr, lse_ptr, delta_ptr: at the row, head 0, query 0.
        end: queries from here on do not count.
        needs: int [BLOCK_N], the first query that sees each key (for MASKED).
    """
    offs_m = tl.arange(0, BLOCK_M)
    q_tile = tile_offsets(q_t, BLOCK_M, k.shape[1])
    do_tile = tile_offsets(do_t, BLOCK_M, k.shape[1])
    for i in range(0, group * tiles):
        h = head + i // tiles
        t = (begin + (i % tiles) * BLOCK_M).to(tl.int64)
        at = t.to(tl.int32) + offs_m
        inside = at < end
        q = tl.load(q_ptr + h * q_h + t * q_t + q_tile, mask=inside[:, None], other=0.0)
        do = tl.load(do_ptr + h * do_h + t * do_t + do_tile, mask=inside[:, None], other=0.0)
        lse2 = tl.load(lse_ptr + h * T + at, mask=inside, other=0.0) * LOG2E
        zero = tl.zeros((k.shape[0], BLOCK_M), tl.float32)
        p = tl.exp2(dot(k, tl.trans(q), zero, PRECISION) * scale_log2 - lse2[None, :])
        if MASKED:
            p = tl.where(at[None, :] >= needs[:, None], p, 0.0)
        if WANT_V:
            dv = dot(p.to(do.dtype), do, dv, PRECISION)
        if WANT_K:
            delta = tl.load(delta_ptr + h * T + at, mask=inside, other=0.0)
            dp = dot(v, tl.trans(do), zero, PRECISION)
            ds = p * (dp - delta[None, :])
            dk = dot(ds.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T", "S"])
def _prefix_attention_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    start_ptr,
    end_ptr,
    first_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    scale,
    heads,
    group,
    T,
    S,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    do_b,
    do_h,
    do_t,
    HAS_BOUNDS: tl.constexpr,
    WANT_K: tl.constexpr,
    WANT_V: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_N own keys of one kv head of one row. dk and dv are contiguous."""
    blocks = tl.cdiv(S, BLOCK_N)
    pid = tl.program_id(0)
    kv_heads = heads // group
    block = pid % blocks  # the first keys are seen by the most queries
    kv = (pid // blocks % kv_heads).to(tl.int64)
    b = (pid // blocks // kv_heads).to(tl.int64)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D)[None, :]
    rows = offs_n.to(tl.int64)[:, None]
    start, end, first = row_bounds(start_ptr, end_ptr, first_ptr, b, T, S, HAS_BOUNDS)
    seen = ((offs_n >= start) & (offs_n < end))[:, None]
    k = tl.load(k_ptr + b * k_b + kv * k_h + rows * k_t + offs_d, mask=seen, other=0.0)
    v = tl.load(v_ptr + b * v_b + kv * v_h + rows * v_t + offs_d, mask=seen, other=0.0)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    q_row = q_ptr + b * q_b
    do_row = do_ptr + b * do_b
    lse_row = lse_ptr + b * heads * T
    delta_row = delta_ptr + b * heads * T
    scale_log2 = scale * LOG2E
    # From the diagonal on; none for a tile outside. Only the tiles on the diagonal need their mask,
    # but with a loop of their own, what both loops hold does not fit in registers (sm_90).
    begin = tl.maximum(block * BLOCK_N - first, 0)
    begin = tl.where((end > block * BLOCK_N) & (start < (block + 1) * BLOCK_N), begin, T)
    tiles = tl.maximum(tl.cdiv(T - begin, BLOCK_M), 0)
    dk, dv = key_tiles(
        dk, dv, k, v, q_row, do_row, lse_row, delta_row, begin, T, tiles, offs_n - first,
        kv * group, group, T, q_h, q_t, do_h, do_t, scale_log2,
        WANT_K, WANT_V, BLOCK_M, True, PRECISION,
    )  # fmt: skip
    # What a key outside the bounds got is selected away: its column of p is not 0.
    at = ((b * kv_heads + kv) * S + rows) * D + offs_d
    inside = (offs_n < S)[:, None]
    if WANT_K:
        dk = tl.where(seen, dk * scale, 0.0)
        tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    if WANT_V:
        tl.store(dv_ptr + at, tl.where(seen, dv, 0.0).to(dv_ptr.dtype.element_ty), mask=inside)


def own_grads(
    call: Call, up: Upstream, needs: tuple[bool, bool], config: Config | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """dk and dv [B, Hkv, S, D] in k's dtype, contiguous; None where ``needs`` has False."""
    shape, call = call.k.shape, call.ready(None)
    dk, dv = (call.k.new_empty(shape) if need else None for need in needs)
    if not any(needs):
        return dk, dv
    config = choose_config(config, CONFIGS, FP32, call.q)
    rows, kv_heads, keys, _ = shape
    launch(
        _prefix_attention_dkv_kernel,
        (cdiv(keys, config.block_n) * kv_heads * rows,),
        dk_ptr=dk,
        dv_ptr=dv,
        WANT_K=needs[0],
        WANT_V=needs[1],
        **up.args(),
        **call.sizes(),
        **call.query_args(),
        **call.own_args(),
        **config.launch(),
    )
    return dk, dv
