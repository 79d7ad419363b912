"""y = x W^T + bias + scaling_m x A_m^T B_m^T for few tokens, in one or two launches.

1. Weight rows, and beside them the rows of all A, times x; K is split over programs, which write
   fp32 partials. Without memories and with one split this is already y.
2. The partials added in order, plus the bias and the low-rank update.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..shared.config import Config
from ..shared.decode import (
    StackedA,
    expand_rows,
    inside,
    narrow,
    rank_step,
    shrink_rows,
    split_blocks,
    sum_splits,
    tile_args,
    token_block,
)
from ..shared.launch import Rows, cdiv, dot, launch, memory_range, precision, token_memory


def _expects(args: dict[str, Any]) -> str | None:
    """Without memories the second launch only adds."""
    return None if args["b_ptr"] is None else "dot16"


EXPECTS = {"_decode_linear_fwd_kernel": "dot", "_decode_expand_fwd_kernel": _expects}

_ALL = (80, 90, 100)  # named, so that the first entry is the default of each (``default_name``)
CONFIGS = {
    "n64_k128_s4": Config(None, 64, 128, stages=4, archs=_ALL),
    "n64_k64_s5": Config(None, 64, 64, stages=5, archs=(90, 100)),
    "n64_k128_s3": Config(None, 64, 128, stages=3, archs=_ALL),
    "n64_k256_s2": Config(None, 64, 256, stages=2, archs=(90,)),
    "n128_k64_s4": Config(None, 128, 64, stages=4, archs=_ALL),
    "n128_k128_s3_w8": Config(None, 128, 128, stages=3, warps=8, archs=_ALL),
}

_EXPAND_BLOCK = 32  # outputs of a program of the second launch: short programs, many of them


@triton.jit(do_not_specialize=["M", "ROWS", "memories", "tokens", "blocks"])
def _decode_linear_fwd_kernel(
    x_ptr,
    stride_x,
    w_ptr,
    stride_w,
    bias_ptr,
    a,
    out_ptr,
    s_ptr,
    ids_ptr,
    memories,
    tokens,
    M,
    N,
    K,
    ROWS,
    blocks,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_N rows of W or, in the first tiles, of the stacked A, for one split of K.

    out is [splits, M, N], s [splits, M, r].
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    # Cuts are multiples of a constant, so the compiler knows that rows stay aligned.
    begin = split * blocks * BLOCK_K
    end = tl.minimum(begin + blocks * BLOCK_K, K)
    tiles_a = 0
    if a is not None:
        tiles_a = tl.cdiv(ROWS, BLOCK_N)
    if tile < tiles_a:
        if a is not None:  # both branches are compiled, and without memories there is no A
            memory = token_memory(ids_ptr, memories, offs_m, mask_m, tokens)
            s_part = s_ptr + split.to(tl.int64) * M * a.rank
            shrink_rows(
                x_ptr, stride_x, a, s_part, tile, memory, offs_m, K, ROWS, begin, end, a.rank,
                BLOCK_N, BLOCK_M, BLOCK_A, EVEN_K, PRECISION,
            )  # fmt: skip
    else:
        offs_n = (tile - tiles_a) * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K)
        mask_n = offs_n < N
        w_rows = w_ptr + offs_n.to(tl.int64)[:, None] * stride_w
        x_cols = x_ptr + offs_m.to(tl.int64)[None, :] * stride_x
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for k in range(begin, end, BLOCK_K):
            # W [BLOCK_N, BLOCK_K], x^T [BLOCK_K, BLOCK_M]
            mask_k = inside(k + offs_k, K, EVEN_K)
            mask_w = mask_n[:, None] & mask_k[None, :]
            w = tl.load(w_rows + (k + offs_k)[None, :], mask=mask_w, other=0.0)
            mask_x = mask_k[:, None] & mask_m[None, :]
            x = tl.load(x_cols + (k + offs_k)[:, None], mask=mask_x, other=0.0)
            acc = dot(w, x, acc, PRECISION)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
        out_ptrs = out_ptr + split.to(tl.int64) * M * N + (offs_m[None, :] * N + offs_n[:, None])
        mask = mask_n[:, None] & mask_m[None, :]
        tl.store(out_ptrs, narrow(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "memories", "tokens", "splits"])
def _decode_expand_fwd_kernel(
    part_ptr,
    bias_ptr,
    s_ptr,
    b_ptr,
    y_ptr,
    ids_ptr,
    memories,
    tokens,
    M,
    N,
    R,
    splits,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_N outputs of all tokens. part is [splits, M, N], s [splits, M, r]."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    mask_n, mask_m = offs_n < N, offs_m < M
    mask = mask_n[:, None] & mask_m[None, :]
    offs = offs_m[None, :] * N + offs_n[:, None]
    size = tl.cast(M, tl.int64)
    y = sum_splits(part_ptr, offs, mask, splits, size * N)  # [BLOCK_N, BLOCK_M]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    if b_ptr is not None:
        memory = token_memory(ids_ptr, memories, offs_m, mask_m, tokens)
        first, last = memory_range(memory)
        y = expand_rows(
            y, s_ptr, b_ptr, memory, offs_n, offs_m, N, R, first, last, splits, size * R, R,
            y_ptr.dtype.element_ty, BLOCK_R, PRECISION,
        )  # fmt: skip
    tl.store(y_ptr + offs, narrow(y, y_ptr.dtype.element_ty), mask=mask)


def _multiply(x, weight, bias, lora, rows, out, s, blocks, config) -> None:
    """First launch: out [splits, M, N] and, with memories, s [splits, M, r]."""
    (m, k), n, splits = x.shape, weight.shape[0], out.shape[0]
    a, a_rows, memories = None, 0, 0
    tile, size = tile_args(x, config), x.element_size()
    if lora is not None:
        memories, rank, _ = lora[0].shape
        a, a_rows = StackedA(lora[0], lora[2], rank), memories * rank
    launch(
        _decode_linear_fwd_kernel,
        (cdiv(a_rows, config.block_n) + cdiv(n, config.block_n), splits),
        x_ptr=x,
        stride_x=x.stride(0),
        w_ptr=weight,
        stride_w=weight.stride(0),
        bias_ptr=bias,
        a=a,
        out_ptr=out,
        s_ptr=s,
        ids_ptr=rows.ids,
        memories=memories,
        tokens=rows.tokens,
        M=m,
        N=n,
        K=k,
        ROWS=a_rows,
        blocks=blocks,
        # As many bytes in a stage as W takes: a program of A must not outlast the others.
        BLOCK_A=tile["BLOCK_K"] * size // max(size, 0 if a is None else a.ptr.element_size()),
        **tile,
    )


def _expand(part, bias, s, b, y, rows) -> None:
    """Second launch: y [M, N] from the partials of the first; s and b may be None."""
    (splits, m, n), r = part.shape, 0 if b is None else b.shape[2]
    launch(
        _decode_expand_fwd_kernel,
        (cdiv(n, _EXPAND_BLOCK),),
        part_ptr=part,
        bias_ptr=bias,
        s_ptr=s,
        b_ptr=b,
        y_ptr=y,
        ids_ptr=rows.ids,
        memories=0 if b is None else b.shape[0],
        tokens=rows.tokens,
        M=m,
        N=n,
        R=r,
        splits=splits,
        BLOCK_N=_EXPAND_BLOCK,
        BLOCK_M=token_block(m),
        BLOCK_R=rank_step(r, token_block(m)),
        PRECISION=precision(y.dtype),
        num_warps=4,
        num_stages=3,
    )


def decode_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor, Tensor] | None,
    rows: Rows,
    config: Config | None = None,
) -> Tensor:
    """Return y = x W^T + bias + scaling_m (x A_m^T) B_m^T, m the memory of each token; M <= 64.

    Args:
        x: [M, K], last stride 1.
        weight: [N, K] in x's dtype, last stride 1.
        bias: [N], or None.
        lora: None, or (a [n, r, K], b [n, N, r], scaling fp32 [n]), a and b contiguous and of any
            floating dtype (rounded to x's).
        rows: memory of each token; tokens without one get no update.
        config: an entry of CONFIGS; None: the first.

    Returns:
        [M, N] in x's dtype.
    """
    m, n = x.shape[0], weight.shape[0]
    y = x.new_empty(m, n)
    if m == 0:
        return y
    config = config or next(iter(CONFIGS.values()))
    splits, blocks = split_blocks(x, cdiv(n, config.block_n), config)
    if lora is None:
        rows = Rows(None, 1)  # not read: no variant of its own
        if splits == 1:
            _multiply(x, weight, bias, None, rows, y[None], None, blocks, config)
            return y
    part = x.new_empty(splits, m, n, dtype=torch.float32)
    s = b = None
    if lora is not None:
        b = lora[1]
        s = x.new_empty(splits, m, b.shape[2], dtype=torch.float32)
    _multiply(x, weight, None, lora, rows, part, s, blocks, config)
    _expand(part, bias, s, b, y, rows)
    return y
