"""lora_linears through the Triton kernels: every route, forward and gradients."""

import pytest
import torch
from support.kernel_inputs import ids_of, normal, of_one_memory
from support.linears_inputs import SHAPES, caller, make, separate
from support.oracle import assert_same, check, run

import koffkernels
from koffkernels._triton.lora.grad import lora_grads
from koffkernels._triton.lora.shrink import shrink, shrink_each
from koffkernels._triton.shared.launch import Rows
from koffkernels._triton.shared.reduce import totals

# Several tiles each way, none of them full; K in several splits, of which the narrower gradients
# have fewer; and ranks of several steps.
LARGE = ((2, 40), 131, ((1100, 5), (133, 70), (30, None)), 3)
QKV = SHAPES[0]
ODD = ((3, 5), 13, ((20, 3), (9, None), (8, 2)), 2)


def inputs(shape, kind, dtype=torch.float32):
    """Tensors, weights, ids, and a bias for all but the second."""
    if kind == "none":
        shape = (*shape[:3], 1)
    tensors, weights = make(shape, dtype)
    biases = [normal(len(w), dtype=dtype) if i != 1 else None for i, w in enumerate(weights)]
    return tensors, weights, ids_of(kind, shape[0][0], shape[3]), biases


@pytest.mark.parametrize("route", ["vendor", "fused"])
@pytest.mark.parametrize("kind", ["none", "off", "mixed"])
@pytest.mark.parametrize("shape", [*SHAPES, pytest.param(LARGE, marks=pytest.mark.slow)], ids=str)
def test_lora_linears_oracle(shape, kind, route):
    tensors, *rest = inputs(shape, kind)
    with koffkernels.force_route(route):
        check(caller(*rest), tensors, torch.float32)


@pytest.mark.parametrize("kind", ["none", "mixed"])
def test_lora_linears_fp16(kind):
    tensors, *rest = inputs(LARGE, kind, torch.float16)
    check(caller(*rest), tensors, torch.float16)


@pytest.mark.parametrize("route", ["vendor", "decode"])
@pytest.mark.parametrize("kind", ["none", "off", "one", "mixed"])
@pytest.mark.parametrize("shape", [*SHAPES, LARGE], ids=str)
def test_lora_linears_inference(shape, kind, route):
    tensors, *rest = inputs(shape, kind)
    with koffkernels.force_route(route):
        check(caller(*rest), tensors, torch.float32, frozen=tensors)


def test_lora_linears_of_unknown_memories_are_the_base():
    """Ids that are none of the memories, and NaN in all of these."""
    tensors, weights, *_ = inputs(QKV, "mixed")
    for name in tensors:
        if name != "x":
            tensors[name].fill_(torch.nan)
    call = caller(weights, torch.tensor([7, -5, 10**9]))
    want = torch.cat([tensors["x"] @ w.T for w in weights], -1)
    for route in ("vendor", "fused", "decode"):
        with koffkernels.force_route(route), torch.no_grad():
            torch.testing.assert_close(call(tensors), want)
    y, grads = run(call, tensors)
    torch.testing.assert_close(y, want)
    assert grads["x"].isfinite().all()


@pytest.mark.parametrize("route", ["vendor", "fused", "decode"])
def test_lora_linears_memory_stays_in_its_rows_and_its_layer(route):
    """Whatever finite numbers it holds."""
    tensors, weights = make(((4, 5), 12, ((20, 3), (8, 3), (8, 3)), 3), torch.float32)
    call = caller(weights, torch.tensor([0, 2, -1, 0]))
    frozen = tensors if route == "decode" else ()
    spoilt = tensors | {"lora1.b": tensors["lora1.b"].clone()}
    spoilt["lora1.b"][2] = 1e30
    with koffkernels.force_route(route):
        (y, grads), (got, got_grads) = (run(call, t, frozen) for t in (tensors, spoilt))
    bad = torch.zeros_like(y, dtype=torch.bool)
    bad[1, :, 20:28] = True
    assert (got[bad].abs() > 1e20).all() and torch.equal(got[~bad], y[~bad])
    for name, grad in grads.items():
        if name == "x":
            kept = [0, 2, 3]
        else:
            kept = slice(0, 2) if name.startswith("lora1") else slice(None)
        assert torch.equal(got_grads[name][kept], grad[kept]), name


