"""Pack documents: tokenise them, join them to one stream, and cut it into blocks of equal length.

This is the only meaning of "pack" in koff. Training and evaluation see the same blocks, and the
same tokens of them count.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import cache
from .records import IGNORED, check_tokenizer
from .sources import DataSource, content_of, read_documents
from .tokens import Encoded, encode

# Tokens that wait for their blocks to be written: a few megabytes.
_WAITING = 1 << 18

# What PackedBlocks holds in tensors, and safetensors' names of their types.
_TENSORS = {"blocks": "I64", "labelled": "BOOL", "lengths": "I64"}

# Raised when documents become other blocks than before: what was cached then is of no use.
_FORMAT = 1

logger = logging.getLogger("koff")


@dataclass(frozen=True)
class PackedBlocks:
    """Tokens of one split, cut into blocks of equal length.

    Args:
        blocks: token ids, int64 [N, T].
        labelled: bool [N, T], whether a token counts in losses and perplexities.
        lengths: int64 [N], how many tokens of each block are the documents' own; those behind them
            fill it up, and count for nothing.
        tokens_per_byte: tokens that count, of the whole split (the dropped tail included), divided
            by the UTF-8 bytes of their text; turns bits per token into bits per byte.
        num_documents: documents that went in (empty ones are left out).
        num_tokens: tokens of the whole split, before the last partial block was dropped.
        id_range: the lowest and the highest token id in the blocks.
    """

    blocks: Tensor
    labelled: Tensor
    lengths: Tensor
    tokens_per_byte: float
    num_documents: int
    num_tokens: int
    id_range: tuple[int, int]

    def __len__(self) -> int:
        return self.blocks.shape[0]

    def labels(self, rows: int | slice) -> Tensor:
        """Return the labels of some blocks as transformers has them: the token ids, and -100 at
        tokens that do not count. The first of a block never does: nothing stands before it.

        Args:
            rows: of the blocks.
        """
        labels = self.blocks[rows].masked_fill(~self.labelled[rows], IGNORED)
        labels[..., 0] = IGNORED
        return labels

    def opening(self, count: int) -> Tensor:
        """Return the first ``count`` tokens of the documents, fewer if there are no more.

        Args:
            count: how many.
        """
        # Every block has a token of its own, so that so many blocks are enough.
        own = zip(self.blocks[:count], self.lengths[:count].tolist(), strict=True)
        return torch.cat([block[:length] for block, length in own])[:count]


def pack(
    documents: PackedBlocks | DataSource | Iterable[Any],
    tokenizer: Any,
    block_size: int,
    *,
    name: str = "documents",
    num_proc: int = 1,
) -> PackedBlocks:
    """Pack documents into blocks of ``block_size`` tokens.

    A document is a text or a record with the columns

    - "text": BOS text EOS, with BOS and EOS only where the tokenizer has them;
    - "prompt" and "completion": BOS prompt completion EOS, of which completion and EOS count. Both
      may be lists of messages; then all that the chat template writes after the prompt counts;
    - "messages": what the tokenizer's chat template writes, of which the assistant's turns count;
    - "input_ids": token ids as they are, without those whose "attention_mask" is 0. Where there are
      "labels", "completion_mask" or "assistant_masks", those count whose label is not -100 and
      whose mask is 1.

    Texts, and ids without labels, follow each other in one stream that is cut wherever a block
    ends; the last partial block is dropped. A document of which only a part counts begins a new
    block where it does not fit into the rest of the last one, so that what counts keeps its prompt
    in sight; what then is left of a block is filled up. Such a document is cut only if it is longer
    than a block. Its first token does not count, and blocks without any token that counts are left
    out.

    A token sees all that stands before it in its block, also of other documents.

    The blocks of a ``DataSource`` lie in a cache on the disk (``koff.data.cache``), from which they
    are memory-mapped; those of other documents lie in memory.

    Args:
        documents: a ``DataSource``; texts, records (a ``datasets.Dataset`` of records too); or
            blocks packed before, which are checked and returned.
        tokenizer: a transformers tokenizer; None if the documents are token ids.
        block_size: T, tokens per block, at least 2.
        name: what to call these documents in errors.
        num_proc: processes that tokenise.

    Returns:
        The blocks, int64 [N, T] with N >= 1, and the statistics of ``PackedBlocks``.

    Raises:
        ValueError: no documents, fewer than ``block_size`` tokens, none that counts, or an illegal
            block size.
        TypeError: documents of another kind, or no tokenizer.
        OSError: no room for the cache; nothing is left in it.
    """
    if not isinstance(block_size, int) or block_size < 2:  # a block of 1 has no token to predict
        raise ValueError(
            f"pack: block_size must be an integer of at least 2 tokens, got {block_size!r}; "
            "512 is a usual value"
        )
    check_tokenizer(tokenizer)
    if isinstance(documents, PackedBlocks):
        if documents.blocks.shape[1] != block_size:
            raise ValueError(
                f"pack: {name} packed before must have blocks of {block_size} tokens, got "
                f"{documents.blocks.shape[1]}; pack the documents again"
            )
        return documents
    if not isinstance(num_proc, int) or num_proc < 1:
        raise ValueError(
            f"pack: num_proc must be a whole number of at least 1, got {num_proc!r}; 1 is usual"
        )
    if isinstance(documents, DataSource):
        return _pack_source(documents, tokenizer, block_size, name, num_proc)
    # A text and a record are iterable too, but by letters and by keys.
    if isinstance(documents, str | bytes | Mapping) or not isinstance(documents, Iterable):
        raise TypeError(
            f"pack: {name} must be a list of texts or of records, got "
            f"{type(documents).__name__}; wrap a single text in a list"
        )
    files = {tensor: io.BytesIO() for tensor in _TENSORS}
    facts = _write(documents, tokenizer, block_size, name, num_proc, files)
    # Shares the memory of the files.
    dtypes = {"I64": torch.int64, "BOOL": torch.bool}
    tensors = {
        tensor: torch.frombuffer(file.getbuffer(), dtype=dtypes[_TENSORS[tensor]])
        for tensor, file in files.items()
    }
    return _packed({key: t.view(facts["shapes"][key]) for key, t in tensors.items()}, facts)


def _pack_source(
    source: DataSource, tokenizer: Any, block_size: int, name: str, num_proc: int
) -> PackedBlocks:
    """Return the blocks of a source, mapped from the cache, which holds them from now on."""
    from safetensors import safe_open

    made_of = {
        "format": _FORMAT,
        "content": content_of(source),
        "field": repr(source.field),
        "part": [source.skip, source.limit],
        "tokenizer": _digest(tokenizer),
        "block_size": block_size,
    }

    def make(folder: Path) -> dict[str, Any]:
        with contextlib.ExitStack() as opened:
            files = {
                tensor: opened.enter_context(cache.tensor_file(folder, tensor))
                for tensor in _TENSORS
            }
            documents = read_documents(source)
            facts = _write(documents, tokenizer, block_size, name, num_proc, files)
            for tensor, file in files.items():
                cache.finish_tensor(file, tensor, _TENSORS[tensor], facts["shapes"][tensor])
        if content_of(source) != made_of["content"]:
            raise ValueError(
                f"pack: the files of {name} must stay as they are while they are read, got others; "
                "start again"
            )
        return facts

    folder, facts = cache.entry(made_of, f"the blocks of {name}", make)
    tensors = {}
    for tensor in _TENSORS:
        with safe_open(folder / f"{tensor}.safetensors", "pt") as file:
            tensors[tensor] = file.get_tensor(tensor)  # mapped: a page is read when it is used
    return _packed(tensors, facts)


def _digest(tokenizer: Any) -> str | None:
    """Return a digest of all of a tokenizer that decides which tokens a document becomes."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        model = sorted(tokenizer.get_vocab().items())
    else:
        model = json.loads(backend.to_str())
        # What the last call left behind.
        for setting in ("padding", "truncation"):
            model.pop(setting, None)
    said = [
        type(tokenizer).__name__,
        model,
        str(tokenizer.special_tokens_map),
        sorted(tokenizer.get_added_vocab().items()),
        getattr(tokenizer, "chat_template", None),
        # Another version may split a text differently, or write a chat differently.
        [metadata.version(package) for package in ("tokenizers", "transformers")],
    ]
    if backend is None:
        kept = {k: v for k, v in tokenizer.init_kwargs.items() if k != "name_or_path"}
        said.append(sorted(map(str, kept.items())))
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _packed(tensors: dict[str, Tensor], facts: dict[str, Any]) -> PackedBlocks:
    num_bytes = facts["num_bytes"]
    return PackedBlocks(
        **tensors,
        # Token ids need not have a text: without a tokenizer there are no bytes to count.
        tokens_per_byte=facts["num_labelled"] / num_bytes if num_bytes else float("nan"),
        num_documents=facts["num_documents"],
        num_tokens=facts["num_tokens"],
        id_range=tuple(facts["id_range"]),
    )


