"""Causal attention of which every row first sees the learned keys and values of its memory."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .checks import check_prefix_attention, check_tensor
from .replay import replayed
from .types import Prefix, RowBounds, RowGroups


@replayed
def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: Prefix | None,
    *,
    memory_ids: Tensor | RowGroups | None = None,
    bounds: RowBounds | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return o = softmax(scale q [K_m; K]^T + mask) [V_m; V], where m is the memory of each row and
    the mask is causal over K within each row's bounds and open over K_m.

    Args:
        q: [B, Hq, T, D], fp32, bf16, fp16 or fp64, RoPE applied.
        k, v: [B, Hkv, S, D], q's dtype; Hq is a multiple of Hkv (grouped-query attention).
        prefix: learned keys and values of n memories (fp32 is usual), or None.
        memory_ids: int64 [B]; -1, or any that is none of them: no prefix for that row. Or what
            ``group_rows`` made of them. May be None with one memory.
        bounds: which keys each row sees; None: key_start 0, key_end S, query_start S - T.
        scale: softmax scale; None: 1 / sqrt(D).

    Returns:
        o [B, Hq, T, D] in q's dtype (autocast's where it is on); rows that see nothing are 0.
        Gradients for q, k, v, prefix.k and prefix.v.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Source: Cartridges (arXiv 2506.06266) for the learned cache; reference:
    ``koffkernels.reference.prefix_attention``.
    """
    where = "prefix_attention"
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_tensor(where, name, value, (4,))
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)  # as scaled_dot_product_attention does
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    check_prefix_attention(where, q, k, v, prefix, memory_ids, bounds, scale)
    run = dispatch.implementation("prefix_attention", q.device, q.dtype)
    return run(q, k, v, prefix, memory_ids, bounds, scale)
