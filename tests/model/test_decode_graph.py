"""Decode steps as CUDA graphs: the same tokens as without, and no graph that outlives what it was
captured from. On the CPU a recorded graph stands for the real one."""

import copy
import gc
import time
import warnings
import weakref

import pytest
import torch
from support import recorded_graph
from support.models import ARCHITECTURES, NAMES, attached, tokens
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import StaticCache

import koff
from koff.model import decode_graph

MIX = ["es", None, "keys"]
NEW = 9
FP32 = 1e-5
FP32 = 1e-5  # the same sums in another order


class Counts:
    captures = replays = 0


@pytest.fixture
def counts(monkeypatch):
    """Decode through recorded graphs on the CPU, and count them."""
    found = Counts()

    def captured():
        found.captures += 1

    def replayed():
        found.replays += 1

    recorded_graph.use(monkeypatch, captured, replayed)
    return found


def generate(model, ids, memory, **kwargs):
    kwargs = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **kwargs}
    return model.generate(ids, memory=memory, **kwargs)


def with_logits(model, ids, memory, **kwargs):
    """Generated ids, and the logits of every step."""
    kwargs = {"return_dict_in_generate": True, "output_logits": True, **kwargs}
    out = generate(model, ids, memory, **kwargs)
    return out.sequences, torch.stack(out.logits)


def check(model, ids, memory, counts, **kwargs):
    """Return the logits that graphs decode by, bit for bit those of the static cache without them,
    and the text, which is that of the dynamic cache, too."""
    before = counts.replays
    got, logits = with_logits(model, ids, memory, cache_implementation="static", **kwargs)
    assert counts.replays >= before + NEW - 3  # all but the prompt and one step
    plain, wanted = with_logits(
        model, ids, memory, cache_implementation="static", disable_compile=True, **kwargs
    )
    assert torch.equal(got, plain) and torch.equal(logits, wanted)
    assert torch.equal(got, generate(model, ids, memory, **kwargs))
    return logits, got


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return attached(request.param)


def test_graphs_decode_every_mix_of_memories(model, counts):
    ids = tokens()
    for memory in (None, "es", MIX, ["keys", None, None], ["en"] * 3):
        _, got = check(model, ids, memory, counts)
        if memory is not None:
            assert not torch.equal(got, generate(model, ids, None))
    for memory in ("en", None, ["keys"]):
        check(model, ids[:1], memory, counts)


def test_graphs_decode_left_padded_rows(model, counts):
    rows = [tokens(1, n, seed=n)[0] for n in (3, 9, 6)]
    padded = torch.stack([torch.nn.functional.pad(r, (9 - len(r), 0)) for r in rows])
    mask = torch.stack([(torch.arange(9) >= 9 - len(r)).long() for r in rows])
    _, got = check(model, padded, MIX, counts, attention_mask=mask)
    for row, (ids, name) in enumerate(zip(rows, MIX, strict=True)):
        assert torch.equal(got[row, 9 - len(ids) :], generate(model, ids[None], name)[0])


def test_graphs_decode_where_tf32_was_set_by_its_newer_name(counts, monkeypatch):
    """torch refuses the older question then. That cannot be taken back in a process, so a stand-in
    refuses it here."""

    def refused():
        raise RuntimeError("PyTorch is checking whether allow_tf32_new is enabled")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refused)
    check(attached("llama"), tokens(), MIX, counts)


@pytest.mark.parametrize("parts", [dict(kv=None), dict(lora=None)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_graphs_decode_with_one_part_alone(architecture, parts, counts):
    """Without a KV part transformers' own attention runs, under its own masks."""
    model = attached(architecture, **parts)
    for memory in (MIX, "es"):
        check(model, tokens(), memory, counts)
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), tokens()], 1)
    check(model, padded, MIX, counts, attention_mask=(padded != 0).long())


def test_graphs_decode_pruned_models(counts):
    model = attached("llama", target_sparsity=0.2)
    ids, seen = tokens(), []
    for change in (lambda m: m, koff.binarize, koff.compact):
        change(model)
        check(model, ids, MIX, counts)
        seen.append(check(model, ids, "es", counts))
    assert not torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[1][1], seen[2][1])


def test_a_prompt_of_one_token_and_one_that_continues_a_cache(counts):
    model = attached("llama")
    check(model, tokens(3, 1), MIX, counts)
    ids = tokens(2)
    whole = generate(model, ids, "en")

    def in_two_halves(**kwargs):
        cache = StaticCache(config=model.config, max_cache_len=64)
        first = generate(
            model, ids, "en", past_key_values=cache, max_new_tokens=5, min_new_tokens=5, **kwargs
        )
        return generate(
            model, first, "en", past_key_values=cache, max_new_tokens=4, min_new_tokens=4, **kwargs
        )

    assert torch.equal(in_two_halves(), whole)
    assert torch.equal(in_two_halves(disable_compile=True), whole)


