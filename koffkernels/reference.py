"""Plain-torch maths of every operation: the oracle that all other implementations are tested
against.

Everything is computed in fp32 (fp64 where an input is fp64), differentiable by autograd, one
formula a line, with no concern for speed or memory. The result has the dtype of the first argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import GatedMLPLoRA, LoRA, Prefix, RowBounds

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
}


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return fp64 if any tensor is fp64, else fp32."""
    return (
        torch.float64
        if any(t is not None and t.dtype == torch.float64 for t in tensors)
        else torch.float32
    )


def hard_concrete(
    log_alpha: Tensor, u: Tensor | None, beta: float, low: float, high: float
) -> Tensor:
    """Return z = clamp(s (high - low) + low, 0, 1), s = sigmoid((logit(u) + log_alpha) / beta), or
    sigmoid(log_alpha) without u."""
    if u is None:
        s = torch.sigmoid(log_alpha)
    else:
        s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / beta)
    return (s * (high - low) + low).clamp(0.0, 1.0)


def lora_delta(x: Tensor, lora: LoRA | None, memory_ids: Tensor | None) -> Tensor | float:
    """Return scaling_m B_m A_m x of each row's memory m; zero for rows whose id is none of them.

    x is [B, T, K] or [M, K].
    """
    if lora is None:
        return 0.0
    lora = lora.stacked()
    if memory_ids is None:
        memory_ids = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    rows = x if x.dim() == 3 else x[:, None, :]
    out = rows.new_zeros(*rows.shape[:-1], lora.b.shape[1])
    for m in range(lora.a.shape[0]):
        index = (memory_ids == m).nonzero()[:, 0]
        delta = (
            (rows[index] @ lora.a[m].to(x.dtype).T)
            @ lora.b[m].to(x.dtype).T
            * lora.scaling[m].to(x.dtype)
        )
        out = out.index_add(0, index, delta)
    return out if x.dim() == 3 else out[:, 0]


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA | None, memory_ids: Tensor | None
) -> Tensor:
    """Return y = x W^T + bias + scaling_m B_m A_m x, m the memory of each row."""
    wide = x.to(wide_dtype(x, *(lora or ())))
    y = F.linear(wide, weight.to(wide.dtype), None if bias is None else bias.to(wide.dtype))
    return (y + lora_delta(wide, lora, memory_ids)).to(x.dtype)


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    loras: Sequence[LoRA | None],
    memory_ids: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return ``lora_linear`` of each weight, with its bias and its LoRA."""
    return tuple(
        lora_linear(x, *layer, memory_ids) for layer in zip(weights, biases, loras, strict=True)
    )


def gated_mlp(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    gates: Tensor | None,
    lora: GatedMLPLoRA | None,
    memory_ids: Tensor | None,
    activation: str,
) -> Tensor:
    """Return y = down(act(gate(x)) * up(x) * z), each linear layer with its LoRA."""
    lora = lora or GatedMLPLoRA()
    wide = x.to(wide_dtype(x, gates, *(t for part in lora if part is not None for t in part)))
    w_gate, w_up, w_down = weights
    g = lora_linear(wide, w_gate, None, lora.gate, memory_ids)
    u = lora_linear(wide, w_up, None, lora.up, memory_ids)
    h = ACTIVATIONS[activation](g) * u
    if gates is not None:
        h = h * gates.to(h.dtype)
    return lora_linear(h, w_down, None, lora.down, memory_ids).to(x.dtype)


def visible_keys(
    rows: int, queries: int, keys: int, bounds: RowBounds | None, device: torch.device
) -> Tensor:
    """Return bool [B, T, S]: may query t of row b see key j (see ``RowBounds``; its defaults are 0,
    S, S - T)."""
    j = torch.arange(keys, device=device)
    t = torch.arange(queries, device=device)
    if bounds is None:
        return (j[None, :] <= (keys - queries) + t[:, None]).expand(rows, -1, -1)
    last = (bounds.query_start[:, None] + t[None, :])[:, :, None]
    inside = (j >= bounds.key_start[:, None, None]) & (j < bounds.key_end[:, None, None])
    return inside & (j <= last)


def attention_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: Prefix | None,
    memory_ids: Tensor | None,
    bounds: RowBounds | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Return (softmax(scale q [K_prefix; K]^T + mask) [B, Hq, T, P + S], [V_prefix; V] [B, Hq, P +
    S, D]); the weights of rows that see nothing are 0."""
    rows, heads, queries, width = q.shape
    wide = wide_dtype(q, *((prefix.k, prefix.v) if prefix is not None else ()))
    scale = 1.0 / math.sqrt(width) if scale is None else scale
    visible = visible_keys(rows, queries, k.shape[2], bounds, q.device)
    used = visible.any(1)[:, None, :, None]
    # Keys that nobody may see must not leak, not even as 0 * NaN.
    keys, values = k.to(wide).where(used, 0.0), v.to(wide).where(used, 0.0)
    if prefix is not None:
        if memory_ids is None:
            memory_ids = torch.zeros(rows, dtype=torch.int64, device=q.device)
        known = (memory_ids >= 0) & (memory_ids < prefix.k.shape[0])
        row = memory_ids.where(known, 0)
        inside = torch.arange(prefix.k.shape[2], device=q.device) < prefix.lengths[row][:, None]
        inside = inside & known[:, None]
        own = inside[:, None, :, None]
        keys = torch.cat([prefix.k[row].to(wide).where(own, 0.0), keys], dim=2)
        values = torch.cat([prefix.v[row].to(wide).where(own, 0.0), values], dim=2)
        visible = torch.cat([inside[:, None, :].expand(-1, queries, -1), visible], dim=2)
    group = heads // k.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    mask = visible[:, None]
    scores = (q.to(wide) @ keys.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    nothing = ~mask.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)
    return weights, values


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: Prefix | None,
    memory_ids: Tensor | None,
    bounds: RowBounds | None,
    scale: float | None,
) -> Tensor:
    """Return softmax(scale q [K_prefix; K]^T + mask) [V_prefix; V], 0 for rows that see nothing."""
    weights, values = attention_weights(q, k, v, prefix, memory_ids, bounds, scale)
    return (weights @ values).to(q.dtype)
