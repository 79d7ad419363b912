"""Inputs and fp64 results that the tests of both fused GEMMs share."""

import torch
from support.kernel_inputs import master, normal
from torch import Tensor

from koffkernels._triton.shared.config import Config
from koffkernels._triton.shared.launch import Rows
from koffkernels._triton.shared.operands import Delta

# Small tiles, so that small inputs have many, in groups of two rows.
SMALL = Config(32, 32, 32, warps=4, stages=2, group_m=2)


def ids_for(m: int, tokens: int, n: int) -> Tensor:
    """Memory of each group of tokens: all of them and -1, in an order that is not sorted."""
    return torch.arange(-(-m // tokens)) * 7 % (n + 1) - 1


def random_delta(m: int, n: int, out: int, r: int, dtype: torch.dtype, turned=False) -> Delta:
    """About as large as the base output; s as a view of wider rows, b as one of a [n, r, N]."""
    s = normal(m, r + 3, dtype=dtype)[:, 3:]
    shape = (n, r, out) if turned else (n, out, r)
    b = normal(*shape, dtype=master(dtype), scale=r**-0.5)
    return Delta(s, b.transpose(1, 2) if turned else b, torch.linspace(0.5, 1.5, n))


def wide_delta(delta: Delta, rows: Rows) -> Tensor:
    """The update in fp64, [M, N]."""
    s, b = delta.s.double(), delta.b.double()
    memory = torch.zeros(s.shape[0], dtype=torch.int64)
    if rows.ids is not None:
        memory = rows.ids.repeat_interleave(rows.tokens)[: s.shape[0]]
    out = torch.zeros(s.shape[0], b.shape[1], dtype=torch.float64)
    for m in range(b.shape[0]):
        mine = memory == m
        out[mine] = delta.scaling[m].double() * (s[mine] @ b[m].T)
    return out
