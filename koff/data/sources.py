"""Where documents come from: a local file or a dataset of the Hugging Face hub.

A document is a text, or a record of which only a part counts (``koff.data.records``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .records import form_of


@dataclass(frozen=True)
class Completion:
    """Columns or templates of a prompt and of the completion that is learned."""

    prompt: str
    completion: str


Field = str | tuple[str, ...] | Completion
Document = str | Mapping[str, Any]

# {column}, or {column[key][0]}: one group for the column, one for all of its keys.
_PLACEHOLDER = re.compile(r"\{(\w+)((?:\[\w+\])*)\}")


@dataclass(frozen=True)
class DataSource:
    """Where one split of one domain lies: a local file or a dataset of the Hugging Face hub.

    Args:
        path: local ``.jsonl`` (one object per line) or ``.txt`` (one document); None for hub data.
        hub: id of a hub dataset; None for a local file.
        name: configuration of the hub dataset ("main", "20231101.en", ...).
        split: split of the hub dataset.
        field: column that holds the text or a list of messages; several columns, joined by a
            newline; a template such as "Question: {question}\\nAnswer: {answer}" (lists are joined
            by "; "); or a ``Completion`` of two of these. A record without the usual column "text"
            may be of another kind that ``koff.data.blocks.pack`` takes: "messages", "prompt" and
            "completion", or "input_ids".
        skip, limit: first document and number of documents; with either, hub data are streamed, so
            that a few thousand documents of a huge dataset do not download all of it.

    Raises:
        ValueError: not exactly one of ``path`` and ``hub``, or an illegal ``skip`` or ``limit``.
    """

    path: Path | None = None
    hub: str | None = None
    name: str | None = None
    split: str = "train"
    field: Field = "text"
    skip: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.hub is None):
            raise ValueError(
                f"DataSource: the source must be either a path or a hub id, got path={self.path!r} "
                f"and hub={self.hub!r}; give exactly one of them"
            )
        if self.skip < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError(
                f"DataSource: skip must be >= 0 and limit >= 1, got skip={self.skip} and "
                f"limit={self.limit}; leave them out to read everything"
            )

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        return ":".join(part for part in (self.hub, self.name, self.split) if part)


def load_documents(source: DataSource | str | Path) -> list[Document]:
    """Load the documents of one split.

    Args:
        source: a ``DataSource``, or the path of a ``.jsonl`` (column "text") or ``.txt`` file.

    Returns:
        One text or record per document, in the order of the source, as ``koff.data.blocks.pack``
        takes them.

    Raises:
        FileNotFoundError: the local file does not exist.
        KeyError: a record lacks the column (the message names file and line).
        ValueError: malformed JSON, bytes that are not UTF-8, an unknown kind of file, or no
            document at all.
        ImportError: hub data without the ``datasets`` package.
    """
    if not isinstance(source, DataSource):
        source = DataSource(path=Path(source))
    documents = list(_read_hub(source) if source.path is None else _read_local(source))
    if not any(not isinstance(document, str) or document.strip() for document in documents):
        got = f"{len(documents)} empty ones" if documents else "none"
        raise ValueError(
            f"load_documents: {source} must hold at least one non-empty document, got {got}; check "
            f"the file and the field {_show(source.field)}"
        )
    return documents


def check_source(source: DataSource) -> None:
    """Raise the errors of ``load_documents`` that need no reading: missing or unknown local files.

    Args:
        source: what is to be read; hub data are not checked here.

    Raises:
        FileNotFoundError, ValueError: as ``load_documents``.
    """
    path = source.path
    if path is None:
        return
    if not path.is_file():
        raise FileNotFoundError(
            f"load_documents: {path} must be an existing file, got "
            f"{'a folder' if path.is_dir() else 'nothing there'}; correct the path, or set "
            "KOFF_DATA to the folder that relative paths start from"
        )
    if path.suffix not in (".jsonl", ".txt"):
        packed = path.suffix in (".gz", ".zst", ".xz", ".bz2", ".zip")
        step = "unpack it" if packed else "convert it to one JSON object per line"
        raise ValueError(
            f"load_documents: {path} must end in .jsonl or .txt, got "
            f"{path.suffix or 'no suffix'!r}; {step}"
        )
    if path.suffix == ".txt" and source.field != "text":
        raise ValueError(
            f"load_documents: the field of the text file {path} must be left out, got "
            f"{_show(source.field)}; a .txt file is one document without columns"
        )


# ---- reading ----


def _read_local(source: DataSource) -> Iterator[Document]:
    check_source(source)
    path = source.path
    if path.suffix == ".txt":
        text = _decode(path.read_bytes(), str(path))
        yield text.replace("\r\n", "\n").replace("\r", "\n")
        return
    stop = None if source.limit is None else source.skip + source.limit
    seen = 0
    # As bytes, so that an error can name the line.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            # Before the next line is looked at: what lies beyond ``limit`` need not be valid.
            if stop is not None and seen >= stop:
                return
            place = f"{path} line {number}"
            text = _decode(line, place).strip()
            if not text:
                continue
            seen += 1
            if seen > source.skip:
                yield _document(_parse_line(text, place, first=seen == 1), source.field, place)


def _decode(data: bytes, place: str) -> str:
    try:
        # Editors on Windows put a byte-order mark first, and joined files have it in their middle.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"load_documents: {place} must be UTF-8 text, got a byte that is not ({error.reason} "
            f"at {error.start}); convert the file"
        ) from None


def _parse_line(line: str, place: str, first: bool) -> dict[str, Any]:
    if first and line.startswith("["):
        raise ValueError(
            f"load_documents: {place} must be a JSON object, got the beginning of a list; write "
            "one object per line, without brackets and commas around them"
        )
    try:
        record = json.loads(line, object_pairs_hook=_no_duplicates)
    # Deep nesting is a RecursionError, and a number of thousands of digits a plain ValueError.
    except (ValueError, RecursionError) as error:
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        why = getattr(error, "msg", None) or str(error)
        raise ValueError(
            f"load_documents: {place} must be valid JSON, got {line[:40]!r} "
            f"({why}{column}); correct or remove the line"
        ) from None
    if not isinstance(record, dict):
        raise ValueError(
            f"load_documents: {place} must be a JSON object, got {type(record).__name__}; write it "
            'as {"text": ...}'
        )
    return record


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object of JSON; Python would let the last of two equal keys win."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} twice")
    return record


def _read_hub(source: DataSource) -> Iterator[Document]:
    try:
        import datasets  # an extra: local files do not need it
    except ImportError:
        raise ImportError(
            f"load_documents: reading {source} from the hub must have the package `datasets`, got "
            'no such package; install it with pip install "koff[eval]", or use a local .jsonl file'
        ) from None
    streaming = source.limit is not None or source.skip > 0
    data = datasets.load_dataset(source.hub, source.name, split=source.split, streaming=streaming)
    if streaming:
        data = data.skip(source.skip)
        data = data if source.limit is None else data.take(source.limit)
    for number, record in enumerate(data, start=source.skip + 1):
        yield _document(record, source.field, f"{source} record {number}")


# ---- from a record to its document ----


def _document(record: Mapping[str, Any], field: Field, place: str) -> Document:
    """Return what the field says of a record: a text, a chat, or a prompt with its completion."""
    if field == "text" and record.get("text") is None:
        try:
            other = form_of(record)
        except ValueError as error:
            raise ValueError(f"load_documents: {place} must be of one kind, got {error}") from None
        if other is not None:
            return record
    try:
        if isinstance(field, Completion):
            return {
                "prompt": _render(record, field.prompt),
                "completion": _render(record, field.completion),
            }
        if not isinstance(field, str):
            return "\n".join(_as_text(record[name]) for name in field)
        if "{" not in field and isinstance(record[field], list):
            beside = {name: record.get(name) for name in ("tools", "chat_template_kwargs")}
            return {"messages": record[field], **beside}
        return _render(record, field)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        reason = error.args[0] if error.args else error
        raise KeyError(
            f"load_documents: {place} must have the field {_show(field)}, got "
            f"{sorted(record)} ({reason}); set `field` to one of these"
        ) from None


def _render(record: Mapping[str, Any], field: str) -> str:
    """Return the text of a column, or of a filled template."""
    if "{" in field:
        return _PLACEHOLDER.sub(lambda match: _look_up(record, match), field)
    return _as_text(record[field])


def _look_up(record: Mapping[str, Any], match: re.Match[str]) -> str:
    """Return what stands in a template for one placeholder."""
    value = record[match[1]]
    for key in re.findall(r"\[(\w+)\]", match[2]):
        value = value[int(key)] if isinstance(value, list | tuple) else value[key]
    return "; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _as_text(value: Any) -> str:
    if not isinstance(value, str):
        got = "null" if value is None else f"a {type(value).__name__}"
        raise TypeError(f"{got} instead of a text")
    return value


def _show(field: Field) -> str:
    if isinstance(field, Completion):
        return f"{field.prompt!r} with {field.completion!r}"
    return repr(field) if isinstance(field, str) else repr(list(field))
