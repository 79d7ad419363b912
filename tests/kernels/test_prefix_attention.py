"""prefix_attention: values and gradients over every shape and kind of bounds; see also
test_prefix_attention_limits.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.attention_shapes import BOUNDS, LAYOUTS, lengths_of, shape_of
from support.kernel_inputs import (
    FP,
    LOW,
    attention_tensors,
    eager_attention,
    ids_of,
    normal,
    padded,
    prefix_from,
)
from support.oracle import assert_same, check, compare, run, run_oracle
from support.tolerances import BACKWARD, FORWARD
from torch.utils.checkpoint import checkpoint

from koffkernels import Prefix, RowBounds, prefix_attention


def caller(ids, lengths, bounds=None, scale=None, layout=lambda x: x):
    def call(t):
        q, k, v = (layout(t[name]) for name in "qkv")
        prefix = prefix_from(t, lengths)
        return prefix_attention(q, k, v, prefix, memory_ids=ids, bounds=bounds, scale=scale)

    return call


def make(shape: dict, dtype, kind="mixed"):
    if kind == "none" and shape.get("n"):
        shape = shape | {"n": 1}
    return attention_tensors(shape, dtype), ids_of(kind, shape["B"], shape.get("n", 1))


SHAPES = [
    shape_of(1, 1, 1, 1, 1, 16, 1, 1),
    shape_of(4, 4, 4, 17, 17, 16, 3, 33),
    shape_of(5, 4, 2, 17, 17, 64, 3, 33),
    shape_of(3, 4, 1, 17, 29, 128, 2, 1),
    shape_of(3, 2, 1, 130, 130, 16, 2, 512),
    shape_of(4, 4, 2, 1, 40, 16, 3, 33),
    shape_of(7, 3, 3, 5, 5, 7, 2, 3),
    shape_of(43, 2, 1, 3, 3, 16, 40, 5),
    shape_of(0, 4, 2, 3, 3, 16, 2, 5),
    shape_of(3, 4, 2, 0, 3, 16, 2, 5),
    shape_of(3, 4, 2, 0, 0, 16, 2, 5),
]


@pytest.mark.parametrize("dtype", FP)
@pytest.mark.parametrize("kind", ["none", "off", "one", "mixed"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
def test_prefix_attention_oracle(shape, kind, dtype):
    tensors, ids = make(shape, dtype, kind)
    lengths = lengths_of(shape if kind != "none" else shape | {"n": 1})
    check(caller(ids, lengths), tensors, dtype)


@pytest.mark.parametrize("dtype", FP)
@pytest.mark.parametrize(
    "sizes", [(3, 4, 2, 17, 17, 16), (3, 4, 1, 1, 9, 64), (3, 2, 2, 5, 9, 16)], ids=str
)
@pytest.mark.parametrize("unwritten", [None, 0, 3])
def test_prefix_attention_without_prefix(unwritten, sizes, dtype):
    shape = shape_of(*sizes)
    bounds = None if unwritten is None else padded(3, shape["T"], shape["S"], unwritten)
    tensors, _ = make(shape, dtype)
    check(caller(None, None, bounds), tensors, dtype)


@pytest.mark.parametrize("dtype", FP)
@pytest.mark.parametrize("kind", ["prefix", "no prefix"])
@pytest.mark.parametrize("sizes", [(17, 17), (1, 40), (5, 40), (40, 5)], ids=str)
@pytest.mark.parametrize("name", BOUNDS)
def test_prefix_attention_bounds(name, sizes, kind, dtype):
    shape = shape_of(5, 4, 2, *sizes, 16, *((3, 9) if kind == "prefix" else ()))
    tensors, ids = make(shape, dtype)
    bounds = BOUNDS[name](shape)
    check(caller(ids, lengths_of(shape), bounds), tensors, dtype)


@pytest.mark.parametrize("dtype", FP)
def test_prefix_attention_rows_that_see_nothing(dtype):
    """0 where a query sees neither prefix nor keys, and no gradient from there; NaN queries too."""
    shape = shape_of(3, 4, 2, 6, 6, 16, 2, 5)
    tensors, _ = make(shape, dtype)
    bounds = RowBounds(torch.tensor([4, 6, 0]), torch.full((3,), 6), torch.zeros(3).long())
    call = caller(torch.tensor([-1, -1, 1]), torch.tensor([5, 3]), bounds)
    output, grads = run(call, tensors)
    blind = torch.zeros(3, 6, dtype=torch.bool)
    blind[0, :4], blind[1] = True, True
    assert not output.transpose(1, 2)[blind].any() and output.transpose(1, 2)[~blind].all()
    assert not grads["q"].transpose(1, 2)[blind].any()
    assert not grads["k"][1].any() and not grads["v"][1].any()
    spoilt = dict(tensors, q=tensors["q"].clone())
    spoilt["q"].transpose(1, 2)[blind] = float("nan")
    with torch.no_grad():
        assert torch.equal(call(spoilt), output)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("bounded", [False, True])
def test_prefix_attention_low_precision(bounded, group, dtype):
    shape = shape_of(4, 4, 4 // group, 65, 65, 64, 3, 33)
    tensors, ids = make(shape, dtype)
    lengths, bounds = lengths_of(shape), padded(4, 65, 65) if bounded else None

    def eager(t):
        return eager_attention(t["q"], t["k"], t["v"], prefix_from(t, lengths), ids, bounds)

    check(caller(ids, lengths, bounds), tensors, dtype, eager=eager)


@pytest.mark.parametrize("prefix_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_prefix_attention_prefix_of_another_dtype(prefix_dtype):
    shape = shape_of(3, 4, 2, 9, 9, 16, 2, 5)
    tensors, ids = make(shape, torch.float32)
    for name in ("prefix.k", "prefix.v"):
        tensors[name] = tensors[name].to(prefix_dtype)
    output, grads = run(caller(ids, lengths_of(shape)), tensors)
    want, want_grads = run_oracle(caller(ids, lengths_of(shape)), tensors)
    torch.testing.assert_close(output.double(), want, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        close = {"rtol": 1e-2, "atol": 1e-2} if name.startswith("prefix") else {}
        torch.testing.assert_close(grad, want_grads[name].to(grad.dtype), **close)


def test_prefix_attention_reference_is_sdpa_of_each_row():
    """The oracle itself, against torch's attention of one row at a time."""
    shape = shape_of(5, 4, 2, 6, 9, 16, 2, 7)
    tensors, ids = make(shape, torch.float64)
    lengths, bounds = lengths_of(shape), BOUNDS["every row another"](shape)
    got, _ = run_oracle(caller(ids, lengths, bounds), tensors)
    for b in range(5):
        keys, values, seen = tensors["k"][b], tensors["v"][b], []
        start, end, first = (int(x[b]) for x in bounds)
        for t in range(6):
            seen.append([start <= j < end and j <= first + t for j in range(9)])
        mask = torch.tensor(seen)
        if ids[b] >= 0:
            m, length = ids[b], lengths[ids[b]]
            keys = torch.cat([tensors["prefix.k"][m, :, :length].double(), keys], 1)
            values = torch.cat([tensors["prefix.v"][m, :, :length].double(), values], 1)
            mask = torch.cat([torch.ones(6, length, dtype=torch.bool), mask], 1)
        want = F.scaled_dot_product_attention(
            tensors["q"][b][None], keys[None], values[None], attn_mask=mask, enable_gqa=True
        )[0]
        want = want.masked_fill(~mask.any(-1)[:, None], 0.0)
        torch.testing.assert_close(got[b], want)


