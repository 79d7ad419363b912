"""The backward kernels against the fp64 oracle."""

import pytest
import torch
from support.attention_shapes import BOUNDS
from support.oracle import compare, cotangent_for, run
from support.prefix_attention_cases import DTYPES, Case, spoiled
from support.tolerances import BACKWARD

from koffkernels import RowBounds
from koffkernels._triton.attention import dkv, dq, prefix_grad
from koffkernels._triton.attention import op as ops
from koffkernels._triton.attention.fwd import one_pass
from koffkernels._triton.shared.config import Config

SMALL = Config(16, 32, warps=4, stages=1)
NAMES = ("q", "k", "v", "prefix.k", "prefix.v")
ALL = (True,) * 5
# B, Hq, Hkv, T, S, D, n, P
SIZES = [
    (4, 1, 1, 1, 1, 64, 3, 1),
    (4, 4, 1, 17, 17, 64, 3, 33),
    (3, 2, 2, 17, 29, 128, 2, 33),
    (2, 1, 1, 130, 130, 64, 2, 512),
]


@pytest.fixture(autouse=True)
def small_gpu(monkeypatch):
    """A few splits show what hundreds would, which the interpreter runs one after another."""
    monkeypatch.setattr(prefix_grad, "multiprocessors", lambda device: 2)


def gradients(case: Case, tensors=None, config: Config | None = None, upstream=None) -> dict:
    """Every gradient, by the launchers, for the oracle's upstream gradient."""
    call = case.call(tensors)
    o, lse = one_pass(call)
    do = cotangent_for(o).to(o.dtype) if upstream is None else upstream
    up = dq.upstream(do, o, lse)
    grads = [dq.query_grad(call, up, None, config)]
    grads += dkv.own_grads(call, up, (True, True), config)
    if call.prefix is not None:
        grads += prefix_grad.prefix_grads(call, up, (True, True), config)
    return dict(zip(NAMES, grads, strict=False))


def check(case: Case, config: Config | None = None) -> None:
    got, (_, want) = gradients(case, config=config), case.oracle()
    assert set(got) == set(want)
    for name, grad in got.items():
        assert grad.dtype == case.tensors[name].dtype
        compare(name, grad, want[name], case.dtype, BACKWARD)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_backward(sizes, dtype):
    check(Case(sizes, dtype))


TILES = {c[:2]: c for m in (dq, dkv, prefix_grad) for c in m.CONFIGS.values()}


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_backward_every_tile(tile):
    check(Case((1, 2, 1, 130, 130, 64, 1, 70), torch.float16, "none"), TILES[tile])


@pytest.mark.parametrize("name", BOUNDS)
def test_backward_bounds(name):
    check(Case((5, 1, 1, 19, 40, 64, 2, 37), torch.float32, bounds=BOUNDS[name]), SMALL)


@pytest.mark.parametrize("kind", ["none", "off"])
def test_backward_ids(kind):
    check(Case((3, 2, 1, 17, 17, 64, 2, 5), torch.float32, kind), SMALL)


def test_backward_without_prefix_and_without_own_keys():
    check(Case((2, 2, 1, 17, 17, 64), torch.float32), SMALL)
    zero = torch.zeros(2, dtype=torch.int64)
    bounds = RowBounds(zero, zero, zero)
    check(Case((2, 2, 1, 5, 0, 64, 1, 19), torch.float32, "none", bounds), SMALL)


@pytest.mark.parametrize("programs", [1, 5, 1000])
def test_backward_splits(programs, monkeypatch):
    """However many splits of rows and queries there are, the prefix gradients are the same sums."""
    monkeypatch.setattr(prefix_grad, "_PROGRAMS", 1)
    monkeypatch.setattr(prefix_grad, "multiprocessors", lambda device: programs)
    case = Case((3, 2, 1, 70, 70, 64, 1, 19), torch.float32, "none")
    config = Config(16, 32, warps=4, stages=1)
    splits = prefix_grad._splits(case.call(), config)
    assert splits == {1: (1, 1), 5: (3, 2), 1000: (3, 2)}[programs]
    o, lse = one_pass(case.call())
    up = dq.upstream(cotangent_for(o), o, lse)
    got = prefix_grad.prefix_grads(case.call(), up, (True, True), SMALL)
    for name, grad in zip(NAMES[3:], got, strict=True):
        compare(name, grad, case.oracle()[1][name], torch.float32, BACKWARD)


