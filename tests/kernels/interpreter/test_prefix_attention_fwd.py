"""The one-pass forward kernel against the fp64 oracle."""

import math

import pytest
import torch
from support.attention_shapes import BOUNDS, LAYOUTS
from support.oracle import compare
from support.prefix_attention_cases import DTYPES, Case, spoiled
from support.tolerances import FORWARD

from koffkernels import Prefix, RowBounds
from koffkernels._triton.attention.fwd import CONFIGS, add_prefix, one_pass
from koffkernels._triton.shared.config import Config

SMALL = Config(16, 16, warps=4, stages=1)  # many tiles where there are few tokens
# B, Hq, Hkv, T, S, D, n, P
SIZES = [
    (4, 1, 1, 1, 1, 64, 3, 1),
    (4, 4, 1, 17, 17, 64, 3, 33),
    (3, 2, 2, 17, 29, 128, 2, 33),
    (2, 1, 1, 130, 130, 64, 2, 512),
    (4, 4, 1, 1, 40, 64, 3, 512),
]


def check(case: Case, config: Config | None = None) -> None:
    o, lse = one_pass(case.call(), config)
    want, _ = case.oracle()
    compare("output", o, want, case.dtype, FORWARD)
    assert o.dtype == case.dtype and lse.dtype == torch.float32 and not lse.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward(sizes, dtype):
    check(Case(sizes, dtype))


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_every_config(name):
    check(Case((1, 2, 1, 130, 130, 64, 1, 70), torch.float16, "none"), CONFIGS[name])


@pytest.mark.parametrize("name", BOUNDS)
def test_forward_bounds(name):
    check(Case((5, 1, 1, 19, 40, 64, 3, 37), torch.float32, bounds=BOUNDS[name]), SMALL)


@pytest.mark.parametrize("kind", ["none", "off", "one"])
def test_forward_ids(kind):
    check(Case((3, 2, 1, 17, 17, 64, 2, 5), torch.float32, kind), SMALL)


def test_forward_without_prefix_and_without_own_keys():
    check(Case((2, 2, 1, 17, 17, 64), torch.float32), SMALL)
    zero = torch.zeros(2, dtype=torch.int64)
    bounds = RowBounds(zero, zero, zero)
    check(Case((2, 2, 1, 5, 0, 64, 1, 19), torch.float32, "none", bounds), SMALL)


def test_forward_ids_out_of_range_are_none():
    """An id that does not exist must not read beyond the memories."""
    case = Case((3, 2, 1, 5, 5, 64, 2, 5), torch.float32)
    case.ids = torch.tensor([2, -7, 1])
    o, _ = one_pass(case.call())
    case.ids = torch.tensor([-1, -1, 1])
    assert torch.equal(o, one_pass(case.call())[0])


def test_forward_lengths_beyond_the_prefix_and_negative():
    check(Case((4, 2, 1, 5, 5, 64, 3, 7), torch.float32, lengths=[99, -2, 3]), SMALL)


def test_forward_lse():
    """lse is natural, over prefix and own keys."""
    case = Case((1, 2, 1, 17, 17, 64, 1, 33), torch.float32, "none")
    _, lse = one_pass(case.call(), SMALL)
    t = case.tensors
    keys = torch.cat([t["prefix.k"], t["k"]], 2).double()
    scores = t["q"].double() @ keys.expand(-1, 2, -1, -1).transpose(-1, -2) / 8
    behind = torch.ones(17, 17, dtype=torch.bool).triu(1)
    scores[..., 33:].masked_fill_(behind, -math.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [SMALL, None], ids=["small", "default"])
def test_forward_rows_that_see_nothing(config):
    """o is 0 and lse -inf; NaN queries there do not matter."""
    bounds = RowBounds(torch.tensor([4, 6, 0]), torch.full((3,), 6), torch.zeros(3).long())
    case = Case((3, 4, 2, 6, 6, 64, 2, 5), torch.float32, bounds=bounds)
    case.ids = torch.tensor([-1, -1, 1])
    blind = torch.zeros(3, 6, dtype=torch.bool)
    blind[0, :4], blind[1] = True, True
    o, lse = one_pass(case.call(), config)
    assert not o.transpose(1, 2)[blind].any() and o.transpose(1, 2)[~blind].all()
    assert (lse.transpose(1, 2)[blind] == -math.inf).all()
    t = dict(case.tensors, q=case.tensors["q"].clone())
    t["q"].transpose(1, 2)[blind] = float("nan")
    assert torch.equal(one_pass(case.call(t), config)[0], o)


