"""The attention implementation "koff" and its mask function, registered with transformers.

The mask function returns None where plain causal attention is meant. Otherwise it gives the bounds
of each row as an int64 tensor [B, 1, 1, 3] (first key, end, first query): four-dimensional masks
pass through transformers untouched, also through generate's own preparation for static caches, and
three numbers say all that a mask of one run per row can.

A learned prefix stands at positions -P..-1, inside the attention function alone. Masks, position
ids and cache lengths know nothing of it, so transformers' own code for them stays right.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from koffkernels import RowBounds, prefix_attention
from koffkernels.dispatch import compute_dtype
from koffkernels.reference import visible_keys

from .forward_context import ForwardContext
from .memories import is_capturing

# What ``config._attn_implementation`` says while koff's attention is in use.
NAME = "koff"


def bounds_to_mask(bounds: RowBounds) -> Tensor:
    """Return row bounds as a mask that transformers lets through, int64 [B, 1, 1, 3]."""
    return torch.stack(list(bounds), dim=-1)[:, None, None, :]


def mask_to_bounds(mask: Tensor | None) -> RowBounds | None:
    """Return the row bounds that ``bounds_to_mask`` wrote down; None stays None."""
    # Contiguous once here, or every layer's kernel would copy the three columns again.
    return None if mask is None else RowBounds(*mask[:, 0, 0, :].t().contiguous())


def next_bounds(first_keys: Tensor, past: int | Tensor, tokens: int) -> Tensor:
    """Return the row bounds, as a mask, of tokens behind a cache, of rows that are visible from
    their first key on.

    Args:
        first_keys: int64 [B, 1, 1, 1].
        past: tokens in the cache.
        tokens: T.
    """
    query_start = torch.zeros_like(first_keys) + past
    return torch.cat([first_keys, query_start + tokens, query_start], -1)


def _padding_bounds(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last visible key of each row of a 2-D mask; holes are refused."""
    present = attention_mask.bool()
    start = (present.cumsum(-1) == 0).sum(-1)
    end = present.shape[-1] - (present.flip(-1).cumsum(-1) == 0).sum(-1)
    if _can_look(attention_mask):
        holes = (present.sum(-1) != (end - start).clamp(min=0)) & present.any(-1)
        if bool(holes.any()):
            raise ValueError(
                "koff attention: attention_mask must be 1 on one run of each row, got a mask with "
                "holes; pad on one side only"
            )
    return start, end


def koff_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor | None:
    """Return the mask of a forward under the attention implementation "koff".

    Args:
        batch_size, q_length, kv_length: B, T, S.
        q_offset: position of the first query; a tensor under a static cache.
        kv_offset: position of the first key.
        mask_function: transformers' description of the pattern.
        attention_mask: bool or int [B, S], 0 at padding, or None.
        device: of the mask.
        kwargs: whatever else transformers passes to mask functions.

    Returns:
        None for plain causal attention, row bounds as int64 [B, 1, 1, 3], or what transformers'
        sdpa has for any other pattern.
    """
    if mask_function is not causal_mask_function:  # packed sequences and users' own patterns
        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
            kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
            device=device, **kwargs,
        )  # fmt: skip
    # Only these two cases are what sdpa means by "causal without a mask" (its triangle is anchored
    # top left).
    dynamic = not isinstance(q_offset, Tensor) and kv_length == q_offset + q_length
    causal = dynamic and (q_length == 1 or q_offset == 0)
    if causal and (attention_mask is None or _all_seen(attention_mask)):
        return None
    zeros = torch.zeros(batch_size, dtype=torch.int64, device=device)
    query_start = zeros + q_offset
    start, end = zeros, query_start + q_length
    if attention_mask is not None:
        start, last = _padding_bounds(attention_mask)
        end = torch.minimum(end, last)
    return bounds_to_mask(RowBounds(start, end, query_start))


def _all_seen(attention_mask: Tensor) -> bool:
    return _can_look(attention_mask) and bool(attention_mask.all())


def _can_look(tensor: Tensor) -> bool:
    """Whether values can be read on the host: a graph, traced or captured, has none yet."""
    if torch.compiler.is_compiling():
        return False
    return not is_capturing(tensor.device)


def _sdpa_mask_of(mask: Tensor | None, query: Tensor, key: Tensor, masks: dict) -> Tensor | None:
    """The mask that sdpa needs: row bounds written out as booleans [B, 1, T, S], once per forward
    for all layers; any other mask as it is."""
    if mask is None or mask.dtype != torch.int64:
        return mask
    if "boolean" not in masks:
        shape = (query.shape[0], query.shape[2], key.shape[2])
        masks["boolean"] = visible_keys(*shape, mask_to_bounds(mask), query.device)[:, None]
    return masks["boolean"]


def koff_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """Return attention over the own keys and the learned prefixes of this forward's memories.

    Without a prefix in this forward it is transformers' own scaled-dot-product attention, bit for
    bit.

    Args:
        module: the attention module of a layer, which knows the forward's context.
        query: [B, Hq, T, D].
        key, value: [B, Hkv, S, D].
        attention_mask: what ``koff_mask`` returned.
        scaling: of the scores; None: D ** -0.5.
        dropout: of the probabilities; 0 under a prefix.
        kwargs: whatever else transformers passes to attention functions.

    Returns:
        [B, T, Hq, D], and None for the probabilities, which are never made.

    Raises:
        ValueError: a mask or a dropout that attention under a prefix does not have.
    """
    link = module._koff
    context = link.running.context or ForwardContext()
    dtype = compute_dtype(query, query)
    prefix = link.bank.prefix(link.layer, context.memories, context.stacks, dtype)
    if prefix is None:
        mask = _sdpa_mask_of(attention_mask, query, key, context.masks)
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if attention_mask is not None and attention_mask.dtype != torch.int64:
        raise ValueError(
            "koff attention: the mask must be a 2-D padding mask when a KV memory is in use, got a "
            "4-D mask or packed sequences; pass attention_mask [B, S] and no packed position ids"
        )
    if dropout != 0.0:
        raise ValueError(
            f"koff attention: attention dropout must be 0 with KV memories, got {dropout}; load "
            "the model with attention_dropout=0.0"
        )
    if "bounds" not in context.masks:
        context.masks["bounds"] = mask_to_bounds(attention_mask)  # the same in every layer
    bounds, rows = context.masks["bounds"], context.rows
    out = prefix_attention(query, key, value, prefix, memory_ids=rows, bounds=bounds, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the names known to transformers; both are needed, or padding masks are silently
    dropped."""
    AttentionInterface.register(NAME, koff_attention)
    AttentionMaskInterface.register(NAME, koff_mask)
