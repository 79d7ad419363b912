"""Replayed calls do what calls as they are written do, and only calls of a kind are replayed.

No GPU is needed: Triton's driver is one that launches nothing and notes what it is given. That the
numbers are the same is shown in the interpreter (``interpreter/test_replayed.py``)."""

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor
from triton import knobs

import koffkernels
from bench.gate import host
from koffkernels import GatedMLPLoRA, LoRA, Prefix, RowBounds, checks, replay, routes
from koffkernels._triton.shared import direct, tape
from koffkernels._triton.shared import launch as common
from koffkernels._triton.shared.reduce import _sum_partials_kernel

BF16 = torch.bfloat16


@pytest.fixture
def launched(monkeypatch):
    """What the launchers were given, one entry for each launch."""
    found = []
    monkeypatch.setattr(replay, "DEVICES", ["cpu"])
    replay.forget()
    with host.triton_on_cpu(), host.empty_driver(lambda *args: found.append(args)):
        yield found
    replay.forget()


@pytest.fixture
def played(monkeypatch):
    """The tapes that were played."""
    found, play = [], tape.Tape.play

    def note(self, tensors):
        found.append(self)
        return play(self, tensors)

    monkeypatch.setattr(tape.Tape, "play", note)
    return found


def tensor(*shape, dtype=BF16):
    return torch.zeros(shape, dtype=dtype)


def lora(k=64, n=64, memories=2, rank=16):
    a, b = tensor(memories, rank, k, dtype=torch.float32), tensor(memories, n, rank)
    return LoRA(a, b, torch.ones(memories))


IDS = torch.tensor([0, 1, -1])


def linears(tokens=1, **extra):
    x, weights = tensor(3, tokens, 64), [tensor(64, 64) for _ in range(3)]
    given = {"lora": [lora(), None, lora()], "memory_ids": IDS.clone()} | extra
    return lambda: koffkernels.lora_linears(x, weights, **given)


def linear(x=None, weight=None, bias=None, **extra):
    x = tensor(3, 1, 64) if x is None else x
    weight = tensor(64, 64) if weight is None else weight
    given = {"lora": lora(), "memory_ids": IDS.clone()} | extra
    return lambda: koffkernels.lora_linear(x, weight, bias, **given)


def mlp(tokens=1):
    x, weights = tensor(3, tokens, 64), [tensor(64, 64) for _ in range(3)]
    given = {"gates": torch.ones(64), "lora": GatedMLPLoRA(lora(), None, lora())}
    return lambda: koffkernels.gated_mlp(x, *weights, memory_ids=IDS.clone(), **given)


def attention(queries=1, bounds=False):
    q, k, v = (tensor(3, heads, t, 64) for heads, t in ((4, queries), (2, 80), (2, 80)))
    prefix = Prefix(*(tensor(2, 2, 32, 64) for _ in range(2)), torch.tensor([32, 7]))
    bounds = RowBounds(*(torch.zeros(3, dtype=torch.int64) for _ in range(3))) if bounds else None
    ids = IDS.clone()
    return lambda: koffkernels.prefix_attention(q, k, v, prefix, memory_ids=ids, bounds=bounds)


CALLS = {
    "linears, decode": (linears, "decode"),
    "linears, vendor": (lambda: linears(40), "vendor"),
    "linears, fused": (lambda: linears(40), "fused"),
    "mlp, decode": (mlp, "decode"),
    "mlp, vendor": (lambda: mlp(40), "vendor"),
    "mlp, fused": (lambda: mlp(40), "fused"),
    "attention of few queries": (attention, "fused"),
    "attention of few queries, bounds": (lambda: attention(bounds=True), "fused"),
    "attention": (lambda: attention(80), "fused"),
}


def described(launch):
    """A launch, with what a kernel sees of a tensor."""

    def of(value):
        if isinstance(value, tuple):
            return type(value), tuple(map(of, value))
        if isinstance(value, Tensor):
            return value.dtype, value.shape, value.stride(), value.storage_offset()
        return value

    return launch[:3], launch[4], tuple(map(of, launch[9:]))


def forms(result):
    results = result if isinstance(result, tuple) else (result,)
    return [(y.dtype, y.shape, y.stride(), y.requires_grad) for y in results]


@pytest.mark.parametrize("name", CALLS)
def test_the_launches_are_the_same(launched, played, name):
    make, route = CALLS[name]
    call = make()
    with koffkernels.force_route(route):
        for _ in range(2):
            call()
        launched.clear()
        written = forms(call())
        assert len(played) == 1
        replayed = [*map(described, launched)]
        other = make()  # tensors of its own
        launched.clear()
        replay.DEVICES.clear()
        assert forms(other()) == written
        assert [*map(described, launched)] == replayed != []
        replay.DEVICES.append("cpu")
        launched.clear()
        assert forms(other()) == written and len(played) == 2
        assert [*map(described, launched)] == replayed


