"""gated_mlp: values, gradients, bit equality with the base model, pieces, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from support.kernel_inputs import (
    ALL,
    FP,
    LOW,
    eager_mlp,
    ids_of,
    master,
    mlp_lora_from,
    of_one_memory,
)
from support.mlp_inputs import PARTS, SHAPES, caller, eager_caller, make
from support.oracle import assert_same, check, run, run_oracle
from torch.utils.checkpoint import checkpoint

from koffkernels import GatedMLPLoRA, force_backend, gated_mlp, recompute_hidden
from koffkernels._torch import gated_mlp as implementation


@pytest.mark.parametrize("dtype", FP)
@pytest.mark.parametrize("kind", ["none", "off", "one", "mixed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_mlp_oracle(shape, kind, dtype):
    if kind == "none":
        shape = (*shape[:3], 1, shape[4])
    tensors, weights = make(shape, dtype)
    check(caller(weights, ids_of(kind, shape[0][0], shape[3])), tensors, dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("gates", ["none", "zeros", "ones", "mixed"])
def test_gated_mlp_gates_and_activations(gates, activation):
    tensors, weights = make(((3, 5), 12, 20, 2, 3), torch.float32, gates=gates)
    check(caller(weights, ids_of("mixed", 3, 2), activation), tensors, torch.float32)


@pytest.mark.parametrize("gates", ["none", "mixed"])
@pytest.mark.parametrize(
    "parts", [(), ("gate",), ("up",), ("down",), ("gate", "down"), ("gate", "up")], ids=str
)
def test_gated_mlp_only_some_parts_have_lora(parts, gates):
    tensors, weights = make(((3, 5), 12, 20, 2, 3), torch.float32, parts, gates)
    check(caller(weights, ids_of("mixed", 3, 2)), tensors, torch.float32)


@pytest.mark.parametrize("parts", [PARTS, ("down",), ()], ids=str)
def test_gated_mlp_recompute_keeps_nothing_wide_and_gives_the_same_bits(parts):
    tensors, weights = make(((4, 30), 12, 80, 2, 3), torch.float32, parts)
    call, saved = caller(weights, ids_of("mixed", 4, 2)), []
    want = run(call, tensors)

    def pack(t):
        saved.append(t.shape)
        return t

    with recompute_hidden(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        assert_same(run(call, tensors), want)
    assert not [shape for shape in saved if shape.numel() >= 4 * 30 * 80]
    assert any(shape.numel() == 4 * 30 * 12 for shape in saved)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", ["none", "mixed"])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated_mlp_low_precision(activation, kind, dtype):
    tensors, weights = make(((9, 33), 64, 160, 1 if kind == "none" else 3, 8), dtype)
    ids = ids_of(kind, 9, 3)
    eager = eager_caller(weights, ids, activation)
    check(caller(weights, ids, activation), tensors, dtype, eager=eager)


def test_gated_mlp_reference_is_the_merged_weights():
    """The oracle itself, against W + scaling B A merged by hand."""
    tensors, weights = make(((5, 3), 6, 10, 2, 3), torch.float64)
    ids, lora = torch.tensor([1, -1, 0, 1, 0]), mlp_lora_from(tensors)
    got, _ = run_oracle(caller(weights, ids), tensors)
    for b, m in enumerate(ids.tolist()):
        merged = weights if m < 0 else None
        if merged is None:
            pairs = zip(weights, lora, strict=True)
            merged = [w + part.scaling[m] * part.b[m] @ part.a[m] for w, part in pairs]
        gate, up = tensors["x"][b] @ merged[0].T, tensors["x"][b] @ merged[1].T
        want = (gate * torch.sigmoid(gate) * up * tensors["gates"]) @ merged[2].T
        torch.testing.assert_close(got[b], want)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_mlp_gradcheck(activation):
    tensors, weights = make(((4, 2), 3, 5, 2, 2), torch.float64)
    call, names = caller(weights, torch.tensor([1, -1, 0, 1]), activation), list(tensors)
    leaves = [tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *args: call(dict(zip(names, args, strict=True))), leaves, check_batched_grad=False
    )


# Everything in one piece, whole rows, parts of a row, and neurons that alone exceed a piece.
@pytest.mark.filterwarnings("error")  # torch warns when it must resize an out= argument
@pytest.mark.parametrize("elements", [1 << 18, 250, 65, 7])
def test_gated_mlp_pieces(elements, monkeypatch):
    tensors, weights = make(((7, 5), 12, 20, 2, 3), torch.float32)
    want = run(caller(weights, ids_of("mixed", 7, 2)), tensors)
    monkeypatch.setattr(implementation, "PIECE_ELEMENTS", elements)
    pieces = implementation._pieces((7, 5, 20), torch.device("cpu"))
    assert len(pieces) == {1 << 18: 1, 250: 4, 65: 14, 7: 35}[elements]
    check(caller(weights, ids_of("mixed", 7, 2)), tensors, torch.float32)
    torch.testing.assert_close(run(caller(weights, ids_of("mixed", 7, 2)), tensors), want)


@pytest.mark.parametrize("shape", [((2, 2), 1, (1 << 18) + 3, 1, 1), ((300, 1), 2, 1021, 2, 1)])
def test_gated_mlp_pieces_at_full_size(shape):
    tensors, weights = make(shape, torch.float32, ("down",))
    check(caller(weights, ids_of("mixed", shape[0][0], shape[3])), tensors, torch.float32)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    ],
    ids=["transposed", "strided", "expanded", "column-major"],
)
def test_gated_mlp_non_contiguous(layout):
    tensors, weights = make(((4, 4), 8, 12, 2, 3), torch.float32)
    both = torch.cat(weights[:2])  # views of one [2 I, H] buffer, and a transposed w_down
    weights = [both[:12], both[12:], weights[2].T.contiguous().T]
    check(caller(weights, ids_of("mixed", 4, 2), layout=layout), tensors, torch.float32)


@pytest.mark.parametrize(
    "frozen",
    [
        ["x"],
        ["gates"],
        ["x", "gates"],
        [f"{part}.{name}" for part in PARTS for name in ("a", "b", "scaling")],
        ["x", *(f"{part}.{name}" for part in PARTS for name in ("a", "b", "scaling"))],
        ["gate.a", "up.b", "down.a", "down.b", "down.scaling"],
    ],
    ids=["x", "gates", "x+gates", "lora", "all but gates", "some of lora"],
)
def test_gated_mlp_partly_frozen(frozen):
    tensors, weights = make(((3, 5), 8, 12, 2, 4), torch.float32)
    call = caller(weights, ids_of("mixed", 3, 2))
    check(call, tensors, torch.float32, frozen)
    _, grads = run(call, tensors, frozen)
    assert set(grads) == set(tensors) - set(frozen)
    assert all(grad is not None for grad in grads.values())


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("gates", ["none", "ones"])
@pytest.mark.parametrize("parts", [(), PARTS])
@pytest.mark.parametrize("lead", [(3, 5), (9,)], ids=str)
def test_gated_mlp_without_memory_is_bit_equal_to_base(lead, parts, gates, dtype):
    tensors, weights = make((lead, 24, 40, 2, 4), dtype, parts, gates)
    ids = ids_of("off", lead[0], 2) if parts else None

    def plain(t):
        h = F.silu(F.linear(t["x"], weights[0])) * F.linear(t["x"], weights[1])
        return F.linear(h, weights[2])

    output, grads = run(caller(weights, ids), tensors)
    want, want_grads = run(plain, tensors)
    assert torch.equal(output, want)
    if parts or gates == "ones":
        check(caller(weights, ids), tensors, dtype)
    else:
        assert torch.equal(grads["x"], want_grads["x"])


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("gates", ["none", "ones", "mixed"])
@pytest.mark.parametrize("parts", [(), PARTS])
def test_gated_mlp_with_gate_and_up_in_one_weight(parts, gates, dtype):
    """As of weights of their own, but for rounding; bit-equal to a base that has one weight."""
    tensors, (w_gate, w_up, w_down) = make(((3, 5), 48, 80, 2, 3), dtype, parts, gates)
    whole = torch.cat([w_gate, w_up])
    ids = ids_of("mixed", 3, 2)
    call = caller((*whole.chunk(2), w_down), ids)
    want = run(call, tensors)
    if dtype in FP:
        check(call, tensors, dtype)
    with recompute_hidden():
        assert_same(run(call, tensors), want)
    x = tensors["x"]
    gate, up = F.linear(x, whole).chunk(2, -1)
    z = torch.ones(80) if gates == "ones" else None
    got = gated_mlp(x, *whole.chunk(2), w_down, gates=z)
    assert torch.equal(got, F.linear(F.silu(gate) * up, w_down))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("used", [False, True])
def test_gated_mlp_bad_memory_stays_in_its_rows(used, bad, backend):
    """Memory 0: the one that a row without memory (-1) would read if its id were clamped."""
    tensors, weights = make(((4, 5), 8, 12, 3, 4), torch.float32)
    ids = torch.tensor([1, 0 if used else 2, -1, 2])
    rows = torch.tensor([0, 2, 3]) if used else torch.arange(4)
    spoilt = dict(tensors)
    memories = [f"{part}.{name}" for part in PARTS for name in ("a", "b")]
    for name in memories:
        spoilt[name] = tensors[name].clone()
        spoilt[name][0] = bad
    with force_backend(backend):
        clean, broken = (run(caller(weights, ids), t) for t in (tensors, spoilt))
    assert torch.equal(clean[0][rows], broken[0][rows])
    assert torch.equal(clean[1]["x"][rows], broken[1]["x"][rows])
    assert used or torch.equal(clean[1]["gates"], broken[1]["gates"])
    for name in memories:
        assert torch.equal(clean[1][name][1:], broken[1][name][1:]), name


def test_gated_mlp_two_backwards_and_two_runs_are_bit_equal():
    torch.use_deterministic_algorithms(False)
    tensors, weights = make(((16, 9), 32, 48, 3, 8), torch.float32)
    call = caller(weights, ids_of("mixed", 16, 3))
    first = run(call, tensors)
    assert_same(first, run(call, tensors))
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    y, again = call(leaves), list(leaves.values())
    twice = [torch.autograd.grad(y.sum(), again, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


def test_gated_mlp_mixed_batch_equals_rows_one_at_a_time():
    tensors, weights = make(((6, 5), 16, 24, 2, 4), torch.float32)
    ids = ids_of("mixed", 6, 2)
    whole = caller(weights, ids)(tensors)
    for b in range(6):
        alone = caller(weights, ids[b : b + 1])(tensors | {"x": tensors["x"][b : b + 1]})
        torch.testing.assert_close(whole[b : b + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gated_mlp_checkpoint(reentrant):
    tensors, weights = make(((3, 5), 8, 12, 2, 4), torch.float32)
    call = caller(weights, ids_of("mixed", 3, 2))

    def checkpointed(t):
        return checkpoint(
            lambda *args: call(dict(zip(t, args, strict=True))),
            *t.values(),
            use_reentrant=reentrant,
        )

    assert_same(run(call, tensors), run(checkpointed, tensors))


def test_gated_mlp_double_backward_is_refused():
    """Better than a silently wrong second derivative."""
    tensors, weights = make(((3, 5), 8, 12, 2, 4), torch.float32)
    x = tensors["x"].requires_grad_()
    y = caller(weights, ids_of("mixed", 3, 2))(tensors)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("parts", [(), PARTS])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_gated_mlp_autocast(x_dtype, parts):
    tensors, weights = make(((4, 33), 64, 160, 2, 8), torch.float32, parts)
    tensors["x"] = tensors["x"].to(x_dtype)
    ids = ids_of("mixed", 4, 2)

    def under_autocast(function):
        def call(t):
            wide = [w.to(master(t["x"].dtype)) for w in weights]
            with torch.autocast("cpu", torch.bfloat16, enabled=t["x"].dtype != torch.float64):
                return function(t, wide)

        return call

    def ours(t, wide):
        extra = {"gates": t["gates"], "lora": mlp_lora_from(t)}
        return gated_mlp(t["x"], *wide, memory_ids=ids, **extra)

    def eager(t, wide):
        return eager_mlp(t["x"].bfloat16(), wide, t["gates"], mlp_lora_from(t), ids, "silu")

    output, grads = run(under_autocast(ours), tensors)
    assert output.dtype == torch.bfloat16
    assert {n: g.dtype for n, g in grads.items()} == {n: t.dtype for n, t in tensors.items()}
    check(under_autocast(ours), tensors, torch.bfloat16, eager=under_autocast(eager))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gated_mlp_base_weight_gets_no_gradient(which):
    tensors, weights = make(((3, 5), 8, 12, 2, 4), torch.float32)
    weights[which].requires_grad_()
    call = caller(weights, ids_of("mixed", 3, 2))
    name = ("w_gate", "w_up", "w_down")[which]
    with pytest.raises(ValueError, match=f"{name} must be frozen"):
        call(tensors)
    with torch.no_grad():
        call(tensors)


@pytest.mark.parametrize("parts", [(), PARTS])
def test_gated_mlp_keeps_only_x_g_u_and_s(parts):
    tensors, weights = make(((4, 16), 32, 64, 2, 4), torch.float32, parts)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    given = {t.untyped_storage().data_ptr() for t in (*leaves.values(), *weights)}
    kept = {}

    def pack(t):
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in given:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = caller(weights, ids_of("mixed", 4, 2))(leaves)
    tokens, width, rank, size = 4 * 16, 64, 4, 4
    assert sum(kept.values()) <= tokens * (2 * width + len(parts) * rank) * size
    y.sum().backward()


def test_gated_mlp_compiled():
    tensors, weights = make(((4, 5), 8, 12, 3, 2), torch.float32)
    ids = ids_of("mixed", 4, 3)
    compiled = torch.compile(gated_mlp, fullgraph=True, backend="aot_eager")

    def call(t):
        extra = {"gates": t["gates"], "lora": mlp_lora_from(t)}
        return compiled(t["x"], *weights, memory_ids=ids, **extra)

    torch.testing.assert_close(run(call, tensors), run(caller(weights, ids), tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_mlp_cuda(dtype):
    tensors, weights = make(((9, 33), 64, 160, 3, 8), dtype)
    tensors = {n: t.cuda() for n, t in tensors.items()}
    call = caller([w.cuda() for w in weights], ids_of("mixed", 9, 3).cuda())
    check(call, tensors, dtype)
    assert_same(run(call, tensors), run(call, tensors))


def test_gated_mlp_empty_lora_is_none():
    tensors, weights = make(((3, 5), 8, 12, 2, 4), torch.float32, (), "none")
    assert torch.equal(
        gated_mlp(tensors["x"], *weights, lora=GatedMLPLoRA()), gated_mlp(tensors["x"], *weights)
    )


@pytest.mark.parametrize("ids", [None, torch.tensor([0, -1, 0])], ids=["all rows", "some"])
@pytest.mark.parametrize("parts", [PARTS, ("down",)], ids=str)
def test_one_memory_may_be_given_without_its_dimension(parts, ids):
    tensors, weights = make(((3, 7), 13, 29, 1, 5), torch.float32, parts)
    given, call = of_one_memory(tensors), caller(weights, ids)
    check(call, given, torch.float32)
    got, want = run(call, given), run(call, tensors)
    assert_same(got, (want[0], of_one_memory(want[1])))
