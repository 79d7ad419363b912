"""A frozen gated MLP with one gate per neuron and the low-rank updates of each row's memory."""

from __future__ import annotations

from torch import Tensor

from . import dispatch
from .checks import check_gated_mlp, refuse
from .reference import ACTIVATIONS
from .replay import replayed
from .types import GatedMLPLoRA, RowGroups


@replayed
def gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    gates: Tensor | None = None,
    lora: GatedMLPLoRA | None = None,
    memory_ids: Tensor | RowGroups | None = None,
    activation: str = "silu",
) -> Tensor:
    """Return y = down(act(gate(x)) * up(x) * z); gate, up and down are ``lora_linear`` layers.

    Args:
        x: [B, T, H] or [M, H], fp32, bf16, fp16 or fp64.
        w_gate, w_up: [I, H], frozen, x's dtype (any under autocast).
        w_down: [H, I], frozen.
        gates: z [I], fp32, or None for all ones.
        lora: LoRA of the three layers, all finite, or None.
        memory_ids: int64 [B] ([M] for two-dimensional x); -1, or any that is none of
            them: no memory for that row. Or what ``group_rows`` made of them. May be None with
            one memory.
        activation: "silu", "gelu" or "gelu_tanh".

    Returns:
        y like x (autocast's dtype where it is on). Gradients for x, gates and every tensor of lora.

    Raises:
        TypeError, ValueError: arguments that do not fit, or a weight that requires a gradient.

    Source: KOFF (arXiv 2605.29075), gates on the input of down_proj; reference:
    ``koffkernels.reference.gated_mlp``.
    """
    where = "gated_mlp"
    if activation not in ACTIVATIONS:
        rule = f"be one of {', '.join(ACTIVATIONS)}"
        refuse(where, "activation", rule, repr(activation), "choose one of these")
    check_gated_mlp(where, x, (w_gate, w_up, w_down), gates, lora, memory_ids)
    run = dispatch.implementation("gated_mlp", x.device, dispatch.compute_dtype(x, w_gate))
    return run(x, (w_gate, w_up, w_down), gates, lora, memory_ids, activation)
