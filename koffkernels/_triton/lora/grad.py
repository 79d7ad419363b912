"""Gradients of low-rank matrices: sums over each memory's tokens of p^T q.

da = scaling t^T x and db = scaling dy^T s. A program owns a block of the wide side, a chunk of
tokens and one memory; chunks are added in order by a second pass, which also scales and transposes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..shared.launch import Rows, cdiv, dot, launch, precision, rank_block, token_memory, token_span
from ..shared.reduce import MatrixSum

EXPECTS = {"_lora_grad_kernel": "dot16"}
_PROGRAMS = 528  # four for each of the 132 multiprocessors of an H100 or H200
# Tokens of a chunk: four tiles, so that the fp32 sums that are written for each chunk weigh little
# against what is read for it.
_SHORTEST_CHUNK = 256
_BLOCK_M, _BLOCK_K = 64, 128


@triton.jit(do_not_specialize=["M", "tokens", "m_per_chunk", "memories"])
def _lora_grad_kernel(
    p_ptr,
    stride_p,
    q_ptr,
    stride_q,
    out_ptr,
    ids_ptr,
    tokens,
    M,
    K,
    R,
    m_per_chunk,
    memories,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: out[chunk, m, ranks, BLOCK_K], summed over the chunk's tokens that use m."""
    chunk, pid = tl.program_id(1), tl.program_id(2)
    m, pid_r = pid % memories, pid // memories
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_k, mask_r = offs_k < K, offs_r < R
    begin = chunk * m_per_chunk
    end = tl.minimum(begin + m_per_chunk, M)
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    first, last = token_span(ids_ptr, begin, end, tokens, m)
    for start in range(first, last, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        inside = offs_m < last
        mine = inside & (token_memory(ids_ptr, memories, offs_m, inside, tokens) == m)
        rows = offs_m.to(tl.int64)[:, None]
        # p [BLOCK_M, BLOCK_R], q [BLOCK_M, BLOCK_K]
        mask_p, mask_q = mine[:, None] & mask_r[None, :], mine[:, None] & mask_k[None, :]
        p = tl.load(p_ptr + rows * stride_p + offs_r[None, :], mask=mask_p, other=0.0)
        q = tl.load(q_ptr + rows * stride_q + offs_k[None, :], mask=mask_q, other=0.0)
        total = dot(tl.trans(p).to(q.dtype), q, total, PRECISION)
    slot = chunk.to(tl.int64) * memories + m
    out = out_ptr + (slot * R + offs_r[:, None]) * K + offs_k[None, :]
    tl.store(out, total, mask=mask_r[:, None] & mask_k[None, :])


def lora_grad(p: Tensor, q: Tensor, memories: int, rows: Rows) -> MatrixSum:
    """Return the sum of p^T q over each memory's tokens.

    Args:
        p: [M, r], last stride 1: s or t.
        q: [M, K], last stride 1: the wide side (x, or dy).
        memories: n.
        rows: memory of each token.

    Returns:
        The sums of chunks, of [n, r, K], not scaled.
    """
    (m, k), r = q.shape, p.shape[1]
    block_r = rank_block(r)
    tiles = cdiv(k, _BLOCK_K) * cdiv(r, block_r) * memories
    size = max(_SHORTEST_CHUNK, cdiv(max(m, 1), cdiv(_PROGRAMS, tiles)))
    per_chunk = cdiv(size, _BLOCK_M) * _BLOCK_M  # a chunk may end within a sequence
    chunks = max(1, cdiv(m, per_chunk))
    parts = q.new_empty(chunks, memories, r, k, dtype=torch.float32)
    launch(
        _lora_grad_kernel,
        (cdiv(k, _BLOCK_K), chunks, cdiv(r, block_r) * memories),
        p_ptr=p,
        stride_p=p.stride(0),
        q_ptr=q,
        stride_q=q.stride(0),
        out_ptr=parts,
        ids_ptr=rows.ids,
        tokens=rows.tokens,
        M=m,
        K=k,
        R=r,
        m_per_chunk=per_chunk,
        memories=memories,
        BLOCK_M=_BLOCK_M,
        BLOCK_K=_BLOCK_K,
        BLOCK_R=block_r,
        PRECISION=precision(q.dtype),
        num_warps=4,
        num_stages=3,
    )
    return MatrixSum(parts, memories)
