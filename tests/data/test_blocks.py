"""Reading and packing documents."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from support.character_tokenizer import make_tokenizer
from transformers import PreTrainedTokenizerFast

from koff.data.blocks import DataSource, load_documents, pack


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos_token="<s>", eos_token="</s>")


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_load_jsonl_keeps_order_and_skips_blank_lines(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    path.write_text(path.read_text() + "\n\n" + json.dumps({"text": "thrée"}) + "\n", "utf-8")
    assert load_documents(path) == ["one", "two", "thrée"]
    assert load_documents(DataSource(path=path, skip=1, limit=1)) == ["two"]


def test_load_txt_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n", "utf-8")
    assert load_documents(str(path)) == ["one\n\ntwo\n"]


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("question", "Why?"),
        (("question", "key"), "Why?\nB"),
        ("Q: {question}\n{choices[label]}: {choices[text]} ({choices[text][1]}) {key}{", None),
    ],
)
def test_load_field_is_a_column_several_or_a_template(tmp_path, field, text):
    record = {"question": "Why?", "key": "B", "choices": {"text": ["x", "y"], "label": ["A", "B"]}}
    path = write_lines(tmp_path / "a.jsonl", record)
    expected = "Q: Why?\nA; B: x; y (y) B{" if text is None else text
    assert load_documents(DataSource(path=path, field=field)) == [expected]


@pytest.mark.parametrize(
    "field", ["body", "{text} {body}", ("text", "body"), "{text[a]}", "number"]
)
def test_load_missing_field_names_file_line_and_columns(tmp_path, field):
    path = write_lines(
        tmp_path / "a.jsonl", {"text": "t", "body": "b", "number": "1"}, {"text": "t"}
    )
    with pytest.raises(KeyError, match=r"a\.jsonl line \d must have the field .*\['"):
        load_documents(DataSource(path=path, field=field))


def test_load_field_that_is_not_text_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"text": 3})
    with pytest.raises(KeyError, match="line 1 must have the field 'text'.*int instead of a text"):
        load_documents(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"line 2 must be valid JSON, got '\{\"text\":'"),
        ("[1]", "line 2 must be a JSON object, got list"),
        ("[" * 100_000, "line 2 must be valid JSON"),
        ('{"text": ' + "1" * 5000 + "}", "line 2 must be valid JSON"),
    ],
)
def test_load_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", "utf-8")
    with pytest.raises(ValueError, match=message):
        load_documents(path)


def test_load_bad_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be an existing file.*KOFF_DATA"):
        load_documents(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="got a folder"):
        load_documents(tmp_path)
    (tmp_path / "a.csv").write_text("x", "utf-8")
    with pytest.raises(ValueError, match=r"must end in \.jsonl or \.txt, got '\.csv'"):
        load_documents(tmp_path / "a.csv")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="must be UTF-8 text"):
        load_documents(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="field of the text file .* must be left out"):
        load_documents(DataSource(path=tmp_path / "a.txt", field="body"))
    with pytest.raises(ValueError, match="at least one non-empty document"):
        load_documents(write_lines(tmp_path / "empty.jsonl", {"text": " "}))


def test_source_is_a_path_or_a_hub_id():
    with pytest.raises(ValueError, match="either a path or a hub id"):
        DataSource()
    with pytest.raises(ValueError, match="limit >= 1"):
        DataSource(hub="a/b", limit=0)
    assert str(DataSource(hub="a/b", name="main", split="test")) == "a/b:main:test"


class FakeStream(list):
    def skip(self, count):
        return FakeStream(self[count:])

    def take(self, count):
        return FakeStream(self[:count])


def test_load_hub_streams_only_when_asked(monkeypatch):
    calls = []

    def load_dataset(hub, name, *, split, streaming):
        calls.append((hub, name, split, streaming))
        return FakeStream({"q": f"q{i}"} for i in range(5))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = DataSource(hub="a/b", name="main", split="test", field="q")
    assert load_documents(source) == ["q0", "q1", "q2", "q3", "q4"]
    part = DataSource(hub="a/b", name="main", split="test", field="Q {q}", skip=1, limit=2)
    assert load_documents(part) == ["Q q1", "Q q2"]
    assert calls == [("a/b", "main", "test", False), ("a/b", "main", "test", True)]
    with pytest.raises(KeyError, match="a/b:main record 1 must have the field 'x'"):
        load_documents(DataSource(hub="a/b", name="main", split="", field="x"))


def test_load_hub_without_datasets_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "koff\[eval\]"'):
        load_documents(DataSource(hub="a/b"))


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
    with pytest.raises(TypeError, match=r"document 0 of documents .* got a record with \['text'\]"):
        pack([{"text": 5}], tokenizer, 2)
    for ids in (5, [[1]], [2**70], ["a"]):
        with pytest.raises(TypeError, match="input_ids of document 1 of documents must be a list"):
            pack(["abcd", {"input_ids": ids}], tokenizer, 2)
    with pytest.raises(ValueError, match="document 1 of x must be valid Unicode, got surrogates"):
        pack(["abcd", "a\ud800"], tokenizer, 2, name="x")
