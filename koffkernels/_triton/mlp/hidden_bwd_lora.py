"""Backward of h = act(g) u z for ranks up to 32, with the sums over tokens in the same pass.

One program owns a strip of neurons and a chunk of tokens: while a tile of dg, du and h is in
registers it is multiplied into the gradients of b_gate, b_up and a_down, so that nothing of width
I is read twice. Chunks are added in order by a second pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..shared.launch import Rows, cdiv, dot, launch, memory_span, token_memory, token_span
from ..shared.reduce import sum_partials
from .hidden_bwd import HiddenDeltas, hidden_args, hidden_grads, outputs

EXPECTS = {"_mlp_hidden_bwd_lora_kernel": "dot16"}
LARGEST_RANK = 32  # above it three accumulators of [rank, BLOCK_I] do not fit the registers
_PROGRAMS = 528  # four for each of the 132 multiprocessors of an H100 or H200
# Tokens of a chunk: eight tiles, so that the fp32 sums that are written for each chunk weigh little
# against what is read for it.
_SHORTEST_CHUNK = 256
_BLOCK_M, _BLOCK_I = 32, 64  # beside three wide tiles there are three sums of [rank, BLOCK_I]


# The four steps in which an update takes part. One that is not there (None) takes part in none.


@triton.jit
def _matrix_of(delta, m, mask_i, offs_i, offs_r, dtype: tl.constexpr):
    """(scaling, b^T [BLOCK_R, BLOCK_I]) of memory m; zeros for m = -1, which is none."""
    scaling = 0.0
    b = tl.zeros((offs_r.shape[0], offs_i.shape[0]), dtype)
    if delta is not None:
        offs = m * delta.stride_memory + offs_r[:, None] * delta.stride_rank
        offs += offs_i[None, :] * delta.stride_wide
        mask = (offs_r < delta.rank)[:, None] & mask_i[None, :] & (m >= 0)
        b = tl.load(delta.b + offs, mask=mask, other=0.0).to(dtype)
        scaling = tl.load(delta.scaling + m, mask=m >= 0, other=0.0).to(tl.float32)
    return scaling, b


@triton.jit
def _rows_of(delta, rows, mine, offs_r, dtype: tl.constexpr):
    """s [BLOCK_M, BLOCK_R] of the tokens that are ``mine``."""
    s = tl.zeros((rows.shape[0], offs_r.shape[0]), dtype)
    if delta is not None:
        s_ptrs = delta.s + rows * delta.stride_token + offs_r[None, :]
        s = tl.load(s_ptrs, mask=mine[:, None] & (offs_r < delta.rank)[None, :], other=0.0)
        s = s.to(dtype)
    return s


@triton.jit
def _updated(base, delta, scaling, s, b, PRECISION: tl.constexpr):
    """base + scaling s b^T, [BLOCK_M, BLOCK_I]."""
    if delta is not None:
        base += scaling * dot(s, b, tl.zeros(base.shape, tl.float32), PRECISION)
    return base


@triton.jit
def _summed(total, delta, s, wide, PRECISION: tl.constexpr):
    """total + s^T wide, [BLOCK_R, BLOCK_I]."""
    if delta is not None:
        total = dot(tl.trans(s), wide, total, PRECISION)
    return total


@triton.jit
def _store_sum(out_ptr, delta, total, slot, I, mask_i, offs_i, offs_r, m):
    """Write a sum to [slots, r, I]; the tokens without a memory have none."""
    if delta is not None:
        out = out_ptr + slot * delta.rank * I + (offs_r[:, None] * I + offs_i[None, :])
        mask = (offs_r < delta.rank)[:, None] & mask_i[None, :] & (m >= 0)
        tl.store(out, total, mask=mask)


@triton.jit(do_not_specialize=["M", "tokens", "m_per_chunk", "memories"])
def _mlp_hidden_bwd_lora_kernel(
    dh,
    g0,
    u0,
    gates_ptr,
    dg,
    du,
    dz_ptr,
    sum_gate_ptr,
    sum_up_ptr,
    sum_down_ptr,
    delta_gate,
    delta_up,
    delta_down,
    ids_ptr,
    tokens,
    M,
    I,
    m_per_chunk,
    memories,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: a strip of neurons and a chunk of tokens, memory after memory (-1 for none).

    Partial sums: dz [chunks, I]; the others [chunks, memories, r, I], zeroed by the launcher, since
    a chunk writes only those of the memories between its lowest and its highest.
    """
    chunk = tl.program_id(1)
    offs_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_r = tl.arange(0, BLOCK_R)
    mask_i = offs_i < I
    dtype = dg.ptr.dtype.element_ty
    z = tl.zeros((BLOCK_I,), tl.float32)
    if gates_ptr is not None:
        z = tl.load(gates_ptr + offs_i, mask=mask_i, other=0.0).to(tl.float32)
    dz = tl.zeros((BLOCK_I,), tl.float32)
    begin = chunk * m_per_chunk
    end = tl.minimum(begin + m_per_chunk, M)
    low, high = memory_span(ids_ptr, begin, end, tokens)
    for m in tl.range(low, high + 1, num_stages=1):
        scale_gate, b_gate = _matrix_of(delta_gate, m, mask_i, offs_i, offs_r, dtype)
        scale_up, b_up = _matrix_of(delta_up, m, mask_i, offs_i, offs_r, dtype)
        scale_down, b_down = _matrix_of(delta_down, m, mask_i, offs_i, offs_r, dtype)
        sum_gate = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
        sum_up = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
        sum_down = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
        first, last = token_span(ids_ptr, begin, end, tokens, m)
        for start in range(first, last, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            inside = offs_m < last
            mine = inside & (token_memory(ids_ptr, offs_m, inside, tokens) == m)
            mask = mine[:, None] & mask_i[None, :]
            rows = offs_m.to(tl.int64)[:, None]
            # Wide tiles [BLOCK_M, BLOCK_I]. u0 has g0's stride and du that of dg.
            offs_g = rows * g0.stride + offs_i[None, :]
            g = tl.load(g0.ptr + offs_g, mask=mask, other=0.0).to(tl.float32)
            u = tl.load(u0.ptr + offs_g, mask=mask, other=0.0).to(tl.float32)
            dh_ptrs = dh.ptr + rows * dh.stride + offs_i[None, :]
            upstream = tl.load(dh_ptrs, mask=mask, other=0.0).to(tl.float32)
            # Narrow tiles [BLOCK_M, BLOCK_R].
            with_memory = mine & (m >= 0)
            s_gate = _rows_of(delta_gate, rows, with_memory, offs_r, dtype)
            s_up = _rows_of(delta_up, rows, with_memory, offs_r, dtype)
            t_down = _rows_of(delta_down, rows, with_memory, offs_r, dtype)
            g = _updated(g, delta_gate, scale_gate, s_gate, b_gate, PRECISION)
            u = _updated(u, delta_up, scale_up, s_up, b_up, PRECISION)
            upstream = _updated(upstream, delta_down, scale_down, t_down, b_down, PRECISION)
            dg_tile, du_tile, h, dz_tile = hidden_grads(
                upstream, g, u, z, mask, gates_ptr is not None, ACTIVATION
            )
            # The tile of dh, or of g0 and u0, is written over: see ``outputs``.
            dg_tile, du_tile = dg_tile.to(dtype), du_tile.to(dtype)
            offs_d = rows * dg.stride + offs_i[None, :]
            tl.store(dg.ptr + offs_d, dg_tile, mask=mask)
            tl.store(du.ptr + offs_d, du_tile, mask=mask)
            dz += tl.sum(dz_tile, 0)
            sum_gate = _summed(sum_gate, delta_gate, s_gate, dg_tile, PRECISION)
            sum_up = _summed(sum_up, delta_up, s_up, du_tile, PRECISION)
            sum_down = _summed(sum_down, delta_down, t_down, h.to(dtype), PRECISION)
        slot = chunk.to(tl.int64) * memories + m
        _store_sum(sum_gate_ptr, delta_gate, sum_gate, slot, I, mask_i, offs_i, offs_r, m)
        _store_sum(sum_up_ptr, delta_up, sum_up, slot, I, mask_i, offs_i, offs_r, m)
        _store_sum(sum_down_ptr, delta_down, sum_down, slot, I, mask_i, offs_i, offs_r, m)
    if dz_ptr is not None:
        tl.store(dz_ptr + chunk.to(tl.int64) * I + offs_i, dz, mask=mask_i)


class HiddenGrads(NamedTuple):
    """dg and du [M, I], dz fp32 [I] or None, and fp32 [n, r, I]: sums over tokens of s_gate^T dg,
    s_up^T du and t^T h (not scaled)."""

    dg: Tensor
    du: Tensor
    dz: Tensor | None
    gate: Tensor | None
    up: Tensor | None
    down: Tensor | None


def _tokens_per_chunk(m: int, i: int) -> int:
    """Return how many tokens a chunk has: as many chunks as fill the multiprocessors. A chunk may
    end within a sequence."""
    size = max(_SHORTEST_CHUNK, cdiv(max(m, 1), cdiv(_PROGRAMS, cdiv(i, _BLOCK_I))))
    return cdiv(size, _BLOCK_M) * _BLOCK_M


def mlp_hidden_bwd_lora(
    dh: Tensor,
    gu: tuple[Tensor, Tensor],
    gates: Tensor | None,
    deltas: HiddenDeltas,
    rows: Rows,
    activation: str,
    needs: tuple[bool, bool],
) -> HiddenGrads:
    """Return all of ``mlp_hidden_bwd`` and the sums that the low-rank matrices' gradients need.

    Args:
        dh, gu, gates, deltas, rows, activation: as in ``mlp_hidden_bwd``; at least one update,
            ranks up to ``LARGEST_RANK``.
        needs: whether dz is wanted, and whether g0 and u0 may be written over.

    Returns:
        See ``HiddenGrads``; None for an update that is not there.
    """
    (m, i), (needs_gates, overwrite) = dh.shape, needs
    memories = max(d.b.shape[0] for d in deltas if d is not None)
    per_chunk = _tokens_per_chunk(m, i)
    chunks = cdiv(m, per_chunk)
    out = outputs(dh, gu, overwrite)
    dz = dh.new_empty(chunks, i, dtype=torch.float32) if needs_gates else None
    sums = [
        None if d is None else dh.new_zeros(chunks, memories, d.b.shape[2], i, dtype=torch.float32)
        for d in deltas
    ]
    launch(
        _mlp_hidden_bwd_lora_kernel,
        (cdiv(i, _BLOCK_I), chunks),
        dz_ptr=dz,
        sum_gate_ptr=sums[0],
        sum_up_ptr=sums[1],
        sum_down_ptr=sums[2],
        m_per_chunk=per_chunk,
        memories=memories,
        BLOCK_M=_BLOCK_M,
        BLOCK_I=_BLOCK_I,
        **hidden_args(dh, gu, gates, out, deltas, rows, activation),
    )
    parts = [None if part is None else sum_partials(part, torch.float32) for part in (dz, *sums)]
    return HiddenGrads(*out, *parts)
