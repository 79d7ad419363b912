"""What bench.gpu measures with and against: its clock, its peers, and the GPU tests' own checks."""

import contextlib

import pytest
import torch
from support import gpu_checks
from support.gpu_cases import NAMES

import koffkernels
from bench.gpu import attention, context, layers, training
from bench.peers.unmerged import Unmerged, adapters_of
from koffkernels import clock


@pytest.fixture(scope="module")
def bench():
    with context.bench(True) as made:
        yield made


class FakeCuda:
    """torch.cuda's timing on a clock that each call advances by 100 us, counting replays."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def call(self, name, took):
        def run(i):
            self.calls.append((name, i))
            self.now += took

        return run

    def install(self, monkeypatch):
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = fake.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        class Graph:
            pass

        @contextlib.contextmanager
        def capture(graph):
            before, start = fake.calls, fake.now
            fake.calls = []
            yield
            calls, took, fake.calls, fake.now = fake.calls, fake.now - start, before, start

            def replay():
                fake.calls += calls
                fake.now += took

            graph.replay = replay

        class Stream:
            def wait_stream(self, other):
                pass

        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "Stream": Stream,
            "stream": lambda s: contextlib.nullcontext(),
            "current_stream": Stream,
            "synchronize": lambda: None,
        }.items():
            monkeypatch.setattr(clock.torch.cuda, name, value)


@pytest.mark.parametrize("graph", [True, False])
def test_bench_gpu_event_clock_counts_every_call(graph, monkeypatch):
    fake = FakeCuda()
    fake.install(monkeypatch)
    variants = {
        "slow": clock.Variant(fake.call("slow", 400.0), sets=3, graph=graph),
        "fast": clock.Variant(fake.call("fast", 100.0), sets=3, graph=graph),
    }
    times = clock.measure(clock.EventClock(), variants)
    assert times["slow"] == pytest.approx([400.0] * len(times["slow"]))
    assert times["fast"] == pytest.approx([100.0] * len(times["fast"]))
    assert len(times["slow"]) == len(times["fast"]) >= clock.EventClock.fewest
    order = [name for name, i in fake.calls if i == 0]
    turns = [a for a, b in zip(order, [*order[1:], None], strict=True) if a != b]
    assert turns.count("slow") < len(times["slow"]) + 8  # the order alternates: ends touch
    assert {i for _, i in fake.calls} == {0, 1, 2}


def wide(bench):
    """The same context in fp32."""
    made = context.Bench(bench.device, True, bench.shape, bench.clock, 0, 4, torch.float32)
    return made


@pytest.mark.parametrize("memories", [1, 3])
def test_bench_gpu_paths_compute_the_same(bench, memories):
    made = wide(bench)
    layer = layers.random_layer(made, 128, memories)
    x = [made.normal(6, 1, made.shape.hidden) for _ in range(3)]
    ids = layers.mixed_ids(made, 6, memories) if memories > 1 else None
    rows = None if ids is None else [(ids == m).nonzero()[:, 0] for m in range(memories)]
    adapters = {n: adapters_of(lora, layer.weights[n]) for n, lora in layer.lora.items()}
    ours = layers.seven(layers.Koff(True, ids), layer, *x)
    theirs = layers.seven(Unmerged({id(layer): adapters}, rows), layer, *x)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    plain = layers.seven(layers.Plain(), layer, *x)
    bare = layers.seven(layers.Koff(False), layer, *x)
    assert all(torch.equal(a, b) for a, b in zip(plain, bare, strict=True))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(ours, plain, strict=True))


def test_bench_gpu_a_pruned_layer_is_the_layer_with_closed_gates(bench):
    made = wide(bench)
    layer = layers.random_layer(made, 128, 1)
    x, gates = made.normal(5, 1, made.shape.hidden), torch.ones(128)
    gates[64:] = 0.0
    masked = layers.Koff(True, gates=gates).mlp(layer, x)
    pruned = layers.Koff(True).mlp(layers.prune(layer, 64), x)
    torch.testing.assert_close(masked, pruned, rtol=1e-4, atol=1e-5)


def test_bench_gpu_peers_train_the_same(bench):
    """Outputs and every gradient of the hand-written function and of PEFT, against ours."""
    made = wide(bench)
    layer = layers.random_layer(made, 96, 1, layers.MLP)
    for name, lora in layer.lora.items():  # one scaling for all, as the peers have
        layer.lora[name] = lora._replace(scaling=torch.full((1,), 2.0))
    x, dy = made.normal(2, 5, made.shape.hidden).requires_grad_(), made.normal(2, 5, 64)
    ours, trained = training._ours(layer)
    want = [ours(x), *training._step(ours, trained, x, dy)]
    hand, leaves = training._hand_written(layer)
    got = [hand(x), *training._step(hand, leaves, x, dy)]
    mlp, adapters = training._peft(layer, made.rank, False)
    with torch.no_grad():
        for parameter, leaf in zip(adapters, leaves, strict=True):
            parameter.copy_(leaf)
    peft = [mlp(x), *training._step(mlp, adapters, x, dy)]
    for a, b, c in zip(want, got, peft, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(c, b, rtol=1e-4, atol=1e-5)


def test_bench_gpu_attention_rows_compare_the_same_function(bench):
    """The peer's concatenation of the decode row is our prefix and own keys."""
    q, k, v = attention._qkv(bench, 3, 1, 8)
    prefix = attention._prefix(bench, 5)
    ours = koffkernels.prefix_attention(q, k, v, prefix, memory_ids=torch.zeros(3).long())
    whole = [
        torch.cat([p.to(t.dtype).expand(3, -1, -1, -1), t], 2)
        for p, t in zip(prefix[:2], (k, v), strict=True)
    ]
    theirs = attention._sdpa(attention.SDPBackend.MATH, q, *whole, False)
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("op", gpu_checks.OPS)
def test_bench_gpu_tests_check_what_they_should(op, dtype, monkeypatch):
    """The GPU tests' own comparison, on the CPU: passes, and fails for a wrong result."""
    monkeypatch.setattr(gpu_checks, "DEVICE", torch.device("cpu"))
    case = gpu_checks.build(op, gpu_checks.TYPICAL[op], dtype)
    gpu_checks.check(case, dtype)
    with pytest.raises(AssertionError, match="forward error"):
        gpu_checks.check(case, dtype, call=lambda t: case.call(t) * 1.05)
    first = next(iter(case.tensors))

    class Off(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, dx: dx * 1.05)

    with pytest.raises(AssertionError, match=f"{first}: backward error"):
        gpu_checks.check(case, dtype, call=lambda t: case.call(t | {first: Off.apply(t[first])}))
