"""h = act(x Wg^T + delta_g) * (x Wu^T + delta_u) * gates for few tokens, in one or two launches.

1. With memories: s = scaling x A^T of gate and up; K is split over programs, which write fp32
   partials.
2. Both weights times x in two accumulators, the two low-rank updates, activation and gates. A tile
   whose gates are all 0 reads no weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..shared.decode import (
    Config,
    expand_rows,
    inside,
    narrow,
    rank_step,
    shrink_rows,
    split_blocks,
    tile_args,
    token_block,
)
from ..shared.launch import Rows, activate, cdiv, dot, launch, memory_range, token_memory

EXPECTS = {"_decode_shrink_fwd_kernel": "dot", "_decode_mlp_up_fwd_kernel": "dot"}

CONFIGS = {
    "n64_k64_s4": Config(64, 64, 4, 4),
    "n64_k64_s3": Config(64, 64, 3, 4),
    "n64_k64_s5": Config(64, 64, 5, 4),
    "n64_k128_s3": Config(64, 128, 3, 4, archs=(90, 100)),
    "n128_k64_s3_w8": Config(128, 64, 3, 8, archs=(80, 90)),
    "n128_k64_s4_w8": Config(128, 64, 4, 8, archs=(80, 90)),
}

# The first launch reads little: short programs, but every program of the second adds up the splits
# (8 where K is long enough, whatever the number of memories).
_SHRINK = Config(block_n=64, block_k=64, stages=3, warps=4, split_cost=2.0)

LoRATensors = tuple[Tensor, Tensor, Tensor]


@triton.jit(do_not_specialize=["M", "ROWS0", "ROWS1", "tokens", "blocks"])
def _decode_shrink_fwd_kernel(
    x_ptr,
    a0_ptr,
    a1_ptr,
    scaling0_ptr,
    scaling1_ptr,
    s_ptr,
    ids_ptr,
    M,
    K,
    R0,
    R1,
    ROWS0,
    ROWS1,
    tokens,
    blocks,
    stride_xm,
    HAS_IDS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_N rows of one stacked A for one split of K. s is [splits, M, R0 + R1]."""
    tile, split = tl.program_id(0), tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    memory = token_memory(ids_ptr, offs_m, offs_m < M, tokens, HAS_IDS)
    begin = split * blocks * BLOCK_K
    end = tl.minimum(begin + blocks * BLOCK_K, K)
    width = R0 + R1
    s_ptr += split.to(tl.int64) * M * width
    tiles0 = tl.cdiv(ROWS0, BLOCK_N)
    if tile < tiles0:
        shrink_rows(
            x_ptr,
            a0_ptr,
            scaling0_ptr,
            s_ptr,
            tile,
            memory,
            offs_m,
            K,
            R0,
            ROWS0,
            begin,
            end,
            stride_xm,
            width,
            BLOCK_N,
            BLOCK_M,
            BLOCK_K,
            EVEN_K,
            PRECISION,
        )
    else:
        if a1_ptr is not None:
            shrink_rows(
                x_ptr,
                a1_ptr,
                scaling1_ptr,
                s_ptr + R0,
                tile - tiles0,
                memory,
                offs_m,
                K,
                R1,
                ROWS1,
                begin,
                end,
                stride_xm,
                width,
                BLOCK_N,
                BLOCK_M,
                BLOCK_K,
                EVEN_K,
                PRECISION,
            )


