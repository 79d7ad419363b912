"""Where documents come from: files of this machine, or a dataset of the Hugging Face hub.

A document is a text, or a record of which only a part counts (``koff.data.records``).

Parquet, CSV and Arrow files and the hub are read by the package `datasets`. Lines of JSON are read
here, because a record must say what its line says: `datasets` guesses the type of a column from all
values in it, so that a text that looks like a date becomes one, and 1 beside 2.5 becomes 1.0; and
it knows no line numbers. Nothing of a file is ever run: `datasets` knows no scripts since version
4, and none of the formats here holds a pickle.
"""

from __future__ import annotations

import csv
import functools
import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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

_LINES = (".jsonl", ".ndjson")
# How `datasets` calls the other kinds that have records.
_READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
_TEXT = ".txt"
SUFFIXES = (*_LINES, *_READERS, _TEXT)


@dataclass(frozen=True)
class DataSource:
    """Where one split of one domain lies: in local files, or in a dataset of the Hugging Face hub.

    Args:
        path: of a local file, a folder (all files of one kind in it and below), or a pattern such
            as "data/part-*.parquet"; or several of these, read in their order, and those of a
            folder or a pattern in the order of their names. ``.jsonl`` and ``.ndjson`` hold one
            object per line; ``.parquet``, ``.csv``, ``.tsv`` and ``.arrow`` one record per row; a
            ``.txt`` file is one document. None for hub data.
        hub: id of a hub dataset; None for local files.
        name: configuration of the hub dataset ("main", "20231101.en", ...).
        split: split of the hub dataset.
        field: column that holds the text or a list of messages; several columns, joined by a
            newline; a template such as "Question: {question}\\nAnswer: {answer}" (lists are joined
            by "; "); or a ``koff.Completion`` of two of these, or the mapping {"prompt": ...,
            "completion": ...} of them that a recipe has. A record without the usual column "text"
            may be of another kind: "messages", "prompt" and "completion", or "input_ids".
        skip, limit: first document and number of documents; with either, hub data are streamed, so
            that a few thousand documents of a huge dataset do not download all of it.
        streaming: train from the documents as they come, in the order they stand in, and keep
            nothing on the disk. Without it, all are tokenised first, into a cache.

    Raises:
        ValueError: not exactly one of ``path`` and ``hub``, or an illegal ``skip`` or ``limit``.
        TypeError: a ``field`` of another kind.
    """

    path: Path | tuple[Path, ...] | None = None
    hub: str | None = None
    name: str | None = None
    split: str = "train"
    field: Field = "text"
    skip: int = 0
    limit: int | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        if bool(self.paths) == (self.hub is not None):
            raise ValueError(
                f"DataSource: the source must be either a path or a hub id, got path={self.path!r} "
                f"and hub={self.hub!r}; give exactly one of them"
            )
        if self.skip < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError(
                f"DataSource: skip must be >= 0 and limit >= 1, got skip={self.skip} and "
                f"limit={self.limit}; leave them out to read everything"
            )
        field = tuple(self.field) if isinstance(self.field, list) else self.field
        if isinstance(field, Mapping) and set(field) == {"prompt", "completion"}:
            field = Completion(**field)
        object.__setattr__(self, "field", field)  # the class is frozen
        parts = field if isinstance(field, tuple) else (field,)
        if isinstance(field, Completion):
            parts = (field.prompt, field.completion)
        if not parts or not all(isinstance(part, str) for part in parts):
            raise TypeError(
                "DataSource: field must be a column or template, several of them, or "
                f"koff.Completion(prompt, completion), got {self.field!r}; correct it"
            )

    @property
    def paths(self) -> tuple[Path, ...]:
        """What ``path`` names, none for hub data."""
        if self.path is None:
            return ()
        given = self.path if isinstance(self.path, list | tuple) else (self.path,)
        return tuple(map(Path, given))

    def __str__(self) -> str:
        if self.hub is None:
            return ", ".join(map(str, self.paths))
        return ":".join(part for part in (self.hub, self.name, self.split) if part)


