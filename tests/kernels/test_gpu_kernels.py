"""The operations on a GPU, on every route: values and gradients against the fp64 oracle on the CPU,
CUDA graphs, torch.compile, bit equality, no synchronisation."""

import contextlib

import pytest
import torch
from support.gpu_cases import ATTENTION, BUILDERS, NAMES, SHAPES, Case
from support.gpu_checks import DEVICE, OPS, TYPICAL, attended_by, build, check, routed
from support.oracle import (
    assert_same,
    compare,
    cotangent_for,
    leaves_of,
    run,
    run_oracle,
    typical_of,
)
from support.tolerances import BACKWARD, FORWARD

from koffkernels import force_backend
from koffkernels.dispatch import _automatic

pytestmark = pytest.mark.gpu

ROUTES = ("automatic", "vendor", "fused")
every_op = pytest.mark.parametrize("op", OPS)
every_dtype = pytest.mark.parametrize("dtype", NAMES)
every_route = pytest.mark.parametrize("route", ROUTES)
# "longer" has more keys than queries, which the vendor's attention does not take.
SQUARE = "square-64"
CASES = [*TYPICAL.items(), ("prefix_attention", SQUARE)]
SQUARES = [SQUARE, "square-128", "square-odd", "no-prefix"]
every_case = pytest.mark.parametrize("op,shape", CASES, ids=str)
DECODE = {  # at most 64 tokens
    "lora_linear": [
        ((1, 1), 520, 1416, 1, 16),
        ((64, 1), 520, 1416, 8, 16),
        ((61,), 67, 131, 40, 5),
    ],
    "lora_linears": [((1, 1), 520, 1416, 1, 16), ((61,), 67, 131, 40, 5)],
    "gated_mlp": [((1, 1), 520, 1416, 1, 16), ((64, 1), 520, 1416, 8, 16), ((61,), 67, 131, 40, 5)],
    "prefix_attention": ["one-token"],
}


@pytest.fixture(autouse=True)
def fp32_accumulation():
    """Tolerances assume products that accumulate in fp32; by default cuBLAS may split a sum and add
    its parts in 16 bits."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(matmul, name, value)


@pytest.fixture(autouse=True)
def triton():
    """The kernels in fp32 too, which runs in plain torch by itself."""
    with force_backend("triton"):
        yield


@pytest.fixture(params=["cudnn", "flash"])
def attention_vendor(request):
    """Whose attention the vendor's route takes: each."""
    old = (torch.backends.cudnn.version() or 0) < 91501 or torch.cuda.get_device_capability() < (8,)
    if request.param == "cudnn" and old:
        pytest.skip("no cuDNN attention that is right at any length")
    torch.use_deterministic_algorithms(False)
    with attended_by(request.param):
        yield request.param


def repeatable(shape) -> None:
    """Forbid the vendor's attention its atomic additions where equal bits are asked for; cuBLAS,
    which would want a setting of its own, is not part of that case."""
    torch.use_deterministic_algorithms(shape == SQUARE)


@every_op
def test_gpu_operations_run_on_triton(op):
    assert _automatic(op, DEVICE, torch.bfloat16).backend == "triton"
    assert _automatic(op, DEVICE, torch.float32).backend == "torch"


@every_op
def test_gpu_fp32_in_plain_torch(op):
    with force_backend("torch"):
        check(build(op, TYPICAL[op], "fp32"), "fp32")


def linear_cases():
    """(op, dtype, shape) of the operations that are made of linear layers."""
    return [(op, dtype, shape) for op in BUILDERS for dtype in NAMES for shape in SHAPES[dtype]]


@every_route
@pytest.mark.parametrize("op,dtype,shape", linear_cases(), ids=str)
def test_gpu_linear_operations(op, dtype, shape, route):
    check(build(op, shape, dtype), dtype, route)


@every_route
@every_dtype
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", ATTENTION)
def test_gpu_prefix_attention(name, padding, dtype, route):
    check(build("prefix_attention", name, dtype, padding=padding), dtype, route)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("name", SQUARES)