@pytest.mark.parametrize("config", [SMALL, None], ids=["small", "default"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_forward_what_nobody_sees_does_not_leak(bad, config):
    """Keys outside the bounds, memories of other rows, and prefix entries behind the length."""
    bounds = RowBounds(
        torch.tensor([0, 2, 0, 9]), torch.tensor([9, 9, 6, 9]), torch.tensor([1, 4, 4, 0])
    )
    case = Case((4, 2, 1, 5, 9, 64, 3, 6), torch.float32, bounds=bounds, lengths=[6, 4, 5])
    case.ids = torch.tensor([1, -1, 2, 1])
    outside = torch.zeros(4, 9, dtype=torch.bool)
    outside[0, 6:], outside[1, :2], outside[2, 6:], outside[3] = True, True, True, True
    clean, _ = one_pass(case.call(), config)
    t = spoiled(case.tensors, "kv", outside[:, None].expand(-1, 1, -1), bad)
    t = spoiled(t, ["prefix.k", "prefix.v"], 0, bad)
    t = spoiled(t, ["prefix.k", "prefix.v"], (slice(None), slice(None), slice(5, 6)), bad)
    t = spoiled(t, ["prefix.k", "prefix.v"], (1, slice(None), slice(4, 6)), bad)
    assert torch.equal(one_pass(case.call(t), config)[0], clean)
    t = spoiled(t, ["q", "k", "v"], 1, bad)  # and a row that is all bad stays alone
    rows = torch.tensor([0, 2, 3])
    assert torch.equal(one_pass(case.call(t), config)[0][rows], clean[rows])


@pytest.mark.parametrize("name", LAYOUTS)
def test_forward_layouts(name):
    case = Case((3, 4, 2, 9, 9, 64, 3, 5), torch.float32)
    t = {key: LAYOUTS[name](value) for key, value in case.tensors.items()}
    dense = {key: value.contiguous() for key, value in t.items()}
    assert torch.equal(one_pass(case.call(t))[0], one_pass(case.call(dense))[0])


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_forward_scale_and_large_scores(scale):
    case = Case((3, 2, 2, 9, 9, 64, 2, 5), torch.float32)
    t = dict(case.tensors, q=case.tensors["q"] * (30 if scale > 1 else 1))
    got, _ = one_pass(case.call(t, scale), SMALL)
    case.tensors = dict(t, q=t["q"] * scale * 8)  # the oracle's scale is 1 / 8
    want, _ = case.oracle()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_prefix_added_to_another_part(dtype):
    """o and lse over own keys, then the prefix: as in one pass; a row without memory stays as it
    was, bit for bit."""
    case = Case((4, 2, 1, 33, 33, 64, 3, 37), dtype)
    both, lse_both = one_pass(case.call())
    o, lse = one_pass(case.call()._replace(prefix=None, ids=None))
    before = o.clone()
    add_prefix(case.call(), o, lse)
    compare("output", o, case.oracle()[0], dtype, FORWARD)
    torch.testing.assert_close(lse, lse_both, rtol=1e-5, atol=1e-5)
    off = (case.ids < 0) | (case.lengths[case.ids] == 0)
    assert off.any() and torch.equal(o[off], before[off])
    assert torch.equal(one_pass(case.call())[0], both)  # and two runs are bit-equal


@pytest.mark.parametrize("prefix_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_forward_prefix_of_another_dtype(prefix_dtype):
    case = Case((3, 2, 1, 9, 9, 64, 2, 5), torch.float32)
    call = case.call()
    rounded = Prefix(*(x.to(prefix_dtype) for x in call.prefix[:2]), call.prefix.lengths)
    want = Prefix(*(x.float() for x in rounded[:2]), rounded.lengths)
    got = one_pass(call._replace(prefix=rounded))[0]
    assert torch.equal(got, one_pass(call._replace(prefix=want))[0])


@pytest.mark.parametrize("sizes", [(0, 2, 1, 3, 3, 64, 2, 5), (2, 2, 1, 0, 3, 64, 2, 5)], ids=str)
def test_forward_empty(sizes):
    o, lse = one_pass(Case(sizes, torch.float32).call())
    assert o.shape == (sizes[0], 2, sizes[3], 64) and lse.shape == o.shape[:3]
