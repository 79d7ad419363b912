"""From users' documents to the sources that a training run draws from, with every check first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from ..data.blocks import PackedBlocks, pack
from ..data.sources import DataSource
from ..data.stream import StreamedBlocks
from ..evaluation.perplexity import check_vocabulary
from .schedule import Mixture, Source
from .settings import Settings


def build_mixture(
    model: PreTrainedModel,
    settings: Settings,
    train_datasets: Mapping[str, Any],
    general_datasets: Mapping[str, Any] | None,
    general_weights: Mapping[str, float] | None,
    tokenizer: Any,
    seed: int,
) -> Mixture:
    """Pack every domain and every part of the general mixture.

    Args:
        model: an attached model.
        settings: of the run.
        train_datasets, general_datasets, general_weights: as ``KoffTrainer`` takes them.
        tokenizer: of the model; None if the documents are token ids.
        seed: of the schedule.

    Returns:
        What the schedule draws from.

    Raises:
        KeyError, TypeError, ValueError: domains that do not match the memories, documents of
            another kind or of another tokenizer, too little text, rows too long.
    """
    state = model.koff
    names = state.memories.names
    size = settings.block_size
    if settings.distractor_rows and len(names) < 2:
        raise ValueError(
            "KoffTrainer: distractor_rows must be 0 with fewer than two memories (there is no "
            f"other one to give), got {settings.distractor_rows} and {names}; leave it out"
        )
    general_datasets = general_datasets or {}
    for name, given in (
        ("train_datasets", train_datasets),
        ("general_datasets", general_datasets),
    ):
        if not isinstance(given, Mapping):
            raise TypeError(
                f"KoffTrainer: {name} must be a mapping, got {type(given).__name__}; pass name -> "
                "documents"
            )
    _check_domains(names, train_datasets)
    longest = max((memory.length for memory in state.memories), default=0)
    if longest + size > state.max_positions:
        raise ValueError(
            f"KoffTrainer: prefix + block_size must fit the model's {state.max_positions} "
            f"positions, got {longest} + {size}; lower block_size or KVConfig.num_tokens"
        )

    def rows_of(documents: Any, name: str) -> PackedBlocks | StreamedBlocks:
        if not (isinstance(documents, DataSource) and documents.streaming):
            return pack(documents, tokenizer, size, name=name)
        vocabulary = model.get_input_embeddings().num_embeddings
        return StreamedBlocks(documents, tokenizer, size, name=name, vocabulary=vocabulary)

    domains = []
    for name, documents in train_datasets.items():
        blocks = rows_of(documents, name)
        domains.append(Source(name, blocks, names.index(name) if names else -1))
    for source in domains:  # the training fills a cache from the first tokens of its domain
        if source.memory < 0 or state.memories[source.memory].kv_filled:
            continue
        need = state.memories[source.memory].length
        have = len(source.blocks.opening(need))
        if have < need:
            raise ValueError(
                f"KoffTrainer: domain {source.name!r} (KV init 'text') must have at least {need} "
                f"tokens, got {have}; give more text or a shorter memory"
            )
    general = []
    for name, documents in general_datasets.items():
        name = f"general/{name}"  # a domain may have the same name
        general.append(Source(name, rows_of(documents, name)))
    mixture = Mixture(
        domains=domains,
        general=general,
        weights=_shares(general, general_weights),
        memories=len(names),
        general_every=settings.general_every if general else 0,
        mixed=settings.batching == "mixed",
        seed=seed,
        no_memory=settings.no_memory_rows,
        distractors=settings.distractor_rows,
    )
    for source in mixture.sources:
        if isinstance(source.blocks, StreamedBlocks):
            continue  # looks at each row when it comes
        check_vocabulary(model, source.blocks, f"the text of {source.name!r}")
    return mixture


def _check_domains(names: list[str], train_datasets: Mapping[str, Any]) -> None:
    """Refuse domains that are not those of the memories; without memories, any will do."""
    if not train_datasets:
        raise ValueError("KoffTrainer: train_datasets must name a domain, got none; give documents")
    missing = sorted(set(names) - set(train_datasets))
    if missing:
        raise KeyError(
            "KoffTrainer: train_datasets must have the domain of every memory, got none for "
            f"{missing}; add it"
        )
    extra = sorted(set(train_datasets) - set(names)) if names else []
    if extra:
        raise KeyError(
            f"KoffTrainer: train_datasets must name only memories {names}, got {extra}; move the "
            "others to general_datasets"
        )


def _shares(general: list[Source], weights: Mapping[str, float] | None) -> list[float]:
    """Return the probability of each general source: by its tokens where no weights are given."""
    if weights is None:
        streamed = [source.name for source in general if source.rows is None]
        if streamed:
            raise ValueError(
                "KoffTrainer: general_weights must be given where a part is streamed, got none for "
                f"{streamed}; nobody knows how many tokens it has"
            )
        values = [float(source.blocks.blocks.numel()) for source in general]
    else:
        names = [source.name.removeprefix("general/") for source in general]
        if set(weights) != set(names):
            raise ValueError(
                f"KoffTrainer: general_weights must name {sorted(names)}, got {sorted(weights)}; "
                "give one weight per part"
            )
        values = [float(weights[name]) for name in names]
        if not all(math.isfinite(v) and v >= 0 for v in values) or sum(values) <= 0:
            raise ValueError(
                f"KoffTrainer: general_weights must be at least 0 and not all 0, got {values}; "
                "change them"
            )
    return [value / sum(values) for value in values]
