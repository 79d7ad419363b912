"""The fused GEMM of a gated MLP's upper half, against fp64, in Triton's interpreter."""

import pytest
import torch
from support.gemm_inputs import SMALL, ids_for, random_delta, wide_delta
from support.kernel_inputs import LOW, normal
from support.oracle import compare
from support.tolerances import FORWARD

from koffkernels._triton.mlp.gemm import CONFIGS, gemm_mlp_up
from koffkernels._triton.shared.launch import Rows
from koffkernels.reference import ACTIVATIONS

DTYPES = (torch.float32, *LOW)
# M, I, K, memories, ranks of gate and up (0: no update), tokens per id (None: no ids)
SHAPES = {
    "one": (1, 1, 1, 1, (1, 1), None),
    "plain": (37, 53, 97, 1, (0, 0), None),
    "one memory": (40, 41, 64, 1, (16, 16), None),
    "sequences across tiles": (67, 75, 48, 3, (33, 20), 13),
    "up only": (50, 64, 32, 2, (0, 5), 10),
    "40 memories": (45, 33, 31, 40, (1, 3), 1),
}


def inputs(shape, dtype, gates="some"):
    """The arguments of gemm_mlp_up up to ``rows``; gates: None, or one third of them 0."""
    m, width, k, n, ranks, tokens = shape
    weights = normal(2 * width, k + 2, dtype=dtype, scale=k**-0.5)[:, :k]
    z = None
    if gates:
        z = torch.rand(width)
        z[torch.arange(width) % 3 == 1] = 0.0
    deltas = [random_delta(m, n, width, r, dtype) if r else None for r in ranks]
    rows = Rows(None, 1) if tokens is None else Rows(ids_for(m, tokens, n), tokens)
    x = normal(m, k + 5, dtype=dtype)[:, 5:]
    return x, weights[:width], weights[width:], z, *deltas, rows


def wide(x, w_gate, w_up, gates, delta_gate, delta_up, rows, activation):
    g0, u0 = x.double() @ w_gate.double().T, x.double() @ w_up.double().T
    g, u = (
        base + (0.0 if delta is None else wide_delta(delta, rows))
        for base, delta in ((g0, delta_gate), (u0, delta_up))
    )
    return ACTIVATIONS[activation](g) * u * (1.0 if gates is None else gates.double()), g0, u0


def check(args, activation, dtype, config):
    h, gu = gemm_mlp_up(*args, activation, config, keep=True)
    found = h, *gu.chunk(2, 1)
    for name, got, want in zip("h g0 u0".split(), found, wide(*args, activation), strict=True):
        compare(name, got, want, dtype, FORWARD)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gemm_mlp_up_is_the_oracle(shape, dtype):
    check(inputs(SHAPES[shape], dtype), "silu", dtype, SMALL)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gates", (True, False), ids=("gates", "no gates"))
def test_gemm_mlp_up_activations(activation, gates):
    args = inputs(SHAPES["sequences across tiles"], torch.float32, gates)
    check(args, activation, torch.float32, SMALL)


