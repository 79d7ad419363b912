"""Documents in, blocks of tokens out: reading texts from disk or the hub, and packing them."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Field = str | tuple[str, ...]
_PLACEHOLDER = re.compile(r"\{(\w+)((?:\[\w+\])*)\}")  # {column} or {column[key]}
_TOKENIZE_BATCH = 512  # documents per tokenizer call: enough to use its threads, small in memory


@dataclass(frozen=True)
class DataSource:
    """Where one split of one domain lies: a local file or a dataset of the Hugging Face hub.

    Args:
        path: local `.jsonl` (one object per line) or `.txt` (one document); None for hub data.
        hub: id of a hub dataset; None for a local file.
        name: configuration of the hub dataset ("main", "20231101.en", ...).
        split: split of the hub dataset.
        field: column that holds the text; several columns, joined by a newline; or a template
            such as "Question: {question}\\nAnswer: {answer}" (lists are joined by "; ").
        skip, limit: first document and number of documents; with either, hub data are streamed, so
            that a few thousand documents of a huge dataset do not download all of it.
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


@dataclass(frozen=True)
class PackedBlocks:
    """Tokens of one split, cut into blocks of equal length.

    Args:
        blocks: int64 tensor [N, T] of token ids.
        tokens_per_byte: tokens of the whole split (BOS, EOS and the dropped tail included) divided
            by the UTF-8 bytes of its documents; turns bits per token into bits per byte.
        num_documents: documents that went in (empty ones are left out).
        num_tokens: tokens of the whole split, before the last partial block was dropped.
    """

    blocks: torch.Tensor
    tokens_per_byte: float
    num_documents: int
    num_tokens: int

    def __len__(self) -> int:
        return self.blocks.shape[0]


def load_documents(source: DataSource | str | Path) -> list[str]:
    """Reads the documents of one split as a list of texts.

    Args:
        source: a `DataSource`, or the path of a `.jsonl` (column "text") or `.txt` file.

    Returns:
        One string per document, in the order of the source.

    Raises:
        FileNotFoundError: the local file does not exist.
        KeyError: a record lacks the column (the message names file and line).
        ValueError: malformed JSON, an unknown kind of file, or no document at all.
        ImportError: hub data without the `datasets` package.
    """
    if not isinstance(source, DataSource):
        source = DataSource(path=Path(source))
    try:
        documents = list(_read_local(source) if source.path is not None else _read_hub(source))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"load_documents: {source} must be UTF-8 text, got a byte that is not "
            f"({error.reason} at {error.start}); convert the file"
        ) from None
    if not any(document.strip() for document in documents):
        raise ValueError(
            f"load_documents: {source} must hold at least one non-empty document, got "
            f"{len(documents)} empty ones; check the file and the field {_show(source.field)}"
        )
    return documents


