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
_SHORTEST_CHUNK = 256
_BLOCK_M = 32


@triton.jit(do_not_specialize=["M", "tokens", "m_per_chunk", "memories"])
def _mlp_hidden_bwd_lora_kernel(
    dh_ptr,
    g_ptr,
    u_ptr,
    z_ptr,
    dg_ptr,
    du_ptr,
    dz_ptr,
    db0_ptr,
    db1_ptr,
    db2_ptr,
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
    m_per_chunk,
    memories,
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
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: a strip of neurons and a chunk of tokens, memory after memory (-1 for none).

    Partial sums: dz [chunks, I]; db0, db1, db2 [chunks, memories, R, I], zeroed by the launcher.
    """
    chunk = tl.program_id(1)
    offs_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_r = tl.arange(0, BLOCK_R)
    mask_i = offs_i < I
    dtype = dg_ptr.dtype.element_ty
    z = tl.zeros((BLOCK_I,), tl.float32)
    if HAS_GATES:
        z = tl.load(z_ptr + offs_i, mask=mask_i, other=0.0).to(tl.float32)
    dz = tl.zeros((BLOCK_I,), tl.float32)
    begin = chunk * m_per_chunk
    end = tl.minimum(begin + m_per_chunk, M)
    low, high = memory_span(ids_ptr, begin, end, tokens, HAS_IDS)
    for m in tl.range(low, high + 1, num_stages=1):
        mask0 = (offs_r < R0)[:, None] & mask_i[None, :] & (m >= 0)
        mask1 = (offs_r < R1)[:, None] & mask_i[None, :] & (m >= 0)
        mask2 = (offs_r < R2)[:, None] & mask_i[None, :] & (m >= 0)
        offs0 = m * stride_b0n + offs_r[:, None] * stride_b0r + offs_i[None, :] * stride_b0i
        offs1 = m * stride_b1n + offs_r[:, None] * stride_b1r + offs_i[None, :] * stride_b1i
        offs2 = m * stride_b2n + offs_r[:, None] * stride_b2r + offs_i[None, :] * stride_b2i
        b0 = tl.load(b0_ptr + offs0, mask=mask0, other=0.0).to(dtype)
        b1 = tl.load(b1_ptr + offs1, mask=mask1, other=0.0).to(dtype)
        b2 = tl.load(b2_ptr + offs2, mask=mask2, other=0.0).to(dtype)
        c0 = tl.load(scaling0_ptr + m, mask=(m >= 0) & (R0 > 0), other=0.0).to(tl.float32)
        c1 = tl.load(scaling1_ptr + m, mask=(m >= 0) & (R1 > 0), other=0.0).to(tl.float32)
        c2 = tl.load(scaling2_ptr + m, mask=(m >= 0) & (R2 > 0), other=0.0).to(tl.float32)
        sum0 = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
        sum1 = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
        sum2 = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
        first, last = token_span(ids_ptr, begin, end, tokens, m, HAS_IDS)
        for start in range(first, last, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            inside = offs_m < last
            mine = inside & (token_memory(ids_ptr, offs_m, inside, tokens, HAS_IDS) == m)
            mask = mine[:, None] & mask_i[None, :]
            rows = offs_m.to(tl.int64)[:, None]
            tile = rows * stride_gm + offs_i[None, :]
            g = tl.load(g_ptr + tile, mask=mask, other=0.0).to(tl.float32)
            u = tl.load(u_ptr + tile, mask=mask, other=0.0).to(tl.float32)
            dh_ptrs = dh_ptr + rows * stride_hm + offs_i[None, :]
            dh = tl.load(dh_ptrs, mask=mask, other=0.0).to(tl.float32)
            mine_r = mine[:, None] & (m >= 0)
            s0_ptrs = s0_ptr + rows * stride_s0m + offs_r[None, :]
            s1_ptrs = s1_ptr + rows * stride_s1m + offs_r[None, :]
            s2_ptrs = s2_ptr + rows * stride_s2m + offs_r[None, :]
            s0 = tl.load(s0_ptrs, mask=mine_r & (offs_r < R0)[None, :], other=0.0)
            s1 = tl.load(s1_ptrs, mask=mine_r & (offs_r < R1)[None, :], other=0.0)
            s2 = tl.load(s2_ptrs, mask=mine_r & (offs_r < R2)[None, :], other=0.0)
            zero = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
            g += c0 * dot(s0.to(dtype), b0, zero, PRECISION)
            u += c1 * dot(s1.to(dtype), b1, zero, PRECISION)
            dh += c2 * dot(s2.to(dtype), b2, zero, PRECISION)
            dg, du, h, dz_tile = hidden_grads(dh, g, u, z, mask, HAS_GATES, ACTIVATION)
            dg, du = dg.to(dtype), du.to(dtype)
            out = rows * stride_dm + offs_i[None, :]
            tl.store(dg_ptr + out, dg, mask=mask)
            tl.store(du_ptr + out, du, mask=mask)
            dz += tl.sum(dz_tile, 0)
            sum0 = dot(tl.trans(s0).to(dtype), dg, sum0, PRECISION)
            sum1 = dot(tl.trans(s1).to(dtype), du, sum1, PRECISION)
            sum2 = dot(tl.trans(s2).to(dtype), h.to(dtype), sum2, PRECISION)
        slot = chunk.to(tl.int64) * memories + m
        part = offs_r[:, None] * I + offs_i[None, :]
        tl.store(db0_ptr + slot * R0 * I + part, sum0, mask=mask0)
        tl.store(db1_ptr + slot * R1 * I + part, sum1, mask=mask1)
        tl.store(db2_ptr + slot * R2 * I + part, sum2, mask=mask2)
    if NEEDS_GATES:
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


def _chunks(m: int, i: int, block_i: int) -> int:
    """Tokens per chunk: chunks enough to fill the multiprocessors, which may cut rows."""
    size = max(_SHORTEST_CHUNK, cdiv(max(m, 1), cdiv(_PROGRAMS, cdiv(i, block_i))))
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
    """All of ``mlp_hidden_bwd`` and the sums that the low-rank matrices' gradients need.

    Args:
        dh, gu, gates, deltas, rows, activation: as in ``mlp_hidden_bwd``; at least one update,
            ranks up to ``LARGEST_RANK``.
        needs: whether dz is wanted, and whether g0 and u0 may be written over.

    Returns:
        See ``HiddenGrads``; None for an update that is not there.
    """
    (m, i), block_i, (needs_gates, overwrite) = dh.shape, 64, needs
    memories = max(d.b.shape[0] for d in deltas if d is not None)
    per_chunk = _chunks(m, i, block_i)
    chunks = cdiv(m, per_chunk)
    out = outputs(dh, gu, overwrite)
    dz = dh.new_empty(chunks, i, dtype=torch.float32) if needs_gates else None
    sums = [
        None if d is None else dh.new_zeros(chunks, memories, d.b.shape[2], i, dtype=torch.float32)
        for d in deltas
    ]
    launch(
        _mlp_hidden_bwd_lora_kernel,
        (cdiv(i, block_i), chunks),
        dz_ptr=dz,
        m_per_chunk=per_chunk,
        memories=memories,
        NEEDS_GATES=needs_gates,
        BLOCK_M=_BLOCK_M,
        BLOCK_I=block_i,
        **{f"db{k}_ptr": dh if part is None else part for k, part in enumerate(sums)},
        **hidden_args(dh, gu, gates, out, deltas, rows, activation),
    )
    parts = [None if part is None else sum_partials(part, torch.float32) for part in (dz, *sums)]
    return HiddenGrads(*out, *parts)
