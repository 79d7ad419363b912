"""prefix_attention: what must not leak, what must not be built, and what must be repeatable."""

import pytest
import torch
import torch.nn.functional as F
from support.kernel_inputs import attention_tensors, ids_of, padded, prefix_from
from support.oracle import assert_same, run
from torch.utils._python_dispatch import TorchDispatchMode

from koffkernels import RowBounds, force_backend, prefix_attention

SHAPE = {"B": 4, "Hq": 4, "Hkv": 2, "T": 5, "S": 9, "D": 16, "n": 3, "P": 6}


def caller(ids, lengths, bounds=None):
    def call(t):
        prefix = prefix_from(t, lengths)
        return prefix_attention(t["q"], t["k"], t["v"], prefix, memory_ids=ids, bounds=bounds)

    return call


def make(dtype=torch.float32, **changes):
    shape = SHAPE | changes
    lengths = torch.tensor([6, 4, 5])[: shape["n"]].clamp(max=shape["P"])
    return attention_tensors(shape, dtype), lengths


def spoil(tensors, names, index, bad):
    changed = dict(tensors)
    for name in names:
        changed[name] = tensors[name].clone()
        changed[name][index] = bad
    return changed


backends = pytest.mark.parametrize("backend", ["torch", "reference"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
values = pytest.mark.parametrize("bad", [float("nan"), float("inf")])


@values
@dtypes
@backends
def test_prefix_attention_bad_memory_stays_in_its_rows(backend, dtype, bad):
    """Memory 0: the one that a row without memory (-1) would read if its id were clamped."""
    tensors, lengths = make(dtype)
    call, rows = caller(torch.tensor([1, 0, -1, 2]), lengths), torch.tensor([0, 2, 3])
    with force_backend(backend):
        clean = run(call, tensors)
        broken = run(call, spoil(tensors, ["prefix.k", "prefix.v"], 0, bad))
    assert torch.equal(clean[0][rows], broken[0][rows])
    for name in "qkv":
        assert torch.equal(clean[1][name][rows], broken[1][name][rows]), name
    for name in ("prefix.k", "prefix.v"):
        assert torch.equal(clean[1][name][1:], broken[1][name][1:]), name


@values
@dtypes
@backends
def test_prefix_attention_unused_memory_and_padding_of_the_prefix(backend, dtype, bad):
    """Memory 0 is in no row, and memories 1 and 2 are shorter than P: nobody may look there."""
    tensors, lengths = make(dtype)
    call = caller(torch.tensor([1, -1, 2, 1]), lengths)
    spoilt = spoil(tensors, ["prefix.k", "prefix.v"], 0, bad)
    spoilt = spoil(spoilt, ["prefix.k", "prefix.v"], (slice(None), slice(None), slice(5, 6)), bad)
    spoilt = spoil(spoilt, ["prefix.k", "prefix.v"], (1, slice(None), slice(4, 6)), bad)
    with force_backend(backend):
        clean, broken = run(call, tensors), run(call, spoilt)
    assert_same(clean, broken)
    for name in ("prefix.k", "prefix.v"):
        assert not clean[1][name][0].any() and not clean[1][name][:, :, 5:].any()
        assert clean[1][name][1, :, :4].all() and clean[1][name][2, :, :5].all()


@values
@dtypes
@backends
def test_prefix_attention_masked_keys_do_not_leak(backend, dtype, bad):
    """Keys before key_start, from key_end on, and behind the last query."""
    tensors, lengths = make(dtype)
    bounds = RowBounds(
        torch.tensor([0, 2, 0, 9]), torch.tensor([9, 9, 6, 9]), torch.tensor([1, 4, 4, 0])
    )
    outside = torch.zeros(4, 9, dtype=torch.bool)
    outside[0, 6:], outside[1, :2], outside[2, 6:], outside[3] = True, True, True, True
    spoilt = dict(tensors)
    for name in "kv":
        spoilt[name] = tensors[name].masked_fill(outside[:, None, :, None], bad)
    for ids in (torch.tensor([0, -1, 2, 1]), torch.full((4,), -1)):
        call = caller(ids, lengths, bounds)
        with force_backend(backend):
            clean, broken = run(call, tensors), run(call, spoilt)
        assert_same(clean, broken)
        assert torch.isfinite(clean[0]).all()
        for name in "kv":
            assert not clean[1][name].transpose(1, 2)[outside].any(), name


@backends
def test_prefix_attention_bad_row_stays_in_its_row(backend):
    tensors, lengths = make()
    call, rows = caller(torch.tensor([0, 1, -1, 2]), lengths), torch.tensor([0, 2, 3])
    with force_backend(backend):
        clean = run(call, tensors)
        broken = run(call, spoil(tensors, ["q", "k", "v"], 1, float("nan")))
    assert torch.equal(clean[0][rows], broken[0][rows])
    for name in "qkv":
        assert torch.equal(clean[1][name][rows], broken[1][name][rows]), name
    for name in ("prefix.k", "prefix.v"):
        assert torch.equal(clean[1][name][[0, 2]], broken[1][name][[0, 2]]), name


@dtypes
@pytest.mark.parametrize("ids", [None, torch.tensor([0, -1, -1, 0])], ids=["all", "mixed"])
def test_prefix_attention_length_zero_is_no_prefix(ids, dtype):
    tensors, _ = make(dtype, n=1)
    output, grads = run(caller(ids, torch.tensor([0])), tensors)
    bare = {name: tensors[name] for name in "qkv"}
    want, want_grads = run(caller(None, None), bare)
    exact = {"rtol": 0, "atol": 0} if dtype != torch.float64 else {}  # fp64 concatenates
    torch.testing.assert_close(output, want, **exact)
    for name in "qkv":
        torch.testing.assert_close(grads[name], want_grads[name], **exact)
    assert not grads["prefix.k"].any() and not grads["prefix.v"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [5, 9])
def test_prefix_attention_without_memory_is_bit_equal_to_none(keys, dtype):
    tensors, lengths = make(dtype, S=keys)
    off = run(caller(torch.full((4,), -1), lengths), tensors)
    bare = run(caller(None, None), {name: tensors[name] for name in "qkv"})
    assert torch.equal(off[0], bare[0])
    assert all(torch.equal(off[1][name], bare[1][name]) for name in "qkv")
    assert not off[1]["prefix.k"].any() and not off[1]["prefix.v"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("queries", [1, 33])
@pytest.mark.parametrize("bounded", [False, True])
def test_prefix_attention_without_memory_is_bit_equal_to_torch(bounded, queries, heads, dtype):
    """Rows without a memory get what the base model's own attention gives, repeated heads or not;
    bounds that only say what None says do not change that."""
    shape = {"B": 3, "Hq": heads[0], "Hkv": heads[1], "T": queries, "S": 33, "D": 64}
    q, k, v = attention_tensors(shape, dtype).values()
    bounds = RowBounds(*(torch.full((3,), x) for x in (0, 33, 33 - queries))) if bounded else None
    got = prefix_attention(q, k, v, None, bounds=bounds)
    group = heads[0] // heads[1]
    kv = (x.repeat_interleave(group, 1) for x in (k, v))
    assert torch.equal(got, F.scaled_dot_product_attention(q, *kv, is_causal=queries > 1))


@pytest.mark.parametrize("bounded", [False, True])
def test_prefix_attention_two_backwards_and_two_runs_are_bit_equal(bounded):
    torch.use_deterministic_algorithms(False)
    tensors, lengths = make(B=8, T=33, S=33, P=65)
    bounds = padded(8, 33, 33) if bounded else None
    call = caller(ids_of("mixed", 8, 3), lengths, bounds)
    assert_same(run(call, tensors), run(call, tensors))
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    o, again = call(leaves), list(leaves.values())
    twice = [torch.autograd.grad(o.sum(), again, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


def test_prefix_attention_mixed_batch_equals_rows_one_at_a_time():
    tensors, lengths = make(B=7)
    ids, bounds = ids_of("mixed", 7, 3), padded(7, 5, 9, 2)
    whole = caller(ids, lengths, bounds)(tensors)
    for b in range(7):
        row = {n: t[b : b + 1] if n in "qkv" else t for n, t in tensors.items()}
        alone = caller(ids[b : b + 1], lengths, RowBounds(*(x[b : b + 1] for x in bounds)))(row)
        torch.testing.assert_close(whole[b : b + 1], alone, rtol=1e-5, atol=1e-6)


def test_prefix_attention_left_padding_changes_nothing():
    """The same sequence with 4 rows of padding before it, and with 3 unwritten keys behind it."""
    tensors, lengths = make(B=1, T=5, S=5)
    want = caller(torch.tensor([1]), lengths)(tensors)
    wide, _ = make(B=1, T=9, S=12)
    for name in "qkv":
        wide[name][:, :, 4:9] = tensors[name]
    wide |= {name: tensors[name] for name in ("prefix.k", "prefix.v")}
    bounds = RowBounds(torch.tensor([4]), torch.tensor([9]), torch.tensor([0]))
    got = caller(torch.tensor([1]), lengths, bounds)(wide)
    torch.testing.assert_close(got[:, :, 4:], want, rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """Records the most elements that any operator's output has, and after which operator."""

    def __init__(self):
        super().__init__()
        self.elements, self.where = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(out, torch.Tensor) and out.numel() > self.elements:
                self.elements, self.where = out.numel(), (func, tuple(out.shape))
        return result


@pytest.mark.parametrize("kind", ["one", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefix_attention_never_repeats_the_prefix(dtype, kind):
    shape = {"B": 48, "Hq": 2, "Hkv": 2, "T": 2, "S": 2, "D": 16, "n": 2, "P": 512}
    tensors = attention_tensors(shape, dtype)
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    call = caller(ids_of(kind, 48, 2), torch.tensor([512, 512]))
    with Largest() as largest:
        call(leaves).sum().backward()
    assert largest.elements <= tensors["prefix.k"].numel(), largest.where  # n Hkv P D, no B


def test_prefix_attention_does_not_touch_unwritten_keys():
    """A decode step on a static cache of 512 keys of which 9 are written."""
    tensors, lengths = make(T=1, S=512)
    bounds = RowBounds(*(torch.full((4,), x) for x in (0, 9, 8)))
    with Largest() as largest, torch.no_grad():
        caller(ids_of("mixed", 4, 3), lengths, bounds)(tensors)
    assert largest.elements <= tensors["k"].numel() // 16, largest.where

    for name in "kv":
        tensors[name][:, :, 9:] = float("nan")
    assert torch.isfinite(caller(ids_of("mixed", 4, 3), lengths, bounds)(tensors)).all()


def test_prefix_attention_needs_no_mask_without_padding():
    tensors, lengths = make(B=8, T=96, S=96)
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    bounds = RowBounds(*(torch.full((8,), x) for x in (0, 96, 0)))
    with Largest() as largest:
        caller(ids_of("mixed", 8, 3), lengths, bounds)(leaves).sum().backward()
    assert largest.elements <= leaves["q"].numel() < 8 * 96 * 96, largest.where


@pytest.mark.parametrize("bounded", [False, True])
def test_prefix_attention_keeps_only_its_inputs_o_and_lse(bounded):
    tensors, lengths = make(T=9, S=9)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    given = {t.untyped_storage().data_ptr() for t in leaves.values()}
    kept = {}

    def pack(t):
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in given:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    ids, bounds = ids_of("mixed", 4, 3), padded(4, 9, 9) if bounded else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        o = caller(ids, lengths, bounds)(leaves)
    copies = 2 * tensors["k"].numel() if bounded else 0  # K and V with the padding set to 0
    assert sum(kept.values()) <= 4 * (o.numel() + o.numel() // 16 + copies)
    o.sum().backward()


def test_prefix_attention_lengths_beyond_the_prefix_and_negative():
    """Data, not shapes, so not checked: as the reference has it, all of it, and nothing."""
    tensors, _ = make()
    ids, lengths = ids_of("mixed", 4, 3), torch.tensor([99, -2, 3])
    got = run(caller(ids, lengths), tensors)
    with force_backend("reference"):
        want = run(caller(ids, lengths), tensors)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("none", [-2, 3, 10**9])
def test_prefix_attention_any_id_that_is_no_memory_is_none(none):
    tensors, lengths = make()
    first, second = (
        run(caller(torch.tensor([0, id_, 1, id_]), lengths), tensors) for id_ in (-1, none)
    )
    assert_same(first, second)
