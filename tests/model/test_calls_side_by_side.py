"""Calls of one model that run side by side, in threads and in asyncio tasks: each has the memory
that it asked for, in forward, generate, evaluate, use_memory and when layers are recomputed."""

import asyncio
import contextlib
import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import activation_checkpointing, recorded_graph
from support.models import HYBRID, NAMES, attached, tokens

import koff
from koff.model.forward_context import BASE, ForwardContext

MIX = ["es", None, "keys"]
MEMORIES = ["en", "es", None, MIX, "keys", ["keys", "en", None], "en", None]
THREADS = len(MEMORIES)


@pytest.fixture(autouse=True)
def _many_switches():
    """Let threads give way to each other within a layer, and not every 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def side_by_side(jobs):
    """Run functions at once, each in a thread of its own; their results in order."""
    start = threading.Barrier(len(jobs))

    def run(job):
        start.wait(timeout=60)
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(run, job) for job in jobs]]


def hidden(model, ids, memory):
    with torch.no_grad():
        return model(ids, memory=memory).logits


def wrong_forwards(model, calls=12):
    """How many of the outputs of ``THREADS`` threads are not those of the calls alone."""
    ids = tokens()
    wanted = [hidden(model, ids, memory) for memory in MEMORIES]

    def job(memory, want):
        return lambda: sum(not torch.equal(hidden(model, ids, memory), want) for _ in range(calls))

    return sum(side_by_side([job(*both) for both in zip(MEMORIES, wanted, strict=True)]))


def share_between_threads(model):
    """What the code must not do, to see that the tests would notice: one state for all threads."""

    class Shared:
        context = generation = ahead = None

        def begin(self):
            pass

        end = begin

    shared = Shared()
    model.koff.running = shared
    for module in model.modules():
        if hasattr(module, "_koff"):
            module._koff.running = shared


def test_forwards_in_threads_use_their_own_memory():
    models = (("llama", {}), ("llama", dict(kv=None, target_sparsity=0.2)), (HYBRID, {}))
    for architecture, parts in models:
        assert wrong_forwards(attached(architecture, **parts)) == 0


def test_forwards_of_one_shared_state_would_be_seen():
    model = attached("llama")
    share_between_threads(model)
    assert wrong_forwards(model) > 0


@pytest.mark.parametrize("shared", [False, True])
def test_memory_for_a_block_is_of_its_thread(shared):
    """Nested blocks, each left while other threads are amid theirs."""
    model, ids = attached("llama"), tokens()
    want = {name: hidden(model, ids, name) for name in (*NAMES, None)}
    if shared:
        model.koff.active = _SharedActive()

    def job(first, second):
        def run():
            wrong = 0
            for _ in range(6):
                with koff.use_memory(model, first):
                    wrong += not torch.equal(model(ids).logits, want[first])
                    with koff.use_memory(model, second):
                        wrong += not torch.equal(model(ids).logits, want[second])
                    wrong += not torch.equal(model(ids).logits, want[first])
            return wrong

        return run

    names = [*NAMES, None] * 2
    pairs = zip(names, names[3:] + names[:3], strict=True)
    with torch.no_grad():
        wrong = sum(side_by_side([job(a, b) for a, b in pairs]))
    assert wrong > 0 if shared else wrong == 0


class _SharedActive:
    """use_memory as one attribute of the model, as it must not be."""

    memory = None

    def get(self):
        return self.memory

    @contextlib.contextmanager
    def set(self, memory):
        before, self.memory = self.memory, memory
        try:
            yield
        finally:
            self.memory = before


@pytest.mark.parametrize("shared", [False, True])
def test_memory_for_a_block_is_of_its_task(shared):
    model, ids = attached("llama"), tokens()
    want = {name: hidden(model, ids, name) for name in (*NAMES, None)}
    if shared:
        model.koff.active = _SharedActive()

    @torch.no_grad()
    def forward():
        return model(ids).logits

    async def task(name):
        wrong = 0
        with koff.use_memory(model, name):
            for _ in range(4):
                await asyncio.sleep(0)  # the other tasks enter and leave their blocks here
                wrong += not torch.equal(forward(), want[name])
                wrong += not torch.equal(await asyncio.to_thread(forward), want[name])
                with koff.use_memory(model, None):
                    await asyncio.sleep(0)
                    wrong += not torch.equal(forward(), want[None])
        return wrong

    async def all_tasks():
        return sum(await asyncio.gather(*(task(name) for name in [*NAMES, None] * 2)))

    wrong = asyncio.run(all_tasks())
    assert wrong > 0 if shared else wrong == 0
    assert shared or torch.equal(forward(), want[None])


def test_a_thread_that_misses_a_block_is_told():
    """As where generate is started in a thread for its streamer, inside of a block."""
    model, ids = attached("llama"), tokens()
    none = hidden(model, ids, None)
    with koff.use_memory(model, "en"), ThreadPoolExecutor(1) as pool, torch.no_grad():
        with pytest.warns(RuntimeWarning, match="names no memory runs without one.*pass memory="):
            got = pool.submit(lambda: model(ids).logits.detach()).result()
    assert torch.equal(got, none)


def texts(model, ids, memory, **kwargs):
    kwargs = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **kwargs}
    return model.generate(ids, memory=memory, **kwargs)


@pytest.mark.parametrize("kwargs", [{}, dict(num_beams=2), dict(cache_implementation="static")])
def test_generates_in_threads_use_their_own_memory(kwargs):
    model, ids = attached("llama"), tokens()
    wanted = [texts(model, ids, memory) for memory in MEMORIES]
    if "num_beams" in kwargs:
        wanted = [texts(model, ids, memory, **kwargs) for memory in MEMORIES]

    def job(memory):
        return lambda: [texts(model, ids, memory, **kwargs) for _ in range(2)]

    got = side_by_side([job(memory) for memory in MEMORIES])
    for pair, want in zip(got, wanted, strict=True):
        assert all(torch.equal(one, want) for one in pair)
    assert len({str(t) for t in wanted}) > 4


def test_captured_steps_in_threads_replay_their_own_graphs(monkeypatch):
    """Also when several generates want the one cache that was kept. A capture, which needs the
    device alone, waits until the others have ended."""
    replays = []
    recorded_graph.use(monkeypatch, on_replay=lambda: replays.append(1))
    model, ids = attached("llama"), tokens()
    memories = [MIX, ["keys", "en", "es"], ["en", None, "es"], ["es", "es", "en"]] * 2
    wanted = [texts(model, ids, memory) for memory in memories]
    for _ in range(2):  # the second of these waits with a captured step for one of the threads
        texts(model, ids, MIX, cache_implementation="static")
    before = len(replays)

    def job(memory):
        return lambda: [texts(model, ids, memory, cache_implementation="static") for _ in range(3)]

    for found, want in zip(side_by_side([job(m) for m in memories]), wanted, strict=True):
        assert all(torch.equal(one, want) for one in found)
    assert len(replays) > before
    assert all(step.user is None for step in model.koff.graphs.steps.values())


def gradients(model, name, backward=torch.Tensor.backward):
    """Those of one memory after a call with it."""
    memory = model.koff.memories[name]
    memory.zero_grad()
    loss = model(tokens(), memory=name, use_cache=False).logits.square().mean()
    backward(loss)
    zero = torch.zeros(())  # where no gradient came
    return [zero if p.grad is None else p.grad.clone() for p in memory.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_recomputed_in_threads_see_their_own_call(reentrant):
    """Every thread trains a memory of its own; backward runs in yet another thread, as it does on a
    GPU."""
    names = tuple(f"m{i}" for i in range(THREADS))
    model = attached("llama", memories=names, target_sparsity=0).train()
    activation_checkpointing.enable(model, reentrant)
    wanted = [gradients(model, name) for name in names]
    with ThreadPoolExecutor(THREADS) as pool:

        def elsewhere(loss):
            pool.submit(loss.backward).result()

        def job(name):
            return lambda: [gradients(model, name, elsewhere) for _ in range(3)]

        found = side_by_side([job(name) for name in names])
    for several, want in zip(found, wanted, strict=True):
        assert all(all(map(torch.equal, one, want)) for one in several)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_recomputed_under_another_call_would_be_seen(reentrant):
    """Not by a race as above: torch's engine does not survive two threads in one memory."""
    model = attached("llama", target_sparsity=0).train()
    activation_checkpointing.enable(model, reentrant)
    wanted = gradients(model, "en")

    class OfAnotherCall:
        other, ahead = ForwardContext((model.koff.memories["es"],)), None
        context = property(lambda self: self.other, lambda self, context: None)

    def backward(loss):
        another = OfAnotherCall()
        for module in model.modules():
            if hasattr(module, "_koff"):
                module._koff.running = another
        loss.backward()

    assert not all(map(torch.equal, gradients(model, "en", backward), wanted))


