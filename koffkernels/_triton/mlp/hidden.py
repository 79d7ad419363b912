"""h = act(g) u z between the vendor's GEMMs.

g = g0 + delta and u = u0 + delta are never written: the low-rank updates are added where g0 and u0
are read. Bound by memory: g0 and u0 are read and h is written once, in stretches of one memory
each.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..shared.launch import Rows, activate, cdiv, launch, multiprocessors, precision, rank_block
from ..shared.operands import Delta, largest_rank, operand
from ..shared.stretch import stretch_of, stretches
from ..shared.update import add_update, memory_part


def _expects(args: dict[str, Any]) -> str | None:
    """Without an update nothing is multiplied."""
    return None if args["delta_gate"] is None and args["delta_up"] is None else "dot16"


EXPECTS = {"_mlp_hidden_fwd_kernel": _expects}

# The tile of g, u and h: 64 columns are 128 bytes, a whole line, in 16 bits. On an H200 (M = 8192,
# I = 11904, r = 16, eight memories) stretches of 256 tokens took 148 us, 95 % of what a copy
# reaches; 64 took 166 and 1024 took 161.
_BLOCK_M, _BLOCK_I, _STAGES, _LENGTH = 32, 64, 3, 256
# Programs of four warps that a multiprocessor of an H100 holds, r = 16, with gates and without.
BLOCKS = 6, 7


@triton.jit(do_not_specialize=["memories", "tokens", "length", "per_row"])
def _mlp_hidden_fwd_kernel(
    g0_ptr,
    u0_ptr,
    stride_g0,
    h_ptr,
    stride_h,
    gates_ptr,
    delta_gate,
    delta_up,
    ids_ptr,
    memories,
    tokens,
    length,
    per_row,
    I,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MORE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: a strip of neurons and a stretch of tokens. u0 has the stride of g0."""
    strips = tl.cdiv(I, BLOCK_I)
    offs_i = (tl.program_id(0) % strips) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_i = offs_i < I
    memory, begin, end = stretch_of(
        tl.program_id(0) // strips, ids_ptr, memories, tokens, length, per_row
    )
    dtype = h_ptr.dtype.element_ty
    if gates_ptr is not None:
        z = tl.load(gates_ptr + offs_i, mask=mask_i, other=0.0).to(tl.float32)
    if delta_gate is not None:
        b_gate = memory_part(delta_gate, memory, offs_i, mask_i, BLOCK_R, dtype)
    if delta_up is not None:
        b_up = memory_part(delta_up, memory, offs_i, mask_i, BLOCK_R, dtype)
    for start in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = (offs_m < end)[:, None]
        mask = mask_m & mask_i[None, :]
        rows = offs_m.to(tl.int64)[:, None]
        # g0, u0 and h [BLOCK_M, BLOCK_I]
        offs = rows * stride_g0 + offs_i[None, :]
        g = tl.load(g0_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(u0_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if delta_gate is not None:
            g = add_update(
                g, delta_gate, b_gate, memory, rows, mask_m, offs_i, mask_i,
                BLOCK_R, MORE, PRECISION,
            )  # fmt: skip
        if delta_up is not None:
            u = add_update(
                u, delta_up, b_up, memory, rows, mask_m, offs_i, mask_i,
                BLOCK_R, MORE, PRECISION,
            )  # fmt: skip
        h = activate(g, ACTIVATION) * u
        if gates_ptr is not None:
            h *= z[None, :]
        tl.store(h_ptr + rows * stride_h + offs_i[None, :], h.to(dtype), mask=mask)


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
    strips, rank = cdiv(i, _BLOCK_I), largest_rank(delta_gate, delta_up)
    at_once = BLOCKS[gates is None] * multiprocessors(g0.device)
    cut = stretches(rows, m, _LENGTH, strips, at_once)
    some = delta_gate or delta_up
    launch(
        _mlp_hidden_fwd_kernel,
        (strips * cut.count,),
        g0_ptr=g0,
        u0_ptr=u0,
        stride_g0=g0.stride(0),
        h_ptr=h,
        stride_h=i,
        gates_ptr=gates,
        delta_gate=operand(delta_gate),
        delta_up=operand(delta_up),
        ids_ptr=rows.ids,
        memories=0 if some is None else some.b.shape[0],
        **cut.args(),
        I=i,
        ACTIVATION=activation,
        BLOCK_M=_BLOCK_M,
        BLOCK_I=_BLOCK_I,
        BLOCK_R=rank_block(rank),
        MORE=rank > rank_block(rank),
        PRECISION=precision(g0.dtype),
        STAGES=_STAGES,
        num_warps=4,
        num_stages=_STAGES,
        most_registers=None,
    )
    return h