def test_a_cache_whose_tensors_were_exchanged_is_captured_anew(counts):
    """As reordering for beams does."""
    model, ids = attached("llama"), tokens(2)
    cache = StaticCache(config=model.config, max_cache_len=64)
    first = generate(model, ids, "en", past_key_values=cache)
    for layer in cache.layers:
        old = layer.keys, layer.values
        layer.keys, layer.values = (t[[1, 0]].clone() for t in old)
        for t in old:
            t.fill_(torch.nan)
    swapped = first[[1, 0]]
    got = generate(model, swapped, "en", past_key_values=cache)
    assert torch.equal(got, generate(model, swapped, "en")) and counts.captures == 2


def test_sampling_is_outside_of_the_graph(counts):
    model, ids = attached("qwen3"), tokens()

    def sample(**kwargs):
        torch.manual_seed(5)
        return generate(model, ids, MIX, do_sample=True, **kwargs)

    wanted = sample()
    assert torch.equal(sample(cache_implementation="static"), wanted)
    assert counts.replays > 0
    assert not torch.equal(sample(cache_implementation="static")[:, 12:], wanted[:, :-12])


def test_beams_run_without_a_graph(counts):
    model, ids = attached("llama"), tokens()
    got = generate(model, ids, MIX, num_beams=3, cache_implementation="static")
    assert torch.equal(got, generate(model, ids, MIX, num_beams=3))
    assert counts.captures == 0


def test_one_capture_serves_the_next_generates(counts):
    model, ids = attached("llama"), tokens()
    static = dict(cache_implementation="static")
    generate(model, ids, MIX, **static)
    other = tokens(seed=9)
    for _ in range(2):
        got = generate(model, other, ["en", "es", None], **static)  # other ids of memories
        assert torch.equal(got, generate(model, other, ["en", "es", None]))
    shorter = other[:, :7]
    assert torch.equal(generate(model, shorter, MIX, **static), generate(model, shorter, MIX))
    assert counts.captures == 1
    generate(model, ids[:2], "en", **static)
    assert counts.captures == 2


def test_a_cache_that_somebody_holds_is_not_used_again(counts):
    model, ids = attached("llama"), tokens()
    static = dict(cache_implementation="static", return_dict_in_generate=True)
    first = generate(model, ids, "en", **static).past_key_values
    keys = first.layers[0].keys.clone()
    second = generate(model, tokens(seed=9), "es", **static).past_key_values
    assert second is not first and torch.equal(first.layers[0].keys, keys)
    generate(model, ids, "en", cache_implementation="static")
    generate(model, ids, "es", cache_implementation="static")
    assert torch.equal(first.layers[0].keys, keys)


def test_graphs_die_with_their_cache_and_stay_few(counts):
    model, ids = attached("llama"), tokens()
    steps = model.koff.graphs.steps
    static = dict(cache_implementation="static", return_dict_in_generate=True)
    out = generate(model, ids, "en", **static)
    cache = weakref.ref(out.past_key_values)
    assert len(steps) == 1
    del out
    assert cache() is None and len(steps) == 0  # at once, with no help of the collector
    held = [generate(model, ids, "en", **static) for _ in range(6)]
    assert len(steps) == decode_graph.MOST_GRAPHS < len(held)


def test_a_memory_that_changes_drops_the_graph(counts):
    model, ids = attached("llama"), tokens()
    bank = model.koff.memories
    first, _ = check(model, ids, MIX, counts)
    with torch.no_grad():
        bank["es"].lora["1_up_proj"].b.add_(0.5)
    second, _ = check(model, ids, MIX, counts)
    bank["es"].kv[0].k.data = bank["es"].kv[0].k.data * 3
    third, _ = check(model, ids, MIX, counts)
    assert not torch.equal(first, second) and not torch.equal(second, third)
    removed = bank.remove("en")  # the ids of the others are one less now
    assert (check(model, ids, MIX, counts)[0] - third).abs().max() < FP32
    bank.add(removed)
    assert (check(model, ids, MIX, counts)[0] - third).abs().max() < FP32
    optimizer = torch.optim.SGD(bank.parameters(), lr=2.0, fused=True)
    model(ids, memory="es").logits.square().mean().backward()
    optimizer.step()
    assert not torch.equal(check(model, ids, MIX, counts)[0], third)


class EditsAMemory:
    """A logits processor that edits a memory in the middle of a generate."""

    def __init__(self, weights):
        self.weights, self.calls = weights, 0

    def __call__(self, ids, scores):
        self.calls += 1
        if self.calls == 5:
            with torch.no_grad():
                self.weights.add_(1.0)
        return scores