def load_documents(source: DataSource | str | Path) -> list[Document]:
    """Load the documents of one split into memory.

    Args:
        source: a ``DataSource``, or what its ``path`` may be.

    Returns:
        One text or record per document, in the order of the source, as ``koff.data.blocks.pack``
        takes them.

    Raises:
        FileNotFoundError: no such local file.
        KeyError: a record lacks the column (the message names file and line).
        ValueError: malformed JSON, bytes that are not UTF-8, an unknown kind of file, or no
            document at all.
    """
    if not isinstance(source, DataSource):
        source = DataSource(path=Path(source))
    documents = list(read_documents(source))
    if not any(not isinstance(document, str) or document.strip() for document in documents):
        got = f"{len(documents)} empty ones" if documents else "none"
        raise ValueError(
            f"load_documents: {source} must hold at least one non-empty document, got {got}; check "
            f"the file and the field {_show(source.field)}"
        )
    return documents


def read_documents(source: DataSource) -> Iterator[Document]:
    """Yield the documents of one split, of which one at a time is in memory.

    Args:
        source: of the documents.

    Raises:
        As ``load_documents``.
    """
    return (document for _, document in read_places(source))


def check_source(source: DataSource) -> list[Path]:
    """Raise the errors of ``load_documents`` that need no reading: missing or unknown local files.

    Args:
        source: what is to be read; hub data are not checked here.

    Returns:
        The local files, in their order; none for hub data.

    Raises:
        FileNotFoundError, ValueError: as ``load_documents``.
    """
    files = [file for path in source.paths for file in _files_of(path)]
    for file in files:
        if file.suffix not in SUFFIXES:
            packed = file.suffix in (".gz", ".zst", ".xz", ".bz2", ".zip")
            step = "unpack it" if packed else "convert it to one JSON object per line"
            raise ValueError(
                f"load_documents: {file} must end in {', '.join(SUFFIXES[:-1])} or {_TEXT}, got "
                f"{file.suffix or 'no suffix'!r}; {step}"
            )
        if file.suffix == _TEXT and source.field != "text":
            raise ValueError(
                f"load_documents: the field of the text file {file} must be left out, got "
                f"{_show(source.field)}; a .txt file is one document without columns"
            )
    return files


