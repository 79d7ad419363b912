"""Perplexity with the halves of memories swapped: the LoRA of one domain, the cache of another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import asked_by
from ..model.memories import crossed
from ..model.state import require_attached
from .perplexity import evaluate


@dataclass(frozen=True)
class SwapRow:
    """One measured cell.

    Args:
        lora: name of the memory whose LoRA was active, or None.
        kv: name of the memory whose learned cache was, or None.
        domain, split, perplexity, bits_per_byte, tokens: as in ``EvalRow``.
    """

    lora: str | None
    kv: str | None
    domain: str
    split: str
    perplexity: float
    bits_per_byte: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)


@asked_by("evaluate_swaps")
def evaluate_swaps(
    model: Any, tokenizer: Any, datasets: Mapping[str, Any], **options: Any
) -> list[SwapRow]:
    """Measure every dataset with the LoRA of each memory, or none, beside the cache of each, or
    none.

    Args:
        model: a koff model with at least two memories, each with both parts.
        tokenizer, datasets, options: as ``koff.evaluate`` takes them, without ``memories``.

    Returns:
        One row per LoRA, cache and dataset, in this order, the memories' own pairs among them.

    Raises:
        KeyError, TypeError, ValueError: as ``koff.evaluate``; memories that cannot be swapped.
    """
    bank = require_attached(model).memories
    whole = [m.name for m in bank if m.lora_config is not None and m.kv_config is not None]
    if len(whole) < 2 or len(whole) < len(bank):
        raise ValueError(
            "evaluate_swaps: the model must have at least two memories, each of LoRA and KV, got "
            f"{whole or 'none'} of {bank.names or 'none'}; there is nothing to swap"
        )
    names: list[str | None] = [*bank.names, None]
    rows = []
    for lora in names:
        for kv in names:
            parts = (None if name is None else bank[name] for name in (lora, kv))
            # A name that no user can give, since "+" is not allowed in one.
            pair = crossed(f"{lora or ''}+{kv or ''}", *parts)
            bank.add(pair)
            try:
                found = evaluate(model, tokenizer, datasets, memories=[pair.name], **options)
            finally:
                bank.remove(pair.name)
            for row in found:
                values = row.to_dict()
                del values["variant"], values["memory"]
                rows.append(SwapRow(lora=lora, kv=kv, **values))
    return rows