def check_source(source: DataSource) -> None:
    """Raises the errors of `load_documents` that need no reading: missing or unknown local files.

    Args:
        source: the source to look at; hub data are not checked here.

    Raises:
        FileNotFoundError, ValueError: as `load_documents`.
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
        raise ValueError(
            f"load_documents: {path} must end in .jsonl or .txt, got "
            f"{path.suffix or 'no suffix'!r}; convert it to one JSON object per line"
        )
    if path.suffix == ".txt" and source.field != "text":
        raise ValueError(
            f"load_documents: the field of the text file {path} must be left out, got "
            f"{_show(source.field)}; a .txt file is one document without columns"
        )


def _read_local(source: DataSource) -> Iterator[str]:
    check_source(source)
    path = source.path
    assert path is not None
    if path.suffix == ".txt":
        yield path.read_text(encoding="utf-8")
        return
    stop = None if source.limit is None else source.skip + source.limit
    seen = 0
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if stop is not None and seen >= stop:
                return
            if not line.strip():
                continue
            seen += 1
            if seen > source.skip:
                where = f"{path} line {number}"
                yield _render(_parse_line(line, where), source.field, where)


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        why = getattr(error, "msg", None) or str(error)
        raise ValueError(
            f"load_documents: {where} must be valid JSON, got {line.strip()[:40]!r} "
            f"({why}{column}); correct or remove the line"
        ) from None
    if not isinstance(record, dict):
        raise ValueError(
            f"load_documents: {where} must be a JSON object, got {type(record).__name__}; write it "
            'as {"text": ...}'
        )
    return record


def _read_hub(source: DataSource) -> Iterator[str]:
    try:
        import datasets
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
        yield _render(record, source.field, f"{source} record {number}")


def _render(record: Mapping[str, Any], field: Field, where: str) -> str:
    """Text of one record: a column, several columns joined by newlines, or a filled template."""
    try:
        if not isinstance(field, str):
            return "\n".join(_as_text(record[name]) for name in field)
        if "{" in field:
            return _PLACEHOLDER.sub(lambda match: _lookup(record, match), field)
        return _as_text(record[field])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        reason = error.args[0] if error.args else error
        raise KeyError(
            f"load_documents: {where} must have the field {_show(field)}, got "
            f"{sorted(record)} ({reason}); set `field` to one of these"
        ) from None


def _lookup(record: Mapping[str, Any], match: re.Match[str]) -> str:
    value = record[match[1]]
    for key in re.findall(r"\[(\w+)\]", match[2]):
        value = value[int(key)] if isinstance(value, list | tuple) else value[key]
    return "; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} instead of a text")
    return value


def _show(field: Field) -> str:
    return repr(field) if isinstance(field, str) else repr(list(field))


def pack(
    documents: PackedBlocks | Iterable[Any],
    tokenizer: Any,
    block_size: int,
    *,
    name: str = "documents",
) -> PackedBlocks:
    """Tokenises documents, concatenates them in order and cuts the stream into blocks.

    Every text becomes BOS text EOS, with BOS and EOS only where the tokenizer has them; documents
    that are already token ids are taken as they are. The last partial block is dropped.

    Args:
        documents: texts, records with "text" or "input_ids" (a `datasets.Dataset` of such records
            too), or blocks packed before, which are checked and returned.
        tokenizer: a transformers tokenizer; None if the documents are token ids.
        block_size: T, tokens per block, at least 2.
        name: what to call these documents in errors.

    Returns:
        The blocks, int64 [N, T] with N >= 1, and the statistics of `PackedBlocks`.

    Raises:
        ValueError: no documents, fewer than `block_size` tokens, or an illegal block size.
        TypeError: documents of another kind.
    """
    _check_packing(documents, block_size, name)
    if isinstance(documents, PackedBlocks):
        return documents
    stream, num_bytes, num_documents = _tokenize(documents, tokenizer, name)
    if not num_documents:
        raise ValueError(
            f"pack: {name} must not be empty, got 0 documents with text; add documents"
        )
    num_blocks = len(stream) // block_size
    if not num_blocks:
        raise ValueError(
            f"pack: {name} must hold at least one block of {block_size} tokens, got {len(stream)} "
            "tokens; add documents or choose a smaller block_size"
        )
    flat = torch.frombuffer(stream, dtype=torch.int64)[: num_blocks * block_size].clone()
    return PackedBlocks(
        blocks=flat.view(num_blocks, block_size),
        tokens_per_byte=len(stream) / num_bytes if num_bytes else float("nan"),
        num_documents=num_documents,
        num_tokens=len(stream),
    )


def _check_packing(documents: Any, block_size: Any, name: str) -> None:
    """The errors of `pack` that need no tokenizer."""
    if not isinstance(block_size, int) or block_size < 2:
        raise ValueError(
            f"pack: block_size must be an integer of at least 2 tokens, got {block_size!r}; "
            "512 is a usual value"
        )
    if isinstance(documents, PackedBlocks):
        if documents.blocks.shape[1] != block_size:
            raise ValueError(
                f"pack: {name} packed before must have blocks of {block_size} tokens, got "
                f"{documents.blocks.shape[1]}; pack the documents again"
            )
        return
    if isinstance(documents, str | bytes | Mapping) or not isinstance(documents, Iterable):
        raise TypeError(
            f"pack: {name} must be a list of texts or of records with 'text' or 'input_ids', got "
            f"{type(documents).__name__}; wrap a single text in a list"
        )


def _tokenize(documents: Iterable[Any], tokenizer: Any, name: str) -> tuple[array, int, int]:
    """Token stream of all documents, UTF-8 bytes of their texts, number of non-empty ones."""
    bos, eos = (getattr(tokenizer, f"{which}_token_id", None) for which in ("bos", "eos"))
    head, tail = ([] if token is None else [token] for token in (bos, eos))
    stream, num_bytes, num_documents = array("q"), 0, 0
    texts: list[str] = []

    def flush() -> None:
        # verbose=False: documents longer than the model's context are fine, they are cut up.
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            stream.extend(head)
            stream.extend(ids)
            stream.extend(tail)
        texts.clear()

    for index, document in enumerate(documents):
        content = _content(document, index, name)
        if not isinstance(content, str):
            if texts:
                flush()
            content = _ids(content, index, name)
            stream.extend(content)
            num_documents += bool(content)
            if tokenizer is not None:
                text = tokenizer.decode(content, skip_special_tokens=True)
                num_bytes += len(text.encode("utf-8", errors="replace"))
            continue
        if tokenizer is None:
            raise TypeError(
                f"pack: {name} must hold token ids when there is no tokenizer, got a text at "
                f"document {index}; pass processing_class or records with 'input_ids'"
            )
        text = content
        if text.strip():
            texts.append(text)
        num_documents += bool(text.strip())
        num_bytes += _bytes(text, index, name) if text.strip() else 0
        if len(texts) == _TOKENIZE_BATCH:
            flush()
    if texts:
        flush()
    return stream, num_bytes, num_documents


def _content(document: Any, index: int, name: str) -> Any:
    """The text or the token ids of one document."""
    if isinstance(document, str):
        return document
    if isinstance(document, Mapping):
        for key in ("input_ids", "text"):
            found = document.get(key)
            if found is not None and (key == "input_ids" or isinstance(found, str)):
                return found
        got = f"a record with {sorted(map(str, document))}"
    else:
        got = type(document).__name__
    raise TypeError(
        f"pack: document {index} of {name} must be a text or a record with 'text' or 'input_ids', "
        f"got {got}; rename the column or render it to a text first"
    )


def _bytes(text: str, index: int, name: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise ValueError(
            f"pack: document {index} of {name} must be valid Unicode, got {error.reason} at "
            f"character {error.start}; correct or remove it"
        ) from None


def _ids(values: Any, index: int, name: str) -> array:
    """Token ids of one document."""
    try:
        return array("q", [int(token) for token in values])
    except (TypeError, ValueError, OverflowError):
        raise TypeError(
            f"pack: input_ids of document {index} of {name} must be a list of whole numbers, got "
            f"{str(values)[:40]}; tokenize it again"
        ) from None
