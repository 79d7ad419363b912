"""Replayed calls do what calls as they are written do, and only calls of a kind are replayed.

No GPU is needed: Triton's driver is one that launches nothing and notes what it is given. That the
numbers are the same is shown in the interpreter (``interpreter/test_replayed.py``)."""

import gc
import sys
import threading
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

import koffkernels
from bench.gate import host
from koffkernels import (
    GatedMLPLoRA,
    LoRA,
    Prefix,
    RowBounds,
    checks,
    dispatch,
    replay,
    routes,
)
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


def described(launches):
    """Launches, with what a kernel sees of a tensor: where it begins, in which of the pieces of
    memory that these launches get. On a tape a view may be that address alone."""
    memory = {}  # where it begins -> where it ends

    def tensors(values):
        for value in values:
            if isinstance(value, tuple):
                yield from tensors(value)
            elif isinstance(value, Tensor):
                yield value

    for t in tensors([args[9:] for args in launches]):
        storage = t.untyped_storage()
        memory[storage.data_ptr()] = storage.data_ptr() + storage.nbytes()
    order = []

    def of(value):
        if isinstance(value, tuple):
            return tuple(map(of, value))
        address = value.data_ptr() if isinstance(value, Tensor) else value
        if type(address) is int:
            for begin, end in memory.items():
                if begin <= address < end:
                    order.extend([begin] if begin not in order else [])
                    return "memory", order.index(begin), address - begin
        return value

    return [(args[:3], args[4], tuple(map(of, args[9:]))) for args in launches]


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
        replayed = described(launched)
        other = make()  # tensors of its own
        launched.clear()
        replay.DEVICES.clear()
        assert forms(other()) == written
        assert described(launched) == replayed != []
        replay.DEVICES.append("cpu")
        launched.clear()
        assert forms(other()) == written and len(played) == 2
        assert described(launched) == replayed


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
        with dispatch.programmatic(True):
            for count in (2, 2, 3):
                call()
                assert len(played) == count
        call()
        assert len(played) == 4


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


def trained(call, *tensors):
    """Forward and backward of a call, in which these require gradients: which of them got one."""
    for t in tensors:
        t.requires_grad_()

    def step(then=None):
        for t in tensors:
            t.grad = None
        ys = call()
        ys = ys if isinstance(ys, tuple) else (ys,)
        if then is not None:
            ys = then(ys)
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
        return [t.grad is not None and t.grad.shape == t.shape for t in tensors]

    step.tensors = tensors
    return step


def train_linear(update=None, **extra):
    x, update = tensor(3, 40, 64), update or lora()
    return trained(linear(x, lora=update, **extra), x, update.a, update.b)


def train_linears():
    x, weights, loras = tensor(3, 40, 64), [tensor(64, 64) for _ in range(3)], [lora(), lora()]

    def call():
        return koffkernels.lora_linears(x, weights, lora=[*loras, None], memory_ids=IDS)

    return trained(call, x, *loras[0][:2], *loras[1][:2])


def train_mlp():
    x, weights, gates = tensor(3, 40, 64), [tensor(64, 64) for _ in range(3)], torch.ones(64)
    up, down = lora(), lora()

    def call():
        given = {"gates": gates, "lora": GatedMLPLoRA(None, up, down), "memory_ids": IDS}
        return koffkernels.gated_mlp(x, *weights, **given)

    return trained(call, x, gates, *up[:2], *down[:2])


def train_attention():
    q, k, v = (tensor(3, heads, 80, 64) for heads in (4, 2, 2))
    learned = [tensor(2, 2, 32, 64, dtype=torch.float32) for _ in range(2)]
    prefix = Prefix(*learned, torch.tensor([32, 7]))
    return trained(
        lambda: koffkernels.prefix_attention(q, k, v, prefix, memory_ids=IDS), q, k, v, *learned
    )


TRAIN = {
    "linear, vendor": (train_linear, "vendor"),
    "linear, fused": (train_linear, "fused"),
    "linears": (train_linears, "vendor"),
    "mlp, vendor": (train_mlp, "vendor"),
    "mlp, fused": (train_mlp, "fused"),
    "attention": (train_attention, "fused"),
}
LINEAR = [name for name in TRAIN if name != "attention"]


@pytest.mark.parametrize("name", TRAIN)
def test_training_replays_forward_and_backward(launched, played, name):
    make, route = TRAIN[name]
    step = make()
    with koffkernels.force_route(route):
        assert all(step())
        first = described(launched)
        for count in (0, 2, 4):
            launched.clear()
            assert all(step()) and described(launched) == first and len(played) == count
        other = make()  # tensors of its own
        launched.clear()
        assert all(other()) and described(launched) == first and len(played) == 6


