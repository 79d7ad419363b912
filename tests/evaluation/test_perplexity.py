"""Perplexity and bits per byte: against a plain computation, with and without memories."""

import math

import pytest
import torch
from support.character_tokenizer import make_tokenizer
from support.models import redraw
from transformers import LlamaConfig, LlamaForCausalLM

import koff
from koff.data.blocks import pack
from koff.evaluation.perplexity import evaluate

DOCUMENTS = {"en": ["abcdefgh " * 8, "hgf ed"], "fr": ["é a é b é c d é" * 5]}


@pytest.fixture
def tokenizer():
    return make_tokenizer(bos_token="<s>", eos_token="</s>")


def tiny(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 14}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | changes)))


def with_memories(**changes):
    """A koff model whose memories all differ from each other and from none."""
    config = koff.KoffConfig(
        memories=("en", "fr"),
        lora=koff.LoRAConfig(r=2, alpha=4, target_modules="all-linear"),
        kv=koff.KVConfig(num_tokens=4, init="normal"),
        **changes,
    )
    return redraw(koff.attach(tiny(), config))


def test_evaluate_agrees_with_the_definition(tokenizer):
    model = tiny().eval()
    rows = evaluate(model, tokenizer, DOCUMENTS, block_size=8, batch_size=3, split="validation")
    assert [(row.variant, row.memory, row.domain, row.split) for row in rows] == [
        ("base", None, "en", "validation"),
        ("base", None, "fr", "validation"),
    ]
    for row in rows:
        packed = pack(DOCUMENTS[row.domain], tokenizer, 8)
        with torch.no_grad():
            logits = model(input_ids=packed.blocks).logits.double()
        scores = logits.log_softmax(-1)[:, :-1].gather(-1, packed.blocks[:, 1:, None])
        nll = -scores.mean().item()
        assert row.tokens == packed.blocks[:, 1:].numel()
        assert row.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
        expected = (
            nll
            / math.log(2)
            * packed.num_tokens
            / sum(len(text.encode()) for text in DOCUMENTS[row.domain])
        )
        assert row.bits_per_byte == pytest.approx(expected, rel=1e-5)


def test_evaluate_scores_the_tokens_that_count_as_transformers_does(tokenizer):
    model = tiny().eval()
    records = [
        {"prompt": "abc", "completion": "def"},
        {"prompt": "h", "completion": "a b c d"},
        {"prompt": "é é é", "completion": "g"},
    ]
    # Too long to share a block, so that each has one of its own, filled up.
    (row,) = evaluate(model, tokenizer, {"en": records}, block_size=11, batch_size=2)
    nats, count = 0.0, 0
    for record in records:
        prompt, completion = (tokenizer(record[name])["input_ids"] for name in record)
        ids = torch.tensor([[1, *prompt, *completion, 2]])
        labels = ids.clone()
        labels[:, : 1 + len(prompt)] = -100
        own = len(completion) + 1
        with torch.no_grad():
            nats += own * float(model(input_ids=ids, labels=labels).loss)
        count += own
    assert row.tokens == count == 4 + 8 + 2
    assert row.perplexity == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert row.bits_per_byte == pytest.approx(nats / math.log(2) / (3 + 7 + 1), rel=1e-5)


def test_evaluate_runs_every_memory_and_none(tokenizer):
    model = with_memories()
    rows = evaluate(model, tokenizer, DOCUMENTS, block_size=8)
    assert [row.memory for row in rows] == ["en", "fr", None] * 2
    assert {row.variant for row in rows} == {"koff"}
    assert len({row.perplexity for row in rows}) == 6
    chosen = evaluate(model, tokenizer, DOCUMENTS, memories=[None, "fr", None], block_size=8)
    assert chosen == [rows[2], rows[1], rows[5], rows[4]]


def test_evaluate_is_deterministic_and_restores_the_mode(tokenizer):
    model = with_memories(target_sparsity=0.5)  # gates that would be sampled in training mode
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    first = evaluate(model, tokenizer, DOCUMENTS, block_size=8)
    assert evaluate(model, tokenizer, DOCUMENTS, block_size=8) == first
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluate_restores_the_mode_after_an_error(tokenizer):
    model = tiny().train()
    model.forward = None
    with pytest.raises(TypeError):
        evaluate(model, tokenizer, DOCUMENTS, block_size=8)
    assert model.training


def test_evaluate_hardly_depends_on_the_batch_size(tokenizer):
    model = with_memories()
    one = evaluate(model, tokenizer, DOCUMENTS, block_size=8, batch_size=1)
    many = evaluate(model, tokenizer, DOCUMENTS, block_size=8, batch_size=50)
    for a, b in zip(one, many, strict=True):
        assert a.perplexity == pytest.approx(b.perplexity, rel=1e-5)


def test_evaluate_refuses_before_it_runs(tokenizer):
    model = tiny()
    with pytest.raises(KeyError, match="memory must be one of .* got 'en'; this model has no"):
        evaluate(model, tokenizer, DOCUMENTS, memories=["en"], block_size=8)
    with pytest.raises(KeyError, match=r"memory must be one of \['en', 'fr'\] or None, got 'de'"):
        evaluate(with_memories(), tokenizer, DOCUMENTS, memories=["de"], block_size=8)
    with pytest.raises(TypeError, match=r"memories must be a list .* write \['en'\]"):
        evaluate(with_memories(), tokenizer, DOCUMENTS, memories="en", block_size=8)
    with pytest.raises(ValueError, match="block_size must be at most the model's 64 positions"):
        evaluate(model, tokenizer, DOCUMENTS, block_size=65)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        evaluate(model, tokenizer, DOCUMENTS, block_size=8, batch_size=0)
    with pytest.raises(TypeError, match="datasets must be a mapping, got list"):
        evaluate(model, tokenizer, DOCUMENTS["en"], block_size=8)
    size = model.config.vocab_size
    with pytest.raises(ValueError, match=rf"dataset 'x' must have token ids in 0..{size - 1}"):
        evaluate(model, None, {"x": [{"input_ids": [1, size, 1]}]}, block_size=2)
    with pytest.raises(ValueError, match="document 0 of dataset 'x' must be at least 0 .* got -1"):
        evaluate(model, None, {"x": [{"input_ids": [1, -1, 1]}]}, block_size=2)
    with pytest.raises(ValueError, match="datasets must not be empty"):
        evaluate(model, tokenizer, {}, block_size=8)
    with pytest.raises(ValueError, match="dataset 'fr' must hold at least one block of 60 tokens"):
        evaluate(model, tokenizer, {"en": DOCUMENTS["en"] * 2, "fr": ["a"]}, block_size=60)
