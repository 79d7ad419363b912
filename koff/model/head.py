"""What is made of a model's last hidden states, where logits of all tokens would be too many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..data.losses import Head
from . import arch
from .state import is_attached

T = TypeVar("T")
# What a caller makes of the last hidden states [B, T, d] and the head. Without a head it gets the
# logits [B, T, V] that the model has made itself.
Measure = Callable[[Tensor, Head | None], T]


def measured(model: Any, measure: Measure[T], **inputs: Any) -> T:
    """Return what ``measure`` makes of the last hidden states of a forward.

    Args:
        model: any causal LM, attached or not.
        measure: is called inside of the forward: there FSDP has the head's weight whole, and
            autocast is as the forward has it.
        inputs: of the forward, by name.
    """
    if is_attached(model):
        return model(instead_of_logits=measure, **inputs)
    # Here the model itself is passed by, and nobody's patch or hook on it may be.
    if "forward" in vars(model) or getattr(model, "_forward_hooks", None):
        return measure(model(**inputs).logits, None)
    return at_head(type(model).__call__, measure, model, **inputs)


def at_head(forward: Callable[..., Any], measure: Measure[T], model: Any, **inputs: Any) -> T:
    """Return what ``measure`` makes of the last hidden states, or, where only the model knows its
    logits, of those that its ``forward`` returns."""
    head = head_of(model)
    if head is None:
        return measure(forward(model, **inputs).logits, None)
    states = arch.decoder(model)(return_dict=True, **inputs).last_hidden_state
    linear = model.get_output_embeddings()
    if not isinstance(linear, FSDPModule):
        return measure(states, head)

    # FSDP gathers the weights of a module when it is called, and for its call alone. So this one
    # is called, and measures instead.
    def forward(states: Tensor) -> T:
        return measure(states, head._replace(weight=linear.weight, bias=linear.bias))

    linear.forward = forward
    try:
        return linear(states)
    finally:
        del linear.forward


def head_of(model: Any) -> Head | None:
    """Return how a model makes its logits. None where it has to make them itself: a model of a
    type that koff does not know, or with a forward of its own; a head with an adapter or a hook;
    one that is trained; one whose weight is not all here, and will not be when it is called."""
    # Also with koff's own in front, ``forward`` has the module of transformers'.
    if not isinstance(model, PreTrainedModel) or not type(model).forward.__module__.startswith(
        "transformers."
    ):
        return None
    entry = arch.ARCHITECTURES.get(model.config.model_type.removeprefix(arch.NARROW_PREFIX))
    linear = model.get_output_embeddings()
    sharded = isinstance(linear, FSDPModule)
    # FSDP's class stands before the module's own, which is the last of its bases.
    kind = type(linear).__bases__[-1] if sharded else type(linear)
    if entry is None or kind is not nn.Linear or "forward" in vars(linear):
        return None
    hooks = [*linear._forward_pre_hooks.values(), *linear._forward_hooks.values()]
    hooks += [*linear._backward_pre_hooks.values(), *linear._backward_hooks.values()]
    if any(hook is not contiguous and not _of_fsdp(hook) for hook in hooks):
        return None
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in linear.parameters())
    if trained or (isinstance(linear.weight, DTensor) and not sharded):
        return None
    config = model.config
    scale = 1 / getattr(config, entry.logits_divisor) if entry.logits_divisor else 1.0
    cap = getattr(config, entry.logits_cap) if entry.logits_cap else None
    return Head(linear.weight, linear.bias, scale, cap)


def _of_fsdp(hook: Callable) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.distributed.fsdp.")


def contiguous(head: nn.Module, args: tuple) -> tuple:
    """Forward pre-hook of the head: lay its input out in one piece.

    Of a prompt, ``generate`` gives it the last token of each row, which lie apart. By a weight that
    has no gradient torch then multiplies row by row, and where it computes bf16 on a processor it
    first copies the whole table once for each of them: 64 rows took half a minute.
    """
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in args)
