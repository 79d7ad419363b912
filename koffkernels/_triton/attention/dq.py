"""Backward of attention over a learned prefix: delta = rowsum(do * o), and dq.

With the o and lse of the whole softmax, p_j = exp(score_j - lse) and ds_j = p_j (do . v_j - delta)
hold for learned and own keys alike, so whoever needs them sums over the parts: dq over both, and
dk, dv of a key over the queries and query heads that see it. One program writes each result.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..shared.launch import cdiv, dot, launch, unit_stride
from .call import LOG2E, Call, Config, choose_config, row_bounds, row_prefix, strides, tile_offsets

EXPECTS = {"_prefix_attention_delta_kernel": None, "_prefix_attention_dq_kernel": "dot"}

CONFIGS = {
    "128x32": Config(128, 32, 8, 2),
    "128x64": Config(128, 64, 8, 2, (90, 100)),
    "64x64": Config(64, 64, 4, 2, (100,)),
    "128x128": Config(128, 128, 8, 1, (100,)),
}
FP32 = Config(32, 32, 4, 1)
_DELTA_BLOCK = 32


@triton.jit(do_not_specialize=["T"])
def _prefix_attention_delta_kernel(
    o_ptr,
    do_ptr,
    delta_ptr,
    heads,
    T,
    o_b,
    o_h,
    o_t,
    do_b,
    do_h,
    do_t,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program: delta = rowsum(do * o) of BLOCK_M queries of one head of one row."""
    blocks = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    head = (pid // blocks % heads).to(tl.int64)
    b = (pid // blocks // heads).to(tl.int64)
    offs_m = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    mask = (offs_m < T)[:, None]
    o = tl.load(o_ptr + b * o_b + head * o_h + rows * o_t + offs_d, mask=mask, other=0.0)
    do = tl.load(do_ptr + b * do_b + head * do_h + rows * do_t + offs_d, mask=mask, other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + (b * heads + head) * T + offs_m, delta, mask=offs_m < T)


@triton.jit
def _query_tiles(
    dq,
    q,
    do,
    lse2,
    delta,
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
    """dq + the sum of ds_j k_j over the keys begin..end; arguments as in ``attend``."""
    offs_n = tl.arange(0, BLOCK_N)
    k_tile, v_tile = (
        tile_offsets(k_t, BLOCK_N, dq.shape[1]),
        tile_offsets(v_t, BLOCK_N, dq.shape[1]),
    )
    for j in range(begin, end, BLOCK_N):
        if MASKED:
            inside = (j + offs_n < end)[:, None]
            k = tl.load(k_ptr + k_tile, mask=inside, other=0.0)
            v = tl.load(v_ptr + v_tile, mask=inside, other=0.0)
        else:
            k = tl.load(k_ptr + k_tile)
            v = tl.load(v_ptr + v_tile)
        zero = tl.zeros((q.shape[0], BLOCK_N), tl.float32)
        p = tl.exp2(dot(q, tl.trans(k), zero, PRECISION) * scale_log2 - lse2[:, None])
        dp = dot(do, tl.trans(v), zero, PRECISION)
        ds = p * (dp - delta[:, None])
        if MASKED:
            ds = tl.where((j + offs_n)[None, :] < limit, ds, 0.0)
        dq = dot(ds.to(k.dtype), k, dq, PRECISION)
        k_ptr += BLOCK_N * k_t
        v_ptr += BLOCK_N * v_t
    return dq


@triton.jit(do_not_specialize=["T", "S"])
def _prefix_attention_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    pk_ptr,
    pv_ptr,
    lengths_ptr,
    ids_ptr,
    start_ptr,
    end_ptr,
    first_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    scale,
    memories,
    P,
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
    dq_b,
    dq_h,
    dq_t,
    HAS_PREFIX: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    RESUME: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M queries of one head of one row; RESUME adds to the dq that is there."""
    blocks = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    block = blocks - 1 - pid % blocks  # the longest go first
    head = (pid // blocks % heads).to(tl.int64)
    b = (pid // blocks // heads).to(tl.int64)
    kv = head // group
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)[None, :]
    mask_m = offs_m < T
    rows = offs_m.to(tl.int64)[:, None]
    mask = mask_m[:, None]
    q = tl.load(q_ptr + b * q_b + head * q_h + rows * q_t + offs_d, mask=mask, other=0.0)
    do = tl.load(do_ptr + b * do_b + head * do_h + rows * do_t + offs_d, mask=mask, other=0.0)
    at = (b * heads + head) * T + offs_m
    lse2 = tl.load(lse_ptr + at, mask=mask_m, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + at, mask=mask_m, other=0.0)
    scale_log2 = scale * LOG2E
    dq = tl.zeros((BLOCK_M, D), tl.float32)

    if HAS_PREFIX:
        memory, length = row_prefix(ids_ptr, lengths_ptr, b, memories, P, HAS_PREFIX, HAS_IDS)
        at = (memory * (heads // group) + kv) * P * D
        full = length // BLOCK_N * BLOCK_N
        dq = _query_tiles(
            dq, q, do, lse2, delta, pk_ptr + at, pv_ptr + at, D, D, 0, full, length,
            scale_log2, BLOCK_N, False, PRECISION,
        )  # fmt: skip
        at += full * D
        dq = _query_tiles(
            dq, q, do, lse2, delta, pk_ptr + at, pv_ptr + at, D, D, full, length, length,
            scale_log2, BLOCK_N, True, PRECISION,
        )  # fmt: skip

    if not RESUME:  # which is of the prefix alone
        start, end, first = row_bounds(start_ptr, end_ptr, first_ptr, b, T, S, HAS_BOUNDS)
        end = tl.minimum(end, first + (block + 1) * BLOCK_M)
        common = tl.maximum(tl.minimum(end, first + block * BLOCK_M + 1) - start, 0)
        full = start + common // BLOCK_N * BLOCK_N
        limit = tl.minimum(end, first + offs_m + 1)[:, None]
        k_ptr += b * k_b + kv * k_h + start.to(tl.int64) * k_t
        v_ptr += b * v_b + kv * v_h + start.to(tl.int64) * v_t
        dq = _query_tiles(
            dq, q, do, lse2, delta, k_ptr, v_ptr, k_t, v_t, start, full, limit,
            scale_log2, BLOCK_N, False, PRECISION,
        )  # fmt: skip
        k_ptr += (full - start).to(tl.int64) * k_t
        v_ptr += (full - start).to(tl.int64) * v_t
        dq = _query_tiles(
            dq, q, do, lse2, delta, k_ptr, v_ptr, k_t, v_t, full, end, limit,
            scale_log2, BLOCK_N, True, PRECISION,
        )  # fmt: skip

    dq *= scale
    dq_rows = dq_ptr + b * dq_b + head * dq_h + rows * dq_t + offs_d
    if RESUME:
        dq += tl.load(dq_rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(dq_rows, dq.to(dq_ptr.dtype.element_ty), mask=mask)


class Upstream(NamedTuple):
    """What every backward kernel reads beside the arguments of the forward.

    Args:
        do: [B, Hq, T, D], last stride 1.
        lse, delta: fp32 [B, Hq, T]; the whole softmax's lse, and rowsum(do * o).
    """

    do: Tensor
    lse: Tensor
    delta: Tensor

    def args(self) -> dict[str, Any]:
        """As kernel arguments."""
        return {
            "do_ptr": self.do,
            "lse_ptr": self.lse,
            "delta_ptr": self.delta,
            **strides("do", self.do),
        }


def upstream(do: Tensor, o: Tensor, lse: Tensor) -> Upstream:
    """delta, computed, beside do and lse."""
    do = unit_stride(do)
    rows, heads, queries, width = o.shape
    delta = torch.empty_like(lse)
    launch(
        _prefix_attention_delta_kernel,
        (cdiv(queries, _DELTA_BLOCK) * heads * rows,),
        o_ptr=o,
        do_ptr=do,
        delta_ptr=delta,
        heads=heads,
        T=queries,
        D=width,
        BLOCK_M=_DELTA_BLOCK,
        **strides("o", o),
        **strides("do", do),
    )
    return Upstream(do, lse, delta)


def query_grad(
    call: Call, up: Upstream, dq: Tensor | None = None, config: Config | None = None
) -> Tensor:
    """dq over the prefix and the own keys; given a dq, the prefix's share is added to it, in place.

    Returns:
        dq [B, Hq, T, D] in q's dtype and, where it is dense, q's layout.
    """
    resume = dq is not None
    dq = torch.empty_like(call.q) if dq is None else dq
    call = call.ready(call.q.dtype)
    config = choose_config(config, CONFIGS, FP32, call.q)
    rows, heads, queries, _ = call.q.shape
    launch(
        _prefix_attention_dq_kernel,
        (cdiv(queries, config.block_m) * heads * rows,),
        dq_ptr=dq,
        RESUME=resume,
        **strides("dq", dq),
        **up.args(),
        **call.sizes(),
        **call.query_args(),
        **call.own_args(),
        **call.prefix_args(),
        **config.launch(),
    )
    return dq
