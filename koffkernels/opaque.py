"""The linear layer and the gated MLP over layers that only their own code can compute, such as
those of a base in few bits."""

from __future__ import annotations

from torch import Tensor

from ._torch import opaque
from .checks import check_ids, check_lora, check_tensor, check_type, refuse
from .reference import ACTIVATIONS
from .types import GatedMLPLoRA, LoRA, OpaqueLinear, RowGroups


def opaque_lora_linear(
    x: Tensor,
    layer: OpaqueLinear,
    *,
    lora: LoRA | None = None,
    memory_ids: Tensor | RowGroups | None = None,
) -> Tensor:
    """Return y = layer(x) + scaling_m (x A_m^T) B_m^T, where m is the memory of each row.

    The layer's own forward computes layer(x), bit for bit. Backward asks it for its weight W once,
    dx = dy W + ..., and keeps none of it. Plain torch on every device.

    Args:
        x: [B, T, K] or [M, K], fp32, bf16 or fp16.
        layer: frozen.
        lora, memory_ids: as ``lora_linear`` takes them.

    Returns:
        y [..., N] in x's dtype (autocast's where it is on). Gradients for x and for the three
        tensors of lora.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Source: Dettmers et al. 2023 (QLoRA, arXiv 2305.14314).
    """
    where = "opaque_lora_linear"
    check_tensor(where, "x", x, (2, 3))
    check_type(where, "layer", layer, OpaqueLinear)
    if lora is not None:
        # How wide the layer is only its own forward knows, which says so if x does not fit.
        n = check_lora(where, "lora", lora, x, x.shape[-1], lora.b.shape[1])
        check_ids(where, memory_ids, n, x.shape[0], x)
    return opaque.linear(x, layer, lora, memory_ids)


def opaque_gated_mlp(
    x: Tensor,
    layers: tuple[OpaqueLinear, ...],
    *,
    gates: Tensor | None = None,
    lora: GatedMLPLoRA | None = None,
    memory_ids: Tensor | RowGroups | None = None,
    activation: str = "silu",
) -> Tensor:
    """Return y = down(act(gate(x)) * up(x) * z), each layer with its LoRA.

    As ``opaque_lora_linear``; for backward x, gate(x) and up(x) are kept (under
    ``recompute_hidden`` only x), as ``gated_mlp`` does.

    Args:
        x: [B, T, H] or [M, H], fp32, bf16 or fp16.
        layers: gate, up and down; or, where gate and up are one, that one [2 I, H] and down.
        gates, lora, memory_ids, activation: as ``gated_mlp`` takes them.

    Returns:
        y like x (autocast's dtype where it is on). Gradients for x, gates and every tensor of lora.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Source: KOFF (arXiv 2605.29075), gates on the input of down_proj.
    """
    where = "opaque_gated_mlp"
    if activation not in ACTIVATIONS:
        rule = f"be one of {', '.join(ACTIVATIONS)}"
        refuse(where, "activation", rule, repr(activation), "choose one of these")
    check_tensor(where, "x", x, (2, 3))
    if len(layers) not in (2, 3):
        rule = "be gate, up and down, or gate with up, and down"
        refuse(where, "layers", rule, len(layers), "pass two or three")
    for layer in layers:
        check_type(where, "a layer", layer, OpaqueLinear)
    if gates is not None:
        check_tensor(where, "gates", gates, (1,))
    for name, part in zip(GatedMLPLoRA._fields, lora or (), strict=False):
        if part is not None:
            width_in = part.a.shape[2] if name == "down" else x.shape[-1]
            n = check_lora(where, f"lora.{name}", part, x, width_in, part.b.shape[1])
            check_ids(where, memory_ids, n, x.shape[0], x)
    return opaque.gated_mlp(x, layers, gates, lora, memory_ids, activation)
