"""Parameter groups of a training run: each part of what is learned has a rate of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..errors import require
from ..model.state import KoffState
from .arguments import Settings


def parameter_groups(
    state: KoffState, settings: Settings, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for LoRA, KV, gates and the multiplier, in this order; empty ones are left out.

    Args:
        state: ``model.koff``.
        settings: the rates.
        weight_decay: of the LoRA matrices; everything else has none.

    Returns:
        Groups for a torch optimiser. The multiplier's maximises, and is marked "unclipped"; gates
        and multiplier are marked "constant".
    """
    lora, kv = _memory_parameters(state)
    groups = [
        {"params": lora, "lr": settings.lora_learning_rate, "weight_decay": weight_decay},
        {"params": kv, "lr": settings.kv_learning_rate, "weight_decay": 0.0},
    ]
    if state.gates is not None:
        still = {"weight_decay": 0.0, "constant": True}
        gates, multiplier = list(state.gates.log_alpha), [state.gates.multiplier]
        ascent = {"maximize": True, "unclipped": True, **still}
        groups.append({"params": gates, "lr": settings.gate_learning_rate, **still})
        groups.append({"params": multiplier, "lr": settings.multiplier_learning_rate, **ascent})
    return [group for group in groups if group["params"]]


def _memory_parameters(state: KoffState) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """All LoRA matrices, and all learned caches."""
    lora = [p for memory in state.memories for p in memory.lora.parameters()]
    return lora, [p for memory in state.memories for p in memory.kv.parameters()]


def clipped_parts(state: KoffState) -> list[str]:
    """Names of the groups that ``clip_groups`` clips, in its order."""
    lora, kv = _memory_parameters(state)
    parts = {"lora": lora, "kv": kv, "gates": state.gates is not None}
    return [name for name, there in parts.items() if there]


def _constant(step: int) -> float:
    return 1.0


def hold_constant_groups(scheduler: Any, groups: list[dict[str, Any]]) -> None:
    """Let the groups marked "constant" keep their rate under a ``LambdaLR``, in place; any other
    scheduler is an error."""
    good, got = isinstance(scheduler, LambdaLR), type(scheduler).__name__
    require(good, "KoffTrainer", "the scheduler", "be a LambdaLR", got, "choose another", TypeError)
    scheduler.lr_lambdas = [
        _constant if group.get("constant") else fn
        for group, fn in zip(groups, scheduler.lr_lambdas, strict=True)
    ]
    for group, base in zip(groups, scheduler.base_lrs, strict=True):
        if group.get("constant"):
            group["lr"] = base


def clip_groups(groups: list[dict[str, Any]], max_norm: float) -> list[torch.Tensor]:
    """Clip the gradients of each group by itself, in place; "unclipped" groups are left alone.

    Returns:
        The norm of each clipped group before clipping, in order.
    """
    return [
        torch.nn.utils.clip_grad_norm_(group["params"], max_norm)
        for group in groups
        if not group.get("unclipped")
    ]
