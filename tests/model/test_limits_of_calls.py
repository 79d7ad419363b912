"""What a call cannot have is said before anything runs: more positions than there are, a cache that
another memory filled, a learned cache that nothing has filled yet."""

import warnings

import pytest
import torch
from support.models import attached, tiny, tokens
from transformers import DynamicCache, StaticCache

import koff
from koff.model.forward_context import BASE

MIX = ["es", None, "keys"]
LIMIT = 40
PREFIX = 7
FP32 = 1e-5


@pytest.fixture(scope="module")
def short():
    """A model with few positions."""
    return attached("llama", changes=dict(max_position_embeddings=LIMIT))


def generate(model, ids, memory, **kwargs):
    kwargs = {"do_sample": False, "min_new_tokens": 60, "max_new_tokens": 60, **kwargs}
    return model.generate(ids, memory=memory, **kwargs)


def count_forwards(model):
    calls = []
    return calls, model.model.register_forward_pre_hook(lambda *_: calls.append(1))


# ---- positions ----


@pytest.mark.parametrize(
    "kwargs", [{}, dict(cache_implementation="static"), dict(num_beams=2, num_return_sequences=2)]
)
@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
def test_every_row_ends_where_its_own_positions_do(short, kwargs):
    """A row without a prefix goes on, as it does alone and in the base model."""
    ids = tokens()
    with pytest.warns(RuntimeWarning, match=r"row 0 ends after 22 new tokens.*embeddings \(40\)"):
        got = generate(short, ids, MIX, **kwargs)
    copies = len(got) // 3
    for row, name in enumerate(MIX):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alone = generate(short, ids[row : row + 1], name, **kwargs)
        assert alone.shape[1] == (11 + 60 if name is None else LIMIT - PREFIX)
        mine = got[copies * row : copies * (row + 1)]
        assert torch.equal(mine[:, : alone.shape[1]], alone)
        # Of beams transformers takes a pad token of 0 for none, and pads with the one that ends.
        padding = torch.tensor([short.config.pad_token_id, short.config.eos_token_id])
        assert torch.isin(mine[:, alone.shape[1] :], padding).all()


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
def test_rows_end_together_where_nothing_could_pad_them(short):
    with pytest.warns(RuntimeWarning, match="row 0 ends after 22"):
        got = generate(short, tokens(), MIX, pad_token_id=None, eos_token_id=None)
    assert got.shape[1] == LIMIT - PREFIX


def test_a_length_that_nobody_asked_for_ends_there_as_in_the_base_model(short):
    base = tiny("llama", max_position_embeddings=LIMIT)
    for model, memory, length in ((base, {}, LIMIT), (short, dict(memory="en"), LIMIT - PREFIX)):
        ids = tokens(1, length - 5)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            got = model.generate(ids, do_sample=False, min_length=length, **memory)
        assert got.shape[1] == length