def test_a_memory_edited_between_two_steps_is_seen(counts):
    texts = []
    for kwargs in ({}, dict(disable_compile=True)):
        model, ids = attached("llama"), tokens()
        edit = EditsAMemory(model.koff.memories["es"].lora["0_up_proj"].b)
        kwargs = dict(logits_processor=[edit], cache_implementation="static", **kwargs)
        texts.append(with_logits(model, ids, MIX, max_new_tokens=12, **kwargs))
    assert torch.equal(texts[0][1], texts[1][1])
    # Two steps each time before there is a graph: the one that stacks, and the prompt's or edited.
    assert counts.captures == 2 and counts.replays == 12 - 1 - 2


def test_weights_that_change_are_seen(counts):
    model, ids = attached("llama"), tokens()
    first, _ = check(model, ids, MIX, counts)
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data * 2  # other memory
    second, _ = check(model, ids, MIX, counts)
    text = generate(model, ids, MIX, cache_implementation="static")
    captures = counts.captures
    with torch.no_grad():
        weight.neg_()  # the same memory: the graph reads it
    edited = generate(model, ids, MIX, cache_implementation="static")
    assert counts.captures == captures and not torch.equal(edited, text)
    assert torch.equal(edited, generate(model, ids, MIX))
    model.to(torch.float64)
    check(model, ids, MIX, counts)
    assert not torch.equal(first, second) and counts.captures > captures


def test_settings_that_change_are_seen(counts):
    from koffkernels import force_backend

    model, ids = attached("llama"), tokens()
    static = dict(cache_implementation="static")
    generate(model, ids, MIX, **static)
    with force_backend("reference"), pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        generate(model, ids, MIX, **static)  # it looks at ids, which no graph can
    generate(model, ids, MIX, **static)
    assert counts.captures == 2
    calls = []
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    generate(model, ids, MIX, **static)
    assert len(calls) == NEW and counts.captures == 2
    hook.remove()
    calls.clear()
    hook = register_module_forward_pre_hook(lambda module, _: calls.append(module))
    generate(model, ids, MIX, **static)
    assert calls.count(model.model.layers[1].mlp) == NEW and counts.captures == 2
    hook.remove()
    model.train()
    generate(model, ids, MIX, **static)
    assert counts.captures == 2
    model.eval()
    generate(model, ids, MIX, output_hidden_states=True, return_dict_in_generate=True, **static)
    assert counts.captures == 2
    wanted = generate(model, ids, MIX)
    for _ in range(2):  # a cache of one mode cannot be written to in the other
        with torch.inference_mode():
            assert torch.equal(generate(model, ids, MIX, **static), wanted)
        assert torch.equal(generate(model, ids, MIX, **static), wanted)


def test_a_compile_config_is_left_to_transformers(counts, monkeypatch):
    from transformers import PreTrainedModel
    from transformers.generation import CompileConfig

    asked = []
    monkeypatch.setattr(
        PreTrainedModel, "get_compiled_call", lambda self, c: asked.append(c) or self.__call__
    )
    model, ids = attached("llama"), tokens()
    config = CompileConfig()
    generate(model, ids, MIX, cache_implementation="static", compile_config=config)
    assert len(asked) == 1 and isinstance(asked[0], CompileConfig) and counts.captures == 0


def test_a_capture_that_fails_goes_on_without(counts, monkeypatch):
    """Also in the middle of a step, when some layers have counted their token already."""
    model, ids = attached("llama"), tokens()
    wanted = generate(model, ids, MIX)
    original = decode_graph.capture

    def broken(step, device):
        def partly():
            model.model.layers[1].register_forward_hook(lambda *_: torch.ones(1).item())
            step()

        try:
            return original(partly, device)
        finally:
            model.model.layers[1]._forward_hooks.clear()
            cache = model.koff.running.generation.static_cache
            for layer in cache.layers[:2]:
                layer.cumulative_length.add_(1)

    monkeypatch.setattr(decode_graph, "capture", broken)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph.*disable_compile") as warned:
        got = generate(model, ids, MIX, cache_implementation="static")
    assert torch.equal(got, wanted) and len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(generate(model, ids, MIX, cache_implementation="static"), wanted)
    assert counts.captures == 0


def test_copies_detaching_and_moving_leave_nothing_behind(counts):
    model, ids = attached("llama"), tokens()
    wanted = generate(model, ids, MIX, cache_implementation="static")
    spare = weakref.ref(model.koff.graphs.spare)
    other = copy.deepcopy(model)
    assert len(other.koff.graphs.steps) == 0 and other.koff.graphs.spare is None
    assert torch.equal(generate(other, ids, MIX, cache_implementation="static"), wanted)
    model.to(torch.float64)
    assert spare() is None
    generate(model, ids, MIX, cache_implementation="static")
    spare = weakref.ref(model.koff.graphs.spare)
    koff.detach(model)
    gc.collect()
    assert spare() is None


