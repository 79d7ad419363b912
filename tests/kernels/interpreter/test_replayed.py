"""Replayed calls compute, from tensors of their own, the bits that calls as they are written do."""

import pytest
import torch
from support import linears_inputs, mlp_inputs
from support.kernel_inputs import attention_tensors, ids_of, prefix_from
from support.oracle import run

import koffkernels
from koffkernels import prefix_attention, replay
from koffkernels._triton.shared.tape import Tape

LEAD, MEMORIES = (3, 5), 2


@pytest.fixture(autouse=True)
def replays(monkeypatch):
    """Let calls on CPU tensors be replayed, and count how many are."""
    monkeypatch.setattr(replay, "DEVICES", ["cpu"])
    replay.forget()
    played, play = [], Tape.play

    def note(self, tensors):
        played.append(self)
        return play(self, tensors)

    monkeypatch.setattr(Tape, "play", note)
    yield played
    replay.forget()


def linears(kind, route):
    shape = (LEAD, 40, ((48, 4), (16, None), (16, 20)), 1 if kind == "none" else MEMORIES)
    tensors, weights = linears_inputs.make(shape, torch.float16)
    return linears_inputs.caller(weights, ids_of(kind, LEAD[0], MEMORIES)), tensors


def mlp(kind, route):
    shape = (LEAD, 13, 29, 1 if kind == "none" else MEMORIES, 4)
    tensors, weights = mlp_inputs.make(shape, torch.float16)
    return mlp_inputs.caller(weights, ids_of(kind, LEAD[0], MEMORIES)), tensors


def attention(kind, route):
    n, queries = 1 if kind == "none" else MEMORIES, 1 if route == "decode" else 20
    shape = {"B": 3, "Hq": 4, "Hkv": 2, "T": queries, "S": 24, "D": 64, "n": n, "P": 20}
    lengths, ids = torch.tensor([20, 7][:n]), ids_of(kind, 3, n)

    def call(t):
        prefix = prefix_from(t, lengths)
        return prefix_attention(t["q"], t["k"], t["v"], prefix, memory_ids=ids)

    return call, attention_tensors(shape, torch.float16)


MAKE = {"linears": linears, "mlp": mlp, "attention": attention}
# Operation, route, whether it trains: what decodes does not.
CASES = [
    ("linears", "decode", False),
    ("linears", "vendor", True),
    ("linears", "fused", True),
    ("mlp", "decode", False),
    ("mlp", "vendor", False),
    ("mlp", "vendor", True),
    ("mlp", "fused", True),
    ("attention", "decode", False),
    ("attention", "fused", True),
]


def others(tensors, seed):
    """Tensors of the same kind with other numbers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(t.shape, generator=generator).to(t.dtype) for name, t in tensors.items()
    }


def same(one, other):
    assert torch.equal(one[0], other[0]) and one[0].stride() == other[0].stride()
    assert set(one[1]) == set(other[1])
    for name, gradient in one[1].items():
        assert torch.equal(gradient, other[1][name]), name
        assert gradient.dtype == other[1][name].dtype


@pytest.mark.parametrize("kind", ["none", "mixed"])
@pytest.mark.parametrize("name, route, trains", CASES)
def test_the_same_bits(replays, monkeypatch, name, route, trains, kind):
    call, tensors = MAKE[name](kind, route)
    frozen = () if trains else tuple(tensors)
    with koffkernels.force_route(route):
        for seed in (1, 2):
            run(call, others(tensors, seed), frozen)
        assert replays == []
        found = run(call, others(tensors, 3), frozen)
        assert len(replays) == 1 + trains  # backward is a call of its own
        monkeypatch.setattr(replay, "DEVICES", [])
        same(found, run(call, others(tensors, 3), frozen))
        assert len(replays) == 1 + trains
        assert not torch.equal(found[0], run(call, others(tensors, 4), frozen)[0])
