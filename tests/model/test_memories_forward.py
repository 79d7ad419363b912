"""Memories in forward: exact against the concatenated cache, and the same whatever they are batched
with."""

import copy

import pytest
import torch
from support.models import ARCHITECTURES, attached, tiny, tokens
from transformers import DynamicCache

import koff
from koff.model.arch import Site
from koff.model.memories import _MOST_TURNS, rotate

MIX = ["es", None, "keys"]
# fp32, three layers: sums of up to ~100 products reordered, 2^-24 each, logits of size ~1.
FP32 = 1e-5

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def with_stock_cache(model, memory, ids):
    """Logits of the plain model that gets the memory's keys and values as its cache."""
    cache = DynamicCache(config=model.config)
    for layer, weights in enumerate(memory.kv):
        k, v = (t.detach()[None].expand(ids.shape[0], -1, -1, -1) for t in weights.full())
        cache.update(k, v, layer)
    return model(ids, past_key_values=cache).logits


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prefix_equals_the_concatenated_cache(architecture, rope):
    changes = {"rope_parameters": ROPES[rope]}
    model = attached(architecture, lora=None, target_sparsity=0, changes=changes)
    memory, ids = model.koff.memories["keys"], tokens()
    with torch.no_grad():
        ours = model(ids, memory="keys").logits
        stock = with_stock_cache(koff.detach(model), memory, ids)
    assert (ours - stock).abs().max() < FP32
    assert (ours - model(ids).logits).abs().max() > 0.01


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mixed_batch_equals_one_at_a_time(architecture):
    model, ids = attached(architecture), tokens()
    mixed = model(ids, memory=MIX).logits
    for row, name in enumerate(MIX):
        alone = model(ids[row : row + 1], memory=name).logits[0]
        assert (mixed[row] - alone).abs().max() < FP32
    base = koff.detach(model)(ids).logits
    assert (mixed[0] - base[0]).abs().max() > 0.01  # the memories do something
    assert (mixed[2] - base[2]).abs().max() > 0.01


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_swaps_and_repeats_are_bit_equal(architecture):
    model, ids = attached(architecture), tokens()
    with torch.no_grad():
        first = [model(ids, memory=m).logits for m in ("en", "es", MIX, None)]
        again = [model(ids, memory=m).logits for m in ("en", "es", MIX, None)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    with_graph = [model(ids, memory=m).logits for m in ("en", "es", MIX, None)]
    assert all(torch.equal(a, b) for a, b in zip(first, with_graph, strict=True))


def test_cached_stacks_follow_every_change_of_a_memory():
    model, ids = attached("llama"), tokens()
    with torch.no_grad():
        before = model(ids, memory="en").logits
        weights = model.koff.memories["en"].lora["1_up_proj"]
        weights.b.add_(0.5)  # in place: the version counts up
        changed = model(ids, memory="en").logits
        weights.b.data = weights.b.data - 0.5  # another tensor: the version does not
        back = model(ids, memory="en").logits
        model.koff.memories["en"].kv[0].k.mul_(2.0)
        assert not torch.equal(model(ids, memory="en").logits, back)
    assert not torch.equal(before, changed)
    assert (back - before).abs().max() < FP32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_left_padded_rows_equal_unpadded_ones(architecture):
    model, ids = attached(architecture), tokens()
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(15) >= 4).long().expand(3, -1)
    got = model(padded, attention_mask=mask, memory=MIX).logits[:, 4:]
    assert (got - model(ids, memory=MIX).logits).abs().max() < FP32


def test_right_padded_training_rows_equal_unpadded_ones():
    model, ids = attached("qwen2"), tokens()
    padded = torch.cat([ids, torch.zeros(3, 4, dtype=torch.long)], 1)
    mask = (torch.arange(15) < 11).long().expand(3, -1)
    got = model(padded, attention_mask=mask, memory=MIX).logits[:, :11]
    assert (got - model(ids, memory=MIX).logits).abs().max() < FP32


