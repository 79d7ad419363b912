"""The wide half of a low-rank update, added to an output that is already there: y += scaling s B^T.

``delta_tile`` is the part that every kernel with an update in its epilogue shares.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..shared.launch import (
    Rows,
    cdiv,
    dot,
    launch,
    memory_range,
    precision,
    rank_block,
    token_memory,
)

EXPECTS = {"_expand_fwd_kernel": "dot16"}


class Delta(NamedTuple):
    """One low-rank update to be added: scaling_m s b_m^T, m the memory of each token.

    Args:
        s: [M, r] in the compute dtype, last stride 1.
        b: [n, N, r], any strides and floating dtype.
        scaling: fp32 [n]; None (fused GEMMs only): 1.
    """

    s: Tensor
    b: Tensor
    scaling: Tensor | None

    def args(self, name: str) -> dict[str, Any]:
        """A kernel's arguments for this update, called ``name``."""
        return {
            f"s{name}_ptr": self.s,
            f"b{name}_ptr": self.b,
            f"scaling{name}_ptr": self.scaling,
            f"R{name}": self.b.shape[2],
            f"stride_s{name}m": self.s.stride(0),
            f"stride_b{name}n": self.b.stride(0),
            f"stride_b{name}i": self.b.stride(1),
            f"stride_b{name}r": self.b.stride(2),
        }


def delta_args(delta: Delta | None, name: str, like: Tensor) -> dict[str, Any]:
    """``Delta.args``, or for none the same arguments with rank 0 (``like`` stands for pointers)."""
    if delta is not None:
        return delta.args(name)
    pointers = {f"{part}{name}_ptr": like for part in ("s", "b", "scaling")}
    strides = {f"stride_{part}": 0 for part in (f"s{name}m", f"b{name}n", f"b{name}i", f"b{name}r")}
    return {**pointers, **strides, f"R{name}": 0}


@triton.jit
def delta_tile(
    s_ptr,
    b_ptr,
    scaling_ptr,
    R,
    stride_sm,
    stride_bn,
    stride_bi,
    stride_br,
    offs_m,
    offs_i,
    mask_i,
    memory,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scaling_m s b_m^T of one tile [BLOCK_M, BLOCK_I] in fp32; 0 where a token has no memory."""
    total = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    first, last = memory_range(memory)
    for m in tl.range(first, last, num_stages=1):
        mine = memory == m
        part = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
        b_rows = b_ptr + offs_i.to(tl.int64)[None, :] * stride_bi + m * stride_bn
        used = tl.max(mine.to(tl.int32), 0)  # a tile can hold memories 0 and 39 and none between
        for start in tl.range(0, R * used, BLOCK_R, num_stages=1):
            offs_r = start + tl.arange(0, BLOCK_R)
            mask_r = offs_r < R
            s = tl.load(
                s_ptr + offs_m.to(tl.int64)[:, None] * stride_sm + offs_r[None, :],
                mask=mine[:, None] & mask_r[None, :],
                other=0.0,
            )
            b = tl.load(
                b_rows + offs_r[:, None] * stride_br,
                mask=mask_r[:, None] & mask_i[None, :],
                other=0.0,
            )
            part = dot(s, b.to(s.dtype), part, PRECISION)
        # Selected, not multiplied by 0: a NaN of another memory must not reach these tokens.
        total = tl.where(mine[:, None], part * tl.load(scaling_ptr + m), total)
    return total


@triton.jit(do_not_specialize=["M", "tokens"])
def _expand_fwd_kernel(
    y_ptr,
    s0_ptr,
    b0_ptr,
    scaling0_ptr,
    s1_ptr,
    b1_ptr,
    scaling1_ptr,
    ids_ptr,
    M,
    N,
    R0,
    R1,
    tokens,
    stride_ym,
    stride_s0m,
    stride_b0n,
    stride_b0i,
    stride_b0r,
    stride_s1m,
    stride_b1n,
    stride_b1i,
    stride_b1r,
    HAS_IDS: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one tile of y, in place."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    memory = token_memory(ids_ptr, offs_m, mask_m, tokens, HAS_IDS)
    delta = delta_tile(
        s0_ptr, b0_ptr, scaling0_ptr, R0, stride_s0m, stride_b0n, stride_b0i, stride_b0r,
        offs_m, offs_n, mask_n, memory, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
    )  # fmt: skip
    if TWO:
        delta += delta_tile(
            s1_ptr, b1_ptr, scaling1_ptr, R1, stride_s1m, stride_b1n, stride_b1i, stride_b1r,
            offs_m, offs_n, mask_n, memory, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
        )  # fmt: skip
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
    mask = (memory >= 0)[:, None] & mask_n[None, :]
    y = tl.load(y_ptrs, mask=mask, other=0.0)
    tl.store(y_ptrs, (y.to(tl.float32) + delta).to(y.dtype), mask=mask)


def expand_(y: Tensor, deltas: tuple[Delta, ...], rows: Rows) -> Tensor:
    """Add one or two low-rank updates to y, in place.

    Args:
        y: [M, N], last stride 1.
        deltas: one or two updates.
        rows: memory of each token; tokens without one are not touched.

    Returns:
        y.
    """
    (m, n), first = y.shape, deltas[0]
    second = deltas[1] if len(deltas) > 1 else None
    block_m, block_n = 32, 128
    launch(
        _expand_fwd_kernel,
        (cdiv(m, block_m), cdiv(n, block_n)),
        y_ptr=y,
        M=m,
        N=n,
        stride_ym=y.stride(0),
        TWO=second is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=rank_block(max(delta.b.shape[2] for delta in deltas)),
        PRECISION=precision(y.dtype),
        num_warps=8,
        num_stages=2,
        **first.args("0"),
        **delta_args(second, "1", y),
        **rows.args(),
    )
    return y
