"""Rows sorted by memory: what is said of them, and that few tokens take the way by memories."""

import pytest
import torch
from support import linear_inputs, mlp_inputs
from support.kernel_inputs import normal
from support.oracle import compare
from support.tolerances import FORWARD

import koffkernels
from koffkernels import Prefix, group_rows, prefix_attention
from koffkernels._torch import rows as torch_rows

N = 3
MIXES = {
    "aligned": [0, 0, 1, 1, 2, 2],
    "balanced": [2, 0, 1, 1, 2, 0],
    "unequal": [2, 0, 2, 2, 1, 2],
    "some without": [-1, 0, 2, 7, 2, -5],
    "one unused": [0, 2, 2, 0, 0, 2],
    "none": [-1, 9, -1, -1, -1, -1],
}


@pytest.mark.parametrize("mix", MIXES)
def test_group_rows_says_where_each_row_stands(mix):
    ids = torch.tensor(MIXES[mix])
    found = group_rows(ids, N)
    known = torch.where((ids >= 0) & (ids < N), ids, -1)
    assert torch.equal(found.ids.clamp(min=-1), known)
    assert found.counts == tuple(int((known == m).sum()) for m in range(N))
    assert torch.equal(found.slots[found.places], found.order)
    of_slot = torch.arange(N).repeat_interleave(max(found.counts))
    assert torch.equal(of_slot[found.places], known[found.order])
    assert sorted(found.order.tolist()) == (known >= 0).nonzero()[:, 0].tolist()
    assert found.aligned == (mix == "aligned")


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [linear_inputs, mlp_inputs])
def test_few_tokens_go_by_memory(inputs, dtype, mix, grouped, monkeypatch):
    """Ranks above the tokens of a group: no matrix is copied for a row."""
    tensors, weights = inputs.make(((6, 1), 40, 70, N, 8), dtype)
    ids = torch.tensor(MIXES[mix])
    call = inputs.caller(weights, group_rows(ids, N) if grouped else ids)
    with koffkernels.force_backend("reference"):
        want = call({name: t.double() for name, t in tensors.items()})
    monkeypatch.setattr(torch_rows, "add_delta", None)
    with torch.no_grad():
        compare("output", call(tensors), want, dtype, FORWARD, None)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("lengths", [[20, 20, 20], [20, 7, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_queries_attend_to_all_prefixes(dtype, lengths, mix):
    q, k, v = (normal(6, heads, n, 16, dtype=dtype) for heads, n in ((4, 1), (2, 9), (2, 9)))
    pk, pv = (normal(N, 2, 20, 16, dtype=torch.float32) for _ in range(2))
    ids, lengths = torch.tensor(MIXES[mix]), torch.tensor(lengths)

    def call(q, k, v, pk, pv, ids):
        return prefix_attention(q, k, v, Prefix(pk, pv, lengths), memory_ids=ids)

    with koffkernels.force_backend("reference"):
        want = call(*(t.double() for t in (q, k, v, pk, pv)), ids)
    with torch.no_grad():
        got = call(q, k, v, pk, pv, group_rows(ids, N))
    compare("output", got, want, dtype, FORWARD, None)


def test_a_nan_of_one_memory_stays_with_its_rows_without_gradients():
    tensors, weights = linear_inputs.make(((6, 1), 40, 70, N, 8), torch.float32)
    ids = torch.tensor(MIXES["unequal"])
    poisoned = {n: t.clone() for n, t in tensors.items()}
    for t in poisoned.values():
        if t.dim() == 3 and len(t) == N:
            t[2] = float("nan")
    with torch.no_grad():
        finite = linear_inputs.caller(weights, ids)(poisoned).isfinite().all(-1)[:, 0]
    assert torch.equal(finite, ids != 2)


def test_rows_grouped_for_another_batch_are_refused():
    tensors, weights = linear_inputs.make(((6, 1), 40, 70, N, 8), torch.float32)
    for groups in (group_rows(torch.zeros(5).long(), N), group_rows(torch.zeros(6).long(), 2)):
        with pytest.raises(ValueError, match="call group_rows with the ids of this batch"):
            linear_inputs.caller(weights, groups)(tensors)


@pytest.mark.parametrize("ids, got", [([0, 1], "list"), (torch.zeros(2), "torch.float32")])
def test_what_is_no_tensor_of_ids_is_refused(ids, got):
    with pytest.raises(TypeError, match=f"memory_ids must be an int64 tensor, got {got}; pass"):
        group_rows(ids, 3)