def test_gpu_prefix_attention_by_each_vendor(name, tokens_first, dtype, attention_vendor):
    check(build("prefix_attention", name, dtype, tokens_first=tokens_first), dtype, "vendor")


@pytest.mark.parametrize("tokens_first", [False, True])
def test_gpu_vendor_takes_an_upstream_gradient_of_any_layout(tokens_first, attention_vendor):
    """One after the other in one process: torch keeps cuDNN's plans."""
    case = build("prefix_attention", SQUARE, "bf16", tokens_first=tokens_first)
    want, grads = run_oracle(case.call, case.tensors, case.frozen)
    tensors, leaves = trained(case)
    names = [name for name, tensor in tensors.items() if tensor.requires_grad]
    do = cotangent_for(want).to(DEVICE, torch.bfloat16)
    other = do.transpose(1, 2).contiguous().transpose(1, 2)
    with routed("vendor"):
        for upstream in (do, other, do):
            got = torch.autograd.grad(case.call(tensors), leaves, upstream)
            for name, grad in zip(names, got, strict=True):
                compare(name, grad, grads[name], torch.bfloat16, BACKWARD)


def test_gpu_cudnn_is_taken_where_it_is_faster():
    from koffkernels._triton.attention import vendor

    tensors = build("prefix_attention", SQUARE, "bf16").on(DEVICE)
    q, k, v = (tensors[name] for name in "qkv")
    torch.use_deterministic_algorithms(False)
    assert vendor._cudnn_takes(None, q, k, v) == vendor._cudnn_is_faster(q.device, None)
    torch.use_deterministic_algorithms(True)
    assert not vendor._cudnn_takes(None, q, k, v)


def decode_cases():
    """(op, shape) of one token per row."""
    return [(op, shape) for op in DECODE for shape in DECODE[op]]


@every_dtype
@pytest.mark.parametrize("op,shape", decode_cases(), ids=str)
def test_gpu_decode(op, shape, dtype):
    """Forward only: decode has no gradients. In fp32 with sums as long as tolerances.py assumes."""
    if dtype == "fp32" and op != "prefix_attention":
        lead, _, _, memories, rank = shape
        shape = (lead, 64, 160, memories, rank)
    case = build(op, shape, dtype)
    with torch.no_grad(), routed("decode"):
        got = case.call(case.on(DEVICE))
    want, _ = run_oracle(case.call, case.tensors, case.frozen)
    compare("output", got, want, NAMES[dtype], FORWARD)


@every_route
@every_dtype
@every_case
def test_gpu_two_runs_are_bit_equal(op, shape, dtype, route):
    repeatable(shape)
    case = build(op, shape, dtype)
    with routed(route):
        first = run(case.call, case.on(DEVICE), case.frozen)
        for _ in range(3):
            assert_same(first, run(case.call, case.on(DEVICE), case.frozen))


def with_another_memory(case: Case, op: str) -> dict:
    """The tensors on the device, with other numbers in memory 0: the one that -1 would read if
    clamped. NaN in a learned cache, since no kernel multiplies it by 0; large ones in a LoRA."""
    tensors = case.on(DEVICE)
    names = ("prefix.",) if op == "prefix_attention" else (".a", ".b")
    for name, tensor in tensors.items():
        if any(part in name for part in names):
            tensor[0] = float("nan") if op == "prefix_attention" else 1e4
    return tensors


@every_route
@every_dtype
@every_case
def test_gpu_a_memory_stays_in_its_rows(op, shape, dtype, route):
    if shape == SQUARE:
        repeatable(shape)
    case = build(op, shape, dtype)
    others = (case.tensors["ids"] != 0).nonzero()[:, 0].to(DEVICE)
    assert 0 < len(others) < len(case.tensors["ids"])
    first = next(iter(case.tensors))  # x or q
    with routed(route):
        clean = run(case.call, case.on(DEVICE), case.frozen)
        changed = run(case.call, with_another_memory(case, op), case.frozen)
    assert torch.equal(clean[0][others], changed[0][others])
    assert torch.equal(clean[1][first][others], changed[1][first][others])