def _files_of(path: Path) -> list[Path]:
    """Return the files that one path names."""
    if path.is_dir():
        inside = (p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
        # Notebooks and file managers leave hidden copies behind.
        files = sorted(p for p in inside if not _is_hidden(p.relative_to(path)))
        kinds = sorted({file.suffix for file in files})
        if len(kinds) > 1:
            raise ValueError(
                f"load_documents: the files of folder {path} must be of one kind, got "
                f"{' and '.join(kinds)}; name those you mean, as {path / ('*' + kinds[0])}"
            )
    elif path.is_file() or not glob.has_magic(str(path)):
        files = [path] if path.is_file() else []
    else:
        files = sorted(
            file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file()
        )
    if not files:
        got = "a folder without any" if path.is_dir() else "nothing there"
        raise FileNotFoundError(
            f"load_documents: {path} must be an existing file, or a folder of "
            f"{', '.join(SUFFIXES)} files, got {got}; correct the path, or set KOFF_DATA to the "
            "folder that relative paths start from"
        )
    return files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def content_of(source: DataSource) -> str:
    """Return a digest of what a source holds: of the bytes of its files, whatever their names and
    times, or of a hub dataset's own.

    Args:
        source: local files, or hub data, which are downloaded unless only a part is wanted.
    """
    hashed = hashlib.sha256()
    if source.hub is None:
        files = check_source(source)
    elif _is_part(source):  # of a dataset that need not be here: its commit says what is in it
        import huggingface_hub

        commit = huggingface_hub.dataset_info(source.hub).sha
        return f"{source.hub}@{commit}:{source.name}:{source.split}"
    else:
        files = [Path(file["filename"]) for file in _hub(source).cache_files]
    for file in files:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").digest()
        hashed.update(file.suffix.encode() + b"\0" + digest)
    return hashed.hexdigest()


# ---- reading ----


class Place(NamedTuple):
    """Where a document begins, from where it can be read again without what stands before it. Plain
    values, ready for JSON.

    Args:
        file: which file of the source.
        at: where in it: a byte, or the state of `datasets` of a reader that comes to it next.
        number: of the line or record before it in its file.
        seen: documents of the source before it, skipped ones too.
    """

    file: int = 0
    at: Any = None
    number: int = 0
    seen: int = 0


def read_places(source: DataSource, start: Place | None = None) -> Iterator[tuple[Place, Document]]:
    """Yield the documents of a split, each with the place it was read from.

    Args:
        source: of the documents.
        start: the place of the first one; None: the beginning.

    Raises:
        As ``load_documents``.
    """
    start = start or Place()
    if source.hub is not None:
        what = str(source)
        for at, number, record in _read_rows(lambda: _hub(source), start.at, start.number, what):
            yield (
                Place(0, at, number - 1, number - 1),
                _document(record, source.field, f"{what} record {source.skip + number}"),
            )
        return
    files, seen = check_source(source), start.seen
    stop = None if source.limit is None else source.skip + source.limit
    for index in range(start.file, len(files)):
        path = files[index]
        at, number = (start.at, start.number) if index == start.file else (None, 0)
        # Before the next record is looked at: what lies beyond ``limit`` need not be valid.
        if stop is not None and seen >= stop:
            return
        if path.suffix == _TEXT:
            if seen >= source.skip:
                text = _decode(path.read_bytes(), str(path))
                yield Place(index, None, 0, seen), text.replace("\r\n", "\n").replace("\r", "\n")
            seen += 1
            continue
        records = _records(path, at, number)
        while stop is None or seen < stop:
            found = next(records, None)
            if found is None:
                break
            at, number, place, read = found
            if seen >= source.skip:
                yield Place(index, at, number - 1, seen), _document(read(), source.field, place)
            seen += 1
        records.close()


def _records(path: Path, at: Any, number: int) -> Iterator[tuple[Any, int, str, Callable]]:
    """Yield where each record of a file begins, its number, what to call it, and a function that
    reads it."""
    if path.suffix in _LINES:
        yield from _lines(path, at or 0, number)
        return
    rows = _read_rows(functools.partial(_open, path), at, number, str(path))
    for begin, row, record in rows:
        yield begin, row, f"{path} record {row}", functools.partial(dict, record)


def _lines(path: Path, at: int, number: int) -> Iterator[tuple[Any, int, str, Callable]]:
    first = number == 0
    # As bytes, so that an error can name the line.
    with path.open("rb") as lines:
        lines.seek(at)
        for line in lines:
            begin, at, number = at, at + len(line), number + 1
            place = f"{path} line {number}"
            text = _decode(line, place).strip()
            if text:
                yield begin, number, place, functools.partial(_parse_line, text, place, first)
                first = False


def _read_rows(
    open_rows: Callable[[], Any], at: Any, number: int, what: str
) -> Iterator[tuple[Any, int, Mapping[str, Any]]]:
    """Yield the state before each row of a data set of `datasets`, its number, and the row."""
    try:
        rows = open_rows()
        if at is not None:
            rows.load_state_dict(at)
        records = iter(rows)
        while True:
            record = next(records, None)
            if record is None:
                return
            number += 1
            yield at, number, record
            # A dataset that is there as a whole has none, and is never streamed.
            at = rows.state_dict() if hasattr(rows, "state_dict") else None
    except (OSError, ImportError):
        raise
    except Exception as error:
        why = str(error).strip().splitlines()
        raise ValueError(
            f"load_documents: {what} must be readable by `datasets`, got {type(error).__name__}: "
            f"{why[0] if why else 'no reason'}; write it anew"
        ) from error


def _open(path: Path) -> Any:
    """Open a file of ``_READERS`` as a stream of `datasets`."""
    import datasets

    kind = _READERS[path.suffix]
    options: dict[str, Any] = {}
    if kind == "csv":
        # Every value is the text that stands there: 007 and NA too.
        sep = "\t" if path.suffix == ".tsv" else ","
        with path.open(encoding="utf-8-sig", newline="") as file:
            columns = next(csv.reader(file, delimiter=sep), [])
        features = datasets.Features({name: datasets.Value("string") for name in columns})
        options = {"sep": sep, "features": features, "na_filter": False, "encoding": "utf-8-sig"}
        options["chunksize"] = 1000
    rows = datasets.load_dataset(
        # A name of a file may hold what means something in a pattern.
        kind,
        data_files=[glob.escape(str(path))],
        split="train",
        streaming=True,
        **options,
    )
    # Then each group of rows of a parquet file can be come back to without reading those before.
    return rows.reshard() if kind == "parquet" else rows


def _is_part(source: DataSource) -> bool:
    """Whether hub data are read as they come, and not downloaded first."""
    return source.streaming or source.limit is not None or source.skip > 0


def _hub(source: DataSource) -> Any:
    import datasets

    part = _is_part(source)
    rows = datasets.load_dataset(source.hub, source.name, split=source.split, streaming=part)
    if source.skip:
        rows = rows.skip(source.skip)
    return rows if source.limit is None else rows.take(source.limit)


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