def test_a_forward_inside_of_a_layer_leaves_the_outer_call_its_memory():
    model, ids = attached("llama"), tokens()
    want = hidden(model, ids, "en")
    inner = []

    def call_again(*_):
        if not inner:
            inner.append(None)
            inner[0] = hidden(model, ids, "es")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(call_again)
    assert torch.equal(hidden(model, ids, "en"), want)
    handle.remove()
    assert torch.equal(inner[0], hidden(model, ids, "es"))


def test_a_layer_that_fails_leaves_nothing_behind():
    model, ids = attached("llama"), tokens()

    def fail(*_):
        raise RuntimeError("no memory left")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    for call in (lambda: hidden(model, ids, "en"), lambda: texts(model, ids, "en")):
        with pytest.raises(RuntimeError, match="no memory left"):
            call()
        assert model.koff.running.context is None and model.koff.running.generation is None
    handle.remove()
    x = torch.randn(2, 64)
    up = model.model.layers[1].mlp.up_proj
    assert torch.equal(up(x), torch.nn.functional.linear(x, up.weight))


def test_the_base_model_is_asked_for_call_by_call():
    """A model that is its own teacher in one thread has its memory in another."""
    model, ids = attached("llama", target_sparsity=0.4), tokens()
    base = koff.detach(copy.deepcopy(model))(ids).logits
    wanted = {"en": hidden(model, ids, "en"), BASE: base}
    jobs = [lambda m=m: [hidden(model, ids, m) for _ in range(5)] for m in ["en", BASE] * 4]
    for memory, got in zip(["en", BASE] * 4, side_by_side(jobs), strict=True):
        assert all((one - wanted[memory]).abs().max() < 1e-5 for one in got)
    assert (base - wanted["en"]).abs().max() > 0.01


