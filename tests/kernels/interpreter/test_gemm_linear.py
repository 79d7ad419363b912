"""The fused GEMM of a linear layer, against fp64, in Triton's interpreter."""

import pytest
import torch
from support.gemm_inputs import SMALL, ids_for, random_delta, wide_delta
from support.kernel_inputs import LOW, normal
from support.oracle import compare
from support.tolerances import FORWARD

from koffkernels._triton.lora.gemm import CONFIGS, gemm_linear
from koffkernels._triton.shared.launch import Rows

DTYPES = (torch.float32, *LOW)
# M, N, K, memories, ranks of the updates, tokens per id (None: no ids)
SHAPES = {
    "one": (1, 1, 1, 1, (1,), None),
    "plain": (37, 53, 97, 1, (), None),
    "one memory": (40, 41, 64, 1, (16,), None),
    "sequences across tiles": (67, 41, 48, 3, (33,), 13),
    "two updates": (50, 64, 32, 2, (5, 20), 10),
    "40 memories": (45, 33, 31, 40, (1, 3), 1),
    "even": (64, 64, 64, 2, (16,), 16),
}


def inputs(shape, dtype, turned=False, bias=True):
    """The arguments of gemm_linear; turned: the weight and b are transposed views."""
    m, out, k, n, ranks, tokens = shape
    weight = normal(k, out, dtype=dtype, scale=k**-0.5).t()
    if not turned:
        weight = normal(out, k, dtype=dtype, scale=k**-0.5)
    rows = Rows(None, 1) if tokens is None else Rows(ids_for(m, tokens, n), tokens)
    deltas = tuple(random_delta(m, n, out, r, dtype, turned) for r in ranks)
    x = normal(m, k + 5, dtype=dtype)[:, 5:]
    return x, weight, normal(out, dtype=dtype) if bias else None, deltas, rows


def wide(x, weight, bias, deltas, rows, onto=None):
    y = x.double() @ weight.double().T
    for term in (bias, onto):
        y += 0.0 if term is None else term.double()
    return y + sum(wide_delta(delta, rows) for delta in deltas)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned", (False, True), ids=("forward", "transposed"))
@pytest.mark.parametrize("shape", SHAPES)
def test_gemm_linear_is_the_oracle(shape, turned, dtype):
    args = inputs(SHAPES[shape], dtype, turned)
    compare("y", gemm_linear(*args, config=SMALL), wide(*args), dtype, FORWARD)


@pytest.mark.parametrize("name", CONFIGS)
def test_gemm_linear_shipped_configs(name):
    """Every shipped tile, across its borders in all directions."""
    args = inputs((200, 300, 100, 3, (16, 40), 77), torch.float16)
    compare("y", gemm_linear(*args, config=CONFIGS[name]), wide(*args), torch.float16, FORWARD)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemm_linear_default_config(dtype):
    args = inputs((129, 257, 65, 2, (256,), 64), dtype, bias=False)
    compare("y", gemm_linear(*args), wide(*args), dtype, FORWARD)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemm_linear_onto(dtype):
    """onto is added, written over and returned; its rows may be part of wider ones."""
    args = inputs(SHAPES["two updates"], dtype, turned=True, bias=False)
    buffer = normal(50, 70, dtype=dtype)
    onto, before = buffer[:, 6:], buffer.clone()
    y = gemm_linear(*args, config=SMALL, onto=onto)
    assert y is onto
    assert torch.equal(buffer[:, :6], before[:, :6])
    compare("y", y, wide(*args, onto=before[:, 6:]), dtype, FORWARD)


@pytest.mark.parametrize("shape", ((0, 5, 7), (5, 0, 7), (5, 7, 0)), ids=str)
def test_gemm_linear_empty(shape):
    m, out, k = shape
    args = inputs((m, out, k, 2, (4,), 2), torch.float32) if k else None
    if args is None:  # nothing to reduce: bias and update remain
        delta = random_delta(m, 2, out, 4, torch.float32)
        args = torch.zeros(m, 0), torch.zeros(out, 0), normal(out), (delta,), Rows(None, 1)
    y = gemm_linear(*args, config=SMALL)
    assert y.shape == (m, out)
    compare("y", y, wide(*args), torch.float32, FORWARD)


def test_gemm_linear_rows_without_memory():
    """Tokens with id -1 get exactly the base output, whatever lies in the memories."""
    x, weight, bias, (delta,), rows = inputs(SHAPES["sequences across tiles"], torch.float16)
    off = rows._replace(ids=torch.full_like(rows.ids, -1))
    delta = delta._replace(b=torch.full_like(delta.b, torch.nan))
    y = gemm_linear(x, weight, bias, (delta,), off, SMALL)
    assert torch.equal(y, gemm_linear(x, weight, bias, (), off, SMALL))


def test_gemm_linear_memory_reaches_its_own_tokens_only():
    """Whatever finite numbers it holds; and one that no token has, whatever it holds."""
    x, weight, bias, (delta,), rows = inputs((67, 41, 48, 4, (33,), 13), torch.float16)
    rows.ids[rows.ids == 1] = 3
    want = gemm_linear(x, weight, bias, (delta,), rows, SMALL)
    delta.b[1] = torch.nan
    delta.b[2] = torch.finfo(torch.float16).max / 2
    y = gemm_linear(x, weight, bias, (delta,), rows, SMALL)
    own = rows.ids.repeat_interleave(13)[:67] == 2
    assert own.any() and torch.equal(y[~own], want[~own])
    assert (y[own] != want[own]).all()


@pytest.mark.parametrize("where", ("x", "s"))
def test_gemm_linear_nan_token_stays_alone(where):
    x, weight, bias, (delta,), rows = inputs(SHAPES["sequences across tiles"], torch.float16)
    want = gemm_linear(x, weight, bias, (delta,), rows, SMALL)
    token = 13 + int((rows.ids[1] < 0) * 13)  # one that has a memory
    (x if where == "x" else delta.s)[token, 7] = torch.nan
    y = gemm_linear(x, weight, bias, (delta,), rows, SMALL)
    assert y[token].isnan().all()
    y[token] = want[token]
    assert torch.equal(y, want)


def test_gemm_linear_token_result_does_not_depend_on_its_neighbours():
    """Bit-equal alone, in a tile of one memory, and in a mixed tile; and from run to run."""
    x, weight, bias, (delta,), rows = inputs(SHAPES["sequences across tiles"], torch.float16)
    y = gemm_linear(x, weight, bias, (delta,), rows, SMALL)
    assert torch.equal(y, gemm_linear(x, weight, bias, (delta,), rows, SMALL))
    for group, m in enumerate(rows.ids.tolist()):
        part = slice(13 * group, min(13 * group + 13, 67))
        own = Rows(torch.tensor([m]), 13)
        alone = delta._replace(s=delta.s[part])
        assert torch.equal(y[part], gemm_linear(x[part], weight, bias, (alone,), own, SMALL))
