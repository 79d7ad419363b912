"""y = x W^T + bias + low-rank updates in one kernel: the fused GEMM of a linear layer with many
tokens and, with W transposed, of its input gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..shared.config import Config, choose_config
from ..shared.gemm import (
    FP32,
    config_args,
    grid_of,
    multiply,
    parts_of,
    split_columns,
    store_tile,
    tile_position,
)
from ..shared.launch import Rows, launch, memory_range, precision, token_memory
from ..shared.operands import Delta, operand
from ..shared.update import add_updates

EXPECTS = {"_gemm_linear_fwd_kernel": "dot"}
PREFILL = {"_gemm_linear_fwd_kernel": 1}

_PART = 32  # numbers of y that a thread finishes at a time

# Left out on a chip: what spills there. On sm_100 four warps or (triton 3.9) the wide tiles; on
# sm_80 the wide tiles, by 16 bytes.
CONFIGS = {
    "128x256x64": Config(128, 256, 64, warps=8, stages=3, archs=(90,)),
    "128x256x64s4": Config(128, 256, 64, warps=8, stages=4, archs=(90,)),
    "128x128x64": Config(128, 128, 64, warps=4, stages=3, archs=(80, 90)),
    "128x128x64w8": Config(128, 128, 64, warps=8, stages=4),
    "128x128x32": Config(128, 128, 32, warps=4, stages=4, archs=(80, 90)),
}


@triton.jit
def store_output(
    y_ptr, stride_y, acc, bias_ptr, begin_m, begin_n, M, N, ONTO: tl.constexpr, PARTS: tl.constexpr
):
    """Write acc + bias, in PARTS parts: all columns at once would not fit in registers."""
    if PARTS > 1:
        left, right = split_columns(acc)
        store_output(y_ptr, stride_y, left, bias_ptr, begin_m, begin_n, M, N, ONTO, PARTS // 2)
        begin_n += left.shape[1]
        store_output(y_ptr, stride_y, right, bias_ptr, begin_m, begin_n, M, N, ONTO, PARTS // 2)
    else:
        if bias_ptr is not None:
            offs_n = begin_n + tl.arange(0, acc.shape[1])
            bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        store_tile(y_ptr, stride_y, acc, begin_m, begin_n, M, N, ONTO)


@triton.jit(do_not_specialize=["M", "memories", "tokens"])
def _gemm_linear_fwd_kernel(
    x_ptr,
    stride_x,
    w_ptr,
    stride_output,
    stride_input,
    bias_ptr,
    y_ptr,
    stride_y,
    delta0,
    delta1,
    ids_ptr,
    memories,
    tokens,
    M,
    N,
    K,
    ONTO: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    W_BY_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M tokens, BLOCK_N outputs. W_BY_N: neighbours in W are outputs."""
    pid_m, pid_n = tile_position(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    begin_m, begin_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    row0 = begin_m.to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offs_n = begin_n + cols
    mask_n = offs_n < N
    # Past the end x and its memories repeat the last row, and so does W where its loads stay whole:
    # the main loop needs no masks.
    rows = tl.minimum(rows, M - begin_m - 1)
    if not EVEN_N and not W_BY_N:
        cols = tl.minimum(cols, N - begin_n - 1)
    memory = token_memory(ids_ptr, memories, begin_m + rows, rows >= 0, tokens)
    first, last = memory_range(memory)
    # x [BLOCK_M, BLOCK_K], W^T [BLOCK_K, BLOCK_N]
    acc = multiply(
        x_ptr + row0 * stride_x + (rows[:, None] * stride_x + offs_k[None, :]),
        w_ptr + begin_n.to(tl.int64) * stride_output
        + (cols[None, :] * stride_output + offs_k[:, None] * stride_input),
        K, stride_input, mask_n, EVEN_K, W_BY_N and not EVEN_N, PRECISION,
    )  # fmt: skip
    rows = (row0 + rows)[:, None]
    if delta0 is not None:
        acc = add_updates(
            acc, delta0, memory, first, last, rows, offs_n, mask_n, ids_ptr, BLOCK_R, PRECISION
        )
    if delta1 is not None:
        acc = add_updates(
            acc, delta1, memory, first, last, rows, offs_n, mask_n, ids_ptr, BLOCK_R, PRECISION
        )
    store_output(y_ptr, stride_y, acc, bias_ptr, begin_m, begin_n, M, N, ONTO, PARTS)


def gemm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: tuple[Delta, ...],
    rows: Rows,
    config: Config | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """Return y = x W^T + bias + updates (+ onto), accumulated in fp32 and written once.

    Args:
        x: [M, K], last stride 1.
        weight: [N, K], x's dtype, one stride 1: W.t() gives dX = dY W.
        bias: [N] or None.
        delta: up to two low-rank updates.
        rows: memory of each token.
        config: one of ``CONFIGS``; None: the default.
        onto: [M, N], last stride 1; it is added, y is written over it, and it is returned.

    Returns:
        [M, N] in x's dtype.
    """
    config = choose_config(config, CONFIGS, FP32, x)
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty(m, n) if onto is None else onto
    first, second = (*delta, None, None)[:2]
    launch(
        _gemm_linear_fwd_kernel,
        grid_of(m, n, config),
        x_ptr=x,
        stride_x=x.stride(0),
        w_ptr=weight,
        stride_output=weight.stride(0),
        stride_input=weight.stride(1),
        bias_ptr=bias,
        y_ptr=y,
        stride_y=y.stride(0),
        delta0=operand(first),
        delta1=operand(second),
        ids_ptr=rows.ids,
        memories=0 if first is None else first.b.shape[0],
        tokens=rows.tokens,
        M=m,
        N=n,
        K=k,
        ONTO=onto is not None,
        PARTS=parts_of(config, _PART),
        EVEN_K=k % config.block_k == 0,
        EVEN_N=n % config.block_n == 0,
        W_BY_N=weight.stride(1) != 1,
        PRECISION=precision(x.dtype),
        **config_args(config, *delta),
    )
    return y
