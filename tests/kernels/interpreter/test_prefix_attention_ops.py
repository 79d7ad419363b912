"""Prefix attention on Triton as a whole: routes, autograd, operators, torch.compile."""

from pathlib import Path

import pytest
import torch
from support.attention_shapes import BOUNDS
from support.kernel_inputs import prefix_from
from support.oracle import assert_same, run
from support.prefix_attention_cases import DTYPES, Case
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils.checkpoint import checkpoint

from koffkernels import Prefix, RowBounds, routes
from koffkernels._triton.attention import op as ops
from koffkernels._triton.attention import vendor

SIZES = (3, 2, 1, 33, 33, 64, 2, 20)


def caller(case: Case, route: str = "one_pass"):
    return lambda t: ops.run(*case.call(t), route)


@pytest.mark.parametrize("route", ops.ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_routes(dtype, route):
    case = Case(SIZES, dtype)
    assert vendor.why_not(case.call()) is None
    case.check(lambda *args: ops.run(*args, route))


@pytest.mark.parametrize("route", ops.ROUTES)
def test_any_stride(route):
    """q, k and v whose last dimension is not the dense one; their gradients then lie the same."""
    case = Case(SIZES, torch.float32)

    def call(*args):
        q, k, v = (x.mT.contiguous().mT for x in args[:3])
        return ops.run(q, k, v, *args[3:], route)

    case.check(call)


@pytest.mark.parametrize("route", ops.ROUTES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prefix_gradients_have_the_prefix_dtype(dtype, route):
    """Of which only one may be in fp32."""
    case = Case(SIZES, dtype)
    case.tensors["prefix.v"] = case.tensors["prefix.v"].to(dtype)
    case.check(lambda *args: ops.run(*args, route))


@pytest.mark.parametrize("route", ops.ROUTES)
@pytest.mark.parametrize("frozen", [["q"], ["q", "k", "v"], ["prefix.k", "prefix.v"]], ids=str)
def test_routes_partly_frozen(frozen, route):
    Case(SIZES, torch.float32).check(lambda *args: ops.run(*args, route), frozen)


def test_vendor_route_without_prefix():
    Case(SIZES[:6], torch.float32).check(lambda *args: ops.run(*args, "vendor"))


@pytest.mark.parametrize("sizes", [SIZES, (3, 2, 1, 9, 20, 64, 2, 20)], ids=str)
def test_vendor_route_leaves_what_it_cannot_to_the_other(sizes):
    bounds = BOUNDS["left padding"] if sizes is SIZES else None
    case = Case(sizes, torch.float32, bounds=bounds)
    assert vendor.why_not(case.call())
    assert_same(run(caller(case, "vendor"), case.tensors), run(caller(case), case.tensors))


@pytest.mark.parametrize("queries", [1, 5])
def test_few_queries_train_too(queries):
    """The forward then is the decode kernels', with the lse that backward needs."""
    sizes = (3, 4, 2, queries, 9, 64, 2, 20)
    Case(sizes, torch.float32).check(ops.run)


def test_two_runs_are_bit_equal():
    case = Case(SIZES, torch.float32)
    assert_same(run(caller(case), case.tensors), run(caller(case), case.tensors))


@pytest.mark.parametrize("sizes", [SIZES, (3, 2, 1, 2, 9, 64, 2, 20)], ids=str)
def test_without_autograd_the_same(sizes):
    case = Case(sizes, torch.float32)
    with torch.no_grad():
        output = caller(case)(case.tensors)
    assert torch.equal(output, run(caller(case), case.tensors)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    case = Case(SIZES, torch.float32)

    def checkpointed(t):
        def call(*args):
            return caller(case)(dict(zip(t, args, strict=True)))

        return checkpoint(call, *t.values(), use_reentrant=reentrant)

    assert_same(run(caller(case), case.tensors), run(checkpointed, case.tensors))


def test_two_backwards_and_no_double_backward():
    case = Case(SIZES, torch.float32)
    leaves = {n: t.clone().requires_grad_() for n, t in case.tensors.items()}
    o = caller(case)(leaves)
    first, second = (
        torch.autograd.grad(o.sum(), list(leaves.values()), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (g,) = torch.autograd.grad(o.square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.sum(), leaves["k"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_inputs_o_and_lse_are_kept(dtype):
    """And an fp32 prefix in q's dtype, where that is another: backward does not cast it again."""
    case = Case(SIZES, dtype)
    leaves = {n: t.clone().requires_grad_() for n, t in case.tensors.items()}
    given = {t.untyped_storage().data_ptr() for t in leaves.values()}
    kept = {}

    def pack(t):
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in given:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        o = caller(case)(leaves)
    prefix = leaves["prefix.k"].numel() + leaves["prefix.v"].numel()
    assert leaves["prefix.k"].dtype == torch.float32
    cast = 0 if dtype == torch.float32 else 2 * prefix
    assert sum(kept.values()) == o.nbytes + 4 * o.numel() // 64 + cast


def test_output_lies_as_the_next_layer_reads_it():
    o = caller(Case(SIZES, torch.float32))(Case(SIZES, torch.float32).tensors)
    assert o.transpose(1, 2).is_contiguous()


OPCHECKS = {
    "all": ((2, 2, 1, 17, 17, 64, 2, 9), "left padding", "one_pass", ()),
    "vendor": ((2, 2, 1, 17, 17, 64, 2, 9), None, "vendor", ("k",)),
    "decode": ((2, 2, 1, 1, 5, 64, 2, 9), "unwritten", "one_pass", ()),
    "no prefix": ((2, 2, 1, 17, 17, 64), None, "one_pass", ("q",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name):
    sizes, bounds, route, frozen = OPCHECKS[name]
    case = Case(sizes, torch.float32, bounds=bounds and BOUNDS[bounds])
    t = {n: x.requires_grad_(n not in frozen) for n, x in case.tensors.items()}
    q, k, v, prefix, ids, row, scale = case.call(t)
    args = (q, k, v, *(prefix or (None,) * 3), ids, *(row or (None,) * 3), scale, route)
    torch.library.opcheck(ops._forward_op, args)
    with torch.no_grad():
        o, lse = ops._forward_op(*args)
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    needs = [x is not None and x.requires_grad for x in args[:5]]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        ops._backward_op, (torch.ones_like(o), o, lse, *plain, needs), test_utils=tests
    )


def compiled(case: Case, route: str, backend="aot_eager", **options):
    def call(q, k, v, prefix, ids, bounds):
        return ops.run(q, k, v, prefix, ids, bounds, None, route)

    fast = torch.compile(call, fullgraph=True, backend=backend, **options)

    def run_it(t):
        prefix = prefix_from(t, case.lengths)
        return fast(t["q"], t["k"], t["v"], prefix, case.ids, case.bounds)

    return run_it


@pytest.mark.parametrize("route", ops.ROUTES)
@pytest.mark.parametrize("bounds", [None, "left padding"])
@pytest.mark.parametrize("frozen", [(), ("q",)])
def test_compiled(frozen, bounds, route):
    case = Case((2, 2, 1, 17, 17, 64, 2, 9), torch.float32, bounds=bounds and BOUNDS[bounds])
    want = run(caller(case, route), case.tensors, frozen)
    assert_same(run(compiled(case, route), case.tensors, frozen), want)


def test_compiled_looks_its_route_up_when_it_runs(monkeypatch):
    case, seen = Case((2, 2, 1, 17, 17, 64, 2, 9), torch.float32), []

    def choose(shape, device):
        assert Path(__file__).is_file()  # as reading a table does, it cannot be traced
        seen.append(shape.op)
        return routes.Route("vendor", None, "test", forced=True)

    monkeypatch.setattr(routes, "choose", choose)
    want = run(caller(case, "vendor"), case.tensors)
    assert_same(run(compiled(case, None), case.tensors), want)
    assert seen == ["prefix_attention"] * 2  # forward and backward


def test_compiled_once_for_every_batch():
    """Batches, lengths and ids that change compile no second time once sizes are dynamic."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(ops.run, fullgraph=True, backend=counter, dynamic=True)
    for rows, length in ((5, 11), (3, 7), (4, 13)):  # no two sizes alike
        case = Case((rows, 2, 1, length, length, 64, 2, 9), torch.float32)
        call = case.call()
        with torch.no_grad():
            assert torch.equal(fast(*call[:-1], None), ops.run(*call[:-1], None))
    assert counter.frame_count == 1


def test_compiled_graph_repeats_no_prefix():
    """No tensor of the traced forward and backward has both a batch and a prefix dimension, nor
    more elements than the largest input."""
    case = Case((7, 2, 1, 17, 17, 64, 2, 211), torch.float32)
    recorder = AotEagerAndRecordGraphs()
    run(compiled(case, "one_pass", recorder), case.tensors)
    graphs = recorder.fw_graphs + recorder.bw_graphs
    largest = max(t.numel() for t in case.tensors.values())
    seen, names = 0, []
    for graph in graphs:
        for node in graph.graph.nodes:
            names.append(str(node.target))
            values = node.meta.get("val")
            for value in values if isinstance(values, (tuple, list)) else (values,):
                if isinstance(value, torch.Tensor):
                    seen += 1
                    assert not free_symbols(value)
                    assert not {7, 211} <= set(value.shape), (node, value.shape)
                    assert value.numel() <= largest, (node, value.shape)
    assert seen > 15 and len(graphs) == 2
    assert any("koffkernels.prefix_attention.default" in name for name in names)
    assert any("koffkernels.prefix_attention_backward" in name for name in names)


def test_supports():
    q = torch.empty(1, 1, 1, 64)
    assert ops.supports(q) is None and ops.supports(q.half(), 0.5) is None
    assert "fp64" in ops.supports(q.double())
    assert "head_dim 96" in ops.supports(torch.empty(1, 1, 1, 96))
    assert "scale" in ops.supports(q, -1.0) and "scale" in ops.supports(q, 0.0)


def test_vendor_reasons():
    q = torch.empty(1, 2, 5, 64)
    call = Case((1, 2, 1, 5, 5, 64), torch.float32).call()
    assert vendor.why_not(call) is None
    one = torch.ones(1, dtype=torch.int64)
    assert "bounds" in vendor.why_not(call._replace(bounds=RowBounds(one, one, one)))
    assert "more keys" in vendor.why_not(call._replace(q=q[:, :, :3]))
    assert "fp32" in vendor.why_not(call._replace(q=q.to("meta")))


def test_integers_may_be_int32():
    case = Case(SIZES, torch.float32, bounds=BOUNDS["left padding"])
    call = case.call()
    prefix = Prefix(*call.prefix[:2], call.prefix.lengths.int())
    bounds = RowBounds(*(x.int() for x in call.bounds))
    got = ops.run(*call._replace(prefix=prefix, bounds=bounds))
    assert torch.equal(got, ops.run(*call))
