"""What kernels take as arguments: tensors together with the steps between their elements.

An operand is a NamedTuple, and one argument of a kernel. Triton treats its fields as it treats
arguments: a tensor becomes the address of its first element, an int that is 1 a constant, and an
int or an address that 16 divides is known to be so. An operand that is not there is None, which is
known when the kernel is compiled, so that ``if delta is not None`` costs nothing there. Two things
stay arguments of their own:

- what may be None by itself, as memory ids may: Triton 3.6 cannot compare an operand with None if
  one of its fields is None ("'NoneType' object has no attribute 'type'"); ``recording`` refuses it;
- what changes from one step to the next (M, T, S, tokens, splits and the like) and must not be
  compiled in: ``do_not_specialize`` does not reach into a tuple.

A matrix [rows, columns] whose columns lie side by side is no operand but two arguments, ``x_ptr``
and ``stride_x``: at launch, Triton spends about a microsecond on a tuple and a third of one on an
argument, so that a tuple pays from four fields on.

Strides count elements, and each name means one step everywhere:

======================  ====================================================================
``stride_x``, ...       to the next row of the matrix at ``x_ptr``, and so for every other name
``stride_output``       to the next output of a weight that may lie either way
``stride_input``        to the next input of a weight that may lie either way
``stride_memory``       to the next memory's low-rank matrix
``stride_rank``         to the next rank of a low-rank matrix
``stride_wide``         along the wide side of a low-rank matrix: K of A, N of B
``stride_token``        to the next token
``stride_head``         to the next head
``stride_row``          to the next row of the batch, which is a sequence
======================  ====================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ...types import LoRA


class LowRank(NamedTuple):
    """One half of a low-rank update, of all memories: A [n, r, K] or B [n, N, r], however it
    lies."""

    ptr: Tensor
    rank: int
    stride_memory: int
    stride_rank: int
    stride_wide: int


class Wide(NamedTuple):
    """A matrix [M, width] whose columns lie side by side: the second or third of its kind."""

    ptr: Tensor
    stride_token: int
    width: int


class DeltaOperand(NamedTuple):
    """A ``Delta`` as kernels take it: s [M, r], b [n, N, r], scaling [n].

    It has the strides of both tensors: ``stride_token`` is that of s, whose ranks lie side by side,
    the other three are those of b.
    """

    s: Tensor
    b: Tensor
    scaling: Tensor
    rank: int
    stride_token: int
    stride_memory: int
    stride_wide: int
    stride_rank: int


class Heads(NamedTuple):
    """A tensor [B, H, T, D] whose heads are dense: q, k, v, o, or a gradient of one."""

    ptr: Tensor
    stride_row: int
    stride_head: int
    stride_token: int


def per_head(x: Tensor) -> Heads:
    """Return x as an operand; its last stride must be 1."""
    row, head, token, _ = x.stride()
    return Heads(x, row, head, token)


class PrefixOperand(NamedTuple):
    """Learned keys and values of n memories: k and v [n, Hkv, P, D], contiguous, lengths [n]."""

    k: Tensor
    v: Tensor
    lengths: Tensor
    memories: int
    P: int


class Delta(NamedTuple):
    """One low-rank update to be added: scaling_m s b_m^T, m the memory of each token.

    Args:
        s: [M, r] in the compute dtype, last stride 1.
        b: [n, N, r], any strides and floating dtype.
        scaling: fp32 [n].
    """

    s: Tensor
    b: Tensor
    scaling: Tensor

    def operand(self) -> DeltaOperand:
        """Return what a kernel takes."""
        s, b, scaling = self
        return DeltaOperand(s, b, scaling, b.shape[2], s.stride(0), *b.stride())


class Linear(NamedTuple):
    """A linear layer as it is called: weight [N, K], bias [N] or None, and its update or None."""

    weight: Tensor
    bias: Tensor | None = None
    lora: LoRA | None = None


def operand(delta: Delta | None) -> DeltaOperand | None:
    """Return ``Delta.operand``, or None for no update."""
    return None if delta is None else delta.operand()


def wide(x: Tensor | None) -> Wide | None:
    """Return a matrix [M, W] as an operand, or None for none."""
    return None if x is None else Wide(x, x.stride(0), x.shape[1])


def up_to_three(given: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Return up to three things that a kernel takes, and None for those that are not there."""
    first, second, third = (*given, *[None] * (3 - len(given)))
    return first, second, third


def largest_rank(*deltas: Delta | None) -> int:
    """Return the largest rank among some updates, 1 if there is none."""
    return max((delta.b.shape[2] for delta in deltas if delta is not None), default=1)