class Meanwhile:
    """A logits processor that does something in the middle of a generate."""

    def __init__(self, what):
        self.what, self.calls = what, 0

    def __call__(self, ids, scores):
        self.calls += 1
        if self.calls == 3:
            self.what()
        return scores


@pytest.mark.parametrize("memory", ["es", MIX, ["keys", "keys", "keys"]])
def test_memories_added_and_removed_meanwhile_change_no_call(memory):
    model, ids = attached("llama"), tokens()
    wanted = texts(model, ids, memory)

    def change():
        removed = {name: koff.remove_memory(model, name) and name for name in ("en", "keys")}
        assert model.koff.memory_names == ("es",) and len(removed) == 2

    got = texts(model, ids, memory, logits_processor=[Meanwhile(change)])
    assert torch.equal(got, wanted)
    with pytest.raises(KeyError, match="must be one of the model's"):
        texts(model, ids, "keys")


def test_a_block_inside_of_a_generate_comes_before_what_that_was_asked_for():
    model, ids = attached("llama"), tokens()
    found = []

    def look():
        found.append(model(ids).logits)
        with koff.use_memory(model, "es"):
            found.append(model(ids).logits)
        found.append(model(ids).logits)

    texts(model, ids, "en", logits_processor=[Meanwhile(look)])
    want = [hidden(model, ids, name) for name in ("en", "es", "en")]
    assert all(map(torch.equal, found, want))


# ---- measuring ----


def documents():
    return {"en": [{"input_ids": tokens(1, 60)[0].tolist()}]}


def test_evaluations_in_threads_measure_their_own_memory():
    """Of a model in training mode, too: its gates are sampled before and after, and not amid."""
    model = attached("llama", target_sparsity=0.4).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]

    def job(memory):
        return lambda: [
            koff.evaluate(model, None, documents(), memories=[memory], block_size=12)[0].perplexity
            for _ in range(4)
        ]

    names = [*NAMES, None] * 2
    wanted = [job(name)() for name in names]
    assert side_by_side([job(name) for name in names]) == wanted
    assert len({value for values in wanted for value in values}) == 4
    assert [module.training for module in model.modules()] == modes


def test_attention_is_measured_beside_other_calls():
    model, ids = attached("llama"), tokens()

    def mass(name):
        return koff.prefix_attention_mass(
            model, None, documents()["en"], memory=name, block_size=12
        ).mass

    names = ["en", "es"] * 2
    wanted = [mass(name) for name in names]
    logits = hidden(model, ids, MIX)
    jobs = [lambda name=name: mass(name) for name in names]
    jobs += [lambda: [hidden(model, ids, MIX) for _ in range(8)]] * 4
    found = side_by_side(jobs)
    assert all(map(torch.equal, found[:4], wanted))
    assert all(torch.equal(one, logits) for calls in found[4:] for one in calls)
    assert model.config._attn_implementation == "koff"


# ---- changes of a model that is in use ----

CHANGES = {
    "binarize": koff.binarize,
    "compact": lambda model: koff.compact(model, inplace=True),
    "detach": koff.detach,
    "load_state_dict": lambda model: model.load_state_dict(model.state_dict()),
}


