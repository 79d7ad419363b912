"""Pack documents: tokenise them, join them to one stream, and cut it into blocks of equal length.

This is the only meaning of "pack" in koff. Training and evaluation see the same blocks, and the
same tokens of them count.
"""

from __future__ import annotations

import itertools
import logging
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .records import IGNORED, Text, Tokens, check_tokenizer, read_document

# Documents per call of the tokenizer: enough for all of its threads, few enough that their ids,
# which come as lists of Python integers, stay small beside the stream.
_TOKENIZE_BATCH = 512

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
    """

    blocks: Tensor
    labelled: Tensor
    lengths: Tensor
    tokens_per_byte: float
    num_documents: int
    num_tokens: int

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
    documents: PackedBlocks | Iterable[Any],
    tokenizer: Any,
    block_size: int,
    *,
    name: str = "documents",
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

    Args:
        documents: texts, records (a ``datasets.Dataset`` of records too), or blocks packed before,
            which are checked and returned.
        tokenizer: a transformers tokenizer; None if the documents are token ids.
        block_size: T, tokens per block, at least 2.
        name: what to call these documents in errors.

    Returns:
        The blocks, int64 [N, T] with N >= 1, and the statistics of ``PackedBlocks``.

    Raises:
        ValueError: no documents, fewer than ``block_size`` tokens, none that counts, or an illegal
            block size.
        TypeError: documents of another kind, or no tokenizer.
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
    # A text and a record are iterable too, but by letters and by keys.
    if isinstance(documents, str | bytes | Mapping) or not isinstance(documents, Iterable):
        raise TypeError(
            f"pack: {name} must be a list of texts or of records, got "
            f"{type(documents).__name__}; wrap a single text in a list"
        )
    stream = _Stream(tokenizer, block_size, name)
    for index, document in enumerate(documents):
        stream.add(read_document(document, tokenizer, f"document {index} of {name}"))
    return stream.blocks()


class _Stream:
    """The tokens of documents one after the other, of which blocks are cut.

    Args:
        tokenizer: of the model, or None.
        block_size: T.
        name: of the documents, for errors.
    """

    def __init__(self, tokenizer: Any, block_size: int, name: str):
        self.tokenizer, self.block_size, self.name = tokenizer, block_size, name
        self.waiting: list[Text] = []  # not yet tokenised
        self.ids = array("q")  # int64: a list of Python integers takes four times as much
        self.labelled = bytearray()  # 1 at the tokens that count
        self.lengths: dict[int, int] = {}  # block that is filled up -> its own tokens
        self.marked_until = 0  # where the last document ends of which only a part counts
        self.num_documents = self.num_tokens = self.num_labelled = self.num_bytes = 0
        self.num_long = self.num_idle = 0  # marked documents beyond a block; without a label

    def add(self, document: Text | Tokens) -> None:
        """Append a document."""
        if isinstance(document, Text):
            if self.tokenizer is None:
                raise TypeError(
                    f"pack: {self.name} must hold token ids when there is no tokenizer, got a text "
                    "or a chat; pass processing_class or records with 'input_ids'"
                )
            if any(part.strip() for part in document.parts()):
                self.waiting.append(document)
                if len(self.waiting) == _TOKENIZE_BATCH:
                    self._tokenize()
            return
        self._tokenize()  # the texts before it come first
        ids, labelled = document.ids, document.labelled
        self._append(ids, labelled, self._count_bytes(ids, labelled))

    def _count_bytes(self, ids: Sequence[int], labelled: bytes | None) -> int:
        """Return the UTF-8 bytes of what the tokens that count say; 0 if there is no tokenizer."""
        if self.tokenizer is None:
            return 0
        counted = list(ids if labelled is None else itertools.compress(ids, labelled))
        text = self.tokenizer.decode(counted, skip_special_tokens=True)
        # A lone surrogate in a user's own text is refused; here it counts as "?".
        return len(text.encode("utf-8", errors="replace"))

    def _tokenize(self) -> None:
        """Append the texts that wait for the tokenizer."""
        if not self.waiting:
            return
        bos = getattr(self.tokenizer, "bos_token_id", None)
        eos = getattr(self.tokenizer, "eos_token_id", None)
        marked = any(document.spans is not None for document in self.waiting)
        if marked and not getattr(self.tokenizer, "is_fast", False):
            raise TypeError(
                f"pack: the tokenizer must be a fast one to tell which tokens of {self.name} "
                f"count, got {type(self.tokenizer).__name__}; give 'input_ids' and 'labels'"
            )
        out = self.tokenizer(
            [document.text for document in self.waiting],
            add_special_tokens=False,
            return_offsets_mapping=marked,
            verbose=False,  # documents longer than the model's context are fine, they are cut up
        )
        for row, document in enumerate(self.waiting):
            ids = out["input_ids"][row]
            labelled = None
            if document.spans is not None:
                # A token over the edge begins in what is given, and so is not written by the model.
                labelled = bytes(
                    any(first <= start < end for first, end in document.spans)
                    for start, _ in out["offset_mapping"][row]
                )
            if not document.framed:
                num_bytes = self._count_bytes(ids, labelled)  # the template's marks are no text
            else:
                num_bytes = sum(len(part.encode("utf-8")) for part in document.parts())
                head = [] if bos is None else [bos]
                # A completion may bring its own end.
                ends = labelled is not None and ids and ids[-1] == eos
                tail = [] if eos is None or ends else [eos]
                ids = [*head, *ids, *tail]
                if labelled is not None:
                    labelled = bytes(len(head)) + labelled + b"\1" * len(tail)
            self._append(ids, labelled, num_bytes)
        self.waiting.clear()

    def _append(self, ids: Sequence[int], labelled: bytes | None, num_bytes: int) -> None:
        """Append the tokens of a document.

        Args:
            ids: of its tokens.
            labelled: 1 at the tokens that count; None: all do.
            num_bytes: of the text of those that count.
        """
        if not ids:
            return
        if labelled is None:
            self.ids.extend(ids)
            self.labelled.extend(b"\1" * len(ids))
            self.num_labelled += len(ids)
        else:
            # Nothing stands before the first token but another document.
            labelled = bytes(1) + labelled[1:]
            if not any(labelled):
                self.num_idle += 1
                return
            if len(self.ids) % self.block_size + len(ids) > self.block_size:
                self._fill_up()
            self.ids.extend(ids)
            self.labelled.extend(labelled)
            self.num_labelled += sum(labelled)
            self.num_long += len(ids) > self.block_size
            self.marked_until = len(self.ids)
        self.num_documents += 1
        self.num_tokens += len(ids)
        self.num_bytes += num_bytes

    def _fill_up(self) -> None:
        """Fill the last block up, if it is partial."""
        block, length = divmod(len(self.ids), self.block_size)
        if length:
            self.lengths[block] = length
            # Any token will do: attention is causal, so that none before it sees it.
            self.ids.extend([self.ids[-1]] * (self.block_size - length))
            self.labelled.extend(bytes(self.block_size - length))

    def blocks(self) -> PackedBlocks:
        """Return what was appended, cut into blocks."""
        self._tokenize()
        if not self.num_documents:
            got = "0 documents with text; add documents"
            if self.num_idle:
                got = f"{self.num_idle} without a token that counts; look at their labels"
            raise ValueError(f"pack: {self.name} must not be empty, got {got}")
        size = self.block_size
        if self.marked_until > len(self.ids) // size * size:
            self._fill_up()
        num_blocks = len(self.ids) // size
        if not num_blocks:
            raise ValueError(
                f"pack: {self.name} must hold at least one block of {size} tokens, got "
                f"{len(self.ids)} tokens; add documents or choose a smaller block_size"
            )
        if self.num_long:
            logger.warning(
                "koff: %d of %d documents of %s are longer than a block of %d tokens: they are "
                "cut, and what then counts has lost its beginning; a larger block_size keeps it",
                self.num_long,
                self.num_documents,
                self.name,
                size,
            )
        # frombuffer shares the stream's memory; the clone lets go of it, and of the dropped tail.
        whole = slice(num_blocks * size)
        ids = torch.frombuffer(self.ids, dtype=torch.int64)[whole].clone().view(-1, size)
        labelled = torch.frombuffer(self.labelled, dtype=torch.bool)[whole].clone().view(-1, size)
        lengths = torch.full((num_blocks,), size)
        for block, length in self.lengths.items():
            lengths[block] = length
        teaches = labelled[:, 1:].any(1)  # the first token of a block is never predicted
        if not teaches.all():  # a prompt longer than a block
            ids, labelled, lengths = ids[teaches], labelled[teaches], lengths[teaches]
        if not len(ids):
            raise ValueError(
                f"pack: {self.name} must hold a token that counts, got none behind the first of a "
                "block; choose a larger block_size"
            )
        return PackedBlocks(
            blocks=ids,
            labelled=labelled,
            lengths=lengths,
            # Token ids need not have a text: without a tokenizer there are no bytes to count.
            tokens_per_byte=self.num_labelled / self.num_bytes if self.num_bytes else float("nan"),
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
        )
