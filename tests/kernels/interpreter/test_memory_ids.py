"""Which addresses a memory id becomes: none where it is no memory, and 64-bit ones where it is."""

import pytest
import torch
from support import linear_inputs, mlp_inputs
from support.kernel_inputs import normal
from support.oracle import assert_same, run
from support.prefix_attention_cases import Case

import koffkernels
from koffkernels._triton.attention import op
from koffkernels._triton.lora.expand import expand_
from koffkernels._triton.lora.gemm import gemm_linear
from koffkernels._triton.lora.shrink import shrink
from koffkernels._triton.shared.launch import Rows
from koffkernels._triton.shared.operands import Delta

N = 3
# int64 has ids that are memories once they are cut to 32 bits.
UNKNOWN = torch.tensor([N, 1, 10**9, -5, 2**32 + 1, -(2**32) + 2, 2**63 - 1, -2, 0])
KNOWN = torch.tensor([-1, 1, -1, -1, -1, -1, -1, -1, 0])
INPUTS = {"gated_mlp": mlp_inputs, "lora_linear": linear_inputs}


def both(make, tensors, frozen=()):
    got, want = (run(make(ids), tensors, frozen) for ids in (UNKNOWN, KNOWN))
    assert_same(got, want)
    assert want[0].isfinite().all()


@pytest.mark.parametrize(
    ("route", "tokens", "rank"),
    [("vendor", 5, 3), ("vendor", 256, 3), ("vendor", 5, 70), ("fused", 5, 3)],
)  # of 256 tokens and more the MLP's backward takes its sums in the same pass, up to rank 64
@pytest.mark.parametrize("name", INPUTS)
def test_unknown_ids_train(name, route, tokens, rank):
    tensors, weights = INPUTS[name].make(((9, tokens), 16, 20, N, rank), torch.float32)
    with koffkernels.force_route(route):
        both(lambda ids: INPUTS[name].caller(weights, ids), tensors)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", INPUTS)
def test_unknown_ids_decode(name, tokens):
    tensors, weights = INPUTS[name].make(((9, tokens), 40, 70, N, 3), torch.float32)
    with koffkernels.force_route("decode"), torch.no_grad():
        both(lambda ids: INPUTS[name].caller(weights, ids), tensors, frozen=tensors)


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("route", op.ROUTES)
def test_unknown_ids_attention(route, queries):
    case = Case((9, 2, 1, queries, queries, 64, N, 20), torch.float32)

    def make(ids):
        case.ids = ids
        return lambda t: op.run(*case.call(t), route)

    both(make, case.tensors)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", INPUTS)
def test_unknown_ids_in_plain_torch(name, backend):
    tensors, weights = INPUTS[name].make(((9, 5), 40, 70, N, 3), torch.float32)
    with koffkernels.force_backend(backend):
        both(lambda ids: INPUTS[name].caller(weights, ids), tensors)


def far_apart(n: int, *size: int) -> torch.Tensor:
    """[n, *size] whose last memory begins 2^31 elements behind the first: 4 GB, which the
    interpreter reads and writes at each launch."""
    each = torch.Size(size).numel()
    store = torch.empty(2**31 + each, dtype=torch.float16)
    x = store.as_strided((n, *size), (2**31 // (n - 1), *torch.empty(size).stride()))
    for memory in x:
        memory.copy_(torch.randn(size))
    return x


@pytest.mark.slow
def test_memories_beyond_31_bits():
    """The offset of a memory is a 64-bit product."""
    ids, s = torch.tensor([2, 0, -1, 1]), normal(20, 3, dtype=torch.float16)
    a, x, rows = far_apart(3, 3, 16), normal(20, 16, dtype=torch.float16), Rows(ids, 5)
    assert torch.equal(shrink(x, [a, a], rows), shrink(x, [a.contiguous()] * 2, rows))
    del a
    b, scaling, w = far_apart(3, 16, 3), torch.ones(3), normal(16, 16, dtype=torch.float16)
    for way in (
        lambda b: expand_(torch.zeros_like(x), (Delta(s, b, scaling),), rows),
        lambda b: gemm_linear(x, w, None, (Delta(s, b, scaling),), rows),
    ):
        assert torch.equal(way(b), way(b.contiguous()))