def test_tokens_are_counted_and_not_padding(short):
    ids = tokens(3, 20)
    padded = torch.cat([torch.zeros(3, 30, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    want = short(ids, memory=MIX).logits
    got = short(padded, attention_mask=mask, memory=MIX).logits[:, 30:]
    assert (got - want).abs().max() < FP32
    wanted = generate(short, ids, "en", min_new_tokens=9, max_new_tokens=9)
    for given in (dict(attention_mask=mask), {}):  # without, the pad token says it
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            got = generate(short, padded, "en", min_new_tokens=9, max_new_tokens=9, **given)
        assert torch.equal(got[:, 30:], wanted)
    with pytest.raises(ValueError, match=r"must fit max_position_embeddings \(40\), got 7 \+ 34"):
        longer = torch.cat([padded, ids[:, :14]], 1)
        short(longer, attention_mask=(longer != 0).long(), memory=MIX)


def test_only_rows_with_a_prefix_are_held_to_it(short):
    """As alone: the base model, and so a row without memory, may go beyond its positions."""
    ids = tokens(2, 36)
    want = short(ids, memory=None).logits
    ids[0, :10] = 0
    got = short(ids, attention_mask=(ids != 0).long(), memory=["en", None]).logits
    assert (got[1] - want[1]).abs().max() < FP32
    with pytest.raises(ValueError, match=r"got 7 \+ 36"):
        short(ids, attention_mask=(ids != 0).long(), memory=[None, "en"])


def test_a_prompt_without_room_is_refused_before_the_first_token(short):
    calls, hook = count_forwards(short)
    with pytest.raises(ValueError, match=r"leave room for a token within.*\(40\), got 7 \+ 33"):
        generate(short, tokens(2, 33), [None, "en"])
    hook.remove()
    assert not calls
    got = generate(short, tokens(1, 32), "en", min_new_tokens=1, max_new_tokens=1)
    assert got.shape == (1, 33)


def test_a_memory_without_room_for_a_token_is_refused(short):
    config = koff.KoffConfig(memories=("a",), kv=koff.KVConfig(LIMIT, "normal"))
    base = tiny("llama", max_position_embeddings=LIMIT)
    with pytest.raises(ValueError, match=r"attach: num_tokens.*less than max_p.*\(40\), got 40"):
        koff.attach(base, config)
    assert not hasattr(base, "koff")
    model = attached("llama", changes=dict(max_position_embeddings=LIMIT), target_sparsity=0)
    with pytest.raises(ValueError, match="koff.add_memory: num_tokens.*got 41"):
        koff.add_memory(model, "long", [{"input_ids": [5] * 600}], kv=koff.KVConfig(41, "tokens"))
    assert model.koff.memory_names == short.koff.memory_names


def test_blocks_that_do_not_fit_are_refused_before_anything_is_measured(short):
    calls, hook = count_forwards(short)
    documents = {"en": [{"input_ids": tokens(1, 200)[0].tolist()}]}
    with pytest.raises(ValueError, match=r"prefix \+ block_size must be at most.*40.*got 7 \+ 34"):
        koff.evaluate(short, None, documents, block_size=34, memories=[None, "en"])
    hook.remove()
    assert not calls
    rows = koff.evaluate(short, None, documents, block_size=34, memories=[None])
    assert len(rows) == 1


# ---- caches ----

ORIGINS = ["en", None, BASE, MIX, ["es", "en", "keys"]]


@pytest.mark.parametrize("parts", [{}, dict(kv=None, target_sparsity=0.2)])
def test_a_cache_goes_on_under_the_memory_that_it_began_with(parts):
    model, ids = attached("llama", **parts), tokens()
    for begun in ORIGINS:
        cache = model(ids[:, :5], memory=begun, use_cache=True).past_key_values
        with koff.use_memory(model, "keys"):
            model(ids[:, 5:8], memory=begun, past_key_values=cache)
        for other in ORIGINS:
            if other is not begun:
                with pytest.raises(ValueError, match="go on under the memory that they began with"):
                    model(ids[:, 8:], memory=other, past_key_values=cache)
        assert cache.get_seq_length() == 8
        got = model(ids[:, 8:], memory=begun, past_key_values=cache).logits
        assert (got - model(ids, memory=begun).logits[:, 8:]).abs().max() < FP32


def test_a_cache_begins_anew_when_it_is_empty():
    model, ids = attached("llama"), tokens()
    want = model(ids, memory="es").logits
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=32)):
        with torch.no_grad():
            for memory in ("en", "es"):
                got = model(ids, memory=memory, past_key_values=cache).logits
                # Older versions of transformers reset a growing cache to zeros, not to nothing.
                if isinstance(cache, StaticCache):
                    cache.reset()
                else:
                    cache.crop(-ids.shape[1])
        assert (got - want).abs().max() < FP32


def test_rows_may_leave_a_cache_and_be_multiplied():
    model, ids = attached("llama"), tokens()
    cache = model(ids[:, :5], memory=MIX, use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([0, 2]))
    got = model(ids[[0, 2], 5:], memory=["es", "keys"], past_key_values=cache).logits
    assert (got - model(ids, memory=MIX).logits[[0, 2], 5:]).abs().max() < FP32
    with pytest.raises(ValueError, match=r"cache of \['es', 'keys'\] and memory 'en'"):
        model(ids[:2, 5:], memory="en", past_key_values=cache)
    cache = model(ids[:1, :5], memory="en", use_cache=True).past_key_values
    cache.batch_repeat_interleave(3)
    model(ids[:1, 5:].expand(3, -1), memory=["en"] * 3, past_key_values=cache)


@pytest.mark.parametrize("memory", ["en", MIX])
@pytest.mark.parametrize("kwargs", [{}, dict(cache_implementation="static"), dict(num_beams=2)])
def test_generate_goes_on_with_its_own_cache_alone(memory, kwargs):
    model, ids = attached("llama"), tokens()
    new = dict(min_new_tokens=4, max_new_tokens=4, return_dict_in_generate=True)
    first = generate(model, ids, memory, **new, **kwargs)
    if "num_beams" in kwargs:
        assert first.past_key_values._koff == (memory if memory == "en" else tuple(MIX))
        return
    cache = first.past_key_values
    if isinstance(cache, StaticCache):
        with torch.no_grad():  # it was made as long as that text
            cache = model(first.sequences[:, :-1], memory=memory, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="go on under the memory that they began with"):
        generate(model, first.sequences, "es", past_key_values=cache, **new)
    got = generate(model, first.sequences, memory, past_key_values=cache, **new).sequences
    assert torch.equal(got, generate(model, ids, memory, min_new_tokens=8, max_new_tokens=8))


# ---- a learned cache that waits for text ----


def test_a_memory_that_waits_for_text_is_not_used():
    model, ids = attached("llama"), tokens()
    model.koff.memories["en"].kv_filled = False
    waits = "the KV part of memory 'en' must be filled, got one that waits for text; train it with"
    documents = {"en": [{"input_ids": ids.flatten().tolist()}]}
    calls, hook = count_forwards(model)
    for memory in ("en", ["es", "en", None]):
        with pytest.raises(ValueError, match=f"generate: {waits}"):
            generate(model, ids, memory)
    for asked, call in (("evaluate", koff.evaluate), ("prefix_attention_mass", None)):
        with pytest.raises(ValueError, match=f"{asked}: {waits}"):
            if call is None:
                koff.prefix_attention_mass(model, None, documents["en"], memory="en", block_size=9)
            else:
                call(model, None, documents, block_size=9)
    hook.remove()
    assert not calls
    for memory in ("en", ["es", "en", None], torch.tensor([0, -1, 2])):
        with pytest.raises(ValueError, match=f"forward: {waits}"):
            model(ids, memory=memory)
    with koff.use_memory(model, "en"), pytest.raises(ValueError, match=f"forward: {waits}"):
        model(ids)


def test_memories_beside_one_that_waits_for_text_work(monkeypatch):
    from koff.model import forward_context

    model, ids = attached("llama"), tokens()
    wanted = [model(ids, memory=MIX).logits, generate(model, ids, MIX, max_new_tokens=60)]
    model.koff.memories["en"].kv_filled = False
    assert torch.equal(model(ids, memory=MIX).logits, wanted[0])
    koff.evaluate(
        model, None, {"es": [{"input_ids": ids.flatten().tolist()}]}, memories=["es"], block_size=9
    )
    # As with ids on a GPU: all memories are stacked, used or not.
    monkeypatch.setattr(forward_context, "_on_host", lambda ids: False)
    with torch.no_grad():
        got = model(ids, memory=torch.tensor([2, -1, 1])).logits
        assert (got - wanted[0]).abs().max() < FP32
        with pytest.raises(ValueError, match="forward: the KV part of memory 'en' must be filled"):
            model(ids, memory=torch.tensor([2, 0, 1]))
    assert torch.equal(generate(model, ids, MIX, max_new_tokens=60), wanted[1])


def test_generate_in_batches_of_its_own_thread_takes_no_memory():
    model = attached("llama", kv=None)
    with koff.use_memory(model, "en"), pytest.raises(ValueError, match="memory must be None, got"):
        model.generate_batch([[5, 6, 7]])
