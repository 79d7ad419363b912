"""From documents to tokens, some hundreds of documents at a time and by several processes if asked.

Nothing here needs torch: the processes that tokenise start without it.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from .records import Text, Tokens, read_document

# Documents per call of the tokenizer: enough for all of its threads, few enough that their ids,
# which come as lists of Python integers, stay small beside the stream.
CHUNK = 512


class Encoded(NamedTuple):
    """A document in tokens.

    Args:
        ids: int64; BOS and EOS included where they belong.
        labelled: 1 at the tokens that count; None: all do.
        num_bytes: UTF-8 bytes of the text of those that count; 0 if there is no tokenizer.
        index: which document it is, of all that were read.
    """

    ids: array
    labelled: bytes | None
    num_bytes: int
    index: int


def encode(documents: Iterable[Any], tokenizer: Any, name: str, num_proc: int) -> Iterator[Encoded]:
    """Yield documents in tokens, in their order; those without text or tokens are left out.

    Args:
        documents: as ``koff.data.blocks.pack`` takes them.
        tokenizer: of the model; None if the documents are token ids.
        name: of the documents, for errors.
        num_proc: processes that tokenise; with 1, this one does.

    Raises:
        TypeError, ValueError: a document of another kind, or one that contradicts itself.
    """
    numbered = enumerate(documents)
    chunks = iter(lambda: list(itertools.islice(numbered, CHUNK)), [])
    if num_proc == 1:
        for chunk in chunks:
            yield from encode_chunk(chunk, tokenizer, name)
        return
    # Started anew and not forked: this process may have threads, and a GPU.
    context = multiprocessing.get_context("spawn")
    start = (tokenizer, name)
    with ProcessPoolExecutor(num_proc, context, _remember, start) as pool:
        waiting: deque = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_encode_remembered, chunk))
                if len(waiting) > 2 * num_proc:  # read no further ahead than they can tokenise
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            raise ValueError(
                f"pack: the {num_proc} processes that tokenise {name} must live until its end, got "
                "one that was killed or could not start; use fewer, and begin a script with "
                'if __name__ == "__main__"'
            ) from None
        finally:
            for future in waiting:
                future.cancel()


_remembered: tuple[Any, str] = (None, "")  # of a process that tokenises


def _remember(tokenizer: Any, name: str) -> None:
    global _remembered
    _remembered = tokenizer, name
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # these processes are its threads


def _encode_remembered(chunk: Sequence[tuple[int, Any]]) -> list[Encoded]:
    return encode_chunk(chunk, *_remembered)


def encode_chunk(chunk: Sequence[tuple[int, Any]], tokenizer: Any, name: str) -> list[Encoded]:
    """Return some documents in tokens, as ``encode`` does.

    Args:
        chunk: number and document of each.
        tokenizer, name: as ``encode`` takes them.
    """
    texts: list[tuple[int, Text]] = []
    done: list[Encoded] = []
    for index, document in chunk:
        read = read_document(document, tokenizer, f"document {index} of {name}")
        if isinstance(read, Tokens):
            if read.ids:
                size = _count_bytes(read.ids, read.labelled, tokenizer)
                done.append(Encoded(read.ids, read.labelled, size, index))
        elif tokenizer is None:
            raise TypeError(
                f"pack: {name} must hold token ids when there is no tokenizer, got a text or a "
                "chat; pass a tokenizer (KoffTrainer's processing_class) or records with "
                "'input_ids'"
            )
        elif any(part.strip() for part in read.parts()):
            texts.append((index, read))
    done += _encode_texts(texts, tokenizer, name)
    done.sort(key=lambda document: document.index)
    return done


def _encode_texts(texts: list[tuple[int, Text]], tokenizer: Any, name: str) -> Iterator[Encoded]:
    if not texts:
        return
    bos = getattr(tokenizer, "bos_token_id", None)
    eos = getattr(tokenizer, "eos_token_id", None)
    marked = any(text.spans is not None for _, text in texts)
    if marked and not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"pack: the tokenizer must be a fast one to tell which tokens of {name} count, got "
            f"{type(tokenizer).__name__}; give 'input_ids' and 'labels'"
        )
    out = tokenizer(
        [text.text for _, text in texts],
        add_special_tokens=False,
        return_offsets_mapping=marked,
        verbose=False,  # documents longer than the model's context are fine, they are cut up
    )
    for row, (index, text) in enumerate(texts):
        ids = out["input_ids"][row]
        labelled = None
        if text.spans is not None:
            # A token over the edge begins in what is given, and so is not written by the model.
            labelled = bytes(
                any(first <= start < end for first, end in text.spans)
                for start, _ in out["offset_mapping"][row]
            )
        if not text.framed:
            num_bytes = _count_bytes(ids, labelled, tokenizer)  # a template's marks are no text
        else:
            num_bytes = sum(len(part.encode("utf-8")) for part in text.parts())
            head = [] if bos is None else [bos]
            # A completion may bring its own end.
            ends = labelled is not None and ids and ids[-1] == eos
            tail = [] if eos is None or ends else [eos]
            ids = [*head, *ids, *tail]
            if labelled is not None:
                labelled = bytes(len(head)) + labelled + b"\1" * len(tail)
        if ids:
            yield Encoded(array("q", ids), labelled, num_bytes, index)


def _count_bytes(ids: Sequence[int], labelled: bytes | None, tokenizer: Any) -> int:
    """Return the UTF-8 bytes of what the tokens that count say; 0 if there is no tokenizer."""
    if tokenizer is None:
        return 0
    counted = list(ids if labelled is None else itertools.compress(ids, labelled))
    text = tokenizer.decode(counted, skip_special_tokens=True)
    # A lone surrogate in a user's own text is refused; here it counts as "?".
    return len(text.encode("utf-8", errors="replace"))
