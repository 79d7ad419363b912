"""h = act(g) u z between the vendor's GEMMs.

g = g0 + delta and u = u0 + delta are never written: the low-rank updates are added where g0 and u0
are read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..lora.expand import Delta, delta_args, delta_tile
from ..shared.launch import Rows, activate, cdiv, launch, precision, rank_block, token_memory

EXPECTS = {"_mlp_hidden_fwd_kernel": "dot16"}


@triton.jit(do_not_specialize=["M", "tokens"])
def _mlp_hidden_fwd_kernel(
    g_ptr,
    u_ptr,
    h_ptr,
    z_ptr,
    s0_ptr,
    b0_ptr,
    scaling0_ptr,
    s1_ptr,
    b1_ptr,
    scaling1_ptr,
    ids_ptr,
    M,
    I,
    R0,
    R1,
    tokens,
    stride_gm,
    stride_hm,
    stride_s0m,
    stride_b0n,
    stride_b0i,
    stride_b0r,
    stride_s1m,
    stride_b1n,
    stride_b1i,
    stride_b1r,
    HAS_IDS: tl.constexpr,
    HAS_GATES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one tile of h."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_m, mask_i = offs_m < M, offs_i < I
    mask = mask_m[:, None] & mask_i[None, :]
    memory = token_memory(ids_ptr, offs_m, mask_m, tokens, HAS_IDS)
    offs = offs_m.to(tl.int64)[:, None] * stride_gm + offs_i[None, :]
    g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    g += delta_tile(
        s0_ptr, b0_ptr, scaling0_ptr, R0, stride_s0m, stride_b0n, stride_b0i, stride_b0r,
        offs_m, offs_i, mask_i, memory, BLOCK_M, BLOCK_I, BLOCK_R, PRECISION,
    )  # fmt: skip
    u += delta_tile(
        s1_ptr, b1_ptr, scaling1_ptr, R1, stride_s1m, stride_b1n, stride_b1i, stride_b1r,
        offs_m, offs_i, mask_i, memory, BLOCK_M, BLOCK_I, BLOCK_R, PRECISION,
    )  # fmt: skip
    h = activate(g, ACTIVATION) * u
    if HAS_GATES:
        h *= tl.load(z_ptr + offs_i, mask=mask_i, other=0.0).to(tl.float32)[None, :]
    h_ptrs = h_ptr + offs_m.to(tl.int64)[:, None] * stride_hm + offs_i[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=mask)


def mlp_hidden(
    g0: Tensor,
    u0: Tensor,
    gates: Tensor | None,
    delta_gate: Delta | None,
    delta_up: Delta | None,
    rows: Rows,
    activation: str,
) -> Tensor:
    """h = act(g0 + delta_gate) (u0 + delta_up) gates.

    Args:
        g0, u0: [M, I] with the same strides, the last 1.
        gates: [I] or None.
        delta_gate, delta_up: low-rank updates or None.
        rows: memory of each token.
        activation: "silu", "gelu" or "gelu_tanh".

    Returns:
        [M, I] in g0's dtype.
    """
    (m, i), block_m, block_i = g0.shape, 32, 128
    h = g0.new_empty(m, i)
    ranks = [d.b.shape[2] for d in (delta_gate, delta_up) if d is not None]
    launch(
        _mlp_hidden_fwd_kernel,
        (cdiv(m, block_m), cdiv(i, block_i)),
        g_ptr=g0,
        u_ptr=u0,
        h_ptr=h,
        z_ptr=gates,
        M=m,
        I=i,
        stride_gm=g0.stride(0),
        stride_hm=i,
        HAS_GATES=gates is not None,
        ACTIVATION=activation,
        BLOCK_M=block_m,
        BLOCK_I=block_i,
        BLOCK_R=rank_block(max(ranks, default=1)),
        PRECISION=precision(g0.dtype),
        num_warps=8,
        num_stages=2,
        **delta_args(delta_gate, "0", g0),
        **delta_args(delta_up, "1", g0),
        **rows.args(),
    )
    return h
