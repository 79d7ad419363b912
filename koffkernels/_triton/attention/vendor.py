"""Attention over a learned prefix, second route: torch's own attention for the rows' own keys, the
one-pass kernel for the prefix alone.

The vendor's kernel gives o and lse over the own keys; the prefix pass resumes the online softmax
from them and overwrites both. Backward hands the merged o and lse to the vendor's backward, which
is exact (docs/math.md), and adds the prefix's share to its dq. Only plain causal attention of as
many keys as queries goes this way.

The vendor is cuDNN on the GPUs on which it is the faster, where it takes the call, and flash
attention elsewhere. Either may follow the other's forward, since both read the same o and lse. On
the CPU torch's CPU kernel takes their place.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from ..._torch.prefix_attention import flash, flash_backward
from ..shared.launch import unit_stride
from .call import Call

_aten = torch.ops.aten

# Major compute capabilities on which cuDNN is taken. On 9.0 it is 1.8 to 2.0 times as fast as flash
# attention, forward and backward (docs/prefix_attention.md); torch prefers it on these two as well,
# and not on 12.x.
_CUDNN_ARCHS = (9, 10)
# Up to 9.15.0 cuDNN touches memory behind sequences whose length is no multiple of 128.
_CUDNN_VERSION = 91501
# cuDNN reads 16 bytes at a time; torch does not check, and a misaligned address is a fault.
_ALIGNMENT = 16

# A plain global, set by ``forced`` for the whole process: backward runs in threads of its own.
_FORCED: str | None = None
# Kinds of call (``_kind``) that cuDNN refused although torch had said it would take them.
_refused: set[tuple] = set()


@contextlib.contextmanager
def forced(vendor: str) -> Iterator[None]:
    """Take "cudnn" or "flash" inside the ``with`` block, for tests and benchmarks; cuDNN's errors
    then come through."""
    global _FORCED
    before, _FORCED = _FORCED, vendor
    try:
        yield
    finally:
        _FORCED = before


def why_not(call: Call) -> str | None:
    """Return the reason why the vendor's kernel cannot take a call, or None."""
    if call.bounds is not None:
        return "rows have bounds"
    if call.k.shape[2] != call.q.shape[2]:
        return "there are more keys than queries"
    if 0 in call.q.shape:
        return "there are no queries"
    if call.q.device.type != "cpu" and call.q.dtype == torch.float32:
        return "the vendor's kernel has no fp32"
    return None


def own_forward(call: Call, choice: str | None = None) -> tuple[Tensor, Tensor]:
    """Return o and lse (fp32 [B, Hq, T], natural) of causal attention over the own keys.

    Args:
        call: one that ``why_not`` has nothing against.
        choice: "cudnn", where it takes the call, or "flash"; None: the faster on most such GPUs.
    """
    q, k, v = (unit_stride(x) for x in call[:3])
    found = _by_cudnn(choice, _cudnn_forward, q, k, v, call.scale)
    if found is not None:
        return found
    if q.device.type == "cpu":
        o, lse = flash(q, k, v, True, None, call.scale)
        return o, lse.contiguous()  # it lies as [B, T, Hq] there
    o, lse, *_ = _aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, True, False, scale=call.scale
    )
    return o, lse


def own_backward(
    call: Call, do: Tensor, o: Tensor, lse: Tensor, choice: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of the own keys' part, given the o and lse of the whole softmax."""
    q, k, v = (unit_stride(x) for x in call[:3])
    found = _by_cudnn(choice, _cudnn_backward, q, k, v, call.scale, do, o, lse)
    if found is not None:
        return found
    if q.device.type == "cpu":
        return flash_backward(do, q, k, v, o, lse, True, None, call.scale)
    t = q.shape[2]
    # The random state serves dropout, of which there is none: it is not read.
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    empty = torch.empty(0, dtype=torch.uint64, device=q.device)
    return _aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, o, lse, None, None, t, t, 0.0, True, state, empty, scale=call.scale
    )


@functools.lru_cache
def _cudnn_is_faster(device: torch.device, choice: str | None) -> bool:
    """Return whether cuDNN, where it is sound, goes before flash attention on a device: by
    ``choice`` or, if that is None, by the kind of GPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    sound = (torch.backends.cudnn.version() or 0) >= _CUDNN_VERSION
    if choice is not None:
        return sound and choice == "cudnn"
    return sound and torch.cuda.get_device_capability(device)[0] in _CUDNN_ARCHS


def _kind(q: Tensor, k: Tensor) -> tuple:
    """Return what decides whether cuDNN has a kernel: all but the numbers of rows and tokens."""
    return q.device, q.dtype, q.shape[1], k.shape[1], q.shape[3]


def _cudnn_takes(choice: str | None, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether to ask cuDNN. This costs about 2 us, and reads nothing back from the
    device."""
    if _FORCED is not None:
        return _FORCED == "cudnn"
    return (
        _cudnn_is_faster(q.device, choice)
        # cuDNN sums dq in no fixed order. Flash attention has a mode in which it does.
        and not torch.are_deterministic_algorithms_enabled()
        and all(x.data_ptr() % _ALIGNMENT == 0 for x in (q, k, v))
        and _kind(q, k) not in _refused
        # Without a mask, without dropout, causal, and key-value heads may be fewer.
        and can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, True, True))
    )


def _by_cudnn(
    choice: str | None,
    attention: Callable[..., tuple],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: object,
) -> tuple | None:
    """Return what ``attention`` gives; None where cuDNN is not asked, or refuses."""
    if not _cudnn_takes(choice, q, k, v):
        return None
    try:
        return attention(q, k, v, *rest)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError:
        if _FORCED is not None:
            raise
        # It has no plan for this call. Not asking again is more than thrift: torch keeps the plan
        # that could not be made, and some versions run it the second time.
        _refused.add(_kind(q, k))
        return None


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    o, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, scale=scale
    )
    return o, lse.squeeze(-1).contiguous()  # [B, Hq, T, 1] there, and contiguous already


def _cudnn_backward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, do: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # torch finds cuDNN's plans again by the layouts of q, k and v alone, and a plan made for other
    # layouts of o and do gives wrong gradients, without an error. So both come in the layout that
    # torch gives o itself, q's; in a model they mostly have it.
    layout = torch.empty_like(q, device="meta").stride()
    do, o = (
        x
        if x.stride() == layout and x.data_ptr() % _ALIGNMENT == 0
        else torch.empty_like(q).copy_(x)
        for x in (do, o)
    )
    t = q.shape[2]
    state = torch.empty((), dtype=torch.int64, device=q.device)  # of dropout, as above
    return _aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, o, lse.unsqueeze(-1), state, state, None, None, None, t, t, 0.0, True,
        scale=scale,
    )  # fmt: skip
