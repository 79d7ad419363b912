"""Gradients of low-rank matrices: sums over each memory's tokens of p^T q.

da = scaling t^T x and db = scaling dy^T s. A program owns a block of the wide side, a chunk of
tokens and one memory; chunks are added in order by a second pass, which also scales and transposes.
Updates that share x have their t side by side, as one matrix of more ranks, so that x is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..shared.launch import (
    Rows,
    cdiv,
    dot,
    launch,
    multiprocessors,
    precision,
    rank_block,
    token_memory,
    token_span,
)
from ..shared.operands import up_to_three
from ..shared.reduce import MatrixSum
from ..shared.waves import piece_length

EXPECTS = {"_lora_grad_kernel": "dot16"}
BLOCKS = 3  # programs that a multiprocessor of an H100 holds; of some variants four
# Tokens of a chunk: four tiles, so that the fp32 sums that are written for each chunk weigh little
# against what is read for it.
_SHORTEST_CHUNK = 256
_BLOCK_M, _BLOCK_K = 64, 128


class Product(NamedTuple):
    """A second or third p^T q: p [M, rank], q [M, width], out [chunks, n, rank, width]."""

    p: Tensor
    q: Tensor
    out: Tensor
    stride_p: int
    stride_q: int
    rank: int
    width: int


@triton.jit
def _lora_grad_block(
    p_ptr,
    stride_p,
    q_ptr,
    stride_q,
    out_ptr,
    K,
    R,
    block,
    pid_r,
    chunk,
    m,
    first,
    last,
    ids_ptr,
    memories,
    tokens,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[chunk, m, BLOCK_R ranks, BLOCK_K], summed over the tokens from first to last - 1 that use
    m."""
    offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_k, mask_r = offs_k < K, offs_r < R
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
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


@triton.jit(do_not_specialize=["M", "tokens", "m_per_chunk", "memories"])
def _lora_grad_kernel(
    p_ptr,
    stride_p,
    q_ptr,
    stride_q,
    out_ptr,
    second,
    third,
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
    """One program: a block of the wide side of one product, a chunk of tokens, one memory."""
    block, chunk, pid = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m, pid_r = pid % memories, pid // memories
    begin = chunk * m_per_chunk
    end = tl.minimum(begin + m_per_chunk, M)
    first, last = token_span(ids_ptr, begin, end, tokens, m)
    if second is None:
        _lora_grad_block(
            p_ptr, stride_p, q_ptr, stride_q, out_ptr, K, R, block, pid_r, chunk, m, first, last,
            ids_ptr, memories, tokens, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
        )  # fmt: skip
    else:
        blocks0 = tl.cdiv(K, BLOCK_K)
        blocks1 = blocks0 + tl.cdiv(second.width, BLOCK_K)
        if block < blocks0:
            _lora_grad_block(
                p_ptr, stride_p, q_ptr, stride_q, out_ptr, K, R, block, pid_r, chunk, m,
                first, last, ids_ptr, memories, tokens, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
            )  # fmt: skip
        if (block >= blocks0) & (block < blocks1):  # no elif: see shrink
            _lora_grad_block(
                second.p, second.stride_p, second.q, second.stride_q, second.out, second.width,
                second.rank, block - blocks0, pid_r, chunk, m, first, last, ids_ptr, memories,
                tokens, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
            )  # fmt: skip
        if third is not None:
            if block >= blocks1:
                _lora_grad_block(
                    third.p, third.stride_p, third.q, third.stride_q, third.out, third.width,
                    third.rank, block - blocks1, pid_r, chunk, m, first, last, ids_ptr, memories,
                    tokens, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
                )  # fmt: skip


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
    return lora_grads([(p, q)], memories, rows)[0]


def lora_grads(
    pairs: Sequence[tuple[Tensor, Tensor]], memories: int, rows: Rows
) -> list[MatrixSum]:
    """Return the same of up to three pairs p [M, r] and q [M, K], whose r and K may differ."""
    m, ranks = pairs[0][1].shape[0], [p.shape[1] for p, _ in pairs]
    block_r = rank_block(max(ranks))
    blocks = sum(cdiv(q.shape[1], _BLOCK_K) for _, q in pairs)
    tiles = blocks * cdiv(max(ranks), block_r) * memories
    at_once = BLOCKS * multiprocessors(pairs[0][1].device)
    full = piece_length(max(m, 1), at_once / tiles, tiles, at_once, _BLOCK_M)
    per_chunk = max(_SHORTEST_CHUNK, full)  # a chunk may end within a sequence
    chunks = max(1, cdiv(m, per_chunk))
    products = []
    for p, q in pairs:
        r, k = p.shape[1], q.shape[1]
        out = q.new_empty(chunks, memories, r, k, dtype=torch.float32)
        products.append(Product(p, q, out, p.stride(0), q.stride(0), r, k))
    first, second, third = up_to_three(products)
    launch(
        _lora_grad_kernel,
        (blocks, chunks, cdiv(max(ranks), block_r) * memories),
        p_ptr=first.p,
        stride_p=first.stride_p,
        q_ptr=first.q,
        stride_q=first.stride_q,
        out_ptr=first.out,
        second=second,
        third=third,
        ids_ptr=rows.ids,
        tokens=rows.tokens,
        M=m,
        K=first.width,
        R=first.rank,
        m_per_chunk=per_chunk,
        memories=memories,
        BLOCK_M=_BLOCK_M,
        BLOCK_K=_BLOCK_K,
        BLOCK_R=block_r,
        PRECISION=precision(first.q.dtype),
        num_warps=4,
        num_stages=3,
        # Three blocks on a multiprocessor. 128, for four, spills under Triton 3.6.
        most_registers=160 if block_r < 64 else 255,
    )
    return [MatrixSum(product.out, memories) for product in products]
