"""h = act(x Wg^T + delta_g) (x Wu^T + delta_u) z in one kernel: the upper half of a gated MLP with
many tokens. A tile whose gates z are all zero reads no weights."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..lora.expand import Delta
from ..shared.gemm import (
    Config,
    add_delta,
    apply_poison,
    choose_config,
    config_args,
    gemm_delta_args,
    grid_of,
    multiply,
    parts_of,
    split_columns,
    store_tile,
    tile_position,
)
from ..shared.launch import Rows, activate, launch, memory_range, precision, token_memory

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
    h_ptr, g, u, gates_ptr, begin_m, begin_n, M, N, stride_hm,
    ACTIVATION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write act(g) u z, in PARTS parts: all columns at once would not fit in registers."""
    if PARTS > 1:
        g_left, g_right = split_columns(g)
        u_left, u_right = split_columns(u)
        store_hidden(
            h_ptr, g_left, u_left, gates_ptr, begin_m, begin_n, M, N, stride_hm,
            ACTIVATION, PARTS // 2,
        )  # fmt: skip
        store_hidden(
            h_ptr, g_right, u_right, gates_ptr, begin_m, begin_n + g.shape[1] // 2, M, N, stride_hm,
            ACTIVATION, PARTS // 2,
        )  # fmt: skip
    else:
        h = activate(g, ACTIVATION) * u
        if gates_ptr is not None:
            offs_n = begin_n + tl.arange(0, g.shape[1])
            z = tl.load(gates_ptr + offs_n, mask=offs_n < N, other=0.0)
            # Selected, so that a neuron's zero gate gives 0 whatever the others in its tile are.
            h = tl.where((z != 0.0)[None, :], h * z[None, :], 0.0)
        store_tile(h_ptr, h, begin_m, begin_n, M, N, stride_hm, False)


@triton.jit(do_not_specialize=["M", "tokens"])
def _gemm_mlp_up_fwd_kernel(
    x_ptr,
    wg_ptr,
    wu_ptr,
    gates_ptr,
    h_ptr,
    g0_ptr,
    u0_ptr,
    ids_ptr,
    s_ptr_g,
    b_ptr_g,
    scaling_ptr_g,
    s_ptr_u,
    b_ptr_u,
    scaling_ptr_u,
    M,
    N,
    K,
    R_g,
    R_u,
    tokens,
    stride_xm,
    stride_wgn,
    stride_wun,
    stride_hm,
    stride_gm,
    stride_sm_g,
    stride_be_g,
    stride_bn_g,
    stride_br_g,
    stride_sm_u,
    stride_be_u,
    stride_bn_u,
    stride_br_u,
    HAS_IDS: tl.constexpr,
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
    """One program: BLOCK_M tokens, BLOCK_N neurons."""
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
            wg_ptr + ((inside * stride_wgn)[None, :] + offs_k[:, None]),
            wu_ptr + ((inside * stride_wun)[None, :] + offs_k[:, None]),
        )
        memory = token_memory(ids_ptr, begin_m + rows, rows >= 0, tokens, HAS_IDS)
        first, last = memory_range(memory)
        acc = multiply(
            x_ptr + row0 * stride_xm + (rows[:, None] * stride_xm + offs_k[None, :]),
            w_ptrs, K, 1, None, EVEN_K, False, PRECISION,
        )  # fmt: skip
        if g0_ptr is not None:
            g, u = split_columns(acc)
            store_tile(g0_ptr, g, begin_m, begin_n, M, N, stride_gm, False)
            store_tile(u0_ptr, u, begin_m, begin_n, M, N, stride_gm, False)
        # Each update is 0 in the other's columns: wgmma wants the whole accumulator in place.
        neurons = begin_n + cols % BLOCK_N
        broken, poison = tl.zeros((BLOCK_M,), tl.int32), tl.zeros((2 * BLOCK_N,), tl.int32)
        if s_ptr_g is not None:
            acc, broken, poison = add_delta(
                acc, broken, poison, s_ptr_g + row0 * stride_sm_g, b_ptr_g, scaling_ptr_g, R_g,
                stride_sm_g, stride_be_g, stride_bn_g, stride_br_g, memory, first, last, rows,
                neurons, (cols < BLOCK_N) & (neurons < N), HAS_IDS, BLOCK_R, PRECISION,
            )  # fmt: skip
        if s_ptr_u is not None:
            acc, broken, poison = add_delta(
                acc, broken, poison, s_ptr_u + row0 * stride_sm_u, b_ptr_u, scaling_ptr_u, R_u,
                stride_sm_u, stride_be_u, stride_bn_u, stride_br_u, memory, first, last, rows,
                neurons, (cols >= BLOCK_N) & (neurons < N), HAS_IDS, BLOCK_R, PRECISION,
            )  # fmt: skip
        if s_ptr_g is not None or s_ptr_u is not None:
            acc = apply_poison(acc, broken, poison, HAS_IDS)
        g, u = split_columns(acc)
        store_hidden(h_ptr, g, u, gates_ptr, begin_m, begin_n, M, N, stride_hm, ACTIVATION, PARTS)
    else:
        zero = tl.zeros((BLOCK_M, BLOCK_N), h_ptr.dtype.element_ty)
        store_tile(h_ptr, zero, begin_m, begin_n, M, N, stride_hm, False)


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
    """h = act(x Wg^T + delta_g) (x Wu^T + delta_u) z, all of it in fp32 until h is rounded.

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
    config = choose_config(config, CONFIGS, x)
    (m, k), width = x.shape, w_gate.shape[0]
    h, gu = x.new_empty(m, width), x.new_empty(m, 2 * width) if keep else None
    g0, u0 = (None, None) if gu is None else (gu[:, :width], gu[:, width:])
    strides = {"stride_wgn": w_gate.stride(0), "stride_wun": w_up.stride(0)}
    strides |= {"stride_xm": x.stride(0), "stride_hm": width, "stride_gm": 2 * width}
    launch(
        _gemm_mlp_up_fwd_kernel,
        grid_of(m, width, config),
        **{"x_ptr": x, "wg_ptr": w_gate, "wu_ptr": w_up, "gates_ptr": gates},
        **{"h_ptr": h, "g0_ptr": g0, "u0_ptr": u0},
        **{"M": m, "N": width, "K": k, **strides},
        ACTIVATION=activation,
        PARTS=parts_of(config, _PART),
        EVEN_K=k % config.block_k == 0,
        PRECISION=precision(x.dtype),
        **gemm_delta_args("_g", delta_gate),
        **gemm_delta_args("_u", delta_up),
        **rows.args(),
        **config_args(config, delta_gate, delta_up),
    )
    return h, gu
