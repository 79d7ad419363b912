"""What the decode kernels share: tiles for few tokens, the split of K, and both halves of a LoRA.

At decode (M <= 64 tokens) a linear layer takes as long as its weights take to arrive. So weights
are the left operand, whose tile side is 64 or more, tokens the narrow right one, and every weight
element is read by one program. Accumulators are [BLOCK_N neurons, BLOCK_M tokens].
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .config import Config
from .launch import (
    INTERPRETED,
    SMALLEST_TILE,
    cdiv,
    dot,
    multiprocessors,
    power_of_2,
    precision,
    rank_block,
)

# All tokens of a call lie in one tile: two fp32 accumulators of 64 x 64 (gate and up) take 64
# registers of each of 128 threads.
MOST_TOKENS = 64
MOST_SPLITS = 16  # every program of the second launch reads them all
_INTERPRETED = tl.constexpr(INTERPRETED)
_SHORTEST_SPLIT = 256  # of K: shorter ones have nothing left to pipeline
_PROGRAMS = 2  # of a multiprocessor at once


class StackedA(NamedTuple):
    """The A of all memories as one matrix [n r, K], contiguous, and their scaling [n]."""

    ptr: Tensor
    scaling: Tensor
    rank: int


@functools.cache
def token_block(m: int) -> int:
    """Return the tile side for m tokens: 16, 32 or 64. Nothing else that is compiled in depends on
    m."""
    assert 0 < m <= MOST_TOKENS, m
    return max(SMALLEST_TILE, power_of_2(m))


def _block_k(x: Tensor, config: Config) -> int:
    """Return the elements of K in a stage: the table's are 16-bit ones, and fp32 has half as many
    in the same shared memory."""
    return config.block_k * 2 // x.element_size()


def tile_args(x: Tensor, config: Config) -> dict[str, Any]:
    """Return what every launch of a decode kernel on x [M, K] gets from a configuration."""
    block_k = _block_k(x, config)
    return {
        "EVEN_K": x.shape[1] % block_k == 0,
        "BLOCK_N": config.block_n,
        "BLOCK_M": token_block(x.shape[0]),
        "BLOCK_K": block_k,
        "PRECISION": precision(x.dtype),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def rank_step(r: int, block_m: int) -> int:
    """Return the ranks in a step of ``expand_rows``: 64, 32 or 16 beside 16, 32 or 64 tokens. Wider
    ones spill beside two accumulators."""
    return rank_block(r, limit=1024 // block_m)


def split_blocks(x: Tensor, tiles: int, config: Config, split_cost: float = 0.2) -> tuple[int, int]:
    """Return (splits, blocks of K in each): K is cut so that every multiprocessor is busy.

    The cost of s splits is ``waves * programs / (tiles * s) + split_cost * s``. It gives four for
    11904 -> 4096 and for 4096 -> 4096, and eight for 4096 -> 1024. On an H200, microseconds for one
    token and, of eight memories, for 64: the first 39.0 and 53.2 with two splits, 33.7 and 47.8
    with four, 32.2 and 47.4 with six; the second 16.7 and 24.5, 15.0 and 23.8, 14.9 and 25.8; the
    third 8.1 and 13.5 with eight, 8.4 and 17.9 with sixteen. The number of tokens does not count,
    so a token's sums are added in the same order in every batch.

    Args:
        x: [M, K].
        tiles: programs without a split.
        config: what is launched.
        split_cost: what one more split of K costs, as a share of the time of the weights.
    """
    at_once = _PROGRAMS * multiprocessors(x.device)
    return _split_blocks(x.shape[1], _block_k(x, config), tiles, at_once, split_cost)


@functools.cache
def _split_blocks(
    k: int, block_k: int, tiles: int, at_once: int, split_cost: float
) -> tuple[int, int]:
    blocks = cdiv(k, block_k)
    most = max(1, min(MOST_SPLITS, k // _SHORTEST_SPLIT, blocks))

    def cost(splits: int) -> float:
        programs = max(1, tiles * splits)
        return cdiv(programs, at_once) * at_once / programs + split_cost * splits

    each = cdiv(blocks, min(range(1, most + 1), key=cost))
    return max(1, cdiv(blocks, max(1, each))), each


@triton.jit
def inside(offs, size, EVEN: tl.constexpr):
    """Mask offs < size, a constant where the size is a multiple of the block."""
    if EVEN:
        return tl.full(offs.shape, 1, tl.int1)
    return offs < size


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x rounded to the nearest number of ``dtype``. The interpreter's own cast to bf16 cuts off."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def sum_splits(part_ptr, offs, mask, splits, stride):
    """Sum of the partials of splits 0, 1, 2, ..., in this order; four loads are under way at once.

    Each split lies ``stride`` (int64) elements behind the one before. ``offs`` inside a split are
    int32: they take half the registers, and a split of 64 tokens holds fewer than 2^31 elements.
    """
    total = tl.zeros(offs.shape, tl.float32)
    for split in range(0, splits, 4):
        part0 = tl.load(part_ptr + offs, mask=mask, other=0.0)
        part1 = tl.load(part_ptr + stride + offs, mask=mask & (split + 1 < splits), other=0.0)
        part2 = tl.load(part_ptr + 2 * stride + offs, mask=mask & (split + 2 < splits), other=0.0)
        part3 = tl.load(part_ptr + 3 * stride + offs, mask=mask & (split + 3 < splits), other=0.0)
        total = total + part0 + part1 + part2 + part3
        part_ptr += 4 * stride
    return total


@triton.jit
def shrink_rows(
    x_ptr,
    stride_x,
    a,
    s_ptr,
    tile,
    memory,
    offs_m,
    K,
    ROWS,
    begin,
    end,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """s = scaling_m x A_m^T of each token's own memory m, over K from begin to end.

    This is one tile of the ROWS = n r rows of ``StackedA``. Rows of memories that no token has are
    not read. s [M, width] holds ``a.rank`` values of each token. It is scaled here, in fp32,
    because here a scale takes one register and beside an accumulator many.
    """
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    owner = tl.where(rows < ROWS, rows // a.rank, -2)  # neither a memory nor -1, which is none
    mine = owner[:, None] == memory[None, :]
    used = tl.max(mine.to(tl.int32), 1)
    mask_m = (memory >= 0)[None, :]
    end = tl.where(tl.max(used, 0) > 0, end, begin)
    a_rows = a.ptr + rows.to(tl.int64)[:, None] * K
    x_cols = x_ptr + offs_m.to(tl.int64)[None, :] * stride_x
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(begin, end, BLOCK_K):
        # x^T [BLOCK_K, BLOCK_M], A [BLOCK_N, BLOCK_K]
        mask_k = inside(k + offs_k, K, EVEN_K)
        x = tl.load(x_cols + (k + offs_k)[:, None], mask=mask_k[:, None] & mask_m, other=0.0)
        mask_a = mask_k[None, :] & (used > 0)[:, None]
        tile_a = tl.load(a_rows + (k + offs_k)[None, :], mask=mask_a, other=0.0)
        acc = dot(narrow(tile_a, x.dtype), x, acc, PRECISION)
    scaling = tl.load(a.scaling + owner, mask=used > 0, other=0.0)
    s_ptrs = s_ptr + (offs_m[None, :] * width + (rows % a.rank)[:, None])
    tl.store(s_ptrs, acc * scaling[:, None], mask=mine)


@triton.jit
def expand_rows(
    acc,
    s_ptr,
    b_ptr,
    memory,
    offs_n,
    offs_m,
    N,
    R,
    first,
    last,
    splits,
    split_stride,
    width,
    dtype: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + B_m s^T of each token's own memory m; acc is [BLOCK_N, BLOCK_M].

    s [splits, M, width] are fp32 partials (R values of each token), rounded to ``dtype`` once
    added. Memories from first to last - 1 are gone through; those that no token has are not read.
    As in ``update.add_updates``, s is 0 for tokens of other memories, and memories must be finite.
    """
    for r in range(0, R, BLOCK_R):
        # s^T [BLOCK_R, BLOCK_M], B [BLOCK_N, BLOCK_R]
        offs_r = r + tl.arange(0, BLOCK_R)
        offs_s = offs_m[None, :] * width + offs_r[:, None]
        mask_s = (offs_r < R)[:, None] & (memory >= 0)[None, :]
        s = narrow(sum_splits(s_ptr, offs_s, mask_s, splits, split_stride), dtype)
        for m in range(first, last):
            mine = memory == m
            used = tl.max(mine.to(tl.int32), 0) > 0
            mask_b = (offs_n < N)[:, None] & (offs_r < R)[None, :] & used
            b_rows = b_ptr + (tl.cast(m, tl.int64) * N + offs_n[:, None]) * R
            b = tl.load(b_rows + offs_r[None, :], mask=mask_b, other=0.0)
            acc = dot(narrow(b, dtype), tl.where(mine[None, :], s, 0.0), acc, PRECISION)
    return acc
