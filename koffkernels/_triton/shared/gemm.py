"""What the fused GEMMs share: configuration, order of tiles, main loop, and the low-rank update
that a tile receives before it is written.

Addresses are an int64 origin of the tile and int32 offsets inside it: with int64 offsets the larger
tiles do not fit in registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..lora.expand import Delta
from .launch import cdiv, default_config, dot, rank_block


class Config(NamedTuple):
    """One way to run a GEMM.

    Args:
        block_m, block_n, block_k: tile sizes over tokens, outputs and the reduction.
        warps, stages: warps per program; tiles of x and W that are loaded ahead.
        block_r: ranks of an update at a time, at most.
        group_m: tile rows that run side by side, so that they share W in the L2 cache.
        archs: compute capabilities (80, 90, 100) that can run it; None: all.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    block_r: int = 16
    group_m: int = 8
    archs: tuple[int, ...] | None = None


# For fp32: its tiles take twice the room, and without TF32 they do not use the tensor cores.
FP32_CONFIG = Config(64, 64, 32, warps=4, stages=2)


def gemm_delta_args(suffix: str, delta: Delta | None) -> dict[str, Any]:
    """The kernel arguments of one update; without it all are None."""
    names = (
        "s_ptr",
        "b_ptr",
        "scaling_ptr",
        "R",
        "stride_sm",
        "stride_be",
        "stride_bn",
        "stride_br",
    )
    values: tuple = (None,) * len(names)
    if delta is not None:
        s, b, scaling = delta
        values = (s, b, scaling, b.shape[2], s.stride(0), *b.stride())
    return {f"{name}{suffix}": value for name, value in zip(names, values, strict=True)}


def config_args(config: Config, *deltas: Delta | None) -> dict[str, Any]:
    """The launch arguments that a config gives."""
    rank = max((delta.b.shape[2] for delta in deltas if delta is not None), default=1)
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_R": rank_block(rank, config.block_r),
        "GROUP_M": config.group_m,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def choose_config(config: Config | None, configs: dict[str, Config], x: Tensor) -> Config:
    """The given config, else the file's default, which are for 16-bit dtypes."""
    if config is not None:
        return config
    return default_config(configs, x.device) if x.element_size() == 2 else FP32_CONFIG


def grid_of(m: int, n: int, config: Config) -> tuple[int]:
    """One program per tile.

    Programs that go through several tiles (``tl.range(..., flatten=True)``) were compiled and left
    out: with an update in the epilogue, ptxas waits after every wgmma of the main loop.
    """
    return (cdiv(m, config.block_m) * cdiv(n, config.block_n),)


def parts_of(config: Config, part: int) -> int:
    """In how many parts to finish a tile, for at most ``part`` numbers in a thread at a time."""
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
    stride_wk,
    mask_n,
    EVEN_K: tl.constexpr,
    MASK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x W^T of a tile, fp32; x_ptrs [BLOCK_M, BLOCK_K], w_ptrs [BLOCK_K, BLOCK_N]."""
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
        w_ptrs += BLOCK_K * stride_wk
    return acc


@triton.jit
def memory_delta(
    acc, broken, poison, s_ptr, b_ptr, scaling_ptr, R, stride_sm, stride_be, stride_bn, stride_br,
    m, mine, rows, offs_n, mask_n, HAS_IDS: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``add_delta`` for memory m, whose tokens are ``mine`` (all of them without ids)."""
    offs_r = tl.arange(0, BLOCK_R)
    s_rows = s_ptr + rows[:, None] * stride_sm
    b_rows = b_ptr + (tl.zeros((), tl.int64) + m) * stride_be + offs_n[None, :] * stride_bn
    scaling = 1.0
    if scaling_ptr is not None:
        scaling = tl.load(scaling_ptr + m)
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        mask_r = r + offs_r < R
        mask_b = mask_r[:, None] & mask_n[None, :]
        mask_s = mask_r[None, :]
        if HAS_IDS:
            mask_s = mine[:, None] & mask_s
        s = tl.load(s_rows + (r + offs_r)[None, :], mask_s, other=0.0)
        b = tl.load(b_rows + ((r + offs_r) * stride_br)[:, None], mask_b, other=0.0)
        b = (b * scaling).to(s.dtype)
        if HAS_IDS:
            finite = tl.abs(b.to(tl.float32)) < float("inf")
            b = tl.where(finite, b, 0.0)
            bad = tl.max(tl.where(finite, 0, 1), 0)
            poison = tl.maximum(poison, bad)
            broken = tl.where(mine, tl.maximum(broken, tl.max(bad, 0)), broken)
        acc = dot(s, b, acc, PRECISION)
    return acc, broken, poison


@triton.jit
def add_delta(
    acc, broken, poison, s_ptr, b_ptr, scaling_ptr, R, stride_sm, stride_be, stride_bn, stride_br,
    memory, first, last, rows, offs_n, mask_n, HAS_IDS: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc plus the update of each token's memory; s_ptr is the tile's first row.

    A memory is multiplied into the accumulator of all tokens of the tile, with s = 0 for those that
    do not use it, since a second accumulator to select from would not fit in registers. So that its
    inf or NaN cannot reach other tokens as 0 * inf, such elements count as 0 here, and the caller
    puts NaN where ``broken`` (tokens) and ``poison`` (outputs) say so.
    """
    if HAS_IDS:
        for m in tl.range(first, last, num_stages=1):
            mine = memory == m
            # A tile at a border can hold memories 0 and 39 and none between.
            if tl.max(mine.to(tl.int32), 0) > 0:
                acc, broken, poison = memory_delta(
                    acc, broken, poison, s_ptr, b_ptr, scaling_ptr, R, stride_sm, stride_be,
                    stride_bn, stride_br, m, mine, rows, offs_n, mask_n, HAS_IDS, BLOCK_R,
                    PRECISION,
                )  # fmt: skip
    else:
        acc, broken, poison = memory_delta(
            acc, broken, poison, s_ptr, b_ptr, scaling_ptr, R, stride_sm, stride_be,
            stride_bn, stride_br, 0, memory, rows, offs_n, mask_n, HAS_IDS, BLOCK_R, PRECISION,
        )  # fmt: skip
    return acc, broken, poison


@triton.jit
def apply_poison(acc, broken, poison, HAS_IDS: tl.constexpr):
    """NaN in the outputs of tokens whose memory had an inf or NaN there."""
    if HAS_IDS:
        acc = tl.where((broken[:, None] & poison[None, :]) > 0, float("nan"), acc)
    return acc


@triton.jit
def split_columns(acc):
    """The left and the right half of a tile."""
    pair = tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2))
    return tl.split(tl.permute(pair, (0, 2, 1)))


@triton.jit
def store_tile(out_ptr, value, begin_m, begin_n, M, N, stride_m, ADD: tl.constexpr):
    """Write, or add, a tile [BLOCK_M, BLOCK_N] to out [M, N] from (begin_m, begin_n) on."""
    rows, cols = tl.arange(0, value.shape[0]), tl.arange(0, value.shape[1])
    mask = (rows < M - begin_m)[:, None] & (cols < N - begin_n)[None, :]
    out_ptrs = out_ptr + begin_m.to(tl.int64) * stride_m + begin_n
    out_ptrs += rows[:, None] * stride_m + cols[None, :]
    if ADD:
        value += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=mask)
