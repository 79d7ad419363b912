"""A frozen linear layer plus the low-rank update of each row's memory."""

from __future__ import annotations

from torch import Tensor

from . import dispatch
from .checks import check_linear
from .types import LoRA, RowGroups


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lora: LoRA | None = None,
    memory_ids: Tensor | RowGroups | None = None,
) -> Tensor:
    """Return y = x W^T + bias + scaling_m (x A_m^T) B_m^T, where m is the memory of each row.

    Args:
        x: [B, T, K] or [M, K], fp32, bf16, fp16 or fp64.
        weight: [N, K], frozen, x's dtype (any under autocast).
        bias: [N] or None, frozen.
        lora: stacked LoRA of n memories, or None.
        memory_ids: int64 [B] ([M] for two-dimensional x); -1, or any that is none of
            them: no memory for that row. Or what ``group_rows`` made of them. May be None when n
            is 1.

    Returns:
        y [..., N] in x's dtype (autocast's where it is on). Gradients for x and for the three
        tensors of lora.

    Raises:
        TypeError, ValueError: arguments that do not fit, or a weight that requires a gradient.

    Source: Hu et al. 2021 (LoRA); reference: ``koffkernels.reference.lora_linear``.
    """
    check_linear("lora_linear", x, weight, bias, lora, memory_ids)
    run = dispatch.implementation("lora_linear", x.device, dispatch.compute_dtype(x, weight))
    return run(x, weight, bias, lora, memory_ids)
