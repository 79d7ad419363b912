"""Decoding: the group, own and merge kernels against the fp64 oracle."""

import math

import pytest
import torch
from support.attention_shapes import BOUNDS
from support.oracle import compare
from support.prefix_attention_cases import DTYPES, Case, spoiled
from support.tolerances import FORWARD

from koffkernels import RowBounds
from koffkernels._triton.attention import decode as few
from koffkernels._triton.attention.fwd import one_pass

# B, Hq, Hkv, T, S, D, n, P
SIZES = [
    (1, 1, 1, 1, 1, 64, 1, 1),
    (4, 4, 1, 1, 40, 64, 3, 33),
    (3, 4, 2, 1, 300, 128, 2, 512),
    (4, 8, 2, 3, 17, 64, 2, 130),
    (2, 4, 1, 16, 16, 64, 1, 33),
]


def check(case: Case, *configs) -> None:
    assert few.fits(case.tensors["q"], case.tensors["k"])
    o, lse = few.decode(case.call(), *configs)
    want, _ = case.oracle()
    compare("output", o, want, case.dtype, FORWARD)
    assert o.dtype == case.dtype and not lse.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_decode(sizes, dtype):
    check(Case(sizes, dtype, "none" if sizes[-2] == 1 else "mixed"))


@pytest.mark.parametrize("group", few.GROUP_CONFIGS.values(), ids=str)
def test_decode_every_group_config(group):
    check(Case((5, 4, 1, 1, 9, 64, 2, 70), torch.float16), group)


@pytest.mark.parametrize("own", few.OWN_CONFIGS.values(), ids=str)
def test_decode_every_own_config(own):
    check(Case((2, 4, 1, 1, 300, 64, 1, 5), torch.float16, "none"), None, own)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("name", BOUNDS)
def test_decode_bounds(name, queries):
    check(Case((5, 2, 1, queries, 40, 64, 3, 19), torch.float32, bounds=BOUNDS[name]))


@pytest.mark.parametrize("kind", ["none", "off", "one"])
def test_decode_ids(kind):
    check(Case((3, 2, 1, 1, 9, 64, 2, 5), torch.float32, kind))


def test_decode_without_prefix_and_without_own_keys():
    check(Case((2, 2, 1, 1, 17, 64), torch.float32))
    zero = torch.zeros(2, dtype=torch.int64)
    bounds = RowBounds(zero, zero, zero)
    check(Case((2, 2, 1, 1, 0, 64, 1, 19), torch.float32, "none", bounds))


@pytest.mark.parametrize("memories", [1, 3])
def test_decode_groups_of_any_size(memories):
    """More rows than are read at a time, in random order: a group without rows, and rows without a
    memory."""
    case = Case((70, 1, 1, 1, 2, 64, memories, 3), torch.float32)
    case.ids = torch.randint(-1, memories, (70,))
    if memories == 3:
        case.ids[case.ids == 1] = 0
    check(case)


def test_decode_forty_memories():
    """Groups of no, one or a few rows."""
    case = Case((7, 1, 1, 1, 2, 64, 40, 3), torch.float32)
    case.ids = torch.tensor([39, 5, -1, 5, 0, 22, 5])
    check(case)


def test_decode_reads_a_prefix_once_per_group(monkeypatch):
    """All rows of a memory share a tile, so there are as many tiles as memories in use."""
    launches = []
    launch = few.launch
    monkeypatch.setattr(few, "launch", lambda *a, **k: (launches.append((a, k)), launch(*a, **k)))
    case = Case((8, 4, 2, 1, 5, 64, 2, 40), torch.float32)
    case.ids = torch.tensor([0, 1] * 4)
    check(case)
    (_, (tiles, kv_heads, _)), options = launches[0]
    assert options["BLOCK_M"] == 16 and kv_heads == 2  # 4 rows x 2 query heads
    assert tiles == 2
    monkeypatch.undo()
    case.ids = torch.tensor([1] * 7 + [0])  # nor do other ids need more
    check(case)