def test_chunked_prefill_equals_one_forward():
    model, ids = attached("llama"), tokens()
    whole = model(ids, memory=MIX).logits
    out = model(ids[:, :5], memory=MIX, use_cache=True)
    rest = model(ids[:, 5:], memory=MIX, past_key_values=out.past_key_values)
    assert (torch.cat([out.logits, rest.logits], 1) - whole).abs().max() < FP32
    base = model(ids).logits
    out = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], past_key_values=out.past_key_values)
    assert (torch.cat([out.logits, rest.logits], 1) - base).abs().max() < FP32


def test_use_memory_is_the_default_and_is_restored():
    model, ids = attached("qwen3"), tokens()
    wanted, none = model(ids, memory="es").logits, model(ids, memory=None).logits
    with koff.use_memory(model, "es"):
        assert torch.equal(model(ids).logits, wanted)
        assert torch.equal(model(ids, memory=None).logits, none)
        assert torch.equal(model.model(ids).last_hidden_state, _hidden(model, ids, "es"))
        with pytest.raises(KeyError), koff.use_memory(model, "xx"):
            pass
    assert torch.equal(model(ids).logits, none)


def _hidden(model, ids, memory):
    return model(ids, memory=memory, output_hidden_states=True).hidden_states[-1]


def test_layers_called_on_their_own_use_no_memory_and_keep_nothing():
    model = attached("llama", target_sparsity=0)
    layer, x = model.model.layers[0], torch.randn(1, 6, 64)
    rotary = model.model.rotary_emb(x, torch.arange(6)[None])
    with koff.use_memory(model, "en"):
        model(tokens(), memory="en", attention_mask=torch.ones(3, 11))
        out = layer(x, position_embeddings=rotary, attention_mask=None)
    bounds = torch.tensor([[[[2, 6, 0]]]])  # first key, end, first query
    masked = layer(x, position_embeddings=rotary, attention_mask=bounds)
    assert torch.equal(layer(x, position_embeddings=rotary, attention_mask=None), out)
    assert not torch.equal(masked, out)
    plain = koff.detach(model).model.layers[0]
    assert torch.equal(plain(x, position_embeddings=rotary, attention_mask=None), out)


def test_hidden_states_are_still_recorded():
    plain = tiny("qwen3")
    count = len(plain(tokens(), output_hidden_states=True).hidden_states)
    model = attached("qwen3")
    states = model(tokens(), memory="en", output_hidden_states=True).hidden_states
    assert len(states) == count == 4


@pytest.mark.parametrize("kind", [dict(fused=True), dict(foreach=True), dict(foreach=False)])
def test_cached_stacks_follow_every_kind_of_optimiser(kind):
    model, ids = attached("llama", target_sparsity=0), tokens()
    optimizer = torch.optim.AdamW(model.koff.parameters(), lr=0.1, **kind)
    model(ids, memory="en").logits.sum().backward()
    with torch.no_grad():
        before = model(ids, memory="en").logits
        optimizer.step()
        after = model(ids, memory="en").logits
    assert not torch.equal(before, after)
    assert torch.equal(model(ids, memory="en").logits, after)  # with autograd: never cached


def test_constants_of_a_stack_are_made_once():
    """Making one on a GPU waits for it."""
    model = attached("llama")
    bank = model.koff.memories
    two = bank["en"], bank["es"]
    first, again = (bank.lora(Site(0, "q_proj"), two) for _ in range(2))
    assert first.a is not again.a and first.scaling is again.scaling
    assert bank.prefix(0, two).lengths is bank.prefix(1, two).lengths
    assert bank.lora(Site(0, "q_proj"), two[:1]).scaling.shape == (1,)
    with torch.inference_mode():
        bank = attached("llama").koff.memories
        fresh = bank.lora(Site(0, "q_proj"), (bank["en"], bank["es"]))
    assert fresh.scaling.is_inference()
    bank = copy.deepcopy(model).koff.memories
    copied = bank.lora(Site(0, "q_proj"), (bank["en"], bank["es"]))
    assert copied.a is not first.a and torch.equal(copied.scaling, first.scaling)


