"""Attention over a learned prefix, second route: torch's flash attention for the rows' own keys,
the one-pass kernel for the prefix alone.

The vendor's kernel gives o and lse over the own keys; the prefix pass resumes the online softmax
from them and overwrites both. Backward hands the merged o and lse to the vendor's backward, which
is exact (docs/math.md), and adds the prefix's share to its dq. Only plain causal attention of as
many keys as queries goes this way. On the CPU torch's CPU kernel takes the vendor's place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._torch.prefix_attention import flash, flash_backward
from ..shared.launch import unit_stride
from .call import Call

_aten = torch.ops.aten


def why_not(call: Call) -> str | None:
    """The reason why the vendor's kernel cannot take a call, or None."""
    if call.bounds is not None:
        return "rows have bounds"
    if call.k.shape[2] != call.q.shape[2]:
        return "there are more keys than queries"
    if 0 in call.q.shape:
        return "there are no queries"
    if call.q.device.type != "cpu" and call.q.dtype == torch.float32:
        return "the vendor's kernel has no fp32"
    return None


def own_forward(call: Call) -> tuple[Tensor, Tensor]:
    """o and lse (fp32, natural) of causal attention over the own keys."""
    q, k, v = call[:3]
    if q.device.type == "cpu":
        o, lse = flash(q, k, v, True, None, call.scale)
        return o, lse.contiguous()  # it lies as [B, T, Hq] there
    q, k, v = (unit_stride(x) for x in (q, k, v))
    o, lse, *_ = _aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, True, False, scale=call.scale
    )
    return o, lse


def own_backward(call: Call, do: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of the own keys' part, given the o and lse of the whole softmax."""
    q, k, v = call[:3]
    if q.device.type == "cpu":
        return flash_backward(do, q, k, v, o, lse, True, None, call.scale)
    q, k, v, t = *(unit_stride(x) for x in (q, k, v)), q.shape[2]
    # The random state serves dropout, of which there is none: it is not read.
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    empty = torch.empty(0, dtype=torch.uint64, device=q.device)
    return _aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, o, lse, None, None, t, t, 0.0, True, state, empty, scale=call.scale
    )