@triton.jit(do_not_specialize=["M", "tokens", "splits"])
def _decode_mlp_up_fwd_kernel(
    x_ptr,
    wg_ptr,
    wu_ptr,
    gates_ptr,
    s_ptr,
    bg_ptr,
    bu_ptr,
    h_ptr,
    ids_ptr,
    M,
    N,
    K,
    RG,
    RU,
    tokens,
    splits,
    stride_xm,
    stride_gn,
    stride_un,
    HAS_IDS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_N of the N neurons for all tokens. s is [splits, M, RG + RU]."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n, mask_m = offs_n < N, offs_m < M
    end = K
    if gates_ptr is not None:
        gates = tl.load(gates_ptr + offs_n, mask=mask_n, other=0.0)
        open_ = gates != 0.0
        end = tl.where(tl.max(open_.to(tl.int32), 0) > 0, K, 0)
    wg_rows = wg_ptr + offs_n.to(tl.int64)[:, None] * stride_gn
    wu_rows = wu_ptr + offs_n.to(tl.int64)[:, None] * stride_un
    x_rows = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm
    g = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    u = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, end, BLOCK_K):
        mask_k = inside(k + offs_k, K, EVEN_K)
        mask_x = mask_k[:, None] & mask_m[None, :]
        x = tl.load(x_rows + (k + offs_k)[:, None], mask=mask_x, other=0.0)
        mask_w = mask_n[:, None] & mask_k[None, :]
        offs_w = (k + offs_k)[None, :]
        wg = tl.load(wg_rows + offs_w, mask=mask_w, other=0.0)
        g = dot(wg, x, g, PRECISION)
        wu = tl.load(wu_rows + offs_w, mask=mask_w, other=0.0)
        u = dot(wu, x, u, PRECISION)
    if s_ptr is not None:
        memory = token_memory(ids_ptr, offs_m, mask_m, tokens, HAS_IDS)
        first, last = memory_range(memory)
        if gates_ptr is not None:
            last = tl.where(end > 0, last, first)
        width = RG + RU
        split_stride = tl.cast(M, tl.int64) * width
        if bg_ptr is not None:
            g = expand_rows(
                g,
                s_ptr,
                bg_ptr,
                memory,
                offs_n,
                offs_m,
                N,
                RG,
                first,
                last,
                splits,
                split_stride,
                width,
                h_ptr.dtype.element_ty,
                BLOCK_R,
                PRECISION,
            )
        if bu_ptr is not None:
            u = expand_rows(
                u,
                s_ptr + RG,
                bu_ptr,
                memory,
                offs_n,
                offs_m,
                N,
                RU,
                first,
                last,
                splits,
                split_stride,
                width,
                h_ptr.dtype.element_ty,
                BLOCK_R,
                PRECISION,
            )
    h = activate(g, ACTIVATION) * u
    if gates_ptr is not None:
        # Selected, so that a closed neuron gives 0 whether or not its tile was skipped.
        h = tl.where(open_[:, None], h * gates[:, None], 0.0)
    h_ptrs = h_ptr + (offs_m[None, :] * N + offs_n[:, None])
    tl.store(h_ptrs, narrow(h, h_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_m[None, :])


def _shrink(x: Tensor, loras: list[LoRATensors], rows: Rows) -> Tensor:
    """fp32 partials [splits, M, sum of ranks] of scaling_m x a_m^T, for one or two LoRA."""
    (m, k), (a0, _, scaling0) = x.shape, loras[0]
    a1, _, scaling1 = loras[1] if len(loras) == 2 else (None, None, None)
    r0, r1 = a0.shape[1], 0 if a1 is None else a1.shape[1]
    rows0, rows1 = a0.shape[0] * r0, 0 if a1 is None else a1.shape[0] * r1
    tiles = cdiv(rows0, _SHRINK.block_n) + cdiv(rows1, _SHRINK.block_n)
    splits, blocks = split_blocks(x, 1, _SHRINK)
    s = x.new_empty(splits, m, r0 + r1, dtype=torch.float32)
    launch(
        _decode_shrink_fwd_kernel,
        (tiles, splits),
        x_ptr=x,
        a0_ptr=a0,
        a1_ptr=a1,
        scaling0_ptr=scaling0,
        scaling1_ptr=scaling1,
        s_ptr=s,
        M=m,
        K=k,
        R0=r0,
        R1=r1,
        ROWS0=rows0,
        ROWS1=rows1,
        blocks=blocks,
        stride_xm=x.stride(0),
        **tile_args(x, _SHRINK),
        **rows.args(),
    )
    return s


def _multiply_both(x, weights, gates, s, lora_b, rows, h, activation, config) -> None:
    """Second launch: h [M, I] from both weights and, with memories, s and the B of gate and up."""
    (w_gate, w_up), (b_gate, b_up) = weights, lora_b
    r_gate, r_up = (0 if b is None else b.shape[2] for b in lora_b)
    launch(
        _decode_mlp_up_fwd_kernel,
        (cdiv(h.shape[1], config.block_n),),
        x_ptr=x,
        wg_ptr=w_gate,
        wu_ptr=w_up,
        gates_ptr=gates,
        s_ptr=s,
        bg_ptr=b_gate,
        bu_ptr=b_up,
        h_ptr=h,
        M=x.shape[0],
        N=h.shape[1],
        K=x.shape[1],
        RG=r_gate,
        RU=r_up,
        splits=0 if s is None else s.shape[0],
        stride_xm=x.stride(0),
        stride_gn=w_gate.stride(0),
        stride_un=w_up.stride(0),
        ACTIVATION=activation,
        BLOCK_R=rank_step(max(r_gate, r_up), token_block(x.shape[0])),
        **tile_args(x, config),
        **rows.args(),
    )


def decode_mlp_up(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    gates: Tensor | None,
    lora_gate: LoRATensors | None,
    lora_up: LoRATensors | None,
    rows: Rows,
    activation: str,
    config: Config | None = None,
) -> Tensor:
    """h = act(x Wg^T + delta_g) * (x Wu^T + delta_u) * gates; M <= 64 tokens.

    Args:
        x: [M, K], last stride 1.
        w_gate, w_up: [I, K] in x's dtype, last stride 1.
        gates: fp32 [I], or None. A neuron whose gate is 0 gives 0, whatever x holds.
        lora_gate, lora_up: None, or (a [n, r, K], b [n, I, r], scaling fp32 [n]), a and b
            contiguous and of any floating dtype (rounded to x's); the ranks may differ.
        rows: memory of each token; tokens without one get no update.
        activation: silu, gelu or gelu_tanh.
        config: an entry of CONFIGS; None: the first.

    Returns:
        [M, I] in x's dtype.
    """
    h = x.new_empty(x.shape[0], w_gate.shape[0])
    if x.shape[0] == 0:
        return h
    config = config or next(iter(CONFIGS.values()))
    given = [lora for lora in (lora_gate, lora_up) if lora is not None]
    rows = rows if given else Rows(None, 1)  # not read: no variant of its own
    s = _shrink(x, given, rows) if given else None
    lora_b = [None if lora is None else lora[1] for lora in (lora_gate, lora_up)]
    _multiply_both(x, (w_gate, w_up), gates, s, lora_b, rows, h, activation, config)
    return h
