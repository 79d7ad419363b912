"""Parameter groups of a training run: each part of what is learned has a rate of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ..model.state import KoffState
from .settings import Settings


def parameter_groups(
    state: KoffState, settings: Settings, weight_decay: float
) -> dict[str, dict[str, Any]]:
    """Return the optimiser's groups by name: lora, kv, gates and multiplier; empty ones are left
    out.

    The names stay outside of the groups: whatever is in a group is written into checkpoints, and a
    checkpoint's groups hold numbers and switches only.

    Args:
        state: ``model.koff``.
        settings: the rates.
        weight_decay: of the LoRA matrices; everything else has none.

    Returns:
        Groups for a torch optimiser, in the order that checkpoints have them. The multiplier's
        maximises, and is marked "unclipped"; gates and multiplier are marked "constant".
    """
    groups = {
        "lora": {
            "params": [p for memory in state.memories for p in memory.lora.parameters()],
            "lr": settings.lora_learning_rate,
            "weight_decay": weight_decay,
        },
        # Only LoRA decays: at zero it is the frozen model. A cache or a gate at zero is not.
        "kv": {
            "params": [p for memory in state.memories for p in memory.kv.parameters()],
            "lr": settings.kv_learning_rate,
            "weight_decay": 0.0,
        },
    }
    if state.gates is not None:
        groups["gates"] = {
            "params": list(state.gates.log_alpha),
            "lr": settings.gate_learning_rate,
            "weight_decay": 0.0,
            "constant": True,
        }
        groups["multiplier"] = {
            "params": [state.gates.multiplier],
            "lr": settings.multiplier_learning_rate,
            "maximize": True,
            "unclipped": True,
            "weight_decay": 0.0,
            "constant": True,
        }
    return {name: group for name, group in groups.items() if group["params"]}


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average gradients over all processes, in place, as DDP does.

    A parameter that only some of them used gets its share of the others' zeros; one that none used
    keeps ``grad is None``, or momentum and weight decay would move it.

    Args:
        parameters: the same on every process, of one dtype and device.
    """
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters:
        return
    used = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device)
    used = used.to(torch.int32)  # collectives reduce no booleans
    dist.all_reduce(used, dist.ReduceOp.MAX)
    chosen = [p for p, by_any in zip(parameters, used.tolist(), strict=True) if by_any]
    if not chosen:
        return
    zeros_or_grad = (torch.zeros_like(p) if p.grad is None else p.grad for p in chosen)
    together = torch.cat([grad.flatten() for grad in zeros_or_grad])  # one call for all of them
    dist.all_reduce(together)
    together /= dist.get_world_size()
    for p, part in zip(chosen, together.split([p.numel() for p in chosen]), strict=True):
        p.grad = part.view_as(p)


def clip_groups(
    names: list[str], groups: list[dict[str, Any]], max_norm: float
) -> dict[str, Tensor]:
    """Clip the gradients of each group by itself, in place; "unclipped" groups are left alone.

    By itself, since the norms differ (a cache's is a tenth of LoRA's): clipped together, the
    largest would decide what is left of the others. The multiplier's gradient is the gap s - t, the
    very amount by which it is to grow.

    Args:
        names: as ``parameter_groups`` has them.
        groups: the optimiser's, in the same order.
        max_norm: what each group's norm is cut to.

    Returns:
        The norm of each clipped group before clipping, by name; on the parameters' device.
    """
    norms = {}
    for name, group in zip(names, groups, strict=True):
        if not group.get("unclipped"):
            norm = torch.nn.utils.clip_grad_norm_(group["params"], max_norm)
            # Where no parameter has a gradient (gates, once the mask is fixed), torch returns a
            # zero on the CPU.
            norms[name] = norm.to(group["params"][0].device)
    return norms


def hold_constant_groups(scheduler: Any, groups: list[dict[str, Any]]) -> None:
    """Let the groups marked "constant" keep their rate under a ``LambdaLR``, in place.

    Raises:
        TypeError: any other scheduler.
    """
    if not isinstance(scheduler, LambdaLR):
        raise TypeError(
            f"KoffTrainer: the scheduler must be a LambdaLR, got {type(scheduler).__name__}; "
            "choose another"
        )
    scheduler.lr_lambdas = [
        _one if group.get("constant") else fn
        for group, fn in zip(groups, scheduler.lr_lambdas, strict=True)
    ]
    for group, base in zip(groups, scheduler.base_lrs, strict=True):
        if group.get("constant"):
            # The scheduler was made with other functions, and has set the first rates by them: to 0
            # with a warm-up.
            group["lr"] = base


def _one(step: int) -> float:
    """Return the factor of a constant rate. A plain function, of which a checkpoint holds nothing:
    the state of a callable object would be written down."""
    return 1.0
