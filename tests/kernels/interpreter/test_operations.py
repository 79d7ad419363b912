"""The public operations through the Triton kernels: every route, forward and gradients."""

import pytest
import torch
from support import linear_inputs, mlp_inputs
from support.kernel_inputs import ids_of, of_one_memory
from support.oracle import assert_same, check, run

import koffkernels
from koffkernels import dispatch
from koffkernels._triton.lora import linear
from koffkernels._triton.mlp import hidden_bwd, mlp

# fp16 needs sizes at which errors average out.
DTYPES = (torch.float32, torch.float16)
MLP_SHAPES = [
    *mlp_inputs.SHAPES,
    ((2, 40), 70, 133, 3, 5),  # more than one tile each way, none of them full
    ((3, 5), 33, 65, 2, 70),  # ranks beyond the fused backward
]
LINEAR_SHAPES = [*linear_inputs.SHAPES, ((2, 40), 131, 133, 3, 70)]
ROUTES = ("vendor", "fused", "decode")


def mlp_case(shape, kind, dtype):
    if kind == "none":
        shape = (*shape[:3], 1, shape[4])
    tensors, weights = mlp_inputs.make(shape, dtype)
    return mlp_inputs.caller(weights, ids_of(kind, shape[0][0], shape[3])), tensors


def linear_case(shape, kind, dtype):
    if kind == "none":
        shape = (*shape[:3], 1, shape[4])
    tensors, weights = linear_inputs.make(shape, dtype)
    return linear_inputs.caller(weights, ids_of(kind, shape[0][0], shape[3])), tensors


def test_process_interprets():
    for op in ("gated_mlp", "lora_linear", "prefix_attention"):
        choice = dispatch.choose(op, torch.device("cpu"))
        assert (choice.backend, choice.reason) == ("interpret", "set by KOFF_BACKEND")


@pytest.mark.parametrize("route", ["vendor", "fused"])
@pytest.mark.parametrize("kind", ["none", "off", "mixed"])
@pytest.mark.parametrize("shape", MLP_SHAPES, ids=str)
def test_gated_mlp_oracle(shape, kind, route):
    call, tensors = mlp_case(shape, kind, torch.float32)
    with koffkernels.force_route(route):
        check(call, tensors, torch.float32)


@pytest.mark.parametrize("route", ["vendor", "fused"])
@pytest.mark.parametrize("kind", ["none", "off", "mixed"])
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_lora_linear_oracle(shape, kind, route):
    call, tensors = linear_case(shape, kind, torch.float32)
    with koffkernels.force_route(route):
        check(call, tensors, torch.float32)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["none", "mixed"])
@pytest.mark.parametrize("case", [mlp_case, linear_case])
def test_inference_oracle(case, kind, route):
    """Without gradients, fp16: the direct calls."""
    call, tensors = case(((5, 3), 64, 96, 3, 8), kind, torch.float16)
    with koffkernels.force_route(route):
        check(call, tensors, torch.float16, frozen=tensors)


@pytest.mark.parametrize("route", ["vendor", "fused"])
@pytest.mark.parametrize("case", [mlp_case, linear_case])
def test_training_oracle_fp16(case, route):
    call, tensors = case(((5, 9), 64, 96, 3, 8), "mixed", torch.float16)
    with koffkernels.force_route(route):
        check(call, tensors, torch.float16)


