"""Attention on a memory's learned keys: against eager attention over the concatenated cache."""

import pytest
import torch
from support.character_tokenizer import make_tokenizer
from support.models import ARCHITECTURES, attached, tokens
from transformers import DynamicCache

import koff
from koff.evaluation.attention_mass import PrefixMass, mean_mass

# As in test_memories_forward: fp32, three layers, sums of up to ~100 products reordered.
FP32 = 1e-5
PREFIX = 7
BLOCKS = [{"input_ids": row.tolist()} for row in tokens(5, 12)]


def kv_alone(architecture, **config):
    """A model whose memories are learned caches alone, which a stock cache can hold too."""
    return attached(architecture, lora=None, target_sparsity=0, **config)


def eager_mass(model, name, ids, mask):
    """The same from transformers' eager attention, with the memory in the stock cache."""
    memory = model.koff.memories[name]
    rows = ids.shape[0]
    plain = koff.detach(model)
    plain.set_attn_implementation("eager")
    cache = DynamicCache(config=plain.config)
    for layer, weights in enumerate(memory.kv):
        cache.update(*(t.detach()[None].expand(rows, -1, -1, -1) for t in weights.full()), layer)
    out = plain(
        ids,
        attention_mask=torch.cat([torch.ones(rows, PREFIX, dtype=torch.long), mask], 1),
        position_ids=PREFIX + (mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        output_attentions=True,
    )
    given = torch.stack(out.attentions)[..., :PREFIX].double()  # [L, B, Hq, T, P]
    return (given * mask[None, :, None, :, None]).sum((1, 3)) / mask.sum()


MASKS = {
    "whole rows": torch.ones(3, 11, dtype=torch.long),
    "left padding": (torch.arange(11) >= torch.tensor([[0], [4], [10]])).long(),
    "right padding": (torch.arange(11) < torch.tensor([[11], [4], [1]])).long(),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mass_equals_eager_attention_over_the_concatenated_cache(architecture, kind):
    model, ids, mask = kv_alone(architecture), tokens(), MASKS[kind]
    implementation = model.config._attn_implementation
    got, count = mean_mass(model, "keys", [(ids[:2], mask[:2]), (ids[2:], mask[2:])])
    assert model.config._attn_implementation == implementation
    wanted = eager_mass(model, "keys", ids, mask)
    assert count == int(mask.sum()) and got.shape == wanted.shape == (3, 4, PREFIX)
    assert (got - wanted).abs().max() < FP32
    assert wanted.std() > 100 * FP32  # no uniform attention, of which every mistake gives the same


def test_mass_is_of_the_packed_blocks_and_changes_nothing():
    model, ids = kv_alone("llama"), tokens()
    model.train()
    before = model(ids, memory="en").logits
    found = koff.prefix_attention_mass(
        model, None, BLOCKS, memory="en", block_size=12, batch_size=2
    )
    assert model.training and torch.equal(model(ids, memory="en").logits, before)
    assert all(p.grad is None for p in model.parameters())
    alone, count = mean_mass(model, "en", [(tokens(5, 12), None)])
    assert torch.allclose(found.mass, alone, rtol=1e-5) and found.tokens == count == 60
    assert found.memory == "en" and found.frozen == 1
    assert found.heads.shape == (3, 4) and found.positions.shape == (3, PREFIX)
    assert bool(((found.heads > 0) & (found.heads < 1)).all())
    other = koff.prefix_attention_mass(model, None, BLOCKS, memory="es", block_size=12)
    assert not torch.allclose(other.mass, found.mass, rtol=1e-2)


def test_mass_of_a_compacted_model_with_lora():
    model = attached("qwen3", target_sparsity=0.5)
    koff.binarize(model, multiple_of=16)
    options = dict(memory="en", block_size=12)
    masked = koff.prefix_attention_mass(model, None, BLOCKS, **options)
    small = koff.prefix_attention_mass(koff.compact(model), None, BLOCKS, **options)
    assert torch.allclose(small.mass, masked.mass, atol=FP32)


def test_mass_sums_up_by_hand():
    mass = torch.tensor([[[0.2, 0.1, 0.1], [0.4, 0.0, 0.0]], [[0.0] * 3] * 2]).double()
    found = PrefixMass("en", mass, 10, 1)
    assert torch.allclose(found.heads[0], torch.tensor([0.4, 0.4]).double())
    assert torch.allclose(found.positions[0], torch.tensor([0.3, 0.05, 0.05]).double())
    share = found.share_of_first()
    assert share[0] == pytest.approx(0.75) and share[1].isnan()  # nothing has no shares
    assert PrefixMass("en", mass, 10, 2).share_of_first()[0] == pytest.approx(0.875)
    assert PrefixMass("en", mass, 10, 0).share_of_first()[0] == pytest.approx(0.75)
    values = found.to_dict()
    assert values["tokens"] == 10 and values["heads"][0] == pytest.approx([0.4, 0.4])


def test_mass_refuses_what_it_cannot_measure():
    model = kv_alone("llama")

    def measure(model=model, documents=BLOCKS, **options):
        options = dict(memory="en", block_size=12) | options
        return koff.prefix_attention_mass(model, None, documents, **options)

    with pytest.raises(ValueError, match="the model must have koff attached"):
        measure(koff.detach(kv_alone("llama")))
    with pytest.raises(KeyError, match=r"must be one of the model's \(en, keys, es\), got 'de'"):
        measure(memory="de")
    with pytest.raises(TypeError, match="memory must be a name, got None"):
        measure(memory=None)
    with pytest.raises(ValueError, match="memory 'en' must have a KV part, got LoRA alone"):
        measure(attached("llama", kv=None))
    with pytest.raises(ValueError, match="at least one block of 100 tokens, got 60"):
        measure(block_size=100)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        measure(batch_size=0)
    long = [{"input_ids": tokens(1, 250)[0].tolist()}]
    with pytest.raises(ValueError, match=r"prefix \+ block_size must be .* 256 .* got 7 \+ 250"):
        measure(documents=long, block_size=250)

    def fail(*_):
        raise RuntimeError("amid the measurement")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="amid the measurement"):
        measure(block_size=12)
    hook.remove()
    assert model.config._attn_implementation == "koff"  # also after an error inside


def test_mass_of_texts_needs_the_tokenizer():
    model = kv_alone("llama")
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    options = dict(memory="en", block_size=8)
    found = koff.prefix_attention_mass(model, tokenizer, ["abc def " * 5], **options)
    assert found.tokens % 8 == 0 and found.tokens > 0
    with pytest.raises(TypeError, match="must hold token ids when there is no tokenizer"):
        koff.prefix_attention_mass(model, None, ["abc def " * 5], **options)