@pytest.mark.parametrize("multiprocessors", [1, 20, 500])
@pytest.mark.parametrize("keys", [10, 290])
def test_decode_splits(keys, multiprocessors, monkeypatch):
    """Rows of one split go on with the prefix's partial results; others leave them to a merge."""
    launches, launch = [], few.launch
    monkeypatch.setattr(few, "launch", lambda *a, **k: (launches.append(a[1]), launch(*a, **k)))
    monkeypatch.setattr(few, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(few, "_SPLIT", 16)
    check(Case((2, 2, 1, 2, keys, 64, 2, 300), torch.float32, bounds=BOUNDS["left padding"]))
    prefix_splits, own_splits = launches[0][2], launches[1][1]
    assert prefix_splits == (1 if multiprocessors == 1 else 19)  # more than one round of the merge
    assert own_splits == (19 if keys == 290 and multiprocessors > 1 else 1)
    assert len(launches) == (2 if own_splits == 1 else 3)


def test_decode_ids_out_of_range_are_none():
    case = Case((3, 2, 1, 1, 5, 64, 2, 5), torch.float32)
    case.ids = torch.tensor([2, -7, 1])
    o, _ = few.decode(case.call())
    case.ids = torch.tensor([-1, -1, 1])
    assert torch.equal(o, few.decode(case.call())[0])


def test_decode_rows_that_see_nothing():
    bounds = RowBounds(torch.tensor([4, 6, 0]), torch.full((3,), 6), torch.zeros(3).long())
    case = Case((3, 4, 2, 6, 6, 64, 2, 5), torch.float32, bounds=bounds)
    case.ids = torch.tensor([-1, -1, 1])
    o, lse = few.decode(case.call())
    want, want_lse = one_pass(case.call())
    assert not o[1].any() and not o[0, :, :4].any() and (lse[1] == -math.inf).all()
    torch.testing.assert_close(o, want)
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_decode_what_nobody_sees_does_not_leak(bad):
    """A static cache of which 9 keys are written, left padding, and memories of other rows."""
    bounds = RowBounds(torch.tensor([0, 2, 0, 4]), torch.full((4,), 9), torch.full((4,), 8))
    case = Case((4, 2, 1, 1, 40, 64, 3, 6), torch.float32, bounds=bounds, lengths=[6, 4, 5])
    case.ids = torch.tensor([1, -1, 2, 1])
    clean, _ = few.decode(case.call())
    outside = torch.zeros(4, 40, dtype=torch.bool)
    outside[:, 9:], outside[1, :2], outside[3, :4] = True, True, True
    t = spoiled(case.tensors, "kv", outside[:, None].expand(-1, 1, -1), bad)
    t = spoiled(t, ["prefix.k", "prefix.v"], 0, bad)
    t = spoiled(t, ["prefix.k", "prefix.v"], (1, slice(None), slice(4, 6)), bad)
    assert torch.equal(few.decode(case.call(t))[0], clean)
    t = spoiled(t, ["q", "k", "v"], 0, bad)  # shares its tile with row 3
    assert torch.equal(few.decode(case.call(t))[0][1:], clean[1:])


@pytest.mark.parametrize("prefix_dtype", [torch.bfloat16, torch.float16])
def test_decode_prefix_already_in_a_low_precision(prefix_dtype):
    case = Case((3, 2, 1, 1, 9, 64, 2, 40), prefix_dtype)
    rounded = {k: t.to(prefix_dtype) if "prefix" in k else t for k, t in case.tensors.items()}
    got, _ = few.decode(case.call(rounded))
    assert torch.equal(got, few.decode(case.call())[0])


def test_decode_empty():
    o, lse = few.decode(Case((0, 2, 1, 1, 3, 64, 2, 5), torch.float32).call())
    assert o.shape == (0, 2, 1, 64) and lse.shape == (0, 2, 1)
    o, _ = few.decode(Case((2, 2, 1, 0, 3, 64, 2, 5), torch.float32).call())
    assert o.shape == (2, 2, 0, 64)
