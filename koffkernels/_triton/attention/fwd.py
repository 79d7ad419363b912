"""Forward of attention over a learned prefix, in one pass: first the tiles of the row's memory,
then its own keys up to the diagonal, one online softmax over both.

Nothing is concatenated, and nothing repeated over the batch or over query heads: a program reads
the one copy of its memory's keys. Only the last tile of a prefix and the tiles on the diagonal need
a mask; own tiles start at the row's first key, so left padding needs none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..shared.config import Config, choose_config
from ..shared.launch import cdiv, launch
from ..shared.operands import per_head
from .call import LN2, LOG2E, Call, attend, row_bounds, row_prefix

EXPECTS = {"_prefix_attention_fwd_kernel": "dot"}

# Larger tiles do not fit the registers of every GPU, at least when resumed (128 x 128 those of
# none, under triton 3.9).
CONFIGS = {
    "128x32": Config(128, 32, warps=8, stages=3),
    "128x64": Config(128, 64, warps=8, stages=3, archs=(90, 100)),
    "128x64s2": Config(128, 64, warps=8, stages=2, archs=(90, 100)),
    "64x64": Config(64, 64, warps=4, stages=3, archs=(90, 100)),
}
_SHORT = {name: CONFIGS[name] for name in ("128x32", "64x64")}  # up to 64 queries
# fp32 has half the keys in the same shared memory, and no tensor cores unless TF32 is allowed.
FP32 = Config(64, 32, warps=4, stages=2)


@triton.jit(do_not_specialize=["T", "S"])
def _prefix_attention_fwd_kernel(
    q,
    k,
    v,
    prefix,
    ids_ptr,
    bounds,
    o,
    lse_ptr,
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
    """One program: BLOCK_M queries of one head of one row.

    RESUME starts from the o and lse of another part of the same softmax and overwrites them.
    """
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
    # q and o [BLOCK_M, D]
    q_rows = q.ptr + b * q.stride_row + head * q.stride_head + rows * q.stride_token + offs_d
    q_tile = tl.load(q_rows, mask=mask_m[:, None], other=0.0)
    o_rows = o.ptr + b * o.stride_row + head * o.stride_head + rows * o.stride_token + offs_d
    lse_rows = lse_ptr + (b * heads + head) * T + offs_m
    if RESUME:
        # o is a weighted mean already: as a sum of p v it has a total of 1 at the peak lse.
        peak = tl.load(lse_rows, mask=mask_m, other=0.0) * LOG2E
        total = tl.full((BLOCK_M,), 1.0, tl.float32)
        acc = tl.load(o_rows, mask=mask_m[:, None], other=0.0).to(tl.float32)
    else:
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, D), tl.float32)
    scale_log2 = scale * LOG2E

    if prefix is not None:
        memory, length = row_prefix(prefix, ids_ptr, b)
        at = (memory * (heads // group) + kv) * prefix.P * D
        full = length // BLOCK_N * BLOCK_N
        acc, total, peak = attend(
            acc, total, peak, q_tile, prefix.k + at, prefix.v + at, D, D, 0, full, length, length,
            scale_log2, BLOCK_N, PRECISION,
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
        acc, total, peak = attend(
            acc, total, peak, q_tile, k_row + start.to(tl.int64) * k.stride_token,
            v_row + start.to(tl.int64) * v.stride_token, k.stride_token, v.stride_token,
            start, full, end, limit, scale_log2, BLOCK_N, PRECISION,
        )  # fmt: skip

    tile = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # 0 where nothing was seen
    tl.store(o_rows, tile.to(o.ptr.dtype.element_ty), mask=mask_m[:, None])
    tl.store(lse_rows, (peak + tl.log2(total)) * LN2, mask=mask_m)


def empty_output(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return memory for o and lse.

    o lies as [B, T, Hq, D], the order in which the output projection reads it, so that no
    transposing copy follows.
    """
    rows, heads, queries, width = q.shape
    o = q.new_empty(rows, queries, heads, width).transpose(1, 2)
    return o, q.new_empty(rows, heads, queries, dtype=torch.float32)


def one_pass(call: Call, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """Return attention over prefix and own keys, in one pass.

    Returns:
        o [B, Hq, T, D] in q's dtype, and lse fp32 [B, Hq, T], natural, -inf where nothing is seen.
    """
    o, lse = empty_output(call.q)
    _launch(call, o, lse, False, config)
    return o, lse


def add_prefix(call: Call, o: Tensor, lse: Tensor, config: Config | None = None) -> None:
    """Bring the prefix into o and lse, in place; they hold the softmax over other keys."""
    _launch(call, o, lse, True, config)


def _launch(call: Call, o: Tensor, lse: Tensor, resume: bool, config: Config | None) -> None:
    call = call.ready(call.q.dtype)
    configs = _SHORT if call.q.shape[2] <= 64 else CONFIGS
    config = choose_config(config, configs, FP32, call.q)
    rows, heads, queries, _ = call.q.shape
    launch(
        _prefix_attention_fwd_kernel,
        (cdiv(queries, config.block_m) * heads * rows,),
        q=per_head(call.q),
        k=per_head(call.k),
        v=per_head(call.v),
        **call.prefix_args(),
        bounds=call.bounds,
        o=per_head(o),
        lse_ptr=lse,
        S=call.k.shape[2],
        RESUME=resume,
        **call.sizes(),
        **config.args(),
    )