def _write(
    documents: Iterable[Any],
    tokenizer: Any,
    block_size: int,
    name: str,
    num_proc: int,
    files: dict[str, IO[bytes]],
) -> dict[str, Any]:
    """Write the blocks of documents into one file per tensor of ``_TENSORS``; little of them is in
    memory at a time.

    Returns:
        The statistics, the tensors' shapes and the range of the ids, ready for JSON.
    """
    cutter = Cutter(block_size)
    num_blocks, lowest, highest = 0, np.iinfo(np.int64).max, -1

    def put(cut: Cut) -> None:
        nonlocal num_blocks, lowest, highest
        for tensor, values in cut._asdict().items():
            files[tensor].write(values.tobytes())
        if len(cut.blocks):
            num_blocks += len(cut.blocks)
            lowest = min(lowest, int(cut.blocks.min()))
            highest = max(highest, int(cut.blocks.max()))

    for document in encode(documents, tokenizer, name, num_proc):
        cutter.add(document)
        if len(cutter.ids) >= _WAITING:
            put(cutter.take())
    put(cutter.finish())
    if not cutter.num_documents:
        got = "0 documents with text; add documents"
        if cutter.num_idle:
            got = f"{cutter.num_idle} without a token that counts; look at their labels"
        raise ValueError(f"pack: {name} must not be empty, got {got}")
    if not cutter.num_cut:
        raise ValueError(
            f"pack: {name} must hold at least one block of {block_size} tokens, got "
            f"{len(cutter.ids)} tokens; add documents or choose a smaller block_size"
        )
    if cutter.num_long:
        logger.warning(
            "koff: %d of %d documents of %s are longer than a block of %d tokens: they are cut, "
            "and what then counts has lost its beginning; a larger block_size keeps it",
            cutter.num_long,
            cutter.num_documents,
            name,
            block_size,
        )
    if not num_blocks:
        raise ValueError(
            f"pack: {name} must hold a token that counts, got none behind the first of a block; "
            "choose a larger block_size"
        )
    rows = [num_blocks, block_size]
    return {
        "shapes": {"blocks": rows, "labelled": rows, "lengths": [num_blocks]},
        "num_labelled": cutter.num_labelled,
        "num_bytes": cutter.num_bytes,
        "num_documents": cutter.num_documents,
        "num_tokens": cutter.num_tokens,
        "id_range": [lowest, highest],
    }


