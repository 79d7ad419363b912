"""h = act(x Wg^T + delta_g) (x Wu^T + delta_u) z in one kernel: the upper half of a gated MLP with
many tokens. A tile whose gates z are all zero reads no weights."""

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
from ..shared.launch import Rows, activate, launch, memory_range, precision, token_memory
from ..shared.operands import Delta, operand
from ..shared.update import add_updates

EXPECTS = {"_gemm_mlp_up_fwd_kernel": "dot"}
PREFILL = {"_gemm_mlp_up_fwd_kernel": 2}

_PART = 16  # numbers of h that a thread finishes at a time

# block_n neurons are 2 block_n columns: the gate's and the up projection's.
# On sm_100 the tiles of four warps, and with triton 3.9 the wide ones, do not fit in registers.
CONFIGS = {
    "128x128x64": Config(128, 128, 64, warps=8, stages=3, archs=(80, 90)),
    "128x128x64s4": Config(128, 128, 64, warps=8, stages=4, archs=(80, 90)),
    "128x64x64": Config(128, 64, 64, warps=4, stages=3, archs=(80, 90)),
    "128x64x64w8": Config(128, 64, 64, warps=8, stages=4),
    "128x64x32": Config(128, 64, 32, warps=4, stages=4, archs=(80, 90)),
}


