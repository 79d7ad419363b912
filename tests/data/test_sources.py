"""Reading documents: local files, the hub, and the field that holds the text."""

import json
import sys
import types
from pathlib import Path

import pytest

from koff.data.sources import DataSource, load_documents


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
