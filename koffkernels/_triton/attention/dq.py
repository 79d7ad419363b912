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

from ..shared.config import Config, choose_config
from ..shared.launch import cdiv, dot, launch, unit_stride
from ..shared.operands import per_head
from .call import LOG2E, Call, row_bounds, row_prefix, tile_offsets

EXPECTS = {"_prefix_attention_delta_kernel": None, "_prefix_attention_dq_kernel": "dot"}

CONFIGS = {
    "128x32": Config(128, 32, warps=8, stages=2),
    "128x64": Config(128, 64, warps=8, stages=2, archs=(90, 100)),
    "64x64": Config(64, 64, warps=4, stages=2, archs=(100,)),
    "128x128": Config(128, 128, warps=8, stages=1, archs=(100,)),
}
FP32 = Config(32, 32, warps=4, stages=1)
_DELTA_BLOCK = 32  # queries of a program that only reads: short programs, many of them


@triton.jit(do_not_specialize=["T"])
def _prefix_attention_delta_kernel(
    o,
    do,
    delta_ptr,
    heads,
    T,
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
    # o and do [BLOCK_M, D]
    o_rows = o.ptr + b * o.stride_row + head * o.stride_head + rows * o.stride_token + offs_d
    do_rows = do.ptr + b * do.stride_row + head * do.stride_head + rows * do.stride_token + offs_d
    o_tile = tl.load(o_rows, mask=mask, other=0.0).to(tl.float32)
    do_tile = tl.load(do_rows, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(o_tile * do_tile, 1)
    tl.store(delta_ptr + (b * heads + head) * T + offs_m, delta, mask=offs_m < T)


@triton.jit
def _query_tiles(
    dq, q, do, lse2, delta, k_ptr, v_ptr, stride_k, stride_v, begin, end, limit, scale_log2,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``_query_grads`` for the keys begin..end, all of them MASKED or none, k_ptr and v_ptr at the
    first."""
    offs_n = tl.arange(0, BLOCK_N)
    k_tile = tile_offsets(stride_k, BLOCK_N, dq.shape[1])
    v_tile = tile_offsets(stride_v, BLOCK_N, dq.shape[1])
    for j in range(begin, end, BLOCK_N):
        # q, do and dq [BLOCK_M, D], k and v [BLOCK_N, D], p, dp and ds [BLOCK_M, BLOCK_N]
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
        k_ptr += BLOCK_N * stride_k
        v_ptr += BLOCK_N * stride_v
    return dq


@triton.jit
def _query_grads(
    dq, q, do, lse2, delta, k_ptr, v_ptr, stride_k, stride_v, begin, full, end, limit, scale_log2,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (without the scale) + the sum of ds_j k_j over the keys begin..end; keys, strides, full
    and limit are those of ``attend``."""
    dq = _query_tiles(
        dq, q, do, lse2, delta, k_ptr, v_ptr, stride_k, stride_v, begin, full, limit, scale_log2,
        BLOCK_N, False, PRECISION,
    )  # fmt: skip
    k_ptr += (full - begin).to(tl.int64) * stride_k
    v_ptr += (full - begin).to(tl.int64) * stride_v
    return _query_tiles(
        dq, q, do, lse2, delta, k_ptr, v_ptr, stride_k, stride_v, full, end, limit, scale_log2,
        BLOCK_N, True, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "S"])
def _prefix_attention_dq_kernel(
    q,
    k,
    v,
    prefix,
    ids_ptr,
    bounds,
    do,
    lse_ptr,
    delta_ptr,
    dq,
    scale,
    heads,
    group,
    T,
    S,
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
    # q, do and dq [BLOCK_M, D]
    q_rows = q.ptr + b * q.stride_row + head * q.stride_head + rows * q.stride_token + offs_d
    do_rows = do.ptr + b * do.stride_row + head * do.stride_head + rows * do.stride_token + offs_d
    q_tile = tl.load(q_rows, mask=mask, other=0.0)
    do_tile = tl.load(do_rows, mask=mask, other=0.0)
    at = (b * heads + head) * T + offs_m
    lse2 = tl.load(lse_ptr + at, mask=mask_m, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + at, mask=mask_m, other=0.0)
    scale_log2 = scale * LOG2E
    acc = tl.zeros((BLOCK_M, D), tl.float32)

    if prefix is not None:
        memory, length = row_prefix(prefix, ids_ptr, b)
        at = (memory * (heads // group) + kv) * prefix.P * D
        full = length // BLOCK_N * BLOCK_N
        acc = _query_grads(
            acc, q_tile, do_tile, lse2, delta, prefix.k + at, prefix.v + at, D, D,
            0, full, length, length, scale_log2, BLOCK_N, PRECISION,
        )  # fmt: skip

    if not RESUME:  # which is of the prefix alone
        start, end, first = row_bounds(bounds, b, T, S)
        end = tl.minimum(end, first + (block + 1) * BLOCK_M)
        # Keys that the tile's first query sees, all its queries see.
        common = tl.maximum(tl.minimum(end, first + block * BLOCK_M + 1) - start, 0)
        full = start + common // BLOCK_N * BLOCK_N
        limit = tl.minimum(end, first + offs_m + 1)[:, None]
        k_row = k.ptr + b * k.stride_row + kv * k.stride_head
        v_row = v.ptr + b * v.stride_row + kv * v.stride_head
        acc = _query_grads(
            acc, q_tile, do_tile, lse2, delta, k_row + start.to(tl.int64) * k.stride_token,
            v_row + start.to(tl.int64) * v.stride_token, k.stride_token, v.stride_token,
            start, full, end, limit, scale_log2, BLOCK_N, PRECISION,
        )  # fmt: skip

    acc *= scale
    dq_rows = dq.ptr + b * dq.stride_row + head * dq.stride_head + rows * dq.stride_token + offs_d
    if RESUME:
        acc += tl.load(dq_rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(dq_rows, acc.to(dq.ptr.dtype.element_ty), mask=mask)


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
        """Return them as kernel arguments."""
        return {"do": per_head(self.do), "lse_ptr": self.lse, "delta_ptr": self.delta}


def upstream(do: Tensor, o: Tensor, lse: Tensor) -> Upstream:
    """Return delta, computed here, beside do and lse."""
    do = unit_stride(do)
    rows, heads, queries, width = o.shape
    delta = torch.empty_like(lse)
    launch(
        _prefix_attention_delta_kernel,
        (cdiv(queries, _DELTA_BLOCK) * heads * rows,),
        o=per_head(o),
        do=per_head(do),
        delta_ptr=delta,
        heads=heads,
        T=queries,
        D=width,
        BLOCK_M=_DELTA_BLOCK,
    )
    return Upstream(do, lse, delta)


def query_grad(
    call: Call, up: Upstream, dq: Tensor | None = None, config: Config | None = None
) -> Tensor:
    """Return dq over the prefix and the own keys; given a dq, the prefix's share is added to it, in
    place.

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
        q=per_head(call.q),
        k=per_head(call.k),
        v=per_head(call.v),
        **call.prefix_args(),
        bounds=call.bounds,
        dq=per_head(dq),
        S=call.k.shape[2],
        RESUME=resume,
        **up.args(),
        **call.sizes(),
        **config.args(),
    )
    return dq
