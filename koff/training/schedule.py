"""Which rows each training batch holds and which memory each row uses: a function of (seed, step)
alone. So a run that resumes sees what an uninterrupted one would have seen.

The order is the same on every rank: accelerate deals the batches of this sampler out in turn, so
the batches of one micro-step follow each other here, one per rank, all of the same kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset, Sampler

from ..data.blocks import PackedBlocks
from ..data.stream import StreamedBlocks

# One training row: (source, row of the source, memory id or -1).
Index = tuple[int, int, int]

# What a random stream is for: the first part of its key after the seed. Two purposes never share a
# stream, whatever the numbers that follow.
_ROW_ORDER, _GENERAL_ROWS, _DOMAIN_ORDER, _NO_MEMORY, _DISTRACTORS = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Source:
    """The blocks of one domain or of one part of the general mixture.

    Args:
        name: for logs.
        blocks: its rows, or the stream that they come from.
        memory: memory id of a domain's rows; -1 for none. General rows draw theirs at random.
    """

    name: str
    blocks: PackedBlocks | StreamedBlocks
    memory: int = -1

    @property
    def rows(self) -> int | None:
        """How many there are; None for a stream, of which nobody knows."""
        return None if isinstance(self.blocks, StreamedBlocks) else len(self.blocks)


@dataclass(frozen=True)
class Mixture:
    """Everything that the schedule depends on.

    Args:
        domains: sources of the domain steps.
        general: sources of the general steps; may be empty.
        weights: probability of each general source, adding up to 1.
        memories: number of memories that general rows choose from; 0: they use none.
        general_every: every n-th step is general; 0: none is.
        mixed: rows of a batch cycle over the domains; otherwise each batch is of one domain.
        seed: of everything random here.
        no_memory: probability that a row (without ``mixed``: a batch) goes without the memory it
            would have.
        distractors: probability that a domain's row (without ``mixed``: a batch) has the memory of
            another domain.
    """

    domains: list[Source]
    general: list[Source]
    weights: list[float]
    memories: int
    general_every: int
    mixed: bool
    seed: int
    no_memory: float = 0.0
    distractors: float = 0.0

    @property
    def sources(self) -> list[Source]:
        """Domains first, then general sources."""
        return [*self.domains, *self.general]


class MixtureDataset(Dataset):
    """Rows of all sources, looked up by ``Index``."""

    def __init__(self, mixture: Mixture, names: list[str]):
        self.sources = mixture.sources
        self.names = names
        self.rows = sum(source.rows or 0 for source in self.sources)  # for transformers' log

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: Index) -> dict:
        source, row, memory = index
        name = None if memory < 0 else self.names[memory]
        data, bookmark = self.sources[source].blocks, None
        if isinstance(data, StreamedBlocks):
            ids, labels, bookmark = data.row(row)
        else:
            ids, labels = data.blocks[row], data.labels(row)
        return {
            "input_ids": ids,
            "labels": labels,
            "memory": name,
            "source": source,
            "bookmark": bookmark,
        }


def collate(rows: list[dict]) -> dict:
    """Return a batch: input_ids and labels int64 [B, T], memory (list of names or None), source
    (list of ints), bookmark (list of texts, None where a row comes from no stream)."""
    return {
        "input_ids": torch.stack([row["input_ids"] for row in rows]),
        "labels": torch.stack([row["labels"] for row in rows]),
        "memory": [row["memory"] for row in rows],
        "source": [row["source"] for row in rows],
        "bookmark": [row["bookmark"] for row in rows],
    }


class _Cursor:
    """Goes through one source's rows in a new random order each epoch, and through those of a
    stream in their own."""

    def __init__(self, source: int, rows: int | None, seed: int):
        self.source = source
        self.rows = rows
        self.seed = seed
        self.drawn = 0
        self.order: list[int] = []  # of this epoch

    def next(self) -> int:
        if self.rows is None:
            self.drawn += 1
            return self.drawn - 1
        epoch, position = divmod(self.drawn, self.rows)
        if position == 0:
            generator = _generator(self.seed, _ROW_ORDER, self.source, epoch)
            self.order = torch.randperm(self.rows, generator=generator).tolist()
        self.drawn += 1
        return self.order[position]


def _generator(*key: int) -> torch.Generator:
    """Return the random stream of a key."""
    mixed = 0
    for part in key:
        # Knuth's linear congruential generator (MMIX): neighbouring keys give seeds far apart.
        # Below 2^63, as manual_seed wants them.
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(mixed)


class MixtureSampler(Sampler):
    """Batches of ``Index`` for a whole run: steps x accumulation x ranks of them.

    Args:
        mixture: what to draw from.
        batch_size: rows of one rank's micro-batch.
        steps: optimiser steps.
        accumulation: micro-batches per step and rank.
        ranks: processes.
        gate_steps: the steps, from the first, in which some rows go without a memory. After them
            nothing but memories is trained: a row without one would train nothing.
    """

    def __init__(
        self,
        mixture: Mixture,
        batch_size: int,
        steps: int,
        accumulation: int,
        ranks: int,
        gate_steps: int = 0,
    ):
        self.mixture = mixture
        self.batch_size = batch_size
        self.steps = steps
        self.accumulation = accumulation
        self.ranks = ranks
        self.gate_steps = gate_steps

    def __len__(self) -> int:
        return self.steps * self.accumulation * self.ranks

    def __iter__(self) -> Iterator[list[Index]]:
        mix = self.mixture
        cursors = [_Cursor(i, s.rows, mix.seed) for i, s in enumerate(mix.sources)]
        domain_rows = domain_batches = 0
        for step in range(self.steps):
            is_general = (
                bool(mix.general) and mix.general_every and (step + 1) % mix.general_every == 0
            )
            for micro in range(self.accumulation):
                # The rows of all ranks are drawn together, and then dealt out: so they are those
                # that one process with as large a batch would have.
                if is_general:
                    rows = self._general(cursors, step, micro)
                else:
                    # Mixed rows go round the domains, on from where the last batch ended; those of
                    # a single-domain batch stay with its domain.
                    if mix.mixed:
                        rows = self._rows(cursors, first=domain_rows, stride=1)
                    else:
                        rows = self._rows(cursors, first=self._domain(domain_batches), stride=0)
                    rows = self._some_with_another(rows, step, micro)
                    domain_rows += len(rows)
                    domain_batches += 1
                if step < self.gate_steps:
                    rows = self._some_without(rows, step, micro)
                for rank in range(self.ranks):
                    yield rows[rank * self.batch_size : (rank + 1) * self.batch_size]

    def _some_without(self, rows: list[Index], step: int, micro: int) -> list[Index]:
        """Return the rows, a share of them (of single-domain batches: all or none) without their
        memory. The draws are a stream of their own: runs with and without them see the same
        text."""
        generator = _generator(self.mixture.seed, _NO_MEMORY, step, micro)
        draws = len(rows) if self.mixture.mixed else 1
        bare = (torch.rand(draws, generator=generator) < self.mixture.no_memory).expand(len(rows))
        return [
            (source, row, -1 if without else memory)
            for (source, row, memory), without in zip(rows, bare.tolist(), strict=True)
        ]

    def _some_with_another(self, rows: list[Index], step: int, micro: int) -> list[Index]:
        """Return rows of domains, a share of them (of single-domain batches: all or none) with the
        memory of another domain; the draws are a stream of their own, too."""
        mix = self.mixture
        if not mix.distractors:
            return rows
        generator = _generator(mix.seed, _DISTRACTORS, step, micro)
        draws = len(rows) if mix.mixed else 1
        chosen = torch.rand(draws, generator=generator) < mix.distractors
        further = torch.randint(1, mix.memories, (draws,), generator=generator)
        shifts = torch.where(chosen, further, 0).expand(len(rows)).tolist()
        return [
            (source, row, (memory + shift) % mix.memories)
            for (source, row, memory), shift in zip(rows, shifts, strict=True)
        ]

    def _domain(self, batch: int) -> int:
        """Return the domain of a single-domain batch: every domain once, in random order, before
        any comes again."""
        cycle, position = divmod(batch, len(self.mixture.domains))
        order = torch.randperm(
            len(self.mixture.domains), generator=_generator(self.mixture.seed, _DOMAIN_ORDER, cycle)
        )
        return int(order[position])

    def _rows(self, cursors: list[_Cursor], first: int, stride: int) -> list[Index]:
        domains = self.mixture.domains
        count = self.ranks * self.batch_size
        picks = [(first + i * stride) % len(domains) for i in range(count)]
        return [(d, cursors[d].next(), domains[d].memory) for d in picks]

    def _general(self, cursors: list[_Cursor], step: int, micro: int) -> list[Index]:
        """Return general rows; in single batches all of them use one memory."""
        mix, count = self.mixture, self.ranks * self.batch_size
        generator = _generator(mix.seed, _GENERAL_ROWS, step, micro)
        one = int(torch.randint(max(mix.memories, 1), (), generator=generator))
        draws = torch.multinomial(torch.tensor(mix.weights), count, True, generator=generator)
        if not mix.memories:
            memories = [-1] * count
        elif mix.mixed:
            memories = torch.randint(mix.memories, (count,), generator=generator).tolist()
        else:
            memories = [one] * count
        sources = [len(mix.domains) + d for d in draws.tolist()]
        return [(s, cursors[s].next(), m) for s, m in zip(sources, memories, strict=True)]
