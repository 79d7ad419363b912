"""Perplexity and bits per byte of a model, per domain and memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..data.blocks import PackedBlocks, pack
from ..data.losses import token_losses
from ..errors import require


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
        """Returns the row as a plain dictionary, ready for JSON."""
        return asdict(self)


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
    """Measures perplexity and bits per byte on every dataset with every memory.

    Protocol: the documents of a split are written as BOS text EOS, concatenated in order and cut
    into blocks of `block_size` tokens, the last partial block dropped (`koff.data.pack`). Each
    block is one forward from an empty cache; its tokens 2..T are scored, each given the tokens
    before it in the block. Perplexity is exp of the mean negative log-likelihood over all scored
    tokens (summed in float64); bits per byte is that mean divided by ln 2, times the tokens per
    byte of the whole split. Gates are deterministic, dropout is off; the model's mode is restored.

    Args:
        model: a koff model, or any causal LM of transformers (measured without memory, as "base").
        tokenizer: the model's tokenizer.
        datasets: {domain: documents}, documents as `koff.data.pack` takes them.
        memories: names, and None for no memory; default: every memory of the model, then None.
        block_size: tokens per block, at most what the model has positions for.
        batch_size: blocks per forward; a different one may change the last digits.
        split: what to write into the rows.

    Returns:
        One row per dataset and memory, datasets in their order, memories within.

    Raises:
        KeyError, ValueError: unknown memory; too little text; block beyond the context.
    """
    names = _memory_names(model)
    chosen = _check_memories(names, memories)
    _check_datasets(datasets)
    check_sizes(model, block_size, batch_size, "evaluate")
    packed = {
        domain: _packed(model, tokenizer, documents, block_size, f"dataset {domain!r}")
        for domain, documents in datasets.items()
    }
    rows = []
    with evaluating(model), torch.inference_mode():
        for domain, data in packed.items():
            for memory in chosen:
                options = {} if names is None else {"memory": memory}
                nll = _mean_nll(model, data.blocks, batch_size, options)
                rows.append(_row(names is not None, memory, domain, split, nll, data))
    return rows


def _check_datasets(datasets: Any) -> None:
    step, got = "pass {domain: documents}", type(datasets).__name__
    good = isinstance(datasets, Mapping)
    require(good, "evaluate", "datasets", "be a mapping", got, step, TypeError)
    require(bool(datasets), "evaluate", "datasets", "not be empty", "{}", "pass documents")


def _packed(model: Any, tokenizer: Any, documents: Any, size: int, name: str) -> PackedBlocks:
    data = pack(documents, tokenizer, size, name=name)
    check_vocabulary(model, data.blocks, "evaluate", name)
    return data


def _row(
    is_koff: bool, memory: str | None, domain: str, split: str, nll: float, data: PackedBlocks
) -> EvalRow:
    return EvalRow(
        variant="koff" if is_koff else "base",
        memory=memory,
        domain=domain,
        split=split,
        perplexity=math.inf if nll > 700 else math.exp(nll),
        bits_per_byte=nll / math.log(2) * data.tokens_per_byte,
        tokens=data.blocks.shape[0] * (data.blocks.shape[1] - 1),
    )


def _mean_nll(model: Any, blocks: torch.Tensor, batch_size: int, options: dict[str, Any]) -> float:
    """Mean negative log-likelihood in nats of tokens 2..T of every block, blocks int64 [N, T]."""
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in blocks.split(batch_size):
        batch = batch.to(device)
        logits = model(input_ids=batch, use_cache=False, **options).logits
        total += token_losses(logits, batch)[0].double().sum()
    return total.item() / (blocks.shape[0] * (blocks.shape[1] - 1))


def _memory_names(model: Any) -> tuple[str, ...] | None:
    """Names of the model's memories; None for a plain transformers model."""
    handle = getattr(model, "koff", None)
    return None if handle is None else tuple(handle.memory_names)


def _check_memories(
    names: tuple[str, ...] | None, memories: Iterable[str | None] | None
) -> list[str | None]:
    if memories is None:
        return [*(names or ()), None]
    if isinstance(memories, str):
        raise TypeError(
            f"evaluate: memories must be a list of names and None, got the text {memories!r}; "
            f"write [{memories!r}]"
        )
    chosen = list(dict.fromkeys(memories))
    unknown = [name for name in chosen if name is not None and name not in (names or ())]
    if unknown:
        raise KeyError(
            f"evaluate: memory must be one of {list(names or ())} or None, got {unknown[0]!r}; "
            + ("correct the name" if names else "this model has no memories")
        )
    return chosen


def check_sizes(model: Any, block_size: int, batch_size: int, where: str) -> None:
    """Raises ValueError for a batch without rows, or blocks beyond the model's positions.

    Args:
        model: a causal LM.
        block_size: tokens per block.
        batch_size: blocks per forward.
        where: for errors.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            f"{where}: batch_size must be an integer of at least 1, got {batch_size!r}; 8 is usual"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and block_size > limit:
        raise ValueError(
            f"{where}: block_size must be at most the model's {limit} positions, got "
            f"{block_size}; choose a smaller block_size"
        )


def check_vocabulary(model: Any, blocks: torch.Tensor, where: str, what: str) -> None:
    """Raises ValueError for token ids that the model has no embedding of.

    Args:
        model: a causal LM.
        blocks: token ids.
        where, what: for errors.
    """
    size = model.get_input_embeddings().num_embeddings
    low, high = (int(x) for x in blocks.aminmax())
    rule, got = f"have token ids in 0..{size - 1}", f"{low}..{high}"
    good, step = 0 <= low and high < size, "use the model's own tokenizer"
    require(good, where, what, rule, got, step)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode restored after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
