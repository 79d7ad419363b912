"""Pack documents: tokenise them, join them to one stream, and cut it into blocks of equal length.

This is the only meaning of "pack" in koff. Training and evaluation see the same blocks.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Documents per call of the tokenizer: enough for all of its threads, few enough that their ids,
# which come as lists of Python integers, stay small beside the stream.
_TOKENIZE_BATCH = 512


@dataclass(frozen=True)
class PackedBlocks:
    """Tokens of one split, cut into blocks of equal length.

    Args:
        blocks: token ids, int64 [N, T].
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


def pack(
    documents: PackedBlocks | Iterable[Any],
    tokenizer: Any,
    block_size: int,
    *,
    name: str = "documents",
) -> PackedBlocks:
    """Pack documents into blocks of ``block_size`` tokens.

    Every text becomes BOS text EOS, with BOS and EOS only where the tokenizer has them; documents
    that are already token ids are taken as they are. The last partial block is dropped.

    Args:
        documents: texts, records with "text" or "input_ids" (a ``datasets.Dataset`` of such records
            too), or blocks packed before, which are checked and returned.
        tokenizer: a transformers tokenizer; None if the documents are token ids.
        block_size: T, tokens per block, at least 2.
        name: what to call these documents in errors.

    Returns:
        The blocks, int64 [N, T] with N >= 1, and the statistics of ``PackedBlocks``.

    Raises:
        ValueError: no documents, fewer than ``block_size`` tokens, or an illegal block size.
        TypeError: documents of another kind.
    """
    if not isinstance(block_size, int) or block_size < 2:  # a block of 1 has no token to predict
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
        return documents
    # A text and a record are iterable too, but by letters and by keys.
    if isinstance(documents, str | bytes | Mapping) or not isinstance(documents, Iterable):
        raise TypeError(
            f"pack: {name} must be a list of texts or of records with 'text' or 'input_ids', got "
            f"{type(documents).__name__}; wrap a single text in a list"
        )
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
    # frombuffer shares the stream's memory; the clone lets go of it, and of the dropped tail.
    flat = torch.frombuffer(stream, dtype=torch.int64)[: num_blocks * block_size].clone()
    return PackedBlocks(
        blocks=flat.view(num_blocks, block_size),
        # Token ids need not have a text: without a tokenizer there are no bytes to count.
        tokens_per_byte=len(stream) / num_bytes if num_bytes else float("nan"),
        num_documents=num_documents,
        num_tokens=len(stream),
    )


def _tokenize(documents: Iterable[Any], tokenizer: Any, name: str) -> tuple[array, int, int]:
    """Return the tokens of all documents, the UTF-8 bytes of their texts, and how many documents
    are not empty."""
    bos = getattr(tokenizer, "bos_token_id", None)
    eos = getattr(tokenizer, "eos_token_id", None)
    head = [] if bos is None else [bos]
    tail = [] if eos is None else [eos]
    stream = array("q")  # int64: a list of Python integers takes four times as much
    num_bytes = num_documents = 0
    texts: list[str] = []  # read, but not yet tokenised

    def flush() -> None:
        if not texts:
            return
        # verbose=False: documents longer than the model's context are fine, they are cut up.
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            stream.extend(head)
            stream.extend(ids)
            stream.extend(tail)
        texts.clear()

    for index, document in enumerate(documents):
        content = _content(document, index, name)
        if isinstance(content, str):
            if tokenizer is None:
                raise TypeError(
                    f"pack: {name} must hold token ids when there is no tokenizer, got a text at "
                    f"document {index}; pass processing_class or records with 'input_ids'"
                )
            if content.strip():
                num_documents += 1
                num_bytes += _count_bytes(content, index, name)
                texts.append(content)
                if len(texts) == _TOKENIZE_BATCH:
                    flush()
        else:
            flush()  # the texts before it come first
            ids = _token_ids(content, index, name)
            stream.extend(ids)
            num_documents += bool(ids)
            if tokenizer is not None:
                text = tokenizer.decode(ids, skip_special_tokens=True)
                # A lone surrogate in a user's own text is refused; here it counts as "?".
                num_bytes += len(text.encode("utf-8", errors="replace"))
    flush()
    return stream, num_bytes, num_documents


def _content(document: Any, index: int, name: str) -> Any:
    """Return the text or the token ids of a document; ids first, where a record has both."""
    if isinstance(document, str):
        return document
    if isinstance(document, Mapping):
        if document.get("input_ids") is not None:
            return document["input_ids"]
        if isinstance(document.get("text"), str):
            return document["text"]
        got = f"a record with {sorted(map(str, document))}"
    else:
        got = type(document).__name__
    raise TypeError(
        f"pack: document {index} of {name} must be a text or a record with 'text' or 'input_ids', "
        f"got {got}; rename the column or render it to a text first"
    )


def _count_bytes(text: str, index: int, name: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:  # a lone surrogate, as broken JSON escapes leave it
        raise ValueError(
            f"pack: document {index} of {name} must be valid Unicode, got {error.reason} at "
            f"character {error.start}; correct or remove it"
        ) from None


def _token_ids(values: Any, index: int, name: str) -> array:
    try:
        return array("q", [int(token) for token in values])
    except (TypeError, ValueError, OverflowError):
        raise TypeError(
            f"pack: input_ids of document {index} of {name} must be a list of whole numbers, got "
            f"{str(values)[:40]}; tokenize it again"
        ) from None
