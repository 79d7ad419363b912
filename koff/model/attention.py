"""The attention implementation "koff" and its mask function, registered with transformers.

The mask function returns None where plain causal attention is meant, and otherwise the bounds of
each row packed in an int64 tensor [B, 1, 1, 3] (four-dimensional masks pass through transformers
untouched, also through generate's own preparation for static caches).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from koffkernels import RowBounds, prefix_attention
from koffkernels.reference import visible_keys

from ..errors import require

NAME = "koff"
_WHERE = "koff attention"


def pack_bounds(bounds: RowBounds) -> Tensor:
    """int64 [B, 1, 1, 3]."""
    return torch.stack(list(bounds), dim=-1)[:, None, None, :]


def unpack_bounds(mask: Tensor | None) -> RowBounds | None:
    """Inverse of ``pack_bounds``, in contiguous tensors; None stays None."""
    return None if mask is None else RowBounds(*mask[:, 0, 0, :].t().contiguous())


def _padding_bounds(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last visible key of each row of a 2-D mask; holes are refused."""
    present = attention_mask.bool()
    start = (present.cumsum(-1) == 0).sum(-1)
    end = present.shape[-1] - (present.flip(-1).cumsum(-1) == 0).sum(-1)
    if not torch.compiler.is_compiling():
        holes = (present.sum(-1) != (end - start).clamp(min=0)) & present.any(-1)
        require(
            not bool(holes.any()),
            _WHERE,
            "attention_mask",
            "be 1 on one run of each row",
            "a mask with holes",
            "pad on one side only",
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
    """Mask function of the attention implementation "koff"; arguments as transformers passes
    them."""
    if mask_function is not causal_mask_function:  # packed sequences and users' own patterns
        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
            kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
            device=device, **kwargs,
        )  # fmt: skip
    # Only these two cases are what sdpa means by "causal without a mask" (its triangle is anchored
    # top left).
    dynamic = not isinstance(q_offset, Tensor) and kv_length == q_offset + q_length
    plain = dynamic and (q_length == 1 or q_offset == 0)
    if plain and (attention_mask is None or _all_seen(attention_mask)):
        return None
    zeros = torch.zeros(batch_size, dtype=torch.int64, device=device)
    query_start = zeros + q_offset
    start, end = zeros, query_start + q_length
    if attention_mask is not None:
        start, last = _padding_bounds(attention_mask)
        end = torch.minimum(end, last)
    return pack_bounds(RowBounds(start, end, query_start))


def _all_seen(attention_mask: Tensor) -> bool:
    return not torch.compiler.is_compiling() and bool(attention_mask.all())


def _plain_mask(mask: Tensor | None, query: Tensor, key: Tensor, kept: dict) -> Tensor | None:
    """The boolean mask that sdpa needs for the same bounds, built once per forward."""
    if mask is None or mask.dtype != torch.int64:
        return mask
    if "plain" not in kept:
        shape = (query.shape[0], query.shape[2], key.shape[2])
        kept["plain"] = visible_keys(*shape, unpack_bounds(mask), query.device)[:, None]
    return kept["plain"]


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
    """Attention of transformers models with KV memories: query [B, Hq, T, D], key, value [B, Hkv,
    S, D] -> [B, T, Hq, D].

    Without a prefix in this forward it is transformers' own scaled-dot-product attention, bit for
    bit.
    """
    site = module._koff
    context = site.scope.context
    prefix = site.bank.prefix(site.scope.index, context.slots)
    if prefix is None:
        mask = _plain_mask(attention_mask, query, key, context.masks)
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    good = attention_mask is None or attention_mask.dtype == torch.int64
    require(
        good,
        _WHERE,
        "the mask",
        "be a 2-D padding mask when a KV memory is in use",
        "a 4-D mask or packed sequences",
        "pass attention_mask [B, S] and no packed position ids",
    )
    require(
        dropout == 0.0,
        _WHERE,
        "attention dropout",
        "be 0 with KV memories",
        dropout,
        "set config.attention_dropout = 0",
    )
    if "bounds" not in context.masks:
        context.masks["bounds"] = unpack_bounds(attention_mask)  # the same in every layer
    bounds, ids = context.masks["bounds"], context.ids
    out = prefix_attention(query, key, value, prefix, memory_ids=ids, bounds=bounds, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the names known to transformers; both are needed, or padding masks are silently
    dropped."""
    AttentionInterface.register(NAME, koff_attention)
    AttentionMaskInterface.register(NAME, koff_mask)