def test_backward_unused_memories_and_entries_get_zero():
    case = Case((3, 2, 1, 5, 5, 64, 3, 20), torch.float32, lengths=[20, 7, 20])
    case.ids = torch.tensor([1, 0, -1])
    got = gradients(case, config=SMALL)
    for name in NAMES[3:]:
        assert not got[name][2].any() and not got[name][1, :, 7:].any()
        assert got[name][0].all() and got[name][1, :, :7].all()


@pytest.mark.parametrize("config", [SMALL, None], ids=["small", "default"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_backward_what_nobody_sees_does_not_leak(bad, config):
    bounds = RowBounds(
        torch.tensor([0, 2, 0, 9]), torch.tensor([9, 9, 6, 9]), torch.tensor([1, 4, 4, 0])
    )
    case = Case((4, 2, 1, 5, 9, 64, 3, 6), torch.float32, bounds=bounds, lengths=[6, 4, 5])
    case.ids = torch.tensor([1, -1, 2, 1])
    outside = torch.zeros(4, 9, dtype=torch.bool)
    outside[0, 6:], outside[1, :2], outside[2, 6:], outside[3] = True, True, True, True
    clean = gradients(case, config=config)
    t = spoiled(case.tensors, "kv", outside[:, None].expand(-1, 1, -1), bad)
    t = spoiled(t, ["prefix.k", "prefix.v"], 0, bad)
    t = spoiled(t, ["prefix.k", "prefix.v"], (1, slice(None), slice(4, 6)), bad)
    broken = gradients(case, t, config)
    for name in NAMES:
        assert torch.equal(clean[name], broken[name]), name
    for name in "kv":
        assert not clean[name].transpose(1, 2)[outside].any(), name


def test_backward_bad_row_stays_alone():
    case = Case((4, 2, 1, 5, 5, 64, 3, 6), torch.float32, lengths=[6, 4, 5])
    case.ids = torch.tensor([0, 1, -1, 2])
    rows, memories = torch.tensor([0, 2, 3]), torch.tensor([0, 2])
    clean, broken = gradients(case), gradients(case, spoiled(case.tensors, ["q", "k", "v"], 1))
    for name in NAMES:
        kept = rows if name in "qkv" else memories
        assert torch.equal(clean[name][kept], broken[name][kept]), name


def test_backward_rows_that_see_nothing_give_nothing():
    bounds = RowBounds(torch.tensor([4, 6, 0]), torch.full((3,), 6), torch.zeros(3).long())
    case = Case((3, 2, 1, 6, 6, 64, 2, 5), torch.float32, bounds=bounds)
    case.ids = torch.tensor([-1, -1, 1])
    got = gradients(case)
    assert not got["q"][0, :, :4].any() and not got["q"][1].any()
    assert not got["k"][1].any() and not got["v"][1].any()
    check(case, SMALL)


def test_backward_upstream_of_any_layout_and_two_runs():
    case = Case((3, 2, 1, 9, 9, 64, 2, 5), torch.float32)
    for upstream in (torch.ones(()).expand(3, 2, 9, 64), torch.randn(3, 2, 64, 9).mT):
        dense = gradients(case, upstream=upstream.contiguous())
        got = gradients(case, upstream=upstream)
        assert all(torch.equal(got[name], dense[name]) for name in NAMES)


@pytest.mark.parametrize("sizes", [(0, 2, 1, 3, 3, 64, 2, 5), (2, 2, 1, 0, 3, 64, 2, 5)], ids=str)
def test_backward_empty(sizes):
    """Keys that no query sees get a gradient of 0, not unwritten memory."""
    for name, grad in gradients(Case(sizes, torch.float32)).items():
        assert not grad.any(), name


@pytest.mark.parametrize("route", ops.ROUTES)
@pytest.mark.parametrize("frozen", [["q"], ["k"], ["k", "v"], ["q", "k", "v"], ["prefix.k"], NAMES])
def test_backward_frozen_inputs_cost_no_work(frozen, route, monkeypatch):
    """Gradients of the others are the same, and what needs none is not computed."""
    launched = set()

    def recorded(module, name):
        kernels = getattr(module, name)

        def run(*args, **kwargs):
            launched.add(name)
            return kernels(*args, **kwargs)

        monkeypatch.setattr(ops, name, run)

    for module, name in ((dq, "query_grad"), (dkv, "own_grads"), (prefix_grad, "prefix_grads")):
        recorded(module, name)
    case = Case((2, 2, 1, 17, 17, 64, 1, 5), torch.float32, "none")
    _, grads = run(lambda t: ops.run(*case.call(t), route), case.tensors, frozen)
    assert set(grads) == set(NAMES) - set(frozen)
    if "q" in frozen:
        assert "query_grad" not in launched
    if set(frozen) == set(NAMES):
        assert not launched
        return
    want = gradients(case)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-5)
