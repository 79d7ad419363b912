"""Blocks of documents as they come, for data that are too large to be tokenised first.

Row n of a stream is a matter of the data alone: the documents one after the other, in the order
they stand in, cut into blocks as ``pack`` cuts them; behind the last document the first one follows
again, in a new block. So the rows of a run are the same for any number of workers and ranks, each
of which reads the stream for itself and keeps the rows that it is asked for.

Where a row begins is said by a bookmark. Every row carries its own to the trainer, which writes the
last one it used into its checkpoints: a run that resumes reads on from there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .blocks import Cut, Cutter
from .records import IGNORED, check_ids, check_tokenizer
from .sources import DataSource, Place, check_source, read_places
from .tokens import encode_chunk

# Documents per call of the tokenizer: who resumes reads at most so many again.
_CHUNK = 32


class Bookmark(NamedTuple):
    """Where a row begins; plain values, ready for JSON.

    Args:
        row: its number.
        place: of the document that its first token belongs to.
        skip: tokens of this document that stand before it.
    """

    row: int = 0
    place: Place = Place()
    skip: int = 0


class StreamedBlocks:
    """Rows of a source that is streamed, for the schedule; the counterpart of ``PackedBlocks``.

    Rows may be asked for in any order, but only one that goes up is read once. After a step back
    the stream is read again from where it was opened.

    Args:
        source: of the documents.
        tokenizer: of the model; None if the documents are token ids.
        block_size: T, tokens per row.
        name: what to call the documents in errors.
        vocabulary: number of tokens that the model knows; None: not checked.
    """

    def __init__(
        self,
        source: DataSource,
        tokenizer: Any,
        block_size: int,
        *,
        name: str = "documents",
        vocabulary: int | None = None,
    ):
        check_tokenizer(tokenizer)
        check_source(source)
        self.source, self.tokenizer, self.block_size = source, tokenizer, block_size
        self.name, self.vocabulary = name, vocabulary
        self.start = Bookmark()
        self._rows: Iterator[tuple[Bookmark, Tensor, Tensor]] | None = None
        self._next = 0  # number of the row that comes next
        self._process = 0  # whose rows these are

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is started anew opens the stream for itself.
        return vars(self) | {"_rows": None}

    def row(self, number: int) -> tuple[Tensor, Tensor, str]:
        """Return token ids int64 [T] and labels int64 [T] of a row, and its bookmark as JSON.

        Args:
            number: of the row, which may lie behind the last document.

        Raises:
            KeyError, TypeError, ValueError: a document that ``pack`` would refuse.
        """
        # A worker that was forked has its parent's open files, at one common place.
        if self._rows is None or number < self._next or self._process != os.getpid():
            self._process = os.getpid()
            if number < self.start.row:  # of an earlier part of the run than was resumed from
                self.start = Bookmark()
            self._rows, self._next = self._read(self.start), self.start.row
        bookmark, ids, labels = next(itertools.islice(self._rows, number - self._next, None))
        self._next = number + 1
        return ids, labels, json.dumps(bookmark)

    def opening(self, count: int) -> Tensor:
        """Return the first ``count`` tokens of the documents, as ``PackedBlocks.opening`` does.

        Args:
            count: how many.
        """
        found: list[Tensor] = []
        for _, _, ids, _, length in self._cut(Place(), 0):
            found.append(torch.from_numpy(ids[:length]))
            if sum(map(len, found)) >= count:
                break
        return torch.cat(found)[:count]

    def resume(self, bookmark: Any) -> None:
        """Read on from a bookmark.

        Args:
            bookmark: what ``row`` returned, read from JSON.

        Raises:
            TypeError, ValueError: it is none.
        """
        row, place, skip = bookmark
        place = Place(*place)
        numbers = (row, skip, place.file, place.number, place.seen)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"numbers of at least 0 instead of {numbers}")
        self.start, self._rows = Bookmark(row, place, skip), None

    def fingerprint(self) -> str:
        """Return a digest of what a bookmark belongs to: the sizes of the files, or the hub's name
        of the dataset, and the settings by which rows are cut."""
        source = self.source
        said = [
            [file.stat().st_size for file in check_source(source)] or str(source),
            [repr(source.field), source.skip, source.limit, self.block_size],
        ]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def _read(self, start: Bookmark) -> Iterator[tuple[Bookmark, Tensor, Tensor]]:
        """Yield bookmark, ids and labels of every row from a bookmark on, without end."""
        row, place, skip = start
        while True:  # once through the documents each time
            whole, first = (place, skip) == (Place(), 0), row
            for begin, before, ids, labels, _ in self._cut(place, skip):
                if self.vocabulary is not None:
                    low, high = int(ids.min()), int(ids.max())
                    check_ids("pack", f"the text of {self.name!r}", low, high, self.vocabulary)
                bookmark = Bookmark(row, begin, before)
                yield bookmark, torch.from_numpy(ids), torch.from_numpy(labels)
                row += 1
            if whole and row == first:
                raise ValueError(
                    f"pack: {self.name} must hold at least one block of {self.block_size} tokens "
                    "of which one counts, got none; add documents or choose a smaller block_size"
                )
            place, skip = Place(), 0

    def _cut(
        self, place: Place, skip: int
    ) -> Iterator[tuple[Place, int, np.ndarray, np.ndarray, int]]:
        """Yield the rows from a place to the last document: where each begins (its document, and
        the tokens of that before it), its ids, its labels and how many tokens are its own."""
        cutter = Cutter(self.block_size)
        # Where in what waits in the cutter the first token of each document is; of a document that
        # is in part cut off already, before its beginning.
        starts: list[tuple[int, Place]] = []
        cut_before = 0

        def rows(cut: Cut) -> Iterator[tuple[Place, int, np.ndarray, np.ndarray, int]]:
            nonlocal cut_before
            for number, ids, labelled, length in zip(cutter.kept, *cut, strict=True):
                first = int(number) * self.block_size
                at, begin = next(s for s in reversed(starts) if s[0] <= first)
                labels = np.where(labelled, ids, IGNORED)
                labels[0] = IGNORED  # nothing stands before it
                yield begin, first - at, ids, labels, int(length)
            gone = (cutter.num_cut - cut_before) * self.block_size
            cut_before = cutter.num_cut
            if gone:
                moved = [(at - gone, begin) for at, begin in starts]
                # The next row may begin within the last document that begins before it.
                behind = sum(at <= 0 for at, _ in moved)
                starts[:] = moved[max(0, behind - 1) :]

        places = read_places(self.source, place)
        while chunk := list(itertools.islice(places, _CHUNK)):
            numbered = [(begin.seen, document) for begin, document in chunk]
            begins = {begin.seen: begin for begin, _ in chunk}
            for document in encode_chunk(numbered, self.tokenizer, self.name):
                before = cutter.num_documents
                if skip:  # the rest of a document whose beginning lies in rows before
                    cutter.add_rest(document, skip)
                    starts.append((-skip, begins[document.index]))
                    skip = 0
                else:
                    cutter.add(document)
                    if cutter.num_documents > before:
                        at = len(cutter.ids) - len(document.ids)
                        starts.append((at, begins[document.index]))
                yield from rows(cutter.take())
        yield from rows(cutter.finish())