def dtypes(stacks):
    """Of all matrices and learned keys and values that are kept."""
    kept = [*stacks.lora.values(), *stacks.prefix.values()]
    return {t.dtype for stack in kept if stack is not None for t in stack[:2]}


@pytest.mark.parametrize("autocast", [False, True])
def test_without_autograd_a_model_of_16_bits_keeps_stacks_of_16(autocast):
    """Half the bytes of every decode step, the same numbers: layers round to their dtype anyway.
    With autograd stacks are views or copies of the fp32 parameters, as ever."""
    lora = koff.LoRAConfig(r=4, alpha=8, target_modules="all-linear")  # a scaling of 2: exact
    model = attached("llama", lora=lora)
    bank, ids = model.koff.memories, tokens()
    if not autocast:
        for name, p in model.named_parameters():
            if not name.startswith("koff."):
                p.data = p.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        trained = model(ids, memory=MIX).logits.detach()
        with torch.no_grad():
            found = model(ids, memory=MIX).logits
    assert torch.equal(found, trained)
    with torch.no_grad():
        ((memories, stacks),) = bank._stacks.mixes.items()
        assert dtypes(stacks) == {torch.bfloat16}
        # Half of the parameters', and beside them 2 % for scalings and lengths.
        assert stacks.bytes() < 0.52 * sum(p.nbytes for m in memories for p in m.parameters())
        if autocast:  # the same model outside of it: fp32, and the others stay
            model(ids, memory=MIX)
            assert bank.stacks(memories) is stacks
            assert dtypes(stacks) == {torch.bfloat16, torch.float32}
    assert {p.dtype for p in bank.parameters()} == {torch.float32}
    assert bank.lora(Site(0, "q_proj"), memories).a.dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora", "keys"])
@torch.no_grad()
def test_a_memory_that_is_not_finite_is_refused_where_it_is_stacked(part, bad):
    """By every forward that stacks it, and by no other; once it is edited, it is looked at anew."""
    model, ids = attached("llama"), tokens()
    want = model(ids, memory=MIX).logits
    memory = model.koff.memories["es"]
    number = memory.lora["2_down_proj"].b[3:4, 0] if part == "lora" else memory.kv[1].k[0, 2, :1]
    before = number.clone()
    number.fill_(bad)
    for rows in (MIX, "es", ["es"] * 3):
        with pytest.raises(ValueError, match="forward: memory 'es' must be finite, got NaN or inf"):
            model(ids, memory=rows)
    assert model(ids, memory=["en", None, "keys"]).logits.isfinite().all()
    number.copy_(before)
    assert torch.equal(model(ids, memory=MIX).logits, want)


def test_a_bank_keeps_few_angles():
    model, ids = attached("llama"), tokens()
    for length in range(3 * _MOST_TURNS):
        model.koff.memories._angles((length,), torch.zeros(1))
    assert len(model.koff.memories._turns) <= _MOST_TURNS
    model(ids, memory="es")


def test_loras_are_found_behind_a_wrapper():
    """As FSDP may put around any module."""

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __contains__(self, key):
            return key in self.inner

        def __getitem__(self, key):
            return self.inner[key]

    memory = attached("llama").koff.memories["es"]
    site = Site(2, "down_proj")
    found = memory.lora_at(site)
    memory.lora = Wrapped(memory.lora)
    assert memory.lora_at(site) is found is not None


def test_a_scaling_equal_to_a_length_is_another_constant():
    lora = koff.LoRAConfig(r=1, alpha=7, target_modules="all-linear")
    model = attached("llama", lora=lora)  # 7 learned tokens, and alpha / r = 7
    assert model(tokens(), memory="en").logits.isfinite().all()


