"""Packing documents: tokens in order, whole blocks, and the bytes of the texts."""

import pytest
import torch
from support.character_tokenizer import make_tokenizer
from transformers import PreTrainedTokenizerFast

from koff.data.blocks import pack


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos_token="<s>", eos_token="</s>")


def test_pack_writes_bos_text_eos_in_order(tokenizer):
    packed = pack(["ab", "c", "", "defg"], tokenizer, 4)
    a = tokenizer.convert_tokens_to_ids("a")
    stream = [1, a, a + 1, 2, 1, a + 2, 2, 1, a + 3, a + 4, a + 5, a + 6, 2]
    assert packed.blocks.dtype == torch.int64
    assert packed.blocks.flatten().tolist() == stream[:12]
    assert (packed.num_documents, packed.num_tokens, len(packed)) == (3, 13, 3)
    assert packed.tokens_per_byte == 13 / 7


def test_pack_adds_only_the_special_tokens_there_are():
    assert pack(["abcd"], make_tokenizer(), 2).num_tokens == 4
    assert pack(["abcd"], make_tokenizer(eos_token="</s>"), 2).num_tokens == 5


def test_pack_counts_bytes_not_characters(tokenizer):
    assert pack(["éa"], tokenizer, 2).tokens_per_byte == 4 / 3


def test_pack_takes_records_ids_datasets_and_packed(tokenizer):
    texts = ["abcd", "efgh"] * 700  # more than one call of the tokenizer
    expected = pack(texts, tokenizer, 8)
    records = pack([{"text": text} for text in texts], tokenizer, 8)
    assert torch.equal(records.blocks, expected.blocks)
    rows = [{"input_ids": [1, *tokenizer(text)["input_ids"], 2]} for text in texts]
    ids = pack(iter(rows), tokenizer, 8)
    assert torch.equal(ids.blocks, expected.blocks)
    assert ids.tokens_per_byte == expected.tokens_per_byte
    mixed = pack([texts[0], rows[1], *texts[2:]], tokenizer, 8)
    assert torch.equal(mixed.blocks, expected.blocks)
    assert pack(expected, tokenizer, 8) is expected
    with pytest.raises(ValueError, match="must have blocks of 4 tokens, got 8"):
        pack(expected, tokenizer, 4)


def test_pack_takes_a_datasets_dataset(tokenizer):
    import datasets

    data = datasets.Dataset.from_dict({"text": ["abcd", "efgh"]})
    assert torch.equal(
        pack(data, tokenizer, 4).blocks, pack(list(data["text"]), tokenizer, 4).blocks
    )


def test_pack_refuses_empty_short_and_foreign_documents(tokenizer):
    with pytest.raises(ValueError, match="data.fr must not be empty, got 0 documents"):
        pack(["", " \n"], tokenizer, 4, name="data.fr")
    with pytest.raises(ValueError, match="at least one block of 99 tokens, got 6 tokens"):
        pack(["abcd"], tokenizer, 99)
    with pytest.raises(ValueError, match="block_size must be an integer of at least 2"):
        pack(["abcd"], tokenizer, 1)
    with pytest.raises(TypeError, match="must be a list of texts.*got str; wrap"):
        pack("abcd", tokenizer, 2)
    with pytest.raises(TypeError, match=r"document 1 of documents .* got a record with \['body'\]"):
        pack(["abcd", {"body": "x"}], tokenizer, 2)
    with pytest.raises(TypeError, match="document 0 of documents .* got int"):
        pack([3], tokenizer, 2)
    with pytest.raises(
        TypeError, match="'text' of document 0 of documents must be a text, got int"
    ):
        pack([{"text": 5}], tokenizer, 2)
    for ids in (5, [[1]], [2**70], ["a"]):
        with pytest.raises(TypeError, match="input_ids of document 1 of documents must be a list"):
            pack(["abcd", {"input_ids": ids}], tokenizer, 2)
    with pytest.raises(ValueError, match="document 1 of x must be valid Unicode, got surrogates"):
        pack(["abcd", "a\ud800"], tokenizer, 2, name="x")
