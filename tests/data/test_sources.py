"""Reading documents: local files, the hub, and the field that holds the text."""

import json
import sys
import types
from pathlib import Path

import pytest

from koff.data.sources import Completion, DataSource, load_documents


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


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("record", "field", "document"),
    [
        ({"messages": CHAT}, "text", None),
        ({"messages": CHAT, "text": None}, "text", None),
        ({"prompt": "a", "completion": "b", "id": 3}, "text", None),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, "text", None),
        # The usual column counts where it is there.
        ({"text": "a", "input_ids": [1]}, "text", "a"),
        ({"text": "a", "messages": CHAT}, "text", "a"),
        (
            {"text": "a", "talk": CHAT, "tools": [{"name": "f"}]},
            "talk",
            {"messages": CHAT, "tools": [{"name": "f"}], "chat_template_kwargs": None},
        ),
        (
            {"q": "Why?", "a": "So."},
            Completion("Q: {q}\nA:", " {a}"),
            {"prompt": "Q: Why?\nA:", "completion": " So."},
        ),
        ({"q": "Why?", "a": "So."}, Completion("q", "a"), {"prompt": "Why?", "completion": "So."}),
    ],
)
def test_load_records_of_which_a_part_counts(tmp_path, record, field, document):
    path = write_lines(tmp_path / "a.jsonl", record)
    expected = record if document is None else document
    assert load_documents(DataSource(path=path, field=field)) == [expected]


def test_a_field_may_be_what_a_recipe_has(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"q": "Why?", "a": "So."})
    source = DataSource(path=path, field={"prompt": "Q: {q}", "completion": "a"})
    assert source == DataSource(path=path, field=Completion("Q: {q}", "a"))
    assert load_documents(source) == [{"prompt": "Q: Why?", "completion": "So."}]
    source = DataSource(path=path, field=["q", "a"])
    assert hash(source) == hash(DataSource(path=path, field=("q", "a")))
    assert load_documents(source) == ["Why?\nSo."]


@pytest.mark.parametrize(
    "field",
    [
        {"prompt": "q"}, {"prompt": "q", "answer": "a"}, {"prompt": "q", "completion": 3}, {},
        [], None, 3, ("q", None), {"q"}, Completion("q", ["a"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_field_of_another_kind_is_refused_at_once(field):
    with pytest.raises(TypeError, match="DataSource: field must be a column or template, several"):
        DataSource(path="a.jsonl", field=field)


def test_load_a_record_of_two_kinds_or_none_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"messages": CHAT, "prompt": "a", "completion": "b"})
    with pytest.raises(
        ValueError, match="line 1 must be of one kind, got both messages and prompt"
    ):
        load_documents(path)
    path = write_lines(tmp_path / "a.jsonl", {"text": None, "id": 1})
    with pytest.raises(KeyError, match=r"line 1 .* 'text', got \['id', 'text'\] \(null instead of"):
        load_documents(path)
    path = write_lines(tmp_path / "a.jsonl", {"q": "a", "a": None})
    with pytest.raises(KeyError, match=r"the field 'q' with 'a', got .*\(null instead of a text"):
        load_documents(DataSource(path=path, field=Completion("q", "a")))


def test_load_what_windows_writes(tmp_path):
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("é", "a\u2028b")]
    for name in ("a", "b"):
        data = "\r\n".join([*lines, "", ""])
        (tmp_path / f"{name}.jsonl").write_bytes(data.encode("utf-8-sig"))
    assert load_documents(tmp_path / "a.jsonl") == ["é", "a\u2028b"]
    joined = tmp_path / "joined.jsonl"  # the second byte-order mark is in its middle
    joined.write_bytes(b"".join((tmp_path / f"{name}.jsonl").read_bytes() for name in ("a", "b")))
    assert load_documents(joined) == ["é", "a\u2028b"] * 2
    (tmp_path / "a.txt").write_bytes("é\r\nb\rc\n".encode("utf-8-sig"))
    assert load_documents(tmp_path / "a.txt") == ["é\nb\nc\n"]


def test_load_a_line_may_be_long(tmp_path):
    text = "é" * 2**21
    assert load_documents(write_lines(tmp_path / "a.jsonl", {"text": text})) == [text]


def test_load_field_that_is_not_text_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"text": 3})
    with pytest.raises(KeyError, match="line 1 must have the field 'text'.*int instead of a text"):
        load_documents(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"line 2 must be valid JSON, got '\{\"text\":'"),
        ("[1]", "line 2 must be a JSON object, got list"),
        ('{"text": "a", "text": "b"}', "line 2 must be valid JSON, .*the key 'text' twice"),
        ('{"text": "a", "x": {"b": 1, "b": 2}}', "line 2 must be valid JSON, .*the key 'b' twice"),
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
    with pytest.raises(FileNotFoundError, match="got a folder without any"):
        load_documents(tmp_path)
    (tmp_path / "a.xml").write_text("x", "utf-8")
    with pytest.raises(ValueError, match=r"must end in \.jsonl, .* or \.txt, got '\.xml'"):
        load_documents(tmp_path / "a.xml")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="must be UTF-8 text"):
        load_documents(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="field of the text file .* must be left out"):
        load_documents(DataSource(path=tmp_path / "a.txt", field="body"))
    with pytest.raises(ValueError, match="at least one non-empty document, got 1 empty ones"):
        load_documents(write_lines(tmp_path / "empty.jsonl", {"text": " "}))
    with pytest.raises(ValueError, match="at least one non-empty document, got none"):
        load_documents(write_lines(tmp_path / "empty.jsonl"))
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"end in \.jsonl, .* or \.txt, got '\.gz'; unpack it"):
        load_documents(tmp_path / "a.jsonl.gz")
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"text": "a"}\n\n{"text": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl line 3 must be UTF-8 text, got a byte"):
        load_documents(bad)
    assert load_documents(DataSource(path=bad, limit=1)) == ["a"]
    for text in ('[{"text": "a"}]', '[\n {"text": "a"}\n]'):
        bad.write_text(text, "utf-8")
        with pytest.raises(ValueError, match="line 1 must be a JSON object, got .* one object per"):
            load_documents(bad)


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
