"""Fill a memory's learned cache from the frozen model's own keys and values."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel

from .forward_context import BASE


@torch.no_grad()
def fill_from_tokens(
    model: PreTrainedModel, name: str, token_ids: list[int] | torch.Tensor
) -> None:
    """Set a memory's KV part to what the frozen model (gates open, no memory) caches for P tokens,
    in place.

    Args:
        model: an attached model.
        name: the memory.
        token_ids: at least P token ids; the first P are used.

    Raises:
        ValueError: too few tokens, or the memory has no KV part.

    Source: Cartridges (arXiv 2506.06266), initialisation from text.
    """
    memory = model.koff.memories[name]
    if memory.length == 0:
        raise ValueError(
            f"the KV initialisation of memory {name!r}: the memory must have a KV part, got none; "
            "set KVConfig"
        )
    ids = torch.as_tensor(token_ids, dtype=torch.int64).flatten()
    if ids.numel() < memory.length:
        raise ValueError(
            f"the KV initialisation of memory {name!r}: the text must have at least "
            f"{memory.length} tokens, got {ids.numel()}; give more text, a shorter memory, or "
            "KVConfig(init='tokens')"
        )
    ids = ids[None, : memory.length].to(model.device)
    cache = DynamicCache(config=model.config)
    training = model.training
    model.eval()
    # One token's logits, since the model makes some: none are looked at.
    model(input_ids=ids, past_key_values=cache, use_cache=True, memory=BASE, logits_to_keep=1)
    model.train(training)
    for weights, layer in zip(memory.kv, cache.layers, strict=True):
        weights.take_(layer)
    memory.kv_filled = True


def fill_from_random_tokens(model: PreTrainedModel, name: str, generator: torch.Generator) -> None:
    """Set a memory's KV part from random token ids, in place."""
    length = model.koff.memories[name].length
    ids = torch.randint(0, model.config.vocab_size, (length,), generator=generator)
    fill_from_tokens(model, name, ids)
