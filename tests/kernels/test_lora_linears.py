"""lora_linears: q, k and v as one operation, against each on its own."""

import pytest
import torch
import torch.nn.functional as F
from support.kernel_inputs import FP, LOW, eager_linear, ids_of, lora_from, normal, of_one_memory
from support.linears_inputs import SHAPES, caller, make, separate
from support.oracle import assert_same, check, run
from torch.utils.checkpoint import checkpoint

from koffkernels import LoRA, add_lora, force_backend, lora_linear, lora_linears

KINDS = ["none", "off", "one", "mixed"]
QKV, WITHOUT_K = SHAPES[:2]


def inputs(shape, kind, dtype):
    """Tensors, weights and ids."""
    if kind == "none":
        shape = (*shape[:3], 1)
    tensors, weights = make(shape, dtype)
    return tensors, weights, ids_of(kind, shape[0][0], shape[3])


def one_by_one(weights, ids, biases):
    """The same by ``lora_linear``."""

    def call(t):
        layers = zip(weights, biases, strict=True)
        ys = [
            lora_linear(t["x"], w, b, lora=lora_from(t, f"lora{i}"), memory_ids=ids)
            for i, (w, b) in enumerate(layers)
        ]
        return torch.cat(ys, -1)

    return call


@pytest.mark.parametrize("dtype", FP)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_linears_oracle(shape, kind, dtype):
    tensors, weights, ids = inputs(shape, kind, dtype)
    check(caller(weights, ids), tensors, dtype)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", ["none", "mixed"])
def test_lora_linears_low_precision(kind, dtype):
    shape = (9, 33), 96, ((80, 8), (40, None), (40, 8)), 3
    tensors, weights, ids = inputs(shape, kind, dtype)

    def eager(t):
        ys = [eager_linear(t["x"], w, lora_from(t, f"lora{i}"), ids) for i, w in enumerate(weights)]
        return torch.cat(ys, -1)

    check(caller(weights, ids), tensors, dtype, eager=eager)


@pytest.mark.parametrize("shape", [QKV, WITHOUT_K], ids=str)
def test_lora_linears_is_each_on_its_own(shape):
    """Bit for bit, but for x's gradient, whose three terms are added in another order."""
    tensors, weights, ids = inputs(shape, "mixed", torch.float32)
    biases = [normal(len(w)) if i != 1 else None for i, w in enumerate(weights)]
    (y, grads), (want, want_grads) = (
        run(call(weights, ids, biases), tensors) for call in (caller, one_by_one)
    )
    torch.testing.assert_close(grads.pop("x"), want_grads.pop("x"))
    assert_same((y, grads), (want, want_grads))


def test_lora_linears_gradcheck():
    shape = (4, 2), 3, ((5, 2), (2, None), (2, 1)), 2
    tensors, weights = make(shape, torch.float64)
    call, names = caller(weights, torch.tensor([1, -1, 0, 1])), list(tensors)
    leaves = [tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *args: call(dict(zip(names, args, strict=True))), leaves, check_batched_grad=False
    )


@pytest.mark.parametrize("used", [0, 1, 2])
def test_lora_linears_of_which_one_output_is_used(used):
    tensors, weights, ids = inputs(QKV, "mixed", torch.float32)
    call = separate(weights, ids)
    check(lambda t: call(t)[used], tensors, torch.float32)
    _, grads = run(lambda t: call(t)[used], tensors)
    assert {name.partition(".")[0] for name, grad in grads.items() if grad is not None} == {
        "x",
        f"lora{used}",
    }


@pytest.mark.parametrize("frozen", [["x"], ["lora0.a", "lora0.b", "lora0.scaling"], ["lora2.b"]])
def test_lora_linears_partly_frozen(frozen):
    tensors, weights, ids = inputs(QKV, "mixed", torch.float32)
    check(caller(weights, ids), tensors, torch.float32, frozen)
    _, grads = run(caller(weights, ids), tensors, frozen)
    assert set(grads) == set(tensors) - set(frozen)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("layout", [lambda x: x.transpose(0, 1), lambda x: x[:, ::2]])
