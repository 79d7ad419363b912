"""Backward of h = act(g) u z: dg, du, the gates' gradient and the low-rank matrices' sums in one
pass.

g and u are recomputed from g0, u0 and the low-rank updates. One program owns a strip of neurons and
a stretch of tokens, all of one memory: while a tile of dg, du and h is in registers it is
multiplied into the gradients of b_gate, b_up and a_down, so that nothing of width I is read twice.
Stretches are added in order by a second pass. Where the sums do not pay (see ``sums_pay``), h is
written instead, and ``lora_grad`` takes them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lora.grad import lora_grads
from ..shared.config import Config, choose_config
from ..shared.launch import (
    Rows,
    activate_grad,
    cdiv,
    dot,
    launch,
    multiprocessors,
    precision,
    rank_block,
)
from ..shared.operands import Delta, largest_rank, operand
from ..shared.reduce import MatrixSum, sum_partials
from ..shared.stretch import stretch_of, stretches
from ..shared.update import add_update, memory_part, narrow_transposed


class HiddenDeltas(NamedTuple):
    """The low-rank updates of g, u and dh; that of dh is t a_down, t = dy b_down."""

    gate: Delta | None
    up: Delta | None
    down: Delta | None

    def rank(self) -> int:
        """Return the largest rank, 1 for none."""
        return largest_rank(*self)


class HiddenGrads(NamedTuple):
    """What ``mlp_hidden_bwd`` returns; None for what is not wanted or not there.

    dg and du [M, I], dz fp32 [I], and [n, r, I]: sums over tokens of s_gate^T dg, s_up^T du and
    t^T h, not scaled.
    """

    dg: Tensor
    du: Tensor
    dz: Tensor | None
    gate: MatrixSum | None
    up: MatrixSum | None
    down: MatrixSum | None


def _expects(args: dict[str, Any]) -> str | None:
    """Without an update nothing is multiplied."""
    deltas = [args[f"delta_{name}"] for name in HiddenDeltas._fields]
    return None if all(delta is None for delta in deltas) else "dot16"


EXPECTS = {"_mlp_hidden_bwd_kernel": _expects}

# Three sums of [rank, block_n] lie in the registers beside five tiles of [block_m, block_n]. On an
# H100 (M = 8192, I = 11904, r = 16, eight memories; a copy moves 3.01 TB/s) the first took 370 us,
# 2.69 TB/s; 32x64 with eight warps 376, tiles of 32 columns, which are half a line, 506 and more,
# and two stages instead of three a quarter more. Stretches of 512 tokens took 3 % longer than 1024,
# and 2048 as long.
_RANK_16 = Config(16, 64, warps=4, stages=3)
_RANK_32 = Config(16, 64, warps=8, stages=3)
# r = 64 on the same H100: 644 us, and 1555 with the smaller tile. sm_80 spills with the larger one,
# and with four warps.
RANK_64_CONFIGS = {
    "32x64": Config(32, 64, warps=8, stages=3, archs=(90, 100)),
    "16x32": Config(16, 32, warps=8, stages=2),
}
_LENGTH = 1024
# Programs that a multiprocessor of an H100 holds, r = 16, with gates and without.
BLOCKS = 3, 4
_LARGEST_RANK = 64  # above it three sums of [rank, 32] fill the registers
_SHORTEST_ROW = 256  # below it the partial sums, one set per row, weigh as much as the tiles


def sums_pay(deltas: HiddenDeltas, rows: Rows) -> bool:
    """Return whether the sums over tokens are taken in the same pass."""
    long = rows.ids is None or rows.tokens >= _SHORTEST_ROW
    return long and deltas.rank() <= _LARGEST_RANK


@triton.jit
def _hidden_grads(dh, g, u, z, HAS_GATES: tl.constexpr, ACTIVATION: tl.constexpr):
    """(dg, du, act u, dh act u) of one tile in fp32; the gradients are those under the gates z."""
    act, slope = activate_grad(g, ACTIVATION)
    product = act * u
    dz = dh * product
    if HAS_GATES:
        dh = dh * z[None, :]
    return dh * u * slope, dh * act, product, dz


@triton.jit
def _store_sum(parts_ptr, total, rank, offs_r, offs_i, mask_i, I):
    """Write the sum [BLOCK_R, BLOCK_I] of an update."""
    mask = (offs_r < rank)[:, None] & mask_i[None, :]
    tl.store(parts_ptr + offs_r.to(tl.int64)[:, None] * I + offs_i[None, :], total, mask=mask)


@triton.jit(do_not_specialize=["memories", "tokens", "length", "per_row"])
def _mlp_hidden_bwd_kernel(
    dh_ptr,
    stride_dh,
    g0_ptr,
    u0_ptr,
    stride_g0,
    gates_ptr,
    dg_ptr,
    du_ptr,
    stride_dg,
    h_ptr,
    dz_ptr,
    parts_ptr,
    delta_gate,
    delta_up,
    delta_down,
    ids_ptr,
    memories,
    tokens,
    length,
    per_row,
    I,
    RANKS,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MORE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: a strip of neurons and a stretch of tokens.

    u0 has the stride of g0, du that of dg, h that of dh. h, dz [stretches, I] and parts [stretches,
    RANKS, I], the sums of gate, up and down one below the other, are None where they are not
    wanted.
    """
    strips = tl.cdiv(I, BLOCK_I)
    stretch = tl.program_id(0) // strips
    offs_i = (tl.program_id(0) % strips) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_r = tl.arange(0, BLOCK_R)
    mask_i = offs_i < I
    memory, begin, end = stretch_of(stretch, ids_ptr, memories, tokens, length, per_row)
    dtype = dg_ptr.dtype.element_ty
    z = tl.zeros((BLOCK_I,), tl.float32)
    if gates_ptr is not None:
        z = tl.load(gates_ptr + offs_i, mask=mask_i, other=0.0).to(tl.float32)
    if delta_gate is not None:
        b_gate = memory_part(delta_gate, memory, offs_i, mask_i, BLOCK_R, dtype)
        sum_gate = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    if delta_up is not None:
        b_up = memory_part(delta_up, memory, offs_i, mask_i, BLOCK_R, dtype)
        sum_up = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    if delta_down is not None:
        b_down = memory_part(delta_down, memory, offs_i, mask_i, BLOCK_R, dtype)
        sum_down = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    # Summed over the tile's tokens only at the end: across warps that takes barriers.
    dz = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    for start in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = (offs_m < end)[:, None]
        mask = mask_m & mask_i[None, :]
        rows = offs_m.to(tl.int64)[:, None]
        # All [BLOCK_M, BLOCK_I]. Outside the mask everything is 0, and so are all gradients.
        offs_g = rows * stride_g0 + offs_i[None, :]
        offs_h = rows * stride_dh + offs_i[None, :]
        g = tl.load(g0_ptr + offs_g, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(u0_ptr + offs_g, mask=mask, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + offs_h, mask=mask, other=0.0).to(tl.float32)
        if delta_gate is not None:
            g = add_update(
                g, delta_gate, b_gate, memory, rows, mask_m, offs_i, mask_i,
                BLOCK_R, MORE, PRECISION,
            )  # fmt: skip
        if delta_up is not None:
            u = add_update(
                u, delta_up, b_up, memory, rows, mask_m, offs_i, mask_i,
                BLOCK_R, MORE, PRECISION,
            )  # fmt: skip
        if delta_down is not None:
            dh = add_update(
                dh, delta_down, b_down, memory, rows, mask_m, offs_i,
                mask_i, BLOCK_R, MORE, PRECISION,
            )  # fmt: skip
        dg, du, product, dz_tile = _hidden_grads(dh, g, u, z, gates_ptr is not None, ACTIVATION)
        if dz_ptr is not None:
            dz += dz_tile
        # From here on the tile of dh, or of g0 and u0, is written over: see ``outputs``.
        dg, du = dg.to(dtype), du.to(dtype)
        offs_d = rows * stride_dg + offs_i[None, :]
        tl.store(dg_ptr + offs_d, dg, mask=mask)
        tl.store(du_ptr + offs_d, du, mask=mask)
        if h_ptr is not None:
            h = product
            if gates_ptr is not None:
                h *= z[None, :]
            tl.store(h_ptr + offs_h, h.to(dtype), mask=mask)
        if parts_ptr is not None:
            if delta_gate is not None:
                s_gate = narrow_transposed(delta_gate, rows, mask_m, BLOCK_R, dtype)
                sum_gate = dot(s_gate, dg, sum_gate, PRECISION)
            if delta_up is not None:
                s_up = narrow_transposed(delta_up, rows, mask_m, BLOCK_R, dtype)
                sum_up = dot(s_up, du, sum_up, PRECISION)
            if delta_down is not None:
                t_down = narrow_transposed(delta_down, rows, mask_m, BLOCK_R, dtype)
                sum_down = dot(t_down, product.to(dtype), sum_down, PRECISION)
    if dz_ptr is not None:
        tl.store(dz_ptr + stretch.to(tl.int64) * I + offs_i, tl.sum(dz, 0), mask=mask_i)
    if parts_ptr is not None:
        part_ptr = parts_ptr + stretch.to(tl.int64) * RANKS * I
        if delta_gate is not None:
            _store_sum(part_ptr, sum_gate, delta_gate.rank, offs_r, offs_i, mask_i, I)
            part_ptr += delta_gate.rank * I
        if delta_up is not None:
            _store_sum(part_ptr, sum_up, delta_up.rank, offs_r, offs_i, mask_i, I)
            part_ptr += delta_up.rank * I
        if delta_down is not None:
            if gates_ptr is not None:
                sum_down *= z[None, :]  # h = product z, and z is the same for all tokens
            _store_sum(part_ptr, sum_down, delta_down.rank, offs_r, offs_i, mask_i, I)


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
    *,
    needs_gates: bool,
    overwrite: bool,
    config: Config | None = None,
) -> HiddenGrads:
    """Return the gradients of h = act(g) u gates; dh, or g0 and u0, are written over.

    Args:
        dh: [M, I], contiguous, without the update of the down layer.
        gu: g0 and u0, [M, I] with the same strides, the last 1.
        gates: [I] or None.
        deltas: the updates of g, u and dh.
        rows: memory of each token.
        activation: "silu", "gelu" or "gelu_tanh".
        needs_gates: whether dz is wanted.
        overwrite: whether g0 and u0 may be written over.
        config: None: by the largest rank, and above 32 by the chip.
    """
    (m, i), (g0, u0) = dh.shape, gu
    rank = deltas.rank()
    if config is None and rank <= 32:
        config = _RANK_16 if rank <= 16 else _RANK_32
    config = choose_config(config, RANK_64_CONFIGS, RANK_64_CONFIGS["16x32"], dh)
    strips = cdiv(i, config.block_n)
    at_once = BLOCKS[gates is None] * multiprocessors(dh.device)
    cut = stretches(rows, m, _LENGTH, strips, at_once)
    dg, du = outputs(dh, gu, overwrite)
    sums, h, dz = None, None, None
    there = [delta for delta in deltas if delta is not None]
    memories = there[0].b.shape[0] if there else 0
    if needs_gates:
        dz = dh.new_empty(cut.count, i, dtype=torch.float32)
    if there and sums_pay(deltas, rows):
        ranks = sum(delta.b.shape[2] for delta in there)
        sums = dh.new_empty(cut.count, ranks, i, dtype=torch.float32)
    elif deltas.down is not None:
        h = dh.new_empty(m, i)
    launch(
        _mlp_hidden_bwd_kernel,
        (strips * cut.count,),
        dh_ptr=dh,
        stride_dh=i,
        g0_ptr=g0,
        u0_ptr=u0,
        stride_g0=g0.stride(0),
        gates_ptr=gates,
        dg_ptr=dg,
        du_ptr=du,
        stride_dg=dg.stride(0),
        h_ptr=h,
        dz_ptr=dz,
        parts_ptr=sums,
        delta_gate=operand(deltas.gate),
        delta_up=operand(deltas.up),
        delta_down=operand(deltas.down),
        ids_ptr=rows.ids,
        memories=memories,
        **cut.args(),
        I=i,
        RANKS=0 if sums is None else sums.shape[1],
        ACTIVATION=activation,
        BLOCK_M=config.block_m,
        BLOCK_I=config.block_n,
        BLOCK_R=rank_block(rank),
        MORE=rank > rank_block(rank),
        PRECISION=precision(g0.dtype),
        STAGES=config.stages,
        num_warps=config.warps,
        num_stages=config.stages,
        most_registers=None,
    )
    if dz is not None:
        dz = sum_partials(dz, torch.float32)
    if sums is None:
        pairs = [
            (delta.s, wide)
            for delta, wide in zip(deltas, (dg, du, h), strict=True)
            if delta is not None
        ]
        added = iter(lora_grads(pairs, memories, rows) if pairs else ())
        found = [None if delta is None else next(added) for delta in deltas]
    else:
        ranks = [0 if delta is None else delta.b.shape[2] for delta in deltas]
        found = [
            MatrixSum(part[:, None], memories, rows.ids, cut.per_row) if part.shape[1] else None
            for part in sums.split(ranks, 1)
        ]
    return HiddenGrads(dg, du, dz, *found)