class Cut(NamedTuple):
    """Blocks as a ``Cutter`` gives them away, fields as those of ``PackedBlocks``.

    Args:
        blocks: int64 [N, T].
        labelled: bool [N, T].
        lengths: int64 [N].
    """

    blocks: np.ndarray
    labelled: np.ndarray
    lengths: np.ndarray


class Cutter:
    """Joins documents to one stream and cuts it into blocks. It holds what was not yet taken, and
    so, after each ``take``, less than a block.

    Args:
        block_size: T.
    """

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.ids = array("q")  # int64: a list of Python integers takes four times as much
        self.labelled = bytearray()  # 1 at the tokens that count
        self.lengths: dict[int, int] = {}  # block that is filled up -> its own tokens
        self.marked_until = 0  # where the last document ends of which only a part counts
        self.num_cut = 0  # blocks, with those that were left out
        self.kept = np.empty(0, np.int64)  # which blocks of the last ``take`` were not
        self.num_documents = self.num_tokens = self.num_labelled = self.num_bytes = 0
        self.num_long = self.num_idle = 0  # marked documents beyond a block; without a label

    def add(self, document: Encoded) -> None:
        """Append the tokens of a document."""
        ids, labelled = document.ids, document.labelled
        if labelled is not None:
            # Nothing stands before the first token but another document.
            labelled = bytes(1) + labelled[1:]
            if not any(labelled):
                self.num_idle += 1
                return
            if len(self.ids) % self.block_size + len(ids) > self.block_size:
                self._fill_up()
            self.num_long += len(ids) > self.block_size
        self._append(ids, labelled)
        self.num_labelled += len(ids) if labelled is None else sum(labelled)
        self.num_documents += 1
        self.num_tokens += len(ids)
        self.num_bytes += document.num_bytes

    def add_rest(self, document: Encoded, skip: int) -> None:
        """Append a document without its first tokens, which lie in blocks that were cut before.

        Args:
            document: with all of its tokens.
            skip: how many of them were cut off.
        """
        labelled = document.labelled
        self._append(document.ids[skip:], None if labelled is None else labelled[skip:])

    def _append(self, ids: Sequence[int], labelled: bytes | None) -> None:
        self.ids.extend(ids)
        self.labelled.extend(b"\1" * len(ids) if labelled is None else labelled)
        if labelled is not None:
            self.marked_until = len(self.ids)

    def _fill_up(self) -> None:
        """Fill the last block up, if it is partial."""
        block, length = divmod(len(self.ids), self.block_size)
        if length:
            self.lengths[block] = length
            # Any token will do: attention is causal, so that none before it sees it.
            self.ids.extend([self.ids[-1]] * (self.block_size - length))
            self.labelled.extend(bytes(self.block_size - length))

    def take(self) -> Cut:
        """Return the blocks that are complete, but for those in which no token counts."""
        size = self.block_size
        count = len(self.ids) // size
        whole = count * size
        blocks = np.array(self.ids[:whole], dtype=np.int64).reshape(count, size)
        labelled = np.frombuffer(bytes(self.labelled[:whole]), dtype=np.bool_).reshape(count, size)
        lengths = np.full(count, size, dtype=np.int64)
        for block, length in self.lengths.items():
            lengths[block] = length
        del self.ids[:whole], self.labelled[:whole]
        self.lengths.clear()
        self.marked_until = max(0, self.marked_until - whole)
        self.num_cut += count
        # The first token of a block is never predicted, and a prompt may be longer than a block.
        self.kept = np.flatnonzero(labelled[:, 1:].any(1))
        if len(self.kept) < count:
            blocks, labelled, lengths = blocks[self.kept], labelled[self.kept], lengths[self.kept]
        return Cut(blocks, labelled, lengths)

    def finish(self) -> Cut:
        """Return the last blocks: what of the last one is missing is filled up if it ends a
        document of which only a part counts; otherwise a partial block is left behind."""
        if self.marked_until > len(self.ids) // self.block_size * self.block_size:
            self._fill_up()
        return self.take()