def test_a_call_is_given_its_own_tensors(launched, played):
    """Those that the kernels get are those of this call, not of the one that was recorded."""
    calls = []
    with koffkernels.force_route("decode"):
        for _ in range(4):
            x, weight, bias, own = tensor(3, 1, 64), tensor(64, 64), tensor(64), lora()
            launched.clear()
            linear(x, weight, bias, lora=own)()
            given = [part for args in launched for part in args[9:]]
            given += [part for operand in given if isinstance(operand, tuple) for part in operand]
            calls.append([any(part is t for part in given) for t in (weight, bias, *own)])
            assert any(isinstance(p, Tensor) and p.data_ptr() == x.data_ptr() for p in given)
    assert len(played) == 2 and calls[-1] == calls[0] and all(calls[0])


CHANGES = {
    "rows": {"x": tensor(4, 1, 64), "memory_ids": torch.tensor([0, 1, -1, 0])},
    "layout": {"x": tensor(1, 3, 64).transpose(0, 1)},
    "dtype": {"x": tensor(3, 1, 64, dtype=torch.float16), "weight": tensor(64, 64).half()},
    "alignment": {"x": tensor(1 + 3 * 64)[1:].view(3, 1, 64)},
    "width": {"weight": tensor(48, 64), "lora": lora(n=48)},
    "rank": {"lora": lora(rank=8)},
    "memories": {"lora": lora(memories=3)},
    "no ids": {"lora": lora(memories=1), "memory_ids": None},
    "bias": {"bias": tensor(64)},
    "groups": {"memory_ids": koffkernels.group_rows(IDS, 2)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_kind_is_not_replayed(launched, played, name):
    with koffkernels.force_route("decode"):
        for _ in range(3):
            linear()()
        assert len(played) == 1
        call = linear(**CHANGES[name])
        call()
        call()
        assert len(played) == 1
        call()
        assert len(played) == 2


def test_the_same_tensor_twice_is_a_kind_of_its_own(launched, played):
    """On the tape of the one these two are one."""
    x, weight, other = tensor(3, 1, 64), tensor(64, 64), tensor(64, 64)
    update = lora()

    def call(*weights):
        koffkernels.lora_linears(x, weights, lora=(update, update), memory_ids=IDS)

    with koffkernels.force_route("decode"):
        for _ in range(3):
            call(weight, weight)
        assert len(played) == 1
        launched.clear()
        call(weight, other)
        assert len(played) == 1
        operands = [part for args in launched for part in args[9:] if isinstance(part, tuple)]
        assert any(part is other for operand in operands for part in operand)


BAD = {
    "a width": ({"x": tensor(3, 1, 63)}, "last dimension 64"),
    "a trained weight": ({"weight": tensor(64, 64).requires_grad_()}, "be frozen"),
    "other rows": ({"memory_ids": IDS[:2]}, "shape"),
    "ids of another dtype": ({"memory_ids": IDS.int()}, "int64"),
    "no ids": ({"memory_ids": None}, "more than one memory"),
    "no tensor": ({"weight": 1}, "torch.Tensor"),
    "another dtype": ({"weight": tensor(64, 64).half()}, "dtype of x"),
    "another rank": ({"lora": lora()._replace(b=tensor(2, 64, 8))}, "shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_also_after_good_ones(launched, played, name):
    with koffkernels.force_route("decode"):
        for _ in range(3):
            linear()()
        assert len(played) == 1
        changes, told = BAD[name]
        for _ in range(3):
            with pytest.raises((TypeError, ValueError), match=told):
                linear(**changes)()


def test_settings_are_part_of_the_kind(launched, played, monkeypatch):
    call = linear(tensor(3, 9, 64))
    with koffkernels.force_route("vendor"):
        for _ in range(3):
            call()
        count = len(launched)
    with koffkernels.force_route("fused"):
        call()
    with koffkernels.force_route("vendor"), koffkernels.force_backend("reference"):
        call()
    assert len(played) == 1 and count == len(launched) - 2  # shrink and the fused GEMM
    with koffkernels.force_route("vendor"):
        routes.forget()
        call()  # tables may say something else now
        assert len(played) == 1
        call()
        call()
        assert len(played) == 2
        with torch.autocast("cpu", dtype=BF16):
            call()
        monkeypatch.setattr(checks, "CHECK_IDS", True)
        call()
        assert len(played) == 2
        monkeypatch.setattr(checks, "CHECK_IDS", False)
        with common.recording() as collected:
            call()
        assert len(played) == 2 and len(collected) == 2
        with common.programmatic(True):
            call()
        assert len(played) == 2


def test_whoever_debugs_gets_tritons_way(launched, played, monkeypatch):
    call = linear()
    with koffkernels.force_route("decode"):
        for _ in range(3):
            call()
        assert len(played) == 1
        monkeypatch.setattr(direct, "ENABLED", False)
        call()
        monkeypatch.setattr(direct, "ENABLED", True)
        launched.clear()
        knobs.runtime.launch_enter_hook.add(print)
        try:
            call()
        finally:
            knobs.runtime.launch_enter_hook.remove(print)
        assert len(played) == 1
        assert [args[7] is None for args in launched] == [False, False]
        call()
        assert len(played) == 2


def test_a_call_that_somebody_watched_is_recorded_later(launched, played):
    call = linear()
    with koffkernels.force_route("decode"):
        call()
        knobs.runtime.launch_enter_hook.add(print)
        try:
            call()
            call()
        finally:
            knobs.runtime.launch_enter_hook.remove(print)
        call()
        assert played == []
        call()
        assert len(played) == 1


def test_training_replays_forward_and_backward(launched, played):
    x, weight, update = tensor(3, 40, 64).requires_grad_(), tensor(64, 64), lora()
    for part in update[:2]:
        part.requires_grad_()

    def step():
        launched.clear()
        y = koffkernels.lora_linear(x, weight, lora=update, memory_ids=IDS)
        y.backward(torch.ones_like(y))
        return [*map(described, launched)]

    with koffkernels.force_route("vendor"):
        first = step()
        assert step() == first and played == []
        assert step() == first and len(played) == 2
        update.a.requires_grad_(False)  # another kind of backward
        assert len(step()) < len(first) and len(played) == 3


def test_memory_is_free_as_early_as_it_was(launched, played, monkeypatch):
    """When a kernel is launched, nothing is there but what this or a later step needs."""
    call, there, counts = mlp(40), [], []
    empty = torch.empty_strided

    def watched(*args, **kwargs):
        made = empty(*args, **kwargs)
        there.append(weakref.ref(made))
        return made

    with koffkernels.force_route("vendor"):
        call()
        call()
        (found,) = [o for o in gc.get_objects() if type(o) is tape.Tape]

        def alive():
            launched.clear()
            return sum(ref() is not None for ref in there)

        def counted(step):
            return lambda *args: (step(*args), counts.append(alive()))

        monkeypatch.setattr(torch, "empty_strided", watched)
        monkeypatch.setattr(found, "steps", [(counted(step), last) for step, last in found.steps])
        y = call()
    assert played == [found] and len(there) > 3
    assert max(counts) < len(there)  # s of gate is gone before that of down is made
    assert alive() == 0 and y.shape == (3, 40, 64)  # y is a view, and the first tensor torch's


def launch_sum(x, splits=1):
    common.launch(_sum_partials_kernel, (1,), part_ptr=x, out_ptr=x, splits=splits, size=4, BLOCK=4)


def attended(x):
    return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def test_only_what_follows_from_the_kind_stands_on_a_tape(launched):
    x, other = tensor(4), tensor(4)
    for call, fits in (
        (lambda: launch_sum(x), True),
        (lambda: launch_sum(x.view(2, 2).t()[None]), True),
        (lambda: launch_sum(x, splits=x.dim()), True),
        (lambda: launch_sum(x, splits=int(x.sum())), False),
        (lambda: launch_sum(x, splits=x.tolist().count(0.0)), False),
        (lambda: launch_sum(other), False),  # the call was not given this
        (lambda: launch_sum(attended(x.view(1, 2, 2))), False),  # which, other settings say
        (lambda: x + 1, False),  # nothing is launched
    ):
        assert (tape.record(call, [x])[1] is not None) == fits


def test_a_thread_that_records_does_not_hear_another(launched, monkeypatch):
    x, weight, update = tensor(3, 1, 64), tensor(64, 64), lora()
    monkeypatch.setattr(replay, "DEVICES", [])

    def call():
        thread = threading.Thread(target=linear())
        thread.start()
        thread.join()
        return koffkernels.lora_linear(x, weight, lora=update, memory_ids=IDS)

    with koffkernels.force_route("decode"):
        call()
        launched.clear()
        _, found = tape.record(call, [x, weight, *update, IDS])
    launches = [step for step, _ in found.steps if "_direct" in step.__qualname__]
    assert len(launched) == 4 and len(launches) == 2


def test_what_a_recorded_call_calls_is_not_replayed_apart(launched, played):
    """Its launches would be missing on the tape."""
    inner, x = linear(), tensor(2, 64)

    @replay.replayed
    def outer(x):
        return inner()

    with koffkernels.force_route("decode"):
        for _ in range(4):
            inner()
        assert len(played) == 2
        before = len(launched)
        outer(x)
        outer(x)  # recorded; but it takes tensors that it is not given
        assert len(played) == 3 and len(launched) == before + 4


def test_ever_new_shapes_do_not_fill_the_memory(launched, monkeypatch):
    monkeypatch.setattr(replay, "_MOST_KINDS", 4)
    with koffkernels.force_route("decode"):
        for rows in range(1, 12):
            for _ in range(2):
                x = tensor(rows, 64)
                ids = torch.zeros(rows, dtype=torch.int64)
                koffkernels.lora_linear(x, tensor(64, 64), lora=lora(), memory_ids=ids)
        gc.collect()
        assert 0 < sum(type(o) is tape.Tape for o in gc.get_objects()) <= 4
