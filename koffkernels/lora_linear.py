"""Frozen linear layers plus the low-rank update of each row's memory, and the update alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import dispatch
from ._torch.rows import as_rows, known_rows, plus_delta
from .checks import check_ids, check_linear, check_linears, check_lora, check_shape, check_tensor
from .replay import replayed
from .types import LoRA, RowGroups


@replayed
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
        lora: stacked LoRA of n memories, all finite, or None.
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
    return run(x, (weight,), (bias,), (lora,), memory_ids)[0]


@replayed
def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    lora: Sequence[LoRA | None] | None = None,
    memory_ids: Tensor | RowGroups | None = None,
) -> tuple[Tensor, ...]:
    """Return ``lora_linear`` of up to three weights that share one x: q, k and v of an attention.

    ``q, k, v = lora_linears(x, [wq, wk, wv], lora=[lora_q, None, lora_v], memory_ids=ids)``. On a
    GPU the updates of all are one launch for every A and one for every B, where each weight on its
    own takes two, and x and its gradient are not read once for each.

    Args:
        x: [B, T, K] or [M, K], fp32, bf16, fp16 or fp64.
        weights: one to three [N, K], frozen, x's dtype (any under autocast); the N may differ.
        biases: [N] or None for each weight, frozen; None: no bias at all.
        lora: stacked LoRA of n memories, all finite, or None, for each weight; the ranks may
            differ. None: no LoRA at all.
        memory_ids: as ``lora_linear`` takes them.

    Returns:
        For each weight y [..., N] in x's dtype (autocast's where it is on). Gradients for x and for
        the three tensors of each lora.

    Raises:
        TypeError, ValueError: arguments that do not fit, or a weight that requires a gradient.

    Source: Hu et al. 2021 (LoRA); reference: ``koffkernels.reference.lora_linears``.
    """
    biases = [None] * len(weights) if biases is None else biases
    lora = [None] * len(weights) if lora is None else lora
    check_linears("lora_linears", x, weights, biases, lora, memory_ids)
    run = dispatch.implementation("lora_linear", x.device, dispatch.compute_dtype(x, weights[0]))
    return run(x, weights, biases, lora, memory_ids)


def add_lora(
    y: Tensor, x: Tensor, lora: LoRA, memory_ids: Tensor | RowGroups | None = None
) -> Tensor:
    """Return y + scaling_m (x A_m^T) B_m^T, where m is the memory of each row.

    For a layer that computes y by code of its own, such as one in few bits. Plain torch on every
    device.

    Args:
        y: [B, T, N] or [M, N], what the layer made of x, in x's dtype.
        x: [B, T, K] or [M, K], fp32, bf16, fp16 or fp64.
        lora, memory_ids: as ``lora_linear`` takes them.

    Returns:
        A new tensor like y. Gradients for y, x and the three tensors of lora.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Source: Hu et al. 2021 (LoRA); reference: ``koffkernels.reference.lora_delta``.
    """
    where = "add_lora"
    check_tensor(where, "x", x, (2, 3))
    check_tensor(where, "y", y, (2, 3))
    check_shape(where, "y", y, (*x.shape[:-1], y.shape[-1]), "pass what the layer made of x")
    n = check_lora(where, "lora", lora, x, x.shape[-1], y.shape[-1])
    check_ids(where, memory_ids, n, x.shape[0], x)
    rows = known_rows(memory_ids, n)
    one_memory = rows is None
    out = plus_delta(as_rows(y, one_memory), as_rows(x, one_memory), lora.stacked(), rows)
    return out.view(y.shape)
