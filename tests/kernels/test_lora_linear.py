"""lora_linear: values, gradients, memories that must not leak, and what it may cost."""

import pytest
import torch
import torch.nn.functional as F
from support.kernel_inputs import ALL, FP, LOW, eager_linear, ids_of, lora_from, master, normal
from support.linear_inputs import SHAPES, caller, make
from support.oracle import assert_same, check, run, run_oracle
from torch.utils.checkpoint import checkpoint

from koffkernels import LoRA, add_lora, force_backend, lora_linear


@pytest.mark.parametrize("dtype", FP)
@pytest.mark.parametrize("kind", ["none", "off", "one", "mixed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_linear_oracle(shape, kind, dtype):
    if kind == "none":
        shape = (*shape[:3], 1, shape[4])
    tensors, weights = make(shape, dtype)
    check(caller(weights, ids_of(kind, shape[0][0], shape[3])), tensors, dtype)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", ["none", "mixed"])
def test_lora_linear_low_precision(kind, dtype):
    tensors, weights = make(((9, 33), 96, 80, 1 if kind == "none" else 3, 8), dtype)
    ids = ids_of(kind, 9, 3)

    def eager(t):
        return eager_linear(t["x"], weights["w"], lora_from(t, "lora"), ids)

    check(caller(weights, ids), tensors, dtype, eager=eager)


def test_lora_linear_reference_is_the_merged_weight():
    """The oracle itself, against W + scaling B A merged by hand."""
    tensors, weights = make(((5, 3), 7, 6, 2, 3), torch.float64)
    ids, lora = torch.tensor([1, -1, 0, 1, 0]), lora_from(tensors, "lora")
    got, _ = run_oracle(caller(weights, ids), tensors)
    for b, m in enumerate(ids.tolist()):
        w = weights["w"] if m < 0 else weights["w"] + lora.scaling[m] * lora.b[m] @ lora.a[m]
        torch.testing.assert_close(got[b], tensors["x"][b] @ w.T)


def test_lora_linear_gradcheck():
    tensors, weights = make(((4, 2), 3, 5, 2, 2), torch.float64)
    call, names = caller(weights, torch.tensor([1, -1, 0, 1])), list(tensors)
    leaves = [tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *args: call(dict(zip(names, args, strict=True))), leaves, check_batched_grad=False
    )


@pytest.mark.parametrize("dtype", FP)
def test_lora_linear_bias(dtype):
    tensors, weights = make(((3, 5), 8, 6, 2, 4), dtype)
    check(caller(weights, ids_of("mixed", 3, 2), normal(6, dtype=dtype)), tensors, dtype)


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
def test_lora_linear_non_contiguous(layout):
    tensors, weights = make(((4, 4), 8, 6, 2, 3), torch.float32)
    tensors |= {"lora.a": tensors["lora.a"].transpose(1, 2).contiguous().transpose(1, 2)}
    check(caller(weights, ids_of("mixed", 4, 2), layout=layout), tensors, torch.float32)


@pytest.mark.parametrize("frozen", [["x"], ["lora.a", "lora.b", "lora.scaling"], ["lora.a", "x"]])
def test_lora_linear_partly_frozen(frozen):
    tensors, weights = make(((3, 5), 8, 6, 2, 4), torch.float32)
    call = caller(weights, ids_of("mixed", 3, 2))
    check(call, tensors, torch.float32, frozen)
    _, grads = run(call, tensors, frozen)
    assert set(grads) == set(tensors) - set(frozen)


@pytest.mark.parametrize("dtype", ALL)
def test_lora_linear_without_memory_is_bit_equal_to_base(dtype):
    tensors, weights = make(((3, 5), 24, 40, 2, 4), dtype)
    bias = normal(40, dtype=dtype)
    want = F.linear(tensors["x"], weights["w"], bias)
    off = caller(weights, ids_of("off", 3, 2), bias)
    assert torch.equal(off(tensors), want)
    assert torch.equal(lora_linear(tensors["x"], weights["w"], bias), want)
    _, grads = run(off, tensors)
    plain, plain_grads = run(lambda t: F.linear(t["x"], weights["w"], bias), tensors)
    assert torch.equal(grads["x"], plain_grads["x"])
    assert not any(grads[name].any() for name in grads if name != "x")


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("used", [False, True])
def test_lora_linear_bad_memory_stays_in_its_rows(used, bad, backend):
    """Memory 0: the one that a row without memory (-1) would read if its id were clamped."""
    tensors, weights = make(((4, 5), 8, 6, 3, 4), torch.float32)
    ids = torch.tensor([1, 0 if used else 2, -1, 2])
    rows = torch.tensor([0, 2, 3]) if used else torch.arange(4)
    spoilt = dict(tensors)
    for part in ("lora.a", "lora.b"):
        spoilt[part] = tensors[part].clone()
        spoilt[part][0] = bad
    with force_backend(backend):
        clean, broken = (run(caller(weights, ids), t) for t in (tensors, spoilt))
    assert torch.equal(clean[0][rows], broken[0][rows])
    assert torch.equal(clean[1]["x"][rows], broken[1]["x"][rows])
    for part in ("lora.a", "lora.b", "lora.scaling"):
        assert torch.equal(clean[1][part][1:], broken[1][part][1:]), part


@pytest.mark.parametrize("row", [1, 2, 3])
def test_lora_linear_bad_row_stays_in_its_memory(row):
    tensors, weights = make(((4, 5), 8, 6, 3, 4), torch.float32)
    spoilt = dict(tensors, x=tensors["x"].clone())
    spoilt["x"][row] = float("nan")
    ids = torch.tensor([0, 1, -1, 2])
    clean, broken = (run(caller(weights, ids), t) for t in (tensors, spoilt))
    others = [m for m in range(3) if m != ids[row]]
    for part in ("lora.a", "lora.b", "lora.scaling"):
        assert torch.equal(clean[1][part][others], broken[1][part][others]), part


def test_lora_linear_two_backwards_and_two_runs_are_bit_equal():
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(2)
    try:
        tensors, weights = make(((16, 9), 32, 48, 3, 8), torch.float32)
        call = caller(weights, ids_of("mixed", 16, 3))
        first = run(call, tensors)
        for _ in range(3):
            assert_same(first, run(call, tensors))
        leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
        y = call(leaves)
        again = list(leaves.values())
        twice = [torch.autograd.grad(y.sum(), again, retain_graph=True) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))
    finally:
        torch.set_num_threads(1)


def test_lora_linear_mixed_batch_equals_rows_one_at_a_time():
    tensors, weights = make(((6, 5), 16, 12, 2, 4), torch.float32)
    ids = ids_of("mixed", 6, 2)
    whole = caller(weights, ids)(tensors)
    for b in range(6):
        alone = caller(weights, ids[b : b + 1])(tensors | {"x": tensors["x"][b : b + 1]})
        torch.testing.assert_close(whole[b : b + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_lora_linear_checkpoint(reentrant):
    tensors, weights = make(((3, 5), 8, 6, 2, 4), torch.float32)
    call = caller(weights, ids_of("mixed", 3, 2))

    def checkpointed(t):
        names = list(t)
        return checkpoint(
            lambda *args: call(dict(zip(names, args, strict=True))),
            *t.values(),
            use_reentrant=reentrant,
        )

    assert_same(run(call, tensors), run(checkpointed, tensors))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_lora_linear_autocast(x_dtype):
    tensors, weights = make(((4, 33), 96, 80, 2, 8), torch.float32)
    tensors["x"] = tensors["x"].to(x_dtype)
    ids, w = ids_of("mixed", 4, 2), weights["w"]

    def under_autocast(function):
        def call(t):
            with torch.autocast("cpu", torch.bfloat16, enabled=t["x"].dtype != torch.float64):
                return function(t["x"], w.to(master(t["x"].dtype)), lora_from(t, "lora"))

        return call

    ours = under_autocast(lambda x, w, lora: lora_linear(x, w, lora=lora, memory_ids=ids))
    eager = under_autocast(lambda x, w, lora: eager_linear(x.bfloat16(), w, lora, ids))
    output, grads = run(ours, tensors)
    assert output.dtype == torch.bfloat16
    assert {n: g.dtype for n, g in grads.items()} == {n: t.dtype for n, t in tensors.items()}
    check(ours, tensors, torch.bfloat16, eager=eager)


def test_lora_linear_base_weight_gets_no_gradient():
    tensors, weights = make(((3, 5), 8, 6, 2, 4), torch.float32)
    call = caller({"w": weights["w"].requires_grad_()}, ids_of("mixed", 3, 2))
    with pytest.raises(ValueError, match="weight must be frozen"):
        call(tensors)
    with torch.no_grad():
        call(tensors)


def test_lora_linear_keeps_only_x_and_s():
    tensors, weights = make(((4, 16), 32, 64, 2, 4), torch.float32)
    kept = []
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    given = {t.untyped_storage().data_ptr() for t in (*leaves.values(), weights["w"])}

    def pack(t):
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in given:
            kept.append(t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        caller(weights, ids_of("mixed", 4, 2))(leaves)
    assert sum(kept) <= 4 * 16 * 4 * 4, "more than s [B, T, r] in fp32"


def test_lora_linear_compiled():
    tensors, weights = make(((4, 5), 8, 6, 3, 2), torch.float32)
    ids = ids_of("mixed", 4, 3)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")

    def call(t):
        lora = LoRA(t["lora.a"], t["lora.b"], t["lora.scaling"])
        return compiled(t["x"], weights["w"].to(t["x"].dtype), lora=lora, memory_ids=ids)

    output, grads = run(call, tensors)
    want, want_grads = run(caller(weights, ids), tensors)
    torch.testing.assert_close(output, want)
    torch.testing.assert_close(grads, want_grads)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_linear_cuda(dtype):
    tensors, weights = make(((9, 33), 96, 80, 3, 8), dtype)
    tensors = {n: t.cuda() for n, t in tensors.items()}
    weights = {n: t.cuda() for n, t in weights.items()}
    call = caller(weights, ids_of("mixed", 9, 3).cuda())
    check(call, tensors, dtype)
    assert_same(run(call, tensors), run(call, tensors))


@pytest.mark.parametrize("kind", ["none", "off", "one", "mixed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_lora_is_what_lora_linear_adds(shape, kind):
    if kind == "none":
        shape = (*shape[:3], 1, shape[4])
    tensors, weights = make(shape, torch.float64)
    ids = ids_of(kind, shape[0][0], shape[3])

    def added(t):
        return add_lora(F.linear(t["x"], weights["w"]), t["x"], lora_from(t, "lora"), ids)

    (got, gradients), (wanted, wanted_gradients) = (
        run(call, tensors) for call in (added, caller(weights, ids))
    )
    torch.testing.assert_close(got, wanted)
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient)


def test_add_lora_refuses_what_does_not_fit():
    tensors, weights = make(((2, 3), 8, 6, 2, 4), torch.float32)
    y, x, lora = tensors["x"].new_zeros(2, 3, 6), tensors["x"], lora_from(tensors, "lora")
    with pytest.raises(ValueError, match="add_lora: y must have shape"):
        add_lora(y[:, :2], x, lora, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"add_lora: lora.b must have shape"):
        add_lora(y[..., :5], x, lora, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="add_lora: memory_ids must be given"):
        add_lora(y, x, lora)
