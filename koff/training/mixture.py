"""From users' documents to the sources that a training run draws from, with every check first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..data.blocks import pack
from ..errors import require
from ..model.state import KoffState
from .arguments import Settings
from .schedule import Mixture, Source

_WHERE = "KoffTrainer"
# (train_datasets, general_datasets, general_weights) as KoffTrainer takes them
Datasets = tuple[Mapping[str, Any], Mapping[str, Any] | None, Mapping[str, float] | None]


def build_mixture(
    state: KoffState, settings: Settings, datasets: Datasets, tokenizer: Any, seed: int
) -> Mixture:
    """Pack every domain and every part of the general mixture.

    Args:
        state: ``model.koff``.
        settings: of the run.
        datasets: as ``KoffTrainer`` takes them.
        tokenizer: of the model.
        seed: of the schedule.

    Raises:
        KeyError, ValueError: domains that do not match the memories, too little text, rows too
            long.
    """
    train, general, weights = datasets
    for name, given in (("train_datasets", train), ("general_datasets", general or {})):
        good, got, step = isinstance(given, Mapping), type(given).__name__, "pass name -> documents"
        require(good, _WHERE, name, "be a mapping", got, step, TypeError)
    names = state.memories.names
    _check_domains(names, train)
    size = settings.block_size
    _check_length(state, size)
    domains = [
        Source(d, pack(docs, tokenizer, size, name=d).blocks, names.index(d) if names else -1)
        for d, docs in train.items()
    ]
    _check_text(state, domains)
    parts = [
        Source(f"general/{d}", pack(docs, tokenizer, size, name=f"general/{d}").blocks)
        for d, docs in (general or {}).items()
    ]
    every = settings.general_every if parts else 0
    mixed = settings.batching == "mixed"
    shares = _shares(parts, weights)
    return Mixture(domains, parts, shares, len(names), every, mixed, seed)


def _check_domains(names: list[str], train: Mapping[str, Any]) -> None:
    require(bool(train), _WHERE, "train_datasets", "name a domain", "none", "give documents")
    missing = sorted(set(names) - set(train))
    rule = "have the domain of every memory"
    require(not missing, _WHERE, "train_datasets", rule, f"none for {missing}", "add it", KeyError)
    extra = sorted(set(train) - set(names)) if names else []
    step = "move the others to general_datasets"
    require(
        not extra, _WHERE, "train_datasets", f"name only memories {names}", extra, step, KeyError
    )


def _check_length(state: KoffState, size: int) -> None:
    longest = max((memory.length for memory in state.memories), default=0)
    limit = state.max_positions
    require(
        longest + size <= limit,
        _WHERE,
        "prefix + block_size",
        f"fit the model's {limit} positions",
        f"{longest} + {size}",
        "lower block_size or KVConfig.num_tokens",
    )


def _check_text(state: KoffState, domains: list[Source]) -> None:
    for source in domains:
        if source.memory >= 0 and not state.memories[source.memory].kv_filled:
            need, got = state.memories[source.memory].length, source.blocks.numel()
            what, rule = f"domain {source.name!r} (KV init 'text')", f"have at least {need} tokens"
            require(got >= need, _WHERE, what, rule, got, "give more text or a shorter memory")


def _shares(parts: list[Source], weights: Mapping[str, float] | None) -> list[float]:
    """Probabilities of the general parts; by number of tokens where no weights are given."""
    if weights is None:
        values = [float(part.blocks.numel()) for part in parts]
    else:
        names = [part.name.removeprefix("general/") for part in parts]
        same = set(weights) == set(names)
        rule, step = f"name {sorted(names)}", "give one weight per part"
        require(same, _WHERE, "general_weights", rule, sorted(weights), step)
        values = [float(weights[name]) for name in names]
        good = all(math.isfinite(v) and v >= 0 for v in values) and sum(values) > 0
        require(
            good, _WHERE, "general_weights", "be at least 0 and not all 0", values, "change them"
        )
    return [v / sum(values) for v in values]
