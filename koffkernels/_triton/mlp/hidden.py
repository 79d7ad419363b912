"""h = act(g) u z between the vendor's GEMMs.

g = g0 + delta and u = u0 + delta are never written: the low-rank updates are added where g0 and u0
are read.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..lora.expand import delta_tile
from ..shared.launch import Rows, activate, cdiv, launch, precision, rank_block, token_memory
from ..shared.operands import Delta, largest_rank, matrix, operand


def _expects(args: dict[str, Any]) -> str | None:
    """Without an update nothing is multiplied."""
    return None if args["delta_gate"] is None and args["delta_up"] is None else "dot16"


EXPECTS = {"_mlp_hidden_fwd_kernel": _expects}

# The tile of h, 128 elements or 256 bytes wide in 16 bits. There is no loop over K to hide the
# loads behind, so tiles are low and programs many.
_BLOCK_M, _BLOCK_I = 32, 128


@triton.jit(do_not_specialize=["M", "tokens"])
def _mlp_hidden_fwd_kernel(
    g0,
    u0,
    h,
    gates_ptr,
    delta_gate,
    delta_up,
    ids_ptr,
    tokens,
    M,
    I,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one tile of h."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_m, mask_i = offs_m < M, offs_i < I
    mask = mask_m[:, None] & mask_i[None, :]
    memory = token_memory(ids_ptr, offs_m, mask_m, tokens)
    # g0, u0 and h [BLOCK_M, BLOCK_I]; u0 has g0's stride, so that both share their offsets.
    offs = offs_m.to(tl.int64)[:, None] * g0.stride + offs_i[None, :]
    g = tl.load(g0.ptr + offs, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u0.ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if delta_gate is not None:
        g += delta_tile(
            delta_gate, offs_m, offs_i, mask_i, memory, BLOCK_M, BLOCK_I, BLOCK_R, PRECISION
        )
    if delta_up is not None:
        u += delta_tile(
            delta_up, offs_m, offs_i, mask_i, memory, BLOCK_M, BLOCK_I, BLOCK_R, PRECISION
        )
    hidden = activate(g, ACTIVATION) * u
    if gates_ptr is not None:
        hidden *= tl.load(gates_ptr + offs_i, mask=mask_i, other=0.0).to(tl.float32)[None, :]
    h_ptrs = h.ptr + offs_m.to(tl.int64)[:, None] * h.stride + offs_i[None, :]
    tl.store(h_ptrs, hidden.to(h.ptr.dtype.element_ty), mask=mask)


def mlp_hidden(
    g0: Tensor,
    u0: Tensor,
    gates: Tensor | None,
    delta_gate: Delta | None,
    delta_up: Delta | None,
    rows: Rows,
    activation: str,
) -> Tensor:
    """Return h = act(g0 + delta_gate) (u0 + delta_up) gates.

    Args:
        g0, u0: [M, I] with the same strides, the last 1.
        gates: [I] or None.
        delta_gate, delta_up: low-rank updates or None.
        rows: memory of each token.
        activation: "silu", "gelu" or "gelu_tanh".

    Returns:
        [M, I] in g0's dtype.
    """
    m, i = g0.shape
    h = g0.new_empty(m, i)
    launch(
        _mlp_hidden_fwd_kernel,
        (cdiv(m, _BLOCK_M), cdiv(i, _BLOCK_I)),
        g0=matrix(g0),
        u0=matrix(u0),
        h=matrix(h),
        gates_ptr=gates,
        delta_gate=operand(delta_gate),
        delta_up=operand(delta_up),
        ids_ptr=rows.ids,
        tokens=rows.tokens,
        M=m,
        I=i,
        ACTIVATION=activation,
        BLOCK_M=_BLOCK_M,
        BLOCK_I=_BLOCK_I,
        BLOCK_R=rank_block(largest_rank(delta_gate, delta_up)),
        PRECISION=precision(g0.dtype),
        num_warps=8,
        num_stages=2,
    )
    return h
