"""Backward of h = act(g) u z, tile by tile: dg, du and the gates' gradient.

g and u are recomputed from g0, u0 and the low-rank updates. This is the way for no or large ranks;
``hidden_bwd_lora`` sums the gradients of the low-rank matrices in the same pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lora.expand import delta_tile
from ..shared.launch import Rows, activate_grad, cdiv, launch, precision, rank_block, token_memory
from ..shared.operands import Delta, largest_rank, matrix, operand
from ..shared.reduce import sum_partials


class HiddenDeltas(NamedTuple):
    """The low-rank updates of g, u and dh; that of dh is t a_down, t = dy b_down."""

    gate: Delta | None
    up: Delta | None
    down: Delta | None

    def rank(self) -> int:
        """Return the largest rank, 1 for none."""
        return largest_rank(*self)


def _expects(args: dict[str, Any]) -> str | None:
    """Without an update nothing is multiplied."""
    deltas = [args[f"delta_{name}"] for name in HiddenDeltas._fields]
    return None if all(delta is None for delta in deltas) else "dot16"


EXPECTS = {"_mlp_hidden_bwd_kernel": _expects}

# Five wide tiles (g, u, dh and the two results) share the registers, so this one is half as wide as
# the forward's.
_BLOCK_M, _BLOCK_I = 32, 64


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
    dh,
    g0,
    u0,
    gates_ptr,
    dg,
    du,
    h_ptr,
    dz_ptr,
    delta_gate,
    delta_up,
    delta_down,
    ids_ptr,
    tokens,
    M,
    I,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one tile of dg and du, and its part of dz [M / BLOCK_M, I].

    h (laid out as dh) and dz are None where they are not wanted.
    """
    pid_m = tl.program_id(0)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_m, mask_i = offs_m < M, offs_i < I
    mask = mask_m[:, None] & mask_i[None, :]
    memory = token_memory(ids_ptr, offs_m, mask_m, tokens)
    rows = offs_m.to(tl.int64)[:, None]
    # All [BLOCK_M, BLOCK_I]. u0 has g0's stride and du that of dg: they share their offsets.
    offs_g = rows * g0.stride + offs_i[None, :]
    offs_h = rows * dh.stride + offs_i[None, :]
    g = tl.load(g0.ptr + offs_g, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u0.ptr + offs_g, mask=mask, other=0.0).to(tl.float32)
    upstream = tl.load(dh.ptr + offs_h, mask=mask, other=0.0).to(tl.float32)
    if delta_gate is not None:
        g += delta_tile(
            delta_gate, offs_m, offs_i, mask_i, memory, BLOCK_M, BLOCK_I, BLOCK_R, PRECISION
        )
    if delta_up is not None:
        u += delta_tile(
            delta_up, offs_m, offs_i, mask_i, memory, BLOCK_M, BLOCK_I, BLOCK_R, PRECISION
        )
    if delta_down is not None:
        upstream += delta_tile(
            delta_down, offs_m, offs_i, mask_i, memory, BLOCK_M, BLOCK_I, BLOCK_R, PRECISION
        )
    z = tl.zeros((BLOCK_I,), tl.float32)
    if gates_ptr is not None:
        z = tl.load(gates_ptr + offs_i, mask=mask_i, other=0.0).to(tl.float32)
    dg_tile, du_tile, h, dz = hidden_grads(
        upstream, g, u, z, mask, gates_ptr is not None, ACTIVATION
    )
    # From here on the tile of dh, or of g0 and u0, is written over: see ``outputs``.
    dtype = dg.ptr.dtype.element_ty
    offs_d = rows * dg.stride + offs_i[None, :]
    tl.store(dg.ptr + offs_d, dg_tile.to(dtype), mask=mask)
    tl.store(du.ptr + offs_d, du_tile.to(dtype), mask=mask)
    if h_ptr is not None:
        tl.store(h_ptr + offs_h, h.to(dtype), mask=mask)
    if dz_ptr is not None:
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
    """Return what both kernels of the backward take, but for the tile and where sums go."""
    (g0, u0), (dg, du), (m, i) = gu, out, dh.shape
    return {
        "dh": matrix(dh),
        "g0": matrix(g0),
        "u0": matrix(u0),
        "gates_ptr": gates,
        "dg": matrix(dg),
        "du": matrix(du),
        "delta_gate": operand(deltas.gate),
        "delta_up": operand(deltas.up),
        "delta_down": operand(deltas.down),
        "ids_ptr": rows.ids,
        "tokens": rows.tokens,
        "M": m,
        "I": i,
        "ACTIVATION": activation,
        "BLOCK_R": rank_block(deltas.rank()),
        "PRECISION": precision(g0.dtype),
    }


def outputs(dh: Tensor, gu: tuple[Tensor, Tensor], overwrite: bool) -> tuple[Tensor, Tensor]:
    """Return where dg and du go: over g0 and u0 if these may be lost, else dg over dh.

    A program has read its tile of all three before it writes, and no other reads that tile.
    """
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
    """Return ((dg, du), h, dz) of h = act(g) u gates; dh, or g0 and u0, are written over.

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
    (m, i), (needs_gates, needs_h, overwrite) = dh.shape, needs
    tiles = cdiv(m, _BLOCK_M), cdiv(i, _BLOCK_I)
    out = outputs(dh, gu, overwrite)
    h = dh.new_empty(m, i) if needs_h else None
    dz = dh.new_empty(tiles[0], i, dtype=torch.float32) if needs_gates else None
    launch(
        _mlp_hidden_bwd_kernel,
        tiles,
        h_ptr=h,
        dz_ptr=dz,
        BLOCK_M=_BLOCK_M,
        BLOCK_I=_BLOCK_I,
        **hidden_args(dh, gu, gates, out, deltas, rows, activation),
    )
    return out, h, None if dz is None else sum_partials(dz, torch.float32)