def test_lora_linears_non_contiguous(layout, backend):
    tensors, weights = make(((4, 4), 8, ((6, 3), (5, None), (5, 2)), 2), torch.float32)
    with force_backend(backend):
        check(caller(weights, ids_of("mixed", 4, 2), layout=layout), tensors, torch.float32)


@pytest.mark.parametrize("reentrant", [False, True])
def test_lora_linears_checkpoint(reentrant):
    tensors, weights, ids = inputs(WITHOUT_K, "mixed", torch.float32)
    call, names = caller(weights, ids), list(tensors)

    def checkpointed(t):
        return checkpoint(
            lambda *args: call(dict(zip(names, args, strict=True))),
            *t.values(),
            use_reentrant=reentrant,
        )

    assert_same(run(call, tensors), run(checkpointed, tensors))


def test_lora_linears_compiled():
    tensors, weights, ids = inputs(WITHOUT_K, "mixed", torch.float32)
    compiled = torch.compile(lora_linears, fullgraph=True, backend="aot_eager")

    def call(t):
        lora = [lora_from(t, f"lora{i}") for i in range(3)]
        return torch.cat(compiled(t["x"], weights, lora=lora, memory_ids=ids), -1)

    (got, grads), (want, want_grads) = (run(f, tensors) for f in (call, caller(weights, ids)))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, want_grads)


def test_lora_linears_without_lora_are_the_base():
    tensors, weights, _ = inputs(QKV, "mixed", torch.float32)
    for y, w in zip(lora_linears(tensors["x"], weights), weights, strict=True):
        assert torch.equal(y, F.linear(tensors["x"], w))


def test_lora_linears_refuses_what_does_not_fit():
    tensors, weights, ids = inputs(QKV, "mixed", torch.float32)
    q, k, v = (lora_from(tensors, f"lora{i}") for i in range(3))
    narrow, trained = weights[1][:, 1:], weights[2].clone().requires_grad_()
    one = LoRA(*(part[:1] for part in k))
    for message, given in {
        "weights must be one to three, got 4": {"weights": weights + weights[:1]},
        "weights must be one to three, got 0": {"weights": []},
        "lora must have an entry for each of 3 weights, got 2": {"lora": [q, k]},
        "biases must have an entry for each of 3 weights, got 1": {"biases": [None]},
        r"lora\[1\].b must have shape": {"lora": [q, q, None]},
        "x must have last dimension 39": {"weights": [weights[0], narrow, weights[2]]},
        r"weights\[2\] must be frozen": {"weights": [*weights[:2], trained]},
        "memory_ids must be given": {"memory_ids": None},
        r"lora must hold equally many memories .* got \[1, 2\]": {"lora": [q, one, None]},
    }.items():
        arguments = {"weights": weights, "lora": [q, k, v], "memory_ids": ids} | given
        with pytest.raises(ValueError, match=f"lora_linears: {message}"):
            lora_linears(tensors["x"], **arguments)


@pytest.mark.parametrize("ids", [None, torch.tensor([0, -1, 0])], ids=["all rows", "some"])
def test_one_memory_may_be_given_without_its_dimension(ids):
    tensors, weights = make((*QKV[:3], 1), torch.float32)
    given = of_one_memory(tensors)
    check(caller(weights, ids), given, torch.float32)
    got, want = run(caller(weights, ids), given), run(caller(weights, ids), tensors)
    assert_same(got, (want[0], of_one_memory(want[1])))

    def added(t):
        y = F.linear(t["x"], weights[0].to(t["x"].dtype))
        return add_lora(y, t["x"], lora_from(t, "lora0"), ids)

    used = {n: t for n, t in tensors.items() if n == "x" or n.startswith("lora0")}
    got, want = run(added, of_one_memory(used)), run(added, used)
    assert_same(got, (want[0], of_one_memory(want[1])))