@contextlib.contextmanager
def no_sync():
    """Let torch raise at whatever makes the host wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def trained(case: Case) -> tuple[dict, list]:
    """(leaves on the device, those of them that train)."""
    tensors = leaves_of(case.on(DEVICE), case.frozen)
    return tensors, [tensor for tensor in tensors.values() if tensor.requires_grad]


@every_route
@every_case
def test_gpu_nothing_synchronises(op, shape, route):
    torch.use_deterministic_algorithms(False)
    case = build(op, shape, "bf16")
    tensors, leaves = trained(case)

    def step():
        y = case.call(tensors)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    with routed(route):
        step()
        with no_sync():
            for _ in range(3):  # recorded, then replayed
                step()


@pytest.mark.parametrize("op,shape", decode_cases(), ids=str)
def test_gpu_decode_does_not_synchronise(op, shape):
    torch.use_deterministic_algorithms(False)
    case = build(op, shape, "bf16")
    tensors = case.on(DEVICE)
    with torch.no_grad(), routed("decode"):
        case.call(tensors)
        with no_sync():
            for _ in range(3):
                case.call(tensors)


def captured(function, inputs):
    """(graph, its output) of a call after a warm-up on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(inputs)
    return graph, output


def graph_cases():
    """(op, shape, route) of forwards that decode captures, and of larger ones."""
    decode = [
        (op, shape, route) for op, shape in decode_cases() for route in ("automatic", "decode")
    ]
    return decode + [(op, shape, route) for op, shape in CASES for route in ROUTES]


@pytest.mark.parametrize("op,shape,route", graph_cases(), ids=str)
def test_gpu_graph_replays_with_other_inputs_and_memories(op, shape, route):
    torch.use_deterministic_algorithms(False)
    case = build(op, shape, "bf16")
    tensors = case.on(DEVICE)
    first = next(iter(tensors))
    with torch.no_grad(), routed(route):
        graph, output = captured(case.call, tensors)
        tensors[first].normal_()
        if "ids" in tensors:
            tensors["ids"].copy_(tensors["ids"].flip(0))
        graph.replay()
        got = output.clone()
        graph.replay()
        assert torch.equal(got, output)
    moved = {name: tensor.cpu() for name, tensor in tensors.items()}
    want, _ = run_oracle(case.call, moved, case.frozen)
    compare("replayed output", got, want, torch.bfloat16, FORWARD)


@every_route
@every_case
def test_gpu_graph_of_forward_and_backward(op, shape, route):
    repeatable(shape)
    check_graph_of_forward_and_backward(op, shape, route, bits=True)


def test_gpu_graph_of_forward_and_backward_by_each_vendor(attention_vendor):
    check_graph_of_forward_and_backward("prefix_attention", SQUARE, "vendor", bits=False)


def check_graph_of_forward_and_backward(op, shape, route, bits: bool) -> None:
    """A replay gives what the oracle gives; and, asked for ``bits``, the same at every replay."""
    case = build(op, shape, "bf16")
    tensors, leaves = trained(case)
    dy = cotangent_for(case.call(tensors)).to(torch.bfloat16)

    def step(held):
        y = case.call(held)
        return y, *torch.autograd.grad(y, leaves, dy)

    with routed(route):
        graph, outputs = captured(step, tensors)
        graph.replay()
        got = [output.clone() for output in outputs]
        graph.replay()
    assert not bits or all(torch.equal(a, b) for a, b in zip(got, outputs, strict=True))
    want, grads = run_oracle(case.call, case.tensors, case.frozen)
    compare("replayed output", got[0], want, torch.bfloat16, FORWARD)
    names = [name for name, tensor in tensors.items() if tensor.requires_grad]
    for name, grad in zip(names, got[1:], strict=True):
        typical = typical_of(name, case.tensors, grads)
        compare(f"replayed {name}", grad, grads[name], torch.bfloat16, BACKWARD, typical=typical)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@every_case
def test_gpu_compiled_in_one_graph(op, shape):
    torch.use_deterministic_algorithms(False)
    case = build(op, shape, "bf16")
    check(case._replace(eager=None), "bf16", call=torch.compile(case.call, fullgraph=True))