def test_use_memory_and_threads(counts):
    from concurrent.futures import ThreadPoolExecutor

    model, ids = attached("llama"), tokens()
    names = ["en", "es", MIX, None] * 2
    wanted = [generate(model, ids, name) for name in names]
    with ThreadPoolExecutor(3) as pool:
        got = list(
            pool.map(lambda m: generate(model, ids, m, cache_implementation="static"), names)
        )
    assert all(map(torch.equal, got, wanted))
    with koff.use_memory(model, "en"):
        static = dict(cache_implementation="static", do_sample=False)
        got = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, **static)
    assert torch.equal(got, wanted[0])
    assert model.koff.running.generation is None


def test_a_loop_of_ones_own_is_not_taken_for_a_generate():
    """What generate knows of its prompt is not known of a mask that somebody else made."""
    model, ids = attached("llama"), tokens(2, 5)
    cache = StaticCache(config=model.config, max_cache_len=16)
    mask = torch.ones(2, 5, dtype=torch.long)
    inputs = model.prepare_inputs_for_generation(
        ids, past_key_values=cache, attention_mask=mask, use_cache=True
    )
    with torch.no_grad():
        model(**inputs, memory="en")
    holes = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    holes[:, 4] = 0
    with pytest.raises(ValueError, match="got a mask with holes"):
        model.prepare_inputs_for_generation(
            ids, next_sequence_length=1, past_key_values=cache, attention_mask=holes, use_cache=True
        )


@pytest.mark.gpu
def test_graphs_on_a_gpu_equal_eager_and_are_faster():
    changes = dict(
        hidden_size=256, intermediate_size=512, num_hidden_layers=8, head_dim=64,
        max_position_embeddings=512,
    )  # fmt: skip
    for dtype in (torch.bfloat16, torch.float32):
        model = attached("llama", changes=changes).to("cuda", dtype)
        ids, graphs = tokens().cuda(), model.koff.graphs
        padded = torch.cat([torch.zeros_like(ids), ids], 1)
        static = dict(cache_implementation="static")
        for memory in (MIX, "es", None, list(NAMES)):
            for kwargs in ({}, dict(attention_mask=(padded != 0).long())):
                prompt = padded if kwargs else ids
                with warnings.catch_warnings():
                    warnings.simplefilter("error", RuntimeWarning)
                    got, logits = with_logits(model, prompt, memory, **static, **kwargs)
                eager = dict(disable_compile=True, **static, **kwargs)
                plain, wanted = with_logits(model, prompt, memory, **eager)
                assert torch.equal(got, plain) and torch.equal(logits, wanted)
                again = generate(model, prompt, memory, **static, **kwargs)
                assert torch.equal(again, got) and len(graphs.steps) > 0
        seconds = {}
        for name, kwargs in (("graph", {}), ("eager", dict(disable_compile=True))):
            for _ in range(2):
                torch.cuda.synchronize()
                start = time.perf_counter()
                generate(model, ids, MIX, max_new_tokens=64, min_new_tokens=64, **static, **kwargs)
                torch.cuda.synchronize()
                seconds[name] = time.perf_counter() - start
        print(f"{dtype}: ms a token: { ({k: 1e3 * v / 64 for k, v in seconds.items()}) }")
        assert seconds["graph"] < seconds["eager"]


@pytest.mark.gpu
def test_a_capture_that_fails_on_a_gpu_leaves_torch_usable():
    changes = dict(hidden_size=256, intermediate_size=512, head_dim=64)
    model = attached("llama", changes=changes).to("cuda", torch.bfloat16)
    ids, stream = tokens().cuda(), torch.cuda.current_stream()
    wanted = generate(model, ids, MIX, cache_implementation="static", disable_compile=True)
    rotary = model.model.rotary_emb
    kind = type(rotary)

    # A method of the class, since a forward of the module's own would not be captured at all.
    class ReadsOnTheHost(kind):
        def forward(self, x, position_ids):
            x.sum().item()
            return super().forward(x, position_ids)

    rotary.__class__ = ReadsOnTheHost
    with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        got = generate(model, ids, MIX, cache_implementation="static")
    assert torch.equal(got, wanted)
    assert torch.cuda.current_stream() == stream
    sampled = generate(model, ids, MIX, cache_implementation="static", do_sample=True)
    assert sampled.shape == wanted.shape and torch.rand(3, device="cuda").isfinite().all()
    rotary.__class__ = kind
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # another setting: it is tried again
        assert torch.equal(generate(model, ids, MIX, cache_implementation="static"), wanted)
    assert len(model.koff.graphs.steps) == 1