@triton.jit
def store_hidden(
    h_ptr, stride_h, g, u, gates_ptr, begin_m, begin_n, M, N,
    ACTIVATION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write act(g) u z, in PARTS parts: all columns at once would not fit in registers."""
    if PARTS > 1:
        g_left, g_right = split_columns(g)
        u_left, u_right = split_columns(u)
        middle = begin_n + g.shape[1] // 2
        store_hidden(
            h_ptr, stride_h, g_left, u_left, gates_ptr, begin_m, begin_n, M, N,
            ACTIVATION, PARTS // 2,
        )  # fmt: skip
        store_hidden(
            h_ptr, stride_h, g_right, u_right, gates_ptr, begin_m, middle, M, N,
            ACTIVATION, PARTS // 2,
        )  # fmt: skip
    else:
        h = activate(g, ACTIVATION) * u
        if gates_ptr is not None:
            offs_n = begin_n + tl.arange(0, g.shape[1])
            z = tl.load(gates_ptr + offs_n, mask=offs_n < N, other=0.0)
            # Selected, so that a neuron's zero gate gives 0 whatever the others in its tile are.
            h = tl.where((z != 0.0)[None, :], h * z[None, :], 0.0)
        store_tile(h_ptr, stride_h, h, begin_m, begin_n, M, N, False)


@triton.jit(do_not_specialize=["M", "memories", "tokens"])
def _gemm_mlp_up_fwd_kernel(
    x_ptr,
    stride_x,
    w_gate_ptr,
    stride_gate,
    w_up_ptr,
    stride_up,
    gates_ptr,
    h_ptr,
    stride_h,
    g0_ptr,
    u0_ptr,
    stride_g0,
    delta_gate,
    delta_up,
    ids_ptr,
    memories,
    tokens,
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M tokens, BLOCK_N neurons. u0 has the stride of g0."""
    pid_m, pid_n = tile_position(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    begin_m, begin_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    live = True
    # With g0 and u0 wanted, a backward follows, and closed gates have gradients too.
    if gates_ptr is not None and g0_ptr is None:
        offs_n = begin_n + tl.arange(0, BLOCK_N)
        z = tl.load(gates_ptr + offs_n, mask=offs_n < N, other=0.0)
        live = tl.max((z != 0.0).to(tl.int32), 0) > 0
    if live:
        # Past the end x, its memories and W repeat their last row: the main loop needs no masks.
        rows = tl.minimum(tl.arange(0, BLOCK_M), M - begin_m - 1)
        row0 = begin_m.to(tl.int64)
        # One tile of both projections, so that the tensor cores read x once for the two.
        cols = tl.arange(0, 2 * BLOCK_N)
        inside = tl.minimum(begin_n + cols % BLOCK_N, N - 1).to(tl.int64)
        offs_k = tl.arange(0, BLOCK_K)
        # Selected as a whole tile: from selected rows, triton 3.9 reads W two bytes at a time.
        w_ptrs = tl.where(
            (cols < BLOCK_N)[None, :],
            w_gate_ptr + ((inside * stride_gate)[None, :] + offs_k[:, None]),
            w_up_ptr + ((inside * stride_up)[None, :] + offs_k[:, None]),
        )
        memory = token_memory(ids_ptr, memories, begin_m + rows, rows >= 0, tokens)
        first, last = memory_range(memory)
        # x [BLOCK_M, BLOCK_K], [Wg; Wu]^T [BLOCK_K, 2 BLOCK_N]
        acc = multiply(
            x_ptr + row0 * stride_x + (rows[:, None] * stride_x + offs_k[None, :]),
            w_ptrs, K, 1, None, EVEN_K, False, PRECISION,
        )  # fmt: skip
        if g0_ptr is not None:
            g, u = split_columns(acc)
            store_tile(g0_ptr, stride_g0, g, begin_m, begin_n, M, N, False)
            store_tile(u0_ptr, stride_g0, u, begin_m, begin_n, M, N, False)
        # Each update is 0 in the other's columns: wgmma wants the whole accumulator in place.
        rows = (row0 + rows)[:, None]
        neurons = begin_n + cols % BLOCK_N
        if delta_gate is not None:
            acc = add_updates(
                acc, delta_gate, memory, first, last, rows, neurons,
                (cols < BLOCK_N) & (neurons < N), ids_ptr, BLOCK_R, PRECISION,
            )  # fmt: skip
        if delta_up is not None:
            acc = add_updates(
                acc, delta_up, memory, first, last, rows, neurons,
                (cols >= BLOCK_N) & (neurons < N), ids_ptr, BLOCK_R, PRECISION,
            )  # fmt: skip
        g, u = split_columns(acc)
        store_hidden(h_ptr, stride_h, g, u, gates_ptr, begin_m, begin_n, M, N, ACTIVATION, PARTS)
    else:
        zero = tl.zeros((BLOCK_M, BLOCK_N), h_ptr.dtype.element_ty)
        store_tile(h_ptr, stride_h, zero, begin_m, begin_n, M, N, False)


def gemm_mlp_up(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    gates: Tensor | None,
    delta_gate: Delta | None,
    delta_up: Delta | None,
    rows: Rows,
    activation: str,
    config: Config | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return h = act(x Wg^T + delta_g) (x Wu^T + delta_u) z, in fp32 until h is rounded.

    Args:
        x: [M, K], last stride 1.
        w_gate, w_up: [I, K], x's dtype, last stride 1.
        gates: fp32 [I], contiguous, or None. A zero gate gives h = 0, also where its neuron is NaN.
        delta_gate, delta_up: low-rank updates of the two projections, or None.
        rows: memory of each token.
        activation: "silu", "gelu" or "gelu_tanh".
        config: one of ``CONFIGS``; None: the default.
        keep: also return the two projections without updates; tiles whose gates are all 0 are
            skipped only without it.

    Returns:
        h [M, I] and, with keep, [x Wg^T, x Wu^T] as one [M, 2 I] buffer, else None; in x's dtype.
    """
    config = choose_config(config, CONFIGS, FP32, x)
    (m, k), width = x.shape, w_gate.shape[0]
    h, gu = x.new_empty(m, width), x.new_empty(m, 2 * width) if keep else None
    some = delta_gate or delta_up
    launch(
        _gemm_mlp_up_fwd_kernel,
        grid_of(m, width, config),
        x_ptr=x,
        stride_x=x.stride(0),
        w_gate_ptr=w_gate,
        stride_gate=w_gate.stride(0),
        w_up_ptr=w_up,
        stride_up=w_up.stride(0),
        gates_ptr=gates,
        h_ptr=h,
        stride_h=width,
        g0_ptr=None if gu is None else gu[:, :width],
        u0_ptr=None if gu is None else gu[:, width:],
        stride_g0=2 * width,
        delta_gate=operand(delta_gate),
        delta_up=operand(delta_up),
        ids_ptr=rows.ids,
        memories=0 if some is None else some.b.shape[0],
        tokens=rows.tokens,
        M=m,
        N=width,
        K=k,
        ACTIVATION=activation,
        PARTS=parts_of(config, _PART),
        EVEN_K=k % config.block_k == 0,
        PRECISION=precision(x.dtype),
        **config_args(config, delta_gate, delta_up),
    )
    return h, gu
