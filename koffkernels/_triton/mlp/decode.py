"""h = act(x Wg^T + delta_g) * (x Wu^T + delta_u) * gates for few tokens, in one or two launches.

1. With memories: s = scaling x A^T of gate and up, in fp32 partials (``lora.decode``).
2. Both weights times x in two accumulators, the two low-rank updates, activation and gates. A tile
   whose gates are all 0 reads no weights.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...types import LoRA
from ..lora.decode import decode_shrink
from ..shared.config import Config
from ..shared.decode import expand_rows, inside, narrow, rank_step, tile_args, token_block
from ..shared.launch import (
    Rows,
    activate,
    cdiv,
    dot,
    launch,
    memory_range,
    pdl,
    token_memory,
    wait_for_primary,
)

EXPECTS = {"_decode_mlp_up_fwd_kernel": "dot"}

_ALL = (80, 90, 100)  # named, so that the first entry is the default of each (``default_name``)
CONFIGS = {
    "n64_k64_s4": Config(None, 64, 64, stages=4, archs=_ALL),
    "n64_k64_s3": Config(None, 64, 64, stages=3, archs=_ALL),
    "n64_k64_s5": Config(None, 64, 64, stages=5, archs=_ALL),
    "n64_k128_s3": Config(None, 64, 128, stages=3, archs=(90, 100)),
    "n128_k64_s3_w8": Config(None, 128, 64, stages=3, warps=8, archs=(80, 90)),
    "n128_k64_s4_w8": Config(None, 128, 64, stages=4, warps=8, archs=(80, 90)),
}


@triton.jit(do_not_specialize=["M", "memories", "tokens", "splits"])
def _decode_mlp_up_fwd_kernel(
    x_ptr,
    stride_x,
    w_gate_ptr,
    stride_gate,
    w_up_ptr,
    stride_up,
    gates_ptr,
    s_ptr,
    b_gate_ptr,
    b_up_ptr,
    h_ptr,
    ids_ptr,
    memories,
    tokens,
    M,
    N,
    K,
    R_GATE,
    R_UP,
    splits,
    EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: BLOCK_N of the N neurons for all tokens.

    s is [splits, M, R_GATE + R_UP]; a projection without an update has rank 0.
    """
    wait_for_primary(PDL)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n, mask_m = offs_n < N, offs_m < M
    end = K
    if gates_ptr is not None:
        gates = tl.load(gates_ptr + offs_n, mask=mask_n, other=0.0)
        open_ = gates != 0.0
        # A tile that is closed as a whole skips the loop, and reads no weights.
        end = tl.where(tl.max(open_.to(tl.int32), 0) > 0, K, 0)
    gate_rows = w_gate_ptr + offs_n.to(tl.int64)[:, None] * stride_gate
    up_rows = w_up_ptr + offs_n.to(tl.int64)[:, None] * stride_up
    x_cols = x_ptr + offs_m.to(tl.int64)[None, :] * stride_x
    g = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    u = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, end, BLOCK_K):
        # x^T [BLOCK_K, BLOCK_M], both weights [BLOCK_N, BLOCK_K]
        mask_k = inside(k + offs_k, K, EVEN_K)
        mask_x = mask_k[:, None] & mask_m[None, :]
        x = tl.load(x_cols + (k + offs_k)[:, None], mask=mask_x, other=0.0)
        mask_w = mask_n[:, None] & mask_k[None, :]
        offs_w = (k + offs_k)[None, :]
        w_gate = tl.load(gate_rows + offs_w, mask=mask_w, other=0.0)
        g = dot(w_gate, x, g, PRECISION)
        w_up = tl.load(up_rows + offs_w, mask=mask_w, other=0.0)
        u = dot(w_up, x, u, PRECISION)
    if s_ptr is not None:
        memory = token_memory(ids_ptr, memories, offs_m, mask_m, tokens)
        first, last = memory_range(memory)
        if gates_ptr is not None:
            last = tl.where(end > 0, last, first)
        width = R_GATE + R_UP
        split_stride = tl.cast(M, tl.int64) * width
        if b_gate_ptr is not None:
            g = expand_rows(
                g, s_ptr, b_gate_ptr, memory, offs_n, offs_m, N, R_GATE, first, last, splits,
                split_stride, width, h_ptr.dtype.element_ty, BLOCK_R, PRECISION,
            )  # fmt: skip
        if b_up_ptr is not None:
            u = expand_rows(
                u, s_ptr + R_GATE, b_up_ptr, memory, offs_n, offs_m, N, R_UP, first, last, splits,
                split_stride, width, h_ptr.dtype.element_ty, BLOCK_R, PRECISION,
            )  # fmt: skip
    h = activate(g, ACTIVATION) * u
    if gates_ptr is not None:
        # Selected, so that a closed neuron gives 0 whether or not its tile was skipped.
        h = tl.where(open_[:, None], h * gates[:, None], 0.0)
    h_ptrs = h_ptr + (offs_m[None, :] * N + offs_n[:, None])
    tl.store(h_ptrs, narrow(h, h_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_m[None, :])


def _multiply_both(x, weights, gates, s, lora_b, rows, h, activation, config) -> None:
    """Second launch: h [M, I] from both weights and, with memories, s and the B of gate and up."""
    (w_gate, w_up), (m, k) = weights, x.shape
    b_gate, b_up = lora_b
    r_gate, r_up = (0 if b is None else b.shape[2] for b in lora_b)
    overlaps = s is not None and pdl(x.device)
    launch(
        _decode_mlp_up_fwd_kernel,
        (cdiv(h.shape[1], config.block_n),),
        x_ptr=x,
        stride_x=x.stride(0),
        w_gate_ptr=w_gate,
        stride_gate=w_gate.stride(0),
        w_up_ptr=w_up,
        stride_up=w_up.stride(0),
        gates_ptr=gates,
        s_ptr=s,
        b_gate_ptr=b_gate,
        b_up_ptr=b_up,
        h_ptr=h,
        ids_ptr=rows.ids,
        memories=next((b.shape[0] for b in lora_b if b is not None), 0),
        tokens=rows.tokens,
        M=m,
        N=h.shape[1],
        K=k,
        R_GATE=r_gate,
        R_UP=r_up,
        splits=0 if s is None else s.shape[0],
        ACTIVATION=activation,
        BLOCK_R=rank_step(max(r_gate, r_up), token_block(m)),
        PDL=overlaps,
        dependent=overlaps,
        **tile_args(x, config),
    )


def decode_mlp_up(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    gates: Tensor | None,
    lora_gate: LoRA | None,
    lora_up: LoRA | None,
    rows: Rows,
    activation: str,
    config: Config | None = None,
) -> Tensor:
    """Return h = act(x Wg^T + delta_g) * (x Wu^T + delta_u) * gates; M <= 64 tokens.

    Args:
        x: [M, K], last stride 1.
        w_gate, w_up: [I, K] in x's dtype, last stride 1.
        gates: fp32 [I], or None. A neuron whose gate is 0 gives 0, whatever x holds.
        lora_gate, lora_up: None, or a [n, r, K], b [n, I, r], scaling fp32 [n], a and b contiguous
            and of any floating dtype (rounded to x's); the ranks may differ.
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
    s = decode_shrink(x, given, rows) if given else None
    lora_b = [None if lora is None else lora.b for lora in (lora_gate, lora_up)]
    _multiply_both(x, (w_gate, w_up), gates, s, lora_b, rows, h, activation, config)
    return h