@pytest.mark.parametrize("route", ["vendor", "fused"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("gates", ["none", "zeros", "ones"])
def test_gated_mlp_gates_and_activations(gates, activation, route):
    tensors, weights = mlp_inputs.make(((3, 5), 12, 20, 2, 3), torch.float32, gates=gates)
    call = mlp_inputs.caller(weights, ids_of("mixed", 3, 2), activation)
    with koffkernels.force_route(route):
        check(call, tensors, torch.float32)


@pytest.mark.parametrize(
    "parts", [(), ("gate",), ("up",), ("down",), ("gate", "down"), ("gate", "up")], ids=str
)
def test_gated_mlp_only_some_parts_have_lora(parts):
    tensors, weights = mlp_inputs.make(((3, 5), 12, 20, 2, 3), torch.float32, parts)
    check(mlp_inputs.caller(weights, ids_of("mixed", 3, 2)), tensors, torch.float32)


@pytest.mark.parametrize("rank", [3, 40])
def test_gated_mlp_recompute_gives_the_same_bits(rank):
    call, tensors = mlp_case(((3, 5), 12, 20, 2, rank), "mixed", torch.float32)
    want = run(call, tensors)
    with koffkernels.recompute_hidden():
        assert_same(run(call, tensors), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", hidden_bwd.RANK_64_CONFIGS)
@pytest.mark.parametrize("kind", ["none", "mixed"])
def test_gated_mlp_backward_of_rank_64_in_every_tile(kind, name, monkeypatch):
    tile = hidden_bwd.RANK_64_CONFIGS[name]
    monkeypatch.setattr(hidden_bwd, "RANK_64_CONFIGS", {"16x32": tile})
    # More than one tile each way, none of them full; rows long enough for the fused sums.
    call, tensors = mlp_case(((2, 300), 33, 101, 2, 40), kind, torch.float32)
    check(call, tensors, torch.float32)


@pytest.mark.parametrize(
    "frozen", [["x"], ["gates", "gate.a"], ["down.b"], ["x", "gates"]], ids=str
)
def test_gated_mlp_partly_frozen(frozen):
    call, tensors = mlp_case(((3, 5), 12, 20, 2, 3), "mixed", torch.float32)
    check(call, tensors, torch.float32, frozen=frozen)


@pytest.mark.parametrize("case", [mlp_case, linear_case])
def test_two_runs_are_bit_equal(case):
    call, tensors = case(((4, 30), 40, 70, 3, 5), "mixed", torch.float32)
    assert_same(run(call, tensors), run(call, tensors))


@pytest.mark.parametrize("route", ROUTES)
def test_memory_stays_in_its_rows(route):
    """Whatever finite numbers it holds; and one that no row has, whatever it holds."""
    tensors, weights = mlp_inputs.make(((4, 5), 12, 20, 3, 3), torch.float32)
    call = mlp_inputs.caller(weights, torch.tensor([0, 2, -1, 0]))
    frozen = tensors if route == "decode" else ()
    changed = {name: t.clone() for name, t in tensors.items()}
    for name in ("gate.a", "up.b", "down.a"):
        changed[name][1] = torch.nan
        changed[name][2] = 1e30
    with koffkernels.force_route(route):
        (want, want_grads), (output, grads) = (run(call, t, frozen) for t in (tensors, changed))
    good = [0, 2, 3]
    assert torch.equal(output[good], want[good]) and (output[1] != want[1]).all()
    for name, grad in grads.items():
        if name == "x":
            assert torch.equal(grad[good], want_grads["x"][good])
        elif name != "gates":
            assert torch.equal(grad[0], want_grads[name][0]), name
            # That of scaling is a product with b.
            assert name == "up.scaling" or not grad[1].any(), f"{name}: memory 1 was not used"


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("parts", [mlp_inputs.PARTS, ("down",), ()], ids=str)
def test_gated_mlp_opcheck(parts, recompute):
    tensors, weights = mlp_inputs.make(((2, 3), 8, 12, 2, 3), torch.float32, parts)
    names = [f"{p}.{f}" for p in mlp_inputs.PARTS for f in ("a", "b", "scaling")]
    lora = [tensors[n].requires_grad_() if n in tensors else None for n in names]
    x = tensors["x"].flatten(0, 1).requires_grad_()
    gates, ids = tensors["gates"].requires_grad_(), torch.tensor([1, -1])
    args = (x, *weights, gates, *lora, ids, 3, "silu", recompute)
    torch.library.opcheck(torch.ops.koffkernels.gated_mlp, args)


@pytest.mark.parametrize("frozen", ["none", "a"])
def test_lora_linear_opcheck(frozen):
    tensors, weights = linear_inputs.make(((2, 3), 8, 12, 2, 3), torch.float32)
    lora = [tensors[f"lora.{f}"].requires_grad_(f != frozen) for f in ("a", "b", "scaling")]
    x = tensors["x"].flatten(0, 1).requires_grad_()
    none = [None] * 5
    args = (x, weights["w"], torch.randn(12), *lora, *none, *none, torch.tensor([1, -1]), 3)
    torch.library.opcheck(torch.ops.koffkernels.lora_linear, args)


@pytest.mark.parametrize("case", [mlp_case, linear_case])
def test_compiled(case):
    call, tensors = case(((3, 5), 12, 20, 2, 3), "mixed", torch.float32)
    want = run(call, tensors)
    assert_same(run(torch.compile(call, fullgraph=True, backend="aot_eager"), tensors), want)


def strided(call):
    """The same with every other tensor a column of a wider one."""

    def with_columns(tensors):
        return call({name: torch.stack([t, t + 1], -1)[..., 0] for name, t in tensors.items()})

    return with_columns


def transposed(weights):
    return [w.t().contiguous().t() for w in weights]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("train", [False, True])
def test_any_strides(route, train):
    """Also of the weights, and a gate for all neurons that is one number in memory."""
    shape, ids = ((3, 5), 12, 20, 2, 3), ids_of("mixed", 3, 2)
    tensors, weights = mlp_inputs.make(shape, torch.float32)
    frozen = () if train else tensors
    with koffkernels.force_route(route):
        check(strided(mlp_inputs.caller(transposed(weights), ids)), tensors, torch.float32, frozen)
        call = mlp_inputs.caller(weights, ids)
        one = {**tensors, "gates": torch.full((1,), 0.7)}
        check(lambda t: call({**t, "gates": t["gates"].expand(20)}), one, torch.float32, frozen)
        tensors, weights = linear_inputs.make(shape, torch.float32)
        weights = {"w": transposed(weights.values())[0]}
        call = linear_inputs.caller(weights, ids, torch.randn(40)[::2])
        check(strided(call), tensors, torch.float32, () if train else tensors)


@pytest.mark.parametrize("case", [mlp_case, linear_case])
def test_compiled_inference_takes_the_decode_kernels_too(case, monkeypatch):
    call, tensors = case(((5, 3), 64, 96, 3, 8), "mixed", torch.float32)
    where, name = (mlp, "decode_mlp_up") if case is mlp_case else (linear, "decode_linears")
    real, seen = getattr(where, name), []
    monkeypatch.setattr(where, name, lambda *args: seen.append(1) or real(*args))
    with koffkernels.force_route("decode"), torch.no_grad():
        want = call(tensors)
        got = torch.compile(call, fullgraph=True, backend="aot_eager")(tensors)
    assert torch.equal(got, want) and len(seen) == 2


@pytest.mark.parametrize("op", ["gated_mlp_backward", "lora_linear_backward"])
def test_backward_operators_keep_the_layout_they_promise(op, monkeypatch):
    """Inductor checks strides at run time; aot_eager does not."""
    mlp = op.startswith("gated")
    case = mlp_case if mlp else linear_case
    call, tensors = case(((2, 3), 8, 12, 2, 3), "mixed", torch.float32)
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() == f"koffkernels::{op}":
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with Record():
        run(call, tensors)
    assert len(seen) == 1
    torch.library.opcheck(seen[0][0], seen[0][1], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("ids", [None, torch.tensor([0, -1, 0])], ids=["all rows", "some"])
@pytest.mark.parametrize("parts", [mlp_inputs.PARTS, ("down",)], ids=str)
def test_gated_mlp_of_one_memory_may_be_given_without_its_dimension(parts, ids):
    tensors, weights = mlp_inputs.make(((3, 7), 13, 29, 1, 5), torch.float32, parts)
    given, call = of_one_memory(tensors), mlp_inputs.caller(weights, ids)
    check(call, given, torch.float32)
    got, want = run(call, given), run(call, tensors)
    assert_same(got, (want[0], of_one_memory(want[1])))
