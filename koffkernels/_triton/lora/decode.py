"""y = x W^T + bias + scaling_m x A_m^T B_m^T for few tokens, in one or two launches, of one linear
layer or of up to three that share x.

1. Weight rows, and beside them the rows of all A, times x; K is split over programs, which write
   fp32 partials. Of one layer, without memories and with one split, this is already y. Without
   weights it is the shrink of whoever has its own way with them.
2. The partials added in order, plus the bias and the low-rank update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...types import LoRA
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
from ..shared.launch import (
    Rows,
    cdiv,
    dot,
    launch,
    memory_range,
    pdl,
    precision,
    start_dependent,
    token_memory,
    wait_for_primary,
)
from ..shared.operands import Linear, up_to_three


def _expects(args: dict[str, Any]) -> str | None:
    """Without memories the second launch only adds."""
    return None if args["b_ptr"] is args["b1"] is args["b2"] is None else "dot16"


EXPECTS = {"_decode_linear_fwd_kernel": "dot", "_decode_expand_fwd_kernel": _expects}

_ALL = (80, 90, 100)  # named, so that the first entry is the default of each (``default_name``)
CONFIGS = {
    "n64_k128_s4": Config(None, 64, 128, stages=4, archs=_ALL),
    "n64_k64_s5": Config(None, 64, 64, stages=5, archs=(90, 100)),
    "n64_k128_s3": Config(None, 64, 128, stages=3, archs=_ALL),
    "n128_k64_s4": Config(None, 128, 64, stages=4, archs=_ALL),
    "n128_k128_s3_w8": Config(None, 128, 128, stages=3, warps=8, archs=_ALL),
}

# Without W little is read: short programs, but whoever takes s adds up its splits (8 where K is
# long enough, whatever the number of memories).
_SHRINK = Config(None, 64, 64, stages=3)
_SHRINK_SPLIT_COST = 4.0

_EXPAND_BLOCK = 32  # outputs of a program of the second launch: short programs, many of them


class Weight(NamedTuple):
    """A second or third weight [N, K]."""

    ptr: Tensor
    stride: int
    N: int


class Output(NamedTuple):
    """A second or third y [M, N], contiguous."""

    ptr: Tensor
    N: int


class StackedB(NamedTuple):
    """The B of all memories [n, N, r] of a second or third layer, contiguous."""

    ptr: Tensor
    rank: int


@triton.jit
def _weight_tile(
    x_ptr,
    stride_x,
    w_ptr,
    stride_w,
    bias_ptr,
    out_ptr,
    width,
    tile,
    M,
    N,
    K,
    begin,
    end,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [M, width] of BLOCK_N rows of W, over K from begin to end."""
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n, mask_m = offs_n < N, offs_m < M
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
    out_ptrs = out_ptr + (offs_m[None, :] * width + offs_n[:, None])
    mask = mask_n[:, None] & mask_m[None, :]
    tl.store(out_ptrs, narrow(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "memories", "tokens", "blocks"])
