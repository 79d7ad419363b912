"""What the fused GEMMs share: configuration, order of tiles, main loop, and the low-rank update
that a tile receives before it is written.

Addresses are an int64 origin of the tile and int32 offsets inside it: with int64 offsets the larger
tiles do not fit in registers.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .config import Config
from .launch import cdiv, dot, rank_block
from .operands import Delta, largest_rank

# For fp32: its tiles take twice the room, and without TF32 they do not use the tensor cores.
FP32 = Config(64, 64, 32, warps=4, stages=2)

# Ranks of an update at a time, at most: the epilogue starts while the whole accumulator is alive,
# and 16 is the least that a dot takes.
_LARGEST_RANK_STEP = 16


def config_args(config: Config, *deltas: Delta | None) -> dict[str, Any]:
    """Return the launch arguments that a config gives."""
    block_r = rank_block(largest_rank(*deltas), _LARGEST_RANK_STEP)
    return {**config.args(), "BLOCK_R": block_r, "GROUP_M": config.group_m}


def grid_of(m: int, n: int, config: Config) -> tuple[int]:
    """Return one program per tile.

    Programs that go through several tiles (``tl.range(..., flatten=True)``) were compiled and left
    out: with an update in the epilogue, ptxas waits after every wgmma of the main loop.
    """
    return (cdiv(m, config.block_m) * cdiv(n, config.block_n),)


def parts_of(config: Config, part: int) -> int:
    """Return in how many parts to finish a tile, so that a thread has at most ``part`` numbers at a
    time."""
    return max(1, config.block_m * config.block_n // (32 * config.warps * part))


@triton.jit
def tile_position(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of this program's tile: down GROUP_M rows, then to the next column."""
    tile = tl.program_id(0)
    columns = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * columns)
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * columns)
    return group * GROUP_M + within % height, within // height


@triton.jit
def multiply(
    x_ptrs,
    w_ptrs,
    K,
    stride_input,
    mask_n,
    EVEN_K: tl.constexpr,
    MASK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x W^T of a tile, fp32; x_ptrs [BLOCK_M, BLOCK_K], w_ptrs [BLOCK_K, BLOCK_N].

    Each combination of masks has loads of its own: under a mask that it cannot see through, the
    compiler copies two bytes at a time to shared memory instead of sixteen.
    """
    BLOCK_K: tl.constexpr = x_ptrs.shape[1]
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((x_ptrs.shape[0], w_ptrs.shape[1]), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(k + offs_k < K)[None, :], other=0.0)
        if EVEN_K and not MASK_N:
            w = tl.load(w_ptrs)
        elif not MASK_N:
            w = tl.load(w_ptrs, mask=(k + offs_k < K)[:, None], other=0.0)
        else:
            w = tl.load(w_ptrs, mask=(k + offs_k < K)[:, None] & mask_n[None, :], other=0.0)
        acc = dot(x, w, acc, PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_input
    return acc


@triton.jit
def memory_delta(
    acc, broken, poison, delta, row0, m, mine, rows, offs_n, mask_n, ids_ptr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``add_delta`` for memory m, whose tokens are ``mine`` (all of them without ids)."""
    offs_r = tl.arange(0, BLOCK_R)
    s_rows = delta.s + row0 * delta.stride_token + rows[:, None] * delta.stride_token
    b_cols = delta.b + (tl.zeros((), tl.int64) + m) * delta.stride_memory
    b_cols += offs_n[None, :] * delta.stride_wide
    scaling = tl.load(delta.scaling + m)
    for r in tl.range(0, delta.rank, BLOCK_R, num_stages=1):
        mask_r = r + offs_r < delta.rank
        mask_b = mask_r[:, None] & mask_n[None, :]
        mask_s = mask_r[None, :]
        if ids_ptr is not None:
            mask_s = mine[:, None] & mask_s
        # s [BLOCK_M, BLOCK_R], b [BLOCK_R, BLOCK_N]
        s = tl.load(s_rows + (r + offs_r)[None, :], mask_s, other=0.0)
        b = tl.load(b_cols + ((r + offs_r) * delta.stride_rank)[:, None], mask_b, other=0.0)
        b = (b * scaling).to(s.dtype)
        if ids_ptr is not None:
            finite = tl.abs(b.to(tl.float32)) < float("inf")
            b = tl.where(finite, b, 0.0)
            bad = tl.max(tl.where(finite, 0, 1), 0)
            poison = tl.maximum(poison, bad)
            broken = tl.where(mine, tl.maximum(broken, tl.max(bad, 0)), broken)
        acc = dot(s, b, acc, PRECISION)
    return acc, broken, poison


@triton.jit
def add_delta(
    acc, broken, poison, delta, row0, memory, first, last, rows, offs_n, mask_n, ids_ptr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc plus the update of each token's memory; the tile starts at token row0.

    A memory is multiplied into the accumulator of all tokens of the tile, with s = 0 for those that
    do not use it, since a second accumulator to select from would not fit in registers. So that its
    inf or NaN cannot reach other tokens as 0 * inf, such elements count as 0 here, and the caller
    puts NaN where ``broken`` (tokens) and ``poison`` (outputs) say so.
    """
    if ids_ptr is not None:
        for m in tl.range(first, last, num_stages=1):
            mine = memory == m
            # A tile at a border can hold memories 0 and 39 and none between.
            if tl.max(mine.to(tl.int32), 0) > 0:
                acc, broken, poison = memory_delta(
                    acc, broken, poison, delta, row0, m, mine, rows, offs_n, mask_n, ids_ptr,
                    BLOCK_R, PRECISION,
                )  # fmt: skip
    else:
        acc, broken, poison = memory_delta(
            acc, broken, poison, delta, row0, 0, memory, rows, offs_n, mask_n, ids_ptr,
            BLOCK_R, PRECISION,
        )  # fmt: skip
    return acc, broken, poison


@triton.jit
def apply_poison(acc, broken, poison, ids_ptr):
    """NaN in the outputs of tokens whose memory had an inf or NaN there."""
    if ids_ptr is not None:
        acc = tl.where((broken[:, None] & poison[None, :]) > 0, float("nan"), acc)
    return acc


@triton.jit
def split_columns(acc):
    """The left and the right half of a tile."""
    pair = tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2))
    return tl.split(tl.permute(pair, (0, 2, 1)))


@triton.jit
def store_tile(out_ptr, stride_out, value, begin_m, begin_n, M, N, ADD: tl.constexpr):
    """Write, or add, a tile [BLOCK_M, BLOCK_N] to out [M, N] from (begin_m, begin_n) on."""
    rows, cols = tl.arange(0, value.shape[0]), tl.arange(0, value.shape[1])
    mask = (rows < M - begin_m)[:, None] & (cols < N - begin_n)[None, :]
    out_ptrs = out_ptr + begin_m.to(tl.int64) * stride_out + begin_n
    out_ptrs += rows[:, None] * stride_out + cols[None, :]
    if ADD:
        value += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=mask)