@pytest.mark.parametrize("asked", CHANGES)
def test_a_model_in_use_is_not_changed(asked):
    model, ids = attached("llama", target_sparsity=0.4), tokens()
    koff.binarize(model, multiple_of=1)
    wanted, text = hidden(model, ids, MIX), texts(model, ids, MIX)
    refused = []

    def change(*_):
        with pytest.raises(RuntimeError, match=f"{asked}: no call of the model must run meanwhile"):
            CHANGES[asked](model)
        refused.append(1)

    with ThreadPoolExecutor(1) as pool:

        def elsewhere(*_):
            pool.submit(change).result()

        for meanwhile in (change, elsewhere):
            hook = model.model.layers[1].register_forward_hook(meanwhile)
            assert torch.equal(hidden(model, ids, MIX), wanted)
            hook.remove()
            got = texts(model, ids, MIX, logits_processor=[Meanwhile(meanwhile)])
            assert torch.equal(got, text)
    assert len(refused) == 4
    CHANGES[asked](model)


def test_a_call_amid_a_change_waits_for_its_end():
    model, ids = attached("llama"), tokens()
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda _: hidden(model, ids, "en").isfinite().all(), range(4)))
        with model.koff.running.changing("binarize"):
            waiting = [pool.submit(call, model, ids, "en") for call in (hidden, texts)]
            for call in waiting:
                with pytest.raises(TimeoutError):
                    call.result(timeout=0.05)
        assert torch.equal(waiting[0].result(), hidden(model, ids, "en"))
        assert torch.equal(waiting[1].result(), texts(model, ids, "en"))


def test_interrupted_calls_do_not_count_for_ever():
    model, ids = attached("llama", target_sparsity=0.4), tokens()

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    for call in (hidden, texts):
        with pytest.raises(KeyboardInterrupt):
            call(model, ids, "en")
    hook.remove()
    with pytest.raises(KeyError):
        hidden(model, ids, "unknown")
    koff.binarize(model)


def test_memories_come_and_go_while_the_model_is_in_use():
    model, ids = attached("llama", target_sparsity=0), tokens()
    wanted, done = hidden(model, ids, "es"), threading.Event()

    def calls():
        wrong = 0
        while not done.is_set():
            wrong += not torch.equal(hidden(model, ids, "es"), wanted)
        return wrong

    def come_and_go():
        try:
            for _ in range(30):
                for name in ("en", "keys"):  # the id of "es" changes each time
                    model.koff.memories.add(model.koff.memories.remove(name))
        finally:
            done.set()

    assert sum(side_by_side([calls, calls, calls, come_and_go])[:3]) == 0


def test_another_stream_reads_no_stack_that_it_did_not_make(monkeypatch):
    """Of threads with streams of their own, as on a GPU: the stream of the first has the stacks."""
    from koff.model import memories

    model, ids = attached("llama"), tokens()
    wanted = hidden(model, ids, "en")
    monkeypatch.setattr(memories, "stream_of", lambda device: threading.get_ident())
    bank = model.koff.memories
    bank._stacks.mixes.clear()
    with torch.no_grad():
        assert bank.stacks((bank["en"],)) is bank.stacks((bank["en"],)) is not None

    def elsewhere():
        with torch.no_grad():
            assert bank.stacks((bank["en"],)) is None
        return hidden(model, ids, "en")

    assert all(torch.equal(got, wanted) for got in side_by_side([elsewhere] * 3))
    assert torch.equal(hidden(model, ids, "en"), wanted)


@pytest.mark.slow
def test_compiled_calls_in_threads_use_their_own_memory():
    model, ids = attached("llama"), tokens()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    @torch.no_grad()
    def call(memory):
        return compiled(ids, memory=memory, use_cache=False).logits

    memories = ["en", None, MIX]
    wanted = [call(memory) for memory in memories]
    jobs = [lambda m=m: [call(m) for _ in range(5)] for m in memories * 2]
    for got, want in zip(side_by_side(jobs), wanted * 2, strict=True):
        assert all(torch.equal(one, want) for one in got)
    with torch.no_grad():
        assert torch.equal(compiled(ids, use_cache=False).logits, wanted[1])
        with koff.use_memory(model, "en"):
            assert torch.equal(call(MIX), wanted[2])
            with pytest.raises(torch._dynamo.exc.Unsupported, match="ContextVar"):
                compiled(ids, use_cache=False)
            loose = torch.compile(model, backend="aot_eager")
            assert (loose(ids, use_cache=False).logits - wanted[0]).abs().max() < 1e-5