def _decode_linear_fwd_kernel(
    x_ptr,
    stride_x,
    w_ptr,
    stride_w,
    w1,
    w2,
    bias_ptr,
    a0,
    a1,
    a2,
    out_ptr,
    s_ptr,
    ids_ptr,
    memories,
    tokens,
    M,
    N,
    K,
    blocks,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: BLOCK_N rows of a W or, in the first tiles, of a stacked A, for one split of K.

    out is [splits, M, N of the first and, beside it, of the second and the third], s likewise
    [splits, M, ranks]. There may be no W (and N is 0), or no A.
    """
    start_dependent(PDL)
    tile, split = tl.program_id(0), tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    # Cuts are multiples of a constant, so the compiler knows that rows stay aligned.
    begin = split * blocks * BLOCK_K
    end = tl.minimum(begin + blocks * BLOCK_K, K)
    # Where the tiles of each A and W end.
    end_a0, end_a1, end_a2, rank0, rank1, ranks = 0, 0, 0, 0, 0, 0
    if a0 is not None:
        end_a0, rank0 = tl.cdiv(memories * a0.rank, BLOCK_N), a0.rank
        end_a1, end_a2, rank1, ranks = end_a0, end_a0, rank0, rank0
    if a1 is not None:
        end_a1, rank1 = end_a0 + tl.cdiv(memories * a1.rank, BLOCK_N), rank0 + a1.rank
        end_a2, ranks = end_a1, rank1
    if a2 is not None:
        end_a2, ranks = end_a1 + tl.cdiv(memories * a2.rank, BLOCK_N), rank1 + a2.rank
    width = N
    if w1 is not None:
        width += w1.N
    if w2 is not None:
        width += w2.N
    row = tile - end_a2
    # One condition after the other, and no else: Triton gives branches that lie inside of an else
    # shared memory of their own.
    if tile < end_a2:
        if a0 is not None:  # compiled also where there is no A
            memory = token_memory(ids_ptr, memories, offs_m, offs_m < M, tokens)
            s_part = s_ptr + split.to(tl.int64) * M * ranks
            if tile < end_a0:
                shrink_rows(
                    x_ptr, stride_x, a0, s_part, tile, memory, offs_m, K, memories * a0.rank,
                    begin, end, ranks, BLOCK_N, BLOCK_M, BLOCK_A, EVEN_K, PRECISION,
                )  # fmt: skip
            if a1 is not None:
                if (tile >= end_a0) & (tile < end_a1):
                    shrink_rows(
                        x_ptr, stride_x, a1, s_part + rank0, tile - end_a0, memory, offs_m, K,
                        memories * a1.rank, begin, end, ranks,
                        BLOCK_N, BLOCK_M, BLOCK_A, EVEN_K, PRECISION,
                    )  # fmt: skip
            if a2 is not None:
                if tile >= end_a1:
                    shrink_rows(
                        x_ptr, stride_x, a2, s_part + rank1, tile - end_a1, memory, offs_m, K,
                        memories * a2.rank, begin, end, ranks,
                        BLOCK_N, BLOCK_M, BLOCK_A, EVEN_K, PRECISION,
                    )  # fmt: skip
    end0 = tl.cdiv(N, BLOCK_N)
    end1 = end0
    if w1 is not None:
        end1 = end0 + tl.cdiv(w1.N, BLOCK_N)
    if w_ptr is not None:
        out_ptr += split.to(tl.int64) * M * width
        if (row >= 0) & (row < end0):
            _weight_tile(
                x_ptr, stride_x, w_ptr, stride_w, bias_ptr, out_ptr, width, row, M, N, K,
                begin, end, EVEN_K, BLOCK_N, BLOCK_M, BLOCK_K, PRECISION,
            )  # fmt: skip
    if w1 is not None:
        if (row >= end0) & (row < end1):
            _weight_tile(
                x_ptr, stride_x, w1.ptr, w1.stride, None, out_ptr + N, width, row - end0, M,
                w1.N, K, begin, end, EVEN_K, BLOCK_N, BLOCK_M, BLOCK_K, PRECISION,
            )  # fmt: skip
    if w2 is not None:
        if row >= end1:
            _weight_tile(
                x_ptr, stride_x, w2.ptr, w2.stride, None, out_ptr + N + w1.N, width,
                row - end1, M, w2.N, K, begin, end,
                EVEN_K, BLOCK_N, BLOCK_M, BLOCK_K, PRECISION,
            )  # fmt: skip


@triton.jit
def _decode_expand_tile(
    part_ptr,
    width,
    bias_ptr,
    s_ptr,
    ranks,
    b_ptr,
    R,
    y_ptr,
    N,
    tile,
    ids_ptr,
    memories,
    tokens,
    M,
    splits,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_N outputs of y [M, N] from part [splits, M, width] and s [splits, M, ranks]."""
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    mask_n, mask_m = offs_n < N, offs_m < M
    mask = mask_n[:, None] & mask_m[None, :]
    size = tl.cast(M, tl.int64)
    offs = offs_m[None, :] * width + offs_n[:, None]
    y = sum_splits(part_ptr, offs, mask, splits, size * width)  # [BLOCK_N, BLOCK_M]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    if b_ptr is not None:
        memory = token_memory(ids_ptr, memories, offs_m, mask_m, tokens)
        first, last = memory_range(memory)
        y = expand_rows(
            y, s_ptr, b_ptr, memory, offs_n, offs_m, N, R, first, last, splits, size * ranks, ranks,
            y_ptr.dtype.element_ty, BLOCK_R, PRECISION,
        )  # fmt: skip
    y_ptrs = y_ptr + (offs_m[None, :] * N + offs_n[:, None])
    tl.store(y_ptrs, narrow(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "memories", "tokens", "splits"])
def _decode_expand_fwd_kernel(
    part_ptr,
    bias_ptr,
    bias1_ptr,
    bias2_ptr,
    s_ptr,
    b_ptr,
    b1,
    b2,
    y_ptr,
    y1,
    y2,
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
    PDL: tl.constexpr,
):
    """One program: BLOCK_N outputs of one layer, of all tokens. part and s are ``out`` and s of the
    first launch; R is 0 for a first layer without an update."""
    wait_for_primary(PDL)
    tile = tl.program_id(0)
    width, rank1, ranks = N, R, R
    if y1 is not None:
        width += y1.N
    if y2 is not None:
        width += y2.N
    if b1 is not None:
        rank1 = R + b1.rank
        ranks = rank1
    if b2 is not None:
        ranks = rank1 + b2.rank
    end0 = tl.cdiv(N, BLOCK_N)
    end1 = end0
    if y1 is not None:
        end1 = end0 + tl.cdiv(y1.N, BLOCK_N)
    if tile < end0:
        _decode_expand_tile(
            part_ptr, width, bias_ptr, s_ptr, ranks, b_ptr, R, y_ptr, N, tile, ids_ptr, memories,
            tokens, M, splits, BLOCK_N, BLOCK_M, BLOCK_R, PRECISION,
        )  # fmt: skip
    if y1 is not None:
        if (tile >= end0) & (tile < end1):
            if b1 is None:
                _decode_expand_tile(
                    part_ptr + N, width, bias1_ptr, None, ranks, None, 0, y1.ptr, y1.N, tile - end0,
                    ids_ptr, memories, tokens, M, splits, BLOCK_N, BLOCK_M, BLOCK_R, PRECISION,
                )  # fmt: skip
            else:
                _decode_expand_tile(
                    part_ptr + N, width, bias1_ptr, s_ptr + R, ranks, b1.ptr, b1.rank, y1.ptr, y1.N,
                    tile - end0, ids_ptr, memories, tokens, M, splits,
                    BLOCK_N, BLOCK_M, BLOCK_R, PRECISION,
                )  # fmt: skip
    if y2 is not None:
        if tile >= end1:
            if b2 is None:
                _decode_expand_tile(
                    part_ptr + N + y1.N, width, bias2_ptr, None, ranks, None, 0, y2.ptr, y2.N,
                    tile - end1, ids_ptr, memories, tokens, M, splits,
                    BLOCK_N, BLOCK_M, BLOCK_R, PRECISION,
                )  # fmt: skip
            else:
                _decode_expand_tile(
                    part_ptr + N + y1.N, width, bias2_ptr, s_ptr + rank1, ranks, b2.ptr, b2.rank,
                    y2.ptr, y2.N, tile - end1, ids_ptr, memories, tokens, M, splits,
                    BLOCK_N, BLOCK_M, BLOCK_R, PRECISION,
                )  # fmt: skip


def _multiply(x, weights, bias, loras, rows, out, s, blocks, config, paired=True) -> None:
    """First launch: out [splits, M, sum of N] and, with memories, s [splits, M, sum of ranks]; a
    bias only of a single weight. The next launch, if ``paired``, is the second."""
    (m, k), splits = x.shape, (s if out is None else out).shape[0]
    w0, w1, w2 = up_to_three([Weight(w, w.stride(0), w.shape[0]) for w in weights])
    memories = loras[0].a.shape[0] if loras else 0
    stacked = [StackedA(lora.a, lora.scaling, lora.a.shape[1]) for lora in loras]
    a0, a1, a2 = up_to_three(stacked)
    tiles = sum(cdiv(memories * a.rank, config.block_n) for a in stacked)
    tiles += sum(cdiv(w.shape[0], config.block_n) for w in weights)
    tile, size = tile_args(x, config), x.element_size()
    largest = max(size, *(a.ptr.element_size() for a in stacked if weights), 0)
    launch(
        _decode_linear_fwd_kernel,
        (tiles, splits),
        x_ptr=x,
        stride_x=x.stride(0),
        w_ptr=None if w0 is None else w0.ptr,
        stride_w=0 if w0 is None else w0.stride,
        w1=w1,
        w2=w2,
        bias_ptr=bias,
        a0=a0,
        a1=a1,
        a2=a2,
        out_ptr=out,
        s_ptr=s,
        ids_ptr=rows.ids,
        memories=memories,
        tokens=rows.tokens,
        M=m,
        N=0 if w0 is None else w0.N,
        K=k,
        blocks=blocks,
        # Beside W as many bytes in a stage as it takes: a program of A must not outlast the others.
        BLOCK_A=tile["BLOCK_K"] * size // largest,
        PDL=paired and pdl(x.device),
        **tile,
    )


def _expand(part, biases, s, bs, ys, rows) -> None:
    """Second launch: each y [M, N] from the partials of the first; s and any b may be None."""
    splits, m, _ = part.shape
    bias, bias1, bias2 = up_to_three(biases)
    b, b1, b2 = up_to_three([None if b is None else StackedB(b, b.shape[2]) for b in bs])
    y, y1, y2 = up_to_three([Output(y, y.shape[1]) for y in ys])
    ranks = [b.shape[2] for b in bs if b is not None]
    block_m, overlaps = token_block(m), pdl(part.device)
    launch(
        _decode_expand_fwd_kernel,
        (sum(cdiv(y.shape[1], _EXPAND_BLOCK) for y in ys),),
        part_ptr=part,
        bias_ptr=bias,
        bias1_ptr=bias1,
        bias2_ptr=bias2,
        s_ptr=s,
        b_ptr=None if b is None else b.ptr,
        b1=b1,
        b2=b2,
        y_ptr=y.ptr,
        y1=y1,
        y2=y2,
        ids_ptr=rows.ids,
        memories=next((b.shape[0] for b in bs if b is not None), 0),
        tokens=rows.tokens,
        M=m,
        N=y.N,
        R=0 if b is None else b.rank,
        splits=splits,
        BLOCK_N=_EXPAND_BLOCK,
        BLOCK_M=block_m,
        BLOCK_R=rank_step(max(ranks, default=0), block_m),
        PRECISION=precision(y.ptr.dtype),
        PDL=overlaps,
        dependent=overlaps,
        num_warps=4,
        num_stages=3,
    )


def decode_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoRA | None,
    rows: Rows,
    config: Config | None = None,
) -> Tensor:
    """Return y = x W^T + bias + scaling_m (x A_m^T) B_m^T, m the memory of each token; M <= 64.

    Args:
        x: [M, K], last stride 1.
        weight: [N, K] in x's dtype, last stride 1.
        bias: [N], or None.
        lora: None, or a [n, r, K], b [n, N, r], scaling fp32 [n], a and b contiguous and of any
            floating dtype (rounded to x's).
        rows: memory of each token; tokens without one get no update.
        config: an entry of CONFIGS; None: the first.

    Returns:
        [M, N] in x's dtype.
    """
    return decode_linears(x, [Linear(weight, bias, lora)], rows, config)[0]


