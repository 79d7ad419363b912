"""Backward of h = act(g) u z, tile by tile: dg, du and the gates' gradient.

g and u are recomputed from g0, u0 and the low-rank updates. This is the way for no or large ranks;
``mlp_hidden_bwd_lora`` sums the gradients of the low-rank matrices in the same pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lora.expand import Delta, delta_args, delta_tile
from ..shared.launch import Rows, activate_grad, cdiv, launch, precision, rank_block, token_memory
from ..shared.reduce import sum_partials

EXPECTS = {"_mlp_hidden_bwd_kernel": "dot16"}


class HiddenDeltas(NamedTuple):
    """The low-rank updates of g, u and dh; that of dh is t a_down, t = dy b_down."""

    gate: Delta | None
    up: Delta | None
    down: Delta | None

    def args(self, like: Tensor) -> dict:
        """Kernel arguments, called 0, 1 and 2."""
        named = zip("012", self, strict=True)
        return {k: v for name, d in named for k, v in delta_args(d, name, like).items()}

    def rank(self) -> int:
        """The largest rank, 1 for none."""
        return max((d.b.shape[2] for d in self if d is not None), default=1)


@triton.jit
def hidden_grads(dh, g, u, z, mask, HAS_GATES: tl.constexpr, ACTIVATION: tl.constexpr):
    """(dg, du, h, dh act u) of one tile in fp32; 0 outside the mask."""
    act, slope = activate_grad(g, ACTIVATION)
    product = act * u
    dz = dh * product
    h = product
    if HAS_GATES:
        dh = dh * z[None, :]
        h = product * z[None, :]
    return dh * u * slope, dh * act, h, tl.where(mask, dz, 0.0)


@triton.jit(do_not_specialize=["M", "tokens"])
def _mlp_hidden_bwd_kernel(
    dh_ptr,
    g_ptr,
    u_ptr,
    z_ptr,
    dg_ptr,
    du_ptr,
    h_ptr,
    dz_ptr,
    s0_ptr,
    b0_ptr,
    scaling0_ptr,
    s1_ptr,
    b1_ptr,
    scaling1_ptr,
    s2_ptr,
    b2_ptr,
    scaling2_ptr,
    ids_ptr,
    M,
    I,
    R0,
    R1,
    R2,
    tokens,
    stride_hm,
    stride_gm,
    stride_dm,
    stride_s0m,
    stride_b0n,
    stride_b0i,
    stride_b0r,
    stride_s1m,
    stride_b1n,
    stride_b1i,
    stride_b1r,
    stride_s2m,
    stride_b2n,
    stride_b2i,
    stride_b2r,
    HAS_IDS: tl.constexpr,
    HAS_GATES: tl.constexpr,
    NEEDS_GATES: tl.constexpr,
    KEEP_H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one tile of dg and du, and its part of dz [M / BLOCK_M, I]."""
    pid_m = tl.program_id(0)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_m, mask_i = offs_m < M, offs_i < I
    mask = mask_m[:, None] & mask_i[None, :]
    memory = token_memory(ids_ptr, offs_m, mask_m, tokens, HAS_IDS)
    rows = offs_m.to(tl.int64)[:, None]
    g = tl.load(g_ptr + rows * stride_gm + offs_i[None, :], mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + rows * stride_gm + offs_i[None, :], mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + rows * stride_hm + offs_i[None, :], mask=mask, other=0.0).to(tl.float32)
    g += delta_tile(
        s0_ptr, b0_ptr, scaling0_ptr, R0, stride_s0m, stride_b0n, stride_b0i, stride_b0r,
        offs_m, offs_i, mask_i, memory, BLOCK_M, BLOCK_I, BLOCK_R, PRECISION,
    )  # fmt: skip
    u += delta_tile(
        s1_ptr, b1_ptr, scaling1_ptr, R1, stride_s1m, stride_b1n, stride_b1i, stride_b1r,
        offs_m, offs_i, mask_i, memory, BLOCK_M, BLOCK_I, BLOCK_R, PRECISION,
    )  # fmt: skip
    dh += delta_tile(
        s2_ptr, b2_ptr, scaling2_ptr, R2, stride_s2m, stride_b2n, stride_b2i, stride_b2r,
        offs_m, offs_i, mask_i, memory, BLOCK_M, BLOCK_I, BLOCK_R, PRECISION,
    )  # fmt: skip
    z = tl.zeros((BLOCK_I,), tl.float32)
    if HAS_GATES:
        z = tl.load(z_ptr + offs_i, mask=mask_i, other=0.0).to(tl.float32)
    dg, du, h, dz = hidden_grads(dh, g, u, z, mask, HAS_GATES, ACTIVATION)
    dtype = dg_ptr.dtype.element_ty
    tl.store(dg_ptr + rows * stride_dm + offs_i[None, :], dg.to(dtype), mask=mask)
    tl.store(du_ptr + rows * stride_dm + offs_i[None, :], du.to(dtype), mask=mask)
    if KEEP_H:
        tl.store(h_ptr + rows * stride_hm + offs_i[None, :], h.to(dtype), mask=mask)
    if NEEDS_GATES:
        tl.store(dz_ptr + pid_m.to(tl.int64) * I + offs_i, tl.sum(dz, 0), mask=mask_i)