def test_training_skips_what_lies_around_the_operation(launched, played, monkeypatch):
    step, checked = train_linear(), []
    module = sys.modules["koffkernels.lora_linear"]
    monkeypatch.setattr(module, "check_linear", lambda *args: checked.append(args))
    with koffkernels.force_route("vendor"):
        for _ in range(5):
            step()
    assert len(checked) == 2 and len(played) == 6


@pytest.mark.parametrize(
    "changes, why",
    [
        (lambda x, a, again: (x * float(a.sum()), a), "__float__ reads a tensor"),
        (lambda x, a, again: (x, a * 1), "lays out anew"),
        (lambda x, a, again: (again(x, a), a), "several autograd.Functions"),
    ],
)
def test_what_cannot_be_replayed_is_trained_as_it_is_written(launched, played, changes, why):
    """And ``kinds`` says why; of an operation that would do such a thing, since ours do not."""
    update, weight = lora(), tensor(64, 64)

    @replay.replayed
    def odd(x, weight, ids, a, b, scaling):
        def once(x, a):
            update = LoRA(a, b, scaling)
            return koffkernels.lora_linear.__wrapped__(x, weight, lora=update, memory_ids=ids)

        return once(*changes(x, a, once))

    with koffkernels.force_route("vendor"):
        for _ in range(4):
            step = trained(lambda: odd(x, weight, IDS, *update), x := tensor(3, 40, 64), update.b)
            assert all(step())
    (name,) = [name for name in replay.kinds() if "odd" in name]
    ((found, count),) = replay.kinds()[name].items()
    assert why in found and count == 1


def test_what_became_of_calls_is_counted(launched):
    call = linear()
    with koffkernels.force_route("decode"):
        call()
        assert replay.kinds() == {"lora_linear": {"seen once": 1}}
        for _ in range(2):
            call()
    assert replay.kinds() == {"lora_linear": {"replayed": 1}}
    replay.forget()
    assert replay.kinds() == {}


def test_what_is_trained_is_part_of_the_kind(launched, played):
    x, update = tensor(3, 40, 64), lora()
    call, step = linear(x, lora=update), train_linear(update)
    with koffkernels.force_route("vendor"):
        for _ in range(3):
            step()
        whole = len(launched) // 3
        update.a.requires_grad_(False)
        for count in (2, 2, 4):
            launched.clear()
            call().backward(tensor(3, 40, 64))
            assert 0 < len(launched) < whole and len(played) == count
        update.b.requires_grad_(False)
        assert not call().requires_grad and len(played) == 4
    # Tensors given twice are told apart from tensors that are trained.
    one, other = tensor(4).requires_grad_(), tensor(4).requires_grad_()
    with torch.no_grad():
        twice, _, records = replay.kind_of((x, one, one))
    kind, _, trains = replay.kind_of((x, one, other))
    assert not records and trains and twice != kind


@pytest.mark.parametrize("name", TRAIN)
def test_what_autograd_kept_elsewhere_is_of_another_kind(launched, played, name):
    """Hooks may give back saved tensors that lie otherwise than what was saved."""
    make, route = TRAIN[name]
    step = make()

    def elsewhere(saved):
        return torch.zeros(saved.numel() + 1, dtype=saved.dtype)[1:].view(saved.shape)

    with koffkernels.force_route(route):
        for _ in range(3):
            step()
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, elsewhere):
            for count in (3, 4, 6):
                assert all(step()) and len(played) == count


class _Filled(TorchDispatchMode):
    """Counts what torch fills in the ``with`` block: on a GPU each is one more launch."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.zeros, torch.ops.aten.zeros_like)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TRAIN)
def test_nothing_is_filled_for_outputs_that_have_no_gradient(launched, name):
    make, route = TRAIN[name]
    step = make()
    with koffkernels.force_route(route), _Filled() as filled:
        for _ in range(4):
            step()
    assert filled.count == 0


@pytest.mark.parametrize("name", TRAIN)
def test_a_gradient_of_a_gradient_is_refused(launched, name):
    make, route = TRAIN[name]
    step = make()

    def twice(ys):
        leaf = step.tensors[0]
        (dx,) = torch.autograd.grad([y.square().sum() for y in ys], leaf, create_graph=True)
        return (dx.sum(),)

    with koffkernels.force_route(route):
        for _ in range(4):
            with pytest.raises(RuntimeError, match="once_differentiable"):
                step(twice)


class Swallows(torch.autograd.Function):
    """Gives no gradient."""

    @staticmethod
    def forward(ctx, *ys):
        return torch.zeros((), dtype=BF16)

    @staticmethod
    def backward(ctx, dy):
        return (None,) * len(ctx.needs_input_grad)


@pytest.mark.parametrize("name", TRAIN)
def test_who_gets_no_gradient_gives_none(launched, name):
    """And reads nothing that was saved, which with a second backward is gone, and which activation
    checkpointing would compute again."""
    make, route = TRAIN[name]
    step = make()

    def swallowed(ys):
        y = Swallows.apply(*ys)
        y.backward()
        return (y,)

    def unpacked(saved):
        raise AssertionError("it reads what was saved")

    with koffkernels.force_route(route):
        for _ in range(4):
            with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, unpacked):
                assert not any(step(swallowed))


@pytest.mark.parametrize("name", LINEAR)
def test_results_may_be_changed_in_place(launched, name):
    """As those of torch's layers; of attention backward needs the result."""
    make, route = TRAIN[name]
    step = make()
    with koffkernels.force_route(route):
        for _ in range(4):
            assert all(step(lambda ys: tuple(y.mul_(2) for y in ys)))


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_in_training(launched, name):
    changes, told = BAD[name]
    with koffkernels.force_route("vendor"):
        for _ in range(3):
            linear(tensor(3, 1, 64).requires_grad_())()
        for _ in range(3):
            with pytest.raises((TypeError, ValueError), match=told):
                given = {"x": tensor(3, 1, 64)} | changes
                linear(**given | {"x": given["x"].requires_grad_()})()