@pytest.mark.parametrize("name", CONFIGS)
def test_gemm_mlp_up_shipped_configs(name):
    """Every shipped tile, across its borders in all directions."""
    args = inputs((200, 150, 100, 3, (16, 40), 77), torch.float16)
    check(args, "silu", torch.float16, CONFIGS[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemm_mlp_up_default_config(dtype):
    check(inputs((129, 130, 65, 2, (256, 1), 64), dtype), "silu", dtype, None)


def test_gemm_mlp_up_keeps_nothing_unasked():
    args = inputs(SHAPES["one memory"], torch.float16)
    h, nothing = gemm_mlp_up(*args, "silu", SMALL)
    assert nothing is None
    same, gu = gemm_mlp_up(*args, "silu", SMALL, keep=True)
    assert torch.equal(h, same) and gu.shape == (len(h), 2 * 41) and gu.is_contiguous()


@pytest.mark.parametrize("shape", ((0, 5, 7), (5, 0, 7)), ids=str)
def test_gemm_mlp_up_empty(shape):
    m, width, k = shape
    args = inputs((m, width, k, 2, (4, 4), 2), torch.float32)
    h, gu = gemm_mlp_up(*args, "silu", SMALL, keep=True)
    assert h.shape == (m, width) and gu.shape == (m, 2 * width)


def test_gemm_mlp_up_dead_tiles_are_skipped():
    """A tile whose gates are all 0 gives 0 without touching weights, memories, or even x; not where
    g0 and u0 are wanted, since a backward then needs them."""
    args = inputs((67, 75, 48, 3, (33, 20), 13), torch.float16)
    x, w_gate, w_up, gates, delta_gate, delta_up, rows = args
    dead = slice(SMALL.block_n, 2 * SMALL.block_n)
    gates[dead] = 0.0
    want, gu = gemm_mlp_up(*args, "silu", SMALL, keep=True)
    assert gu.chunk(2, 1)[0][:, dead].any()
    for tensor in (w_gate, w_up):
        tensor[dead] = torch.nan
    for delta in (delta_gate, delta_up):
        delta.b[:, dead] = torch.inf
    got = gemm_mlp_up(*args, "silu", SMALL)[0]
    assert not got[:, dead].any() and torch.equal(got, want)


def test_gemm_mlp_up_zero_gates_give_zero():
    """All gates 0: h is 0; one gate 0: its neuron is, even where it would be NaN."""
    x, w_gate, w_up, gates, *rest = inputs(SHAPES["sequences across tiles"], torch.float16)
    for keep in (False, True):
        assert not gemm_mlp_up(x, w_gate, w_up, gates * 0, *rest, "silu", SMALL, keep)[0].any()
    want = gemm_mlp_up(x, w_gate, w_up, gates, *rest, "silu", SMALL)[0]
    assert not want[:, gates == 0].any()
    w_gate[gates == 0] = torch.nan
    assert torch.equal(gemm_mlp_up(x, w_gate, w_up, gates, *rest, "silu", SMALL)[0], want)


@pytest.mark.parametrize("part", ("gate", "up"))
def test_gemm_mlp_up_memory_reaches_its_own_tokens_only(part):
    """Whatever finite numbers it holds; one of them reaches one neuron, and neither g0 nor u0."""
    x, w_gate, w_up, _, *deltas, rows = inputs(SHAPES["sequences across tiles"], torch.float16)
    want = gemm_mlp_up(x, w_gate, w_up, None, *deltas, rows, "silu", SMALL, keep=True)
    deltas[part == "up"].b[1, 40, 5] = torch.finfo(torch.float16).max / 2
    got = gemm_mlp_up(x, w_gate, w_up, None, *deltas, rows, "silu", SMALL, keep=True)
    hit = torch.zeros_like(got[0], dtype=torch.bool)
    hit[rows.ids.repeat_interleave(13)[:67] == 1, 40] = True
    assert hit.any() and (got[0][hit] != want[0][hit]).all()
    assert torch.equal(got[0][~hit], want[0][~hit])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("where", ("x", "s"))
def test_gemm_mlp_up_nan_token_stays_alone(where):
    args = inputs(SHAPES["sequences across tiles"], torch.float16, gates=None)
    want = gemm_mlp_up(*args, "silu", SMALL)[0]
    token = 13 + int((args[-1].ids[1] < 0) * 13)  # one that has a memory
    (args[0] if where == "x" else args[4].s)[token, 7] = torch.nan
    h = gemm_mlp_up(*args, "silu", SMALL)[0]
    assert h[token].isnan().all()
    h[token] = want[token]
    assert torch.equal(h, want)


def test_gemm_mlp_up_runs_are_equal():
    args = inputs(SHAPES["40 memories"], torch.float16)
    first, again = (gemm_mlp_up(*args, "silu", SMALL, keep=True) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