def hidden_args(
    dh: Tensor,
    gu: tuple[Tensor, Tensor],
    gates: Tensor | None,
    out: tuple[Tensor, Tensor],
    deltas: HiddenDeltas,
    rows: Rows,
    activation: str,
) -> dict[str, Any]:
    """What both kernels of the backward take, but for the tile and where sums go."""
    (g0, u0), (dg, du), (m, i) = gu, out, dh.shape
    tensors = {"dh_ptr": dh, "g_ptr": g0, "u_ptr": u0, "dg_ptr": dg, "du_ptr": du}
    sizes = {"M": m, "I": i, "stride_hm": i, "stride_gm": g0.stride(0), "stride_dm": dg.stride(0)}
    gated = {"z_ptr": gates, "HAS_GATES": gates is not None, "ACTIVATION": activation}
    shared = {"BLOCK_R": rank_block(deltas.rank()), "PRECISION": precision(g0.dtype)}
    return tensors | sizes | gated | shared | deltas.args(g0) | rows.args()


def outputs(dh: Tensor, gu: tuple[Tensor, Tensor], overwrite: bool) -> tuple[Tensor, Tensor]:
    """Where dg and du go: over g0 and u0 if these may be lost, else dg over dh. A program has read
    its tile of all three before it writes."""
    return gu if overwrite else (dh, torch.empty_like(dh))


def mlp_hidden_bwd(
    dh: Tensor,
    gu: tuple[Tensor, Tensor],
    gates: Tensor | None,
    deltas: HiddenDeltas,
    rows: Rows,
    activation: str,
    needs: tuple[bool, bool, bool],
) -> tuple[tuple[Tensor, Tensor], Tensor | None, Tensor | None]:
    """((dg, du), h, dz) of h = act(g) u gates; dh, or g0 and u0, are written over.

    Args:
        dh: [M, I], contiguous, without the update of the down layer.
        gu: g0 and u0, [M, I] with the same strides, the last 1.
        gates: [I] or None.
        deltas: the updates of g, u and dh.
        rows: memory of each token.
        activation: "silu", "gelu" or "gelu_tanh".
        needs: whether dz and h are wanted, and whether g0 and u0 may be written over.

    Returns:
        dg and du [M, I], h [M, I] or None, dz fp32 [I] or None.
    """
    (m, i), block_m, block_i = dh.shape, 32, 64
    needs_gates, keep_h, overwrite = needs
    tiles = cdiv(m, block_m), cdiv(i, block_i)
    out = outputs(dh, gu, overwrite)
    h = dh.new_empty(m, i) if keep_h else None
    dz = dh.new_empty(tiles[0], i, dtype=torch.float32) if needs_gates else None
    launch(
        _mlp_hidden_bwd_kernel,
        tiles,
        h_ptr=h,
        dz_ptr=dz,
        NEEDS_GATES=needs_gates,
        KEEP_H=keep_h,
        BLOCK_M=block_m,
        BLOCK_I=block_i,
        **hidden_args(dh, gu, gates, out, deltas, rows, activation),
    )
    return out, h, None if dz is None else sum_partials(dz, torch.float32)
