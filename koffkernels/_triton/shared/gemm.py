"""What the fused GEMMs share: configuration, order of tiles, main loop, and how a tile is
written.

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
