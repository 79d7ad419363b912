"""Perplexity and bits per byte of a model, per domain and memory."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..data.blocks import PackedBlocks, pack
from ..data.losses import token_losses
from ..data.records import IGNORED, check_ids
from ..errors import asked_by, asker
from ..model.head import measured

# math.exp overflows beyond 709; a model with so many nats per token knows nothing in any case.
_MOST_NATS = 700
# The models that are being measured: the modes of their modules before, and how many threads do.
_measured: dict[torch.nn.Module, tuple[list[tuple[torch.nn.Module, bool]], int]] = {}
_switching = threading.Lock()


@dataclass(frozen=True)
class EvalRow:
    """One measured cell.

    Args:
        variant: "base" for a plain transformers model, "koff" for one with gates or memories.
        memory: name of the active memory, or None.
        domain: name of the dataset.
        split: name of the split, as the caller gave it.
        perplexity: exp of the mean negative log-likelihood per scored token.
        bits_per_byte: bits per byte of the split's text, comparable across tokenizers.
        tokens: number of scored tokens.
    """

    variant: str
    memory: str | None
    domain: str
    split: str
    perplexity: float
    bits_per_byte: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)


@asked_by("evaluate")
def evaluate(
    model: Any,
    tokenizer: Any,
    datasets: Mapping[str, Any],
    *,
    memories: Iterable[str | None] | None = None,
    block_size: int = 512,
    batch_size: int = 8,
    split: str = "test",
) -> list[EvalRow]:
    """Measure perplexity and bits per byte on every dataset with every memory.

    Protocol: the documents of a split are packed in order into blocks of ``block_size`` tokens
    (texts as BOS text EOS, the last partial block dropped; ``pack`` of ``koff.data.blocks`` does
    it). Each block is one forward from an empty cache; those of its tokens 2..T that count are
    scored, each given all tokens before it in the block. All tokens of a text count; of a prompt
    with its completion, of a chat and of token ids with labels, the completion, the assistant's
    turns and the labelled ones. With the mean negative log-likelihood m over all scored tokens, in
    nats and summed in float64,

        perplexity = exp(m),   bits per byte = m / ln 2 * tokens that count per byte of their text.

    Gates are deterministic, dropout is off; the model's mode is restored.

    Args:
        model: a koff model, or any causal LM of transformers (measured without memory, as "base").
        tokenizer: the model's tokenizer; None if the documents are token ids.
        datasets: domain -> its documents: texts, records ("text", "messages", "prompt" and
            "completion", or "input_ids" and "labels"), a ``datasets.Dataset`` of these, a
            ``koff.DataSource``, or the ``PackedBlocks`` that ``koff.data.blocks.pack`` made of them
            (both: ``from koff.data.blocks import PackedBlocks, pack``).
        memories: names, and None for no memory; default: every memory of the model, then None.
        block_size: tokens per block; with the longest prefix at most what the model has positions
            for.
        batch_size: blocks per forward; a different one may change the last digits.
        split: what to write into the rows.

    Returns:
        One row per dataset and memory, datasets in their order, memories within.

    Raises:
        KeyError, TypeError, ValueError: unknown memory; datasets of another kind; too little text;
            a block beyond the context.
    """
    state = getattr(model, "koff", None)
    names = () if state is None else tuple(state.memory_names)
    chosen = _choose_memories(names, memories)
    if not isinstance(datasets, Mapping):
        raise TypeError(
            f"evaluate: datasets must be a mapping, got {type(datasets).__name__}; pass "
            "{domain: documents}"
        )
    if not datasets:
        raise ValueError("evaluate: datasets must not be empty, got {}; pass documents")
    used = [] if state is None else [state.memories[name] for name in chosen if name is not None]
    for memory in used:
        memory.check_filled("evaluate")
    longest = max((memory.length for memory in used), default=0)
    check_sizes(model, block_size, batch_size, prefix=longest)
    packed = {}
    for domain, documents in datasets.items():  # all of them, before the first forward
        what = f"dataset {domain!r}"
        packed[domain] = pack(documents, tokenizer, block_size, name=what)
        check_vocabulary(model, packed[domain], what)
    rows = []
    with evaluating(model), torch.inference_mode():
        for domain, data in packed.items():
            for memory in chosen:
                # A plain transformers model has no such argument.
                argument = {} if state is None else {"memory": memory}
                nats, tokens = _mean_nats(model, data, batch_size, argument)
                row = EvalRow(
                    variant="base" if state is None else "koff",
                    memory=memory,
                    domain=domain,
                    split=split,
                    perplexity=math.inf if nats > _MOST_NATS else math.exp(nats),
                    bits_per_byte=nats / math.log(2) * data.tokens_per_byte,
                    tokens=tokens,
                )
                rows.append(row)
    return rows


def _choose_memories(
    names: tuple[str, ...], memories: Iterable[str | None] | None
) -> list[str | None]:
    """Return which memories to measure with, each once."""
    if memories is None:
        return [*names, None]
    if isinstance(memories, str):
        raise TypeError(
            f"evaluate: memories must be a list of names and None, got the text {memories!r}; "
            f"write [{memories!r}]"
        )
    chosen = list(dict.fromkeys(memories))
    unknown = [name for name in chosen if name is not None and name not in names]
    if unknown:
        raise KeyError(
            f"evaluate: memory must be one of {list(names)} or None, got {unknown[0]!r}; "
            + ("correct the name" if names else "this model has no memories")
        )
    return chosen


def _mean_nats(
    model: Any, data: PackedBlocks, batch_size: int, argument: dict[str, Any]
) -> tuple[float, int]:
    """Return the mean negative log-likelihood of the tokens that count, and how many those are."""
    device = next(model.parameters()).device
    # On the device, and read once at the end. In fp64, since in fp32 a sum over millions of tokens
    # would round away part of each further batch.
    total = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    for first in range(0, len(data), batch_size):
        rows = slice(first, first + batch_size)
        labels = data.labels(rows)
        tokens += int((labels != IGNORED).sum())
        _, nats = measured(
            model,
            functools.partial(token_losses, labels=labels),
            input_ids=data.blocks[rows].to(device),
            use_cache=False,
            **argument,
        )
        total += nats.double().sum()
    return total.item() / tokens, tokens


# ---- what other measurements and the trainer use too ----


def check_sizes(model: Any, block_size: int, batch_size: int, prefix: int = 0) -> None:
    """Refuse a batch without rows, or blocks beyond the model's positions.

    Args:
        model: a causal LM.
        block_size: T.
        batch_size: B.
        prefix: learned tokens in front of a block.

    Raises:
        ValueError: one of these.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            f"{asker()}: batch_size must be an integer of at least 1, got {batch_size!r}; 8 is "
            "usual"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and prefix + block_size > limit:
        got = f"{prefix} + {block_size}" if prefix else block_size
        raise ValueError(
            f"{asker()}: {'prefix + ' if prefix else ''}block_size must be at most the model's "
            f"{limit} positions, got {got}; choose a smaller block_size"
        )


def check_vocabulary(model: Any, data: PackedBlocks, what: str) -> None:
    """Refuse token ids that the model has no embedding of: on a GPU they would end the process.

    Args:
        model: a causal LM.
        data: the blocks.
        what: what these tokens are, for the error.

    Raises:
        ValueError: an id beyond the vocabulary.
    """
    size = model.get_input_embeddings().num_embeddings
    check_ids(asker(), what, *data.id_range, size)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch to evaluation mode inside, and give every module its own mode back after.

    Where several threads measure one model, the first to begin switches it, and the last to end
    switches it back.
    """
    with _switching:
        # Not model.train() in the end: a user may have left single modules in evaluation mode on
        # purpose.
        modes, threads = _measured.get(model, ([(m, m.training) for m in model.modules()], 0))
        _measured[model] = modes, threads + 1
        model.eval()
    try:
        yield
    finally:
        with _switching:
            modes, threads = _measured.pop(model)
            if threads > 1:
                _measured[model] = modes, threads - 1
            else:
                for module, training in modes:
                    module.training = training