def test_memories_of_different_lengths_and_ranks_mix():
    from koff.model.attach import new_memory, use_koff_attention

    model, ids = attached("llama"), tokens()
    generator = torch.Generator().manual_seed(5)
    lora, kv = (
        koff.LoRAConfig(r=2, target_modules=("q_proj", "down_proj")),
        koff.KVConfig(12, "normal"),
    )
    model.koff.memories.add(new_memory(model, "long", lora, kv, generator))
    model.koff.memories.add(new_memory(model, "thin", koff.LoRAConfig(r=9), None, generator))
    use_koff_attention(model)
    with torch.no_grad():
        for name in ("long", "thin"):
            for p in model.koff.memories[name].parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    names = ["long", "en", "thin"]
    mixed = model(ids, memory=names).logits
    for row, name in enumerate(names):
        alone = model(ids[row : row + 1], memory=name).logits[0]
        assert (mixed[row] - alone).abs().max() < FP32


def test_rotation_moves_keys_exactly():
    frequencies = 1.0 / 1e4 ** (torch.arange(0, 16, 2) / 16)
    keys = torch.randn(2, 5, 16, dtype=torch.float64)
    there = rotate(keys, -40, frequencies)
    assert (rotate(there, 40, frequencies) - keys).abs().max() < 1e-14
    assert (rotate(rotate(keys, -25, frequencies), -15, frequencies) - there).abs().max() < 1e-13
    assert torch.allclose(there.norm(dim=-1), keys.norm(dim=-1))


def test_rotation_touches_the_rotated_dimensions_alone():
    """Partial RoPE: the first dimensions of a head are a head of their own."""
    frequencies = 1.0 / 1e4 ** (torch.arange(0, 10, 2) / 10)
    keys = torch.randn(2, 5, 16, dtype=torch.float64)
    there = rotate(keys, -40, frequencies)
    assert torch.equal(there[..., :10], rotate(keys[..., :10], -40, frequencies))
    assert torch.equal(there[..., 10:], keys[..., 10:])
    assert not torch.equal(there[..., :10], keys[..., :10])


@pytest.mark.parametrize(
    ("memory", "error", "message"),
    [
        ("de", KeyError, r"must be one of the model's \(en, keys, es\), got 'de'"),
        (["en", "de", None], KeyError, "must be one of the model's"),
        (["en"], ValueError, r"must have one entry per row \(3\), got 1"),
        (7, TypeError, "must be a name, None, a list of these, or an int64 tensor"),
        ([1, 2, 0], TypeError, "must be a name or None, got 1"),
        (torch.tensor([0, 1, 9]), KeyError, r"must lie in -1..2, got \[9\]"),
        (torch.tensor([0.0, 1.0, 2.0]), ValueError, "must be an int64 tensor of shape"),
    ],
)
def test_unknown_memories_are_refused(memory, error, message):
    with pytest.raises(error, match=message):
        attached("llama")(tokens(), memory=memory)


def test_a_foreign_cache_is_refused_under_a_kv_memory():
    model, ids = attached("llama"), tokens()
    cache = DynamicCache(config=model.config)
    for layer, weights in enumerate(model.koff.memories["en"].kv):
        k, v = (t.detach()[None].expand(3, -1, -1, -1) for t in weights.full())
        cache.update(k, v, layer)
    with pytest.raises(ValueError, match="must be empty or come from this model, got a cache that"):
        model(ids, memory="en", past_key_values=cache)


def test_rows_that_do_not_fit_the_positions_are_refused():
    model = attached("llama")
    model(tokens(1, 249), memory="en")
    with pytest.raises(ValueError, match=r"must fit max_position_embeddings \(256\), got 7 \+ 250"):
        model(tokens(1, 250), memory="en")


def test_masks_that_a_prefix_cannot_honour_are_refused():
    model, ids = attached("llama"), tokens()
    mask = torch.ones_like(ids)
    mask[0, 5] = 0
    with pytest.raises(ValueError, match="must be 1 on one run of each row, got a mask with holes"):
        model(ids, memory="en", attention_mask=mask)
    packed = torch.cat([torch.arange(5), torch.arange(6)])[None].expand(3, -1)
    with pytest.raises(ValueError, match="must be a 2-D padding mask when a KV memory is in use"):
        model(ids, memory="en", position_ids=packed, use_cache=False)