def test_what_is_laid_out_anew_is_trained_as_it_is_written(launched, played):
    """Autograd has to record that as well."""
    wide = tensor(2, 16, 128, dtype=torch.float32).requires_grad_()
    update = lora()._replace(a=wide[:, :, ::2])
    call = linear(tensor(3, 40, 64), lora=update)
    with koffkernels.force_route("vendor"):
        for count in (0, 0, 2, 4):
            wide.grad = None
            call().backward(tensor(3, 40, 64))
            assert wide.grad.shape == wide.shape and len(played) == count


def test_whether_hidden_states_are_kept_is_part_of_the_kind(launched, played):
    step = train_mlp()
    with koffkernels.force_route("fused"):
        for _ in range(3):
            step()
        kept = len(launched) // 3
        with dispatch.recompute_hidden():
            for count in (2, 2, 4):
                launched.clear()
                assert all(step()) and len(launched) > 0 and len(played) == count
        launched.clear()
        assert all(step()) and len(launched) == kept and len(played) == 6


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


def test_a_tape_holds_what_it_launches(launched):
    """From 3.8 on Triton unloads a kernel that nobody holds."""
    call = linear()
    with koffkernels.force_route("decode"):
        for _ in range(3):
            call()
    variants = [v for kernel in direct._kernels.values() for v in kernel.variants.values()]
    compiled = [weakref.ref(variant.compiled) for variant in variants]
    jitted = [kernel.kernel for kernel in direct._kernels.values()]
    del variants
    direct._kernels.clear()
    for kernel in jitted:
        kernel.device_caches.pop(host._DEVICE)
    gc.collect()
    assert len([ref for ref in compiled if ref() is not None]) == 2
    replay.forget()
    gc.collect()
    assert not any(ref() for ref in compiled)


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
        (lambda: launch_sum(x, splits=1 + len(x.sum().shape)), True),
        (lambda: launch_sum(x, splits=int(x.sum())), "__int__ reads a tensor"),
        (lambda: launch_sum(x, splits=x.tolist().count(0.0)), "tolist reads a tensor"),
        (lambda: launch_sum(other), "it takes a tensor that it was not given"),
        (
            lambda: launch_sum(attended(x.view(1, 2, 2))),
            "scaled_dot_product_attention chooses for itself what runs",
        ),
        (lambda: x + 1, "it launches nothing"),
    ):
        found = tape.record(call, [x])[1]
        assert type(found) is tape.Tape if fits is True else found == fits


def test_of_a_view_kernels_get_the_address(launched):
    """It is made only where something else reads it."""
    x = tensor(8)

    def steps(call):
        found = tape.record(call, [x])[1]
        launched.clear()
        found.play([other := tensor(8)])
        addresses = [a.data_ptr() if torch.is_tensor(a) else a for a in launched[-1][9:11]]
        names = [step.__qualname__.split(".")[0] for step, _ in found.steps]
        return names, {address - other.data_ptr() for address in addresses}

    launch_sum(x)
    assert steps(lambda: launch_sum(x.view(2, 4).t())) == (["_direct"], {0})
    assert steps(lambda: launch_sum(x.view(2, 4)[1])) == (["_address", "_direct"], {8})
    names, at = steps(lambda: launch_sum(x[8:]))
    assert names == ["_operator", "_direct"]  # what has no elements has no address
    # Its address is of x, whatever the view was made for.
    names, at = steps(lambda: launch_sum(x.chunk(2)[1].zero_()))
    assert sorted(names) == ["_address", "_direct", "_operator", "_operator"] and at == {8}


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