@pytest.mark.parametrize("used", [0, 2])
def test_lora_linears_of_which_one_output_is_used(used):
    """The updates of the others have no gradient at all; also where torch.compile asks for it."""
    tensors, weights, ids, _ = inputs(QKV, "mixed")
    call = separate(weights, ids)
    check(lambda t: call(t)[used], tensors, torch.float32)
    compiled = torch.compile(lambda t: call(t)[used], fullgraph=True, backend="aot_eager")
    got = run(lambda t: call(t)[used], tensors)
    assert_same(run(compiled, tensors), got)
    assert {name.partition(".")[0] for name, grad in got[1].items() if grad is not None} == {
        "x",
        f"lora{used}",
    }


@pytest.mark.parametrize("frozen", [["x"], ["lora0.a"], ["lora1.a", "lora1.b", "lora1.scaling"]])
def test_lora_linears_partly_frozen(frozen):
    tensors, weights, ids, _ = inputs(QKV, "mixed")
    check(caller(weights, ids), tensors, torch.float32, frozen=frozen)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("route", ["vendor", "decode"])
def test_lora_linears_compiled(route, train):
    tensors, *rest = inputs(ODD, "mixed")
    call, frozen = caller(*rest), () if train else tensors
    with koffkernels.force_route(route):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert_same(run(compiled, tensors, frozen), run(call, tensors, frozen))


@pytest.mark.parametrize("route", ["vendor", "fused", "decode"])
@pytest.mark.parametrize("train", [False, True])
def test_lora_linears_any_strides(route, train):
    """Columns of wider tensors, odd addresses, weights that lie across."""
    tensors, weights, ids, _ = inputs(ODD, "mixed")
    across = [w.t().contiguous().t() for w in weights]
    call = caller(across, ids, [normal(2 * len(w) + 1)[1::2] for w in weights])

    def columns(t):
        return call({name: torch.stack([v + 1, v], -1)[..., 1] for name, v in t.items()})

    with koffkernels.force_route(route):
        check(columns, tensors, torch.float32, () if train else tensors)


@pytest.mark.slow
@pytest.mark.parametrize("ids", [None, torch.tensor([2, -1, 0, 5])], ids=["one", "mixed"])
@pytest.mark.parametrize("tokens", [1, 17])
def test_narrow_kernels_of_three_are_those_of_one(tokens, ids):
    m, n, rows = 4 * tokens, 3, Rows(ids, tokens)
    x, ranks, widths = normal(m, 70), (5, 20, 3), (70, 33, 1300)
    dys = [normal(m, w) for w in widths]
    a = [normal(n, r, 70) for r in ranks]
    b = [normal(n, w, r).transpose(1, 2) for w, r in zip(widths, ranks, strict=True)]
    s, t = shrink(x, a, rows), shrink_each(dys, b, rows)
    torch.testing.assert_close(s, torch.cat([shrink(x, [part], rows) for part in a], 1))
    alone = [shrink(dy, [part], rows) for dy, part in zip(dys, b, strict=True)]
    torch.testing.assert_close(t, torch.cat(alone, 1))
    pairs = list(zip(s.split(ranks, 1), dys, strict=True))
    scaling = [torch.rand(n) for _ in ranks]
    sums = lora_grads(pairs, n, rows)
    together = [torch.empty(n, w, r) for w, r in zip(widths, ranks, strict=True)]
    totals(sums, together, scaling, transposed=True)
    for pair, scale, got in zip(pairs, scaling, together, strict=True):
        want = lora_grads([pair], n, rows)[0].total(torch.float32, scale, transposed=True)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("ids", [None, torch.tensor([0, -1, 0])], ids=["all rows", "some"])
@pytest.mark.parametrize("route", ["vendor", "fused", "decode"])
def test_one_memory_may_be_given_without_its_dimension(route, ids):
    tensors, weights = make((*QKV[:3], 1), torch.float32)
    frozen, given = tensors if route == "decode" else (), of_one_memory(tensors)
    with koffkernels.force_route(route):
        check(caller(weights, ids), given, torch.float32, frozen)
        got, want = (run(caller(weights, ids), t, frozen) for t in (given, tensors))
    assert_same(got, (want[0], of_one_memory(want[1])))