def decode_linears(
    x: Tensor, layers: Sequence[Linear], rows: Rows, config: Config | None = None
) -> list[Tensor]:
    """Return the same of up to three layers, whose N and ranks may differ."""
    m, weights = x.shape[0], [layer.weight for layer in layers]
    widths = [weight.shape[0] for weight in weights]
    ys = [x.new_empty(m, n) for n in widths]
    if m == 0:
        return ys
    config = config or next(iter(CONFIGS.values()))
    splits, blocks = split_blocks(x, sum(cdiv(n, config.block_n) for n in widths), config)
    loras = [layer.lora for layer in layers if layer.lora is not None]
    if not loras:
        rows = Rows(None, 1)  # not read: no variant of its own
        if splits == 1 and len(layers) == 1:
            y = ys[0][None]
            _multiply(x, weights, layers[0].bias, [], rows, y, None, blocks, config, paired=False)
            return ys
    part = x.new_empty(splits, m, sum(widths), dtype=torch.float32)
    s = None
    if loras:
        ranks = sum(lora.a.shape[1] for lora in loras)
        s = x.new_empty(splits, m, ranks, dtype=torch.float32)
    _multiply(x, weights, None, loras, rows, part, s, blocks, config)
    bs = [None if layer.lora is None else layer.lora.b for layer in layers]
    _expand(part, [layer.bias for layer in layers], s, bs, ys, rows)
    return ys


def decode_shrink(x: Tensor, loras: Sequence[LoRA], rows: Rows) -> Tensor:
    """Return fp32 partials of s = scaling_m x a_m^T, of one to three updates side by side; M <= 64.

    Args:
        x: [M, K], last stride 1.
        loras: as ``decode_linear`` takes them.
        rows: memory of each token; what lies in s of tokens without one is not to be read.

    Returns:
        [splits, M, sum of ranks].
    """
    splits, blocks = split_blocks(x, 1, _SHRINK, _SHRINK_SPLIT_COST)
    ranks = sum(lora.a.shape[1] for lora in loras)
    s = x.new_empty(splits, x.shape[0], ranks, dtype=torch.float32)
    _multiply(x, [], None, loras, rows, None, s, blocks, _SHRINK)
    return s