def test_prefix_attention_gradcheck():
    shape = shape_of(3, 2, 1, 2, 3, 4, 2, 2)
    tensors, ids = make(shape, torch.float64)
    call, names = caller(ids, lengths_of(shape), padded(3, 2, 3)), list(tensors)
    leaves = [tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *args: call(dict(zip(names, args, strict=True))), leaves, check_batched_grad=False
    )


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
def test_prefix_attention_scale(scale):
    shape = shape_of(3, 4, 2, 9, 9, 16, 2, 5)
    tensors, ids = make(shape, torch.float32)
    tensors["q"] *= min(1.0, 0.25 / scale)
    check(caller(ids, lengths_of(shape), scale=scale), tensors, torch.float32)


def test_prefix_attention_large_scores():
    """Scores of several hundreds: the merge of prefix and keys must not overflow."""
    shape = shape_of(3, 2, 2, 9, 9, 16, 2, 5)
    tensors, ids = make(shape, torch.float32)
    tensors["q"] = (tensors["q"] * 64).round()
    for name in ("k", "prefix.k"):
        tensors[name] = (tensors[name] * 8).round()
    output, grads = run(caller(ids, lengths_of(shape)), tensors)
    want, want_grads = run_oracle(caller(ids, lengths_of(shape)), tensors)
    torch.testing.assert_close(output.double(), want, rtol=1e-3, atol=1e-3)
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    torch.testing.assert_close(grads["v"].double(), want_grads["v"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_prefix_attention_non_contiguous(name, bounded):
    shape = shape_of(3, 4, 2, 9, 9, 16, 3, 5)
    tensors, ids = make(shape, torch.float32)
    bounds = padded(3, 9, 9) if bounded else None
    lengths = lengths_of(shape)

    def call(t):
        changed = {key: LAYOUTS[name](value) for key, value in t.items()}
        return caller(ids, lengths, bounds)(changed)

    check(call, tensors, torch.float32)


def test_prefix_attention_upstream_gradient_of_any_layout():
    shape = shape_of(3, 4, 2, 9, 9, 16, 2, 5)
    tensors, ids = make(shape, torch.float32)
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    o = caller(ids, lengths_of(shape))(leaves)
    for layout in LAYOUTS.values():
        upstream = layout(normal(*o.shape))
        got, want = (
            torch.autograd.grad(o, list(leaves.values()), g, retain_graph=True)
            for g in (upstream, upstream.contiguous())
        )
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    torch.autograd.grad(o.sum(), list(leaves.values()))


@pytest.mark.parametrize("frozen", [["q"], ["k", "v"], ["prefix.k", "prefix.v"], ["q", "k", "v"]])
def test_prefix_attention_partly_frozen(frozen):
    shape = shape_of(3, 4, 2, 9, 9, 16, 2, 5)
    tensors, ids = make(shape, torch.float32)
    check(caller(ids, lengths_of(shape)), tensors, torch.float32, frozen)


@pytest.mark.parametrize("reentrant", [False, True])
def test_prefix_attention_checkpoint(reentrant):
    shape = shape_of(3, 4, 2, 9, 9, 16, 2, 5)
    tensors, ids = make(shape, torch.float32)
    call = caller(ids, lengths_of(shape))

    def checkpointed(t):
        return checkpoint(
            lambda *args: call(dict(zip(t, args, strict=True))),
            *t.values(),
            use_reentrant=reentrant,
        )

    assert_same(run(call, tensors), run(checkpointed, tensors))


@pytest.mark.parametrize("dtypes", ["fff", "bff", "bbb"])
def test_prefix_attention_autocast(dtypes):
    """As torch's attention: q, k and v are cast, whatever they were; the prefix keeps fp32."""
    shape = shape_of(3, 4, 2, 9, 9, 16, 2, 5)
    tensors, ids = make(shape, torch.float32)
    for name, dtype in zip("qkv", dtypes, strict=True):
        tensors[name] = tensors[name].bfloat16() if dtype == "b" else tensors[name]
    call = caller(ids, lengths_of(shape))
    with torch.autocast("cpu", torch.bfloat16):
        output, grads = run(call, tensors)
    by_hand = tensors | {name: tensors[name].bfloat16() for name in "qkv"}
    want, want_grads = run(call, by_hand)
    assert output.dtype == torch.bfloat16 and torch.equal(output, want)
    for name, grad in grads.items():
        assert grad.dtype == tensors[name].dtype
        assert torch.equal(grad, want_grads[name].to(grad.dtype)), name
    with torch.autocast("cpu", torch.bfloat16):
        assert call({n: t.double() for n, t in tensors.items()}).dtype == torch.float64


@pytest.mark.parametrize("bounded", [False, True])
def test_prefix_attention_compiled(bounded):
    shape = shape_of(4, 4, 2, 5, 5, 16, 3, 6)
    tensors, ids = make(shape, torch.float32)
    bounds, lengths = padded(4, 5, 5) if bounded else None, lengths_of(shape)
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")

    def call(t):
        prefix = Prefix(t["prefix.k"], t["prefix.v"], lengths)
        return compiled(t["q"], t["k"], t["v"], prefix, memory_ids=ids, bounds=bounds)

    got, want = run(call, tensors), run_oracle(caller(ids, lengths, bounds), tensors)
    compare("output", got[0], want[0], torch.float32, FORWARD)
    for name, grad in got[1].items():
        compare(name, grad, want[1][name], torch.float32, BACKWARD)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefix_attention_cuda(dtype):
    shape = shape_of(4, 4, 2, 65, 65, 64, 3, 33)
    tensors, ids = make(shape, dtype)
    tensors = {n: t.cuda() for n, t in tensors.items()}
    bounds = RowBounds(*(b.cuda() for b in padded(4, 65, 65)))
    check(caller(ids.cuda(), lengths_of(shape).cuda(), bounds), tensors, dtype)


def test_prefix_attention_default_scale():
    shape = shape_of(2, 2, 2, 3, 3, 16, 1, 2)
    tensors, _ = make(shape, torch.float32, "none")
    lengths = torch.tensor([2])
    same = caller(None, lengths, scale=1 / math.sqrt(16))(tensors)
    assert torch.equal(caller(None, lengths)(tensors), same)
