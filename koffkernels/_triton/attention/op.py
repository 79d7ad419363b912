"""Attention over a learned prefix on Triton: which kernels run, and how torch sees them.

Eager calls go straight to the launchers; torch.compile sees two custom operators, forward and
backward. Both keep only the inputs, o and lse; eager training keeps the prefix in q's dtype, as the
kernels read it. One call takes one of three ways:

- few queries a row (decoding): rows grouped by memory, split keys, one merge;
- "one_pass": prefix and own keys in one kernel, forward and backward;
- "vendor": cuDNN or flash attention for the own keys and a pass of ours for the prefix.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ... import routes
from ..._torch import prefix_attention as plain
from ...replay import apply, replayed, replayed_backward
from ...types import Prefix, RowBounds
from ..shared.torch_operator import NAMESPACE, differentiable_once
from . import decode as few
from . import vendor
from .call import HEAD_DIMS, Call
from .dkv import own_grads
from .dq import query_grad, upstream
from .fwd import CONFIGS as ONE_PASS
from .fwd import add_prefix, empty_output, one_pass
from .prefix_grad import prefix_grads

ROUTES = ("one_pass", "vendor")
Grads = tuple[Tensor | None, ...]


def supports(q: Tensor, scale: float | None = None) -> str | None:
    """Return the reason why these kernels cannot take a call, or None."""
    if q.dtype == torch.float64:
        return "fp64 runs in plain torch"
    if q.shape[-1] not in HEAD_DIMS:
        widths = " and ".join(map(str, HEAD_DIMS))
        return f"head_dim {q.shape[-1]} runs in plain torch, the kernels have {widths}"
    if scale is not None and not scale > 0:
        return "a scale that is not above 0 runs in plain torch"
    return None


def _way(call: Call, route: str, stage: str) -> tuple[str, str | None]:
    """Return ("vendor", "cudnn", "flash" or None for the usual one), or ("one_pass", a name of its
    configs or None); for "auto" what ``routes`` says of a pass.

    Forward and backward may go different ways: both give and take the o and lse of the whole
    softmax.
    """
    if route != "auto":
        return route, None
    q, k = call.q, call.k
    sizes, mixed = (q.shape[2], q.shape[3], k.shape[2]), call.ids is not None
    found = routes.choose(routes.Shape("prefix_attention", stage, *sizes, q.dtype, mixed), q.device)
    if found.name == "vendor" and (found.forced or q.device.type == "cuda"):
        return "vendor", found.config
    return "one_pass", found.config


def forward(call: Call, route: str) -> tuple[Tensor, Tensor]:
    """Return o [B, Hq, T, D] and lse (fp32 [B, Hq, T], natural, -inf where nothing is seen)."""
    if call.q.numel() == 0:
        return empty_output(call.q)
    if few.fits(call.q, call.k):
        return few.decode(call)
    way, choice = _way(call, route, "forward")
    if way != "vendor" or vendor.why_not(call):
        return one_pass(call, ONE_PASS.get(choice))
    o, lse = vendor.own_forward(call, choice)
    if call.prefix is not None:
        add_prefix(call, o, lse)
    return o, lse


def backward(
    call: Call,
    do: Tensor,
    o: Tensor,
    lse: Tensor,
    needs: tuple[bool, ...],
    route: str,
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
) -> Grads:
    """Return the gradients of q, k, v, prefix.k, prefix.v; None where ``needs``, in this order, has
    False.

    Args:
        dtypes: of the gradients of prefix.k and prefix.v; None: those of the prefix.
    """
    if not any(needs):
        return (None,) * 5
    dq = dk = dv = dpk = dpv = None
    way, choice = _way(call, route, "backward")
    by_vendor = way == "vendor" and any(needs[:3]) and vendor.why_not(call) is None
    if by_vendor:
        dq, dk, dv = vendor.own_backward(call, do, o, lse, choice)
    if by_vendor and (call.prefix is None or not (needs[0] or any(needs[3:]))):
        return _needed((dq, dk, dv, None, None), needs)
    if call.prefix is not None and dtypes is None:
        dtypes = call.prefix.k.dtype, call.prefix.v.dtype
    call = call.ready(call.q.dtype)  # one cast of the prefix for both kernels that read it
    up = upstream(do, o, lse)
    if needs[0]:
        dq = query_grad(call, up, dq)
    if not by_vendor:
        dk, dv = own_grads(call, up, needs[1:3])
    if call.prefix is not None:
        dpk, dpv = prefix_grads(call, up, needs[3:], dtypes=dtypes)
    return _needed((dq, dk, dv, dpk, dpv), needs)


def _needed(grads: Grads, needs: tuple[bool, ...]) -> Grads:
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def _call(q, k, v, prefix_k, prefix_v, lengths, ids, start, end, first, scale) -> Call:
    prefix = None if prefix_k is None else Prefix(prefix_k, prefix_v, lengths)
    bounds = None if start is None else RowBounds(start, end, first)
    return Call(q, k, v, prefix, ids, bounds, scale)


def _tensors(call: Call) -> tuple[Tensor | None, ...]:
    """Undo ``_call``, without the scale."""
    prefix, bounds = call.prefix or (None,) * 3, call.bounds or (None,) * 3
    return call.q, call.k, call.v, *prefix, call.ids, *bounds


def _setup_context(ctx, inputs, output) -> None:
    *tensors, scale, route = inputs
    ctx.constants = scale, route
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


class _PrefixAttention(torch.autograd.Function):
    """Eager training: no custom operator in between. The prefix is cast here, for backward too."""

    @staticmethod
    def forward(ctx, *args):
        *args, kind = args
        *_, k, v, _, _, _, _, _, scale, route = args
        ctx.constants = scale, route, None if k is None else (k.dtype, v.dtype)
        *saved, o, lse = _forward_eager.of_kind(kind, *args)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # or torch would fill zeros for lse, a launch of its own
        ctx.save_for_backward(*saved, o, lse)
        return o, lse

    @staticmethod
    @differentiable_once
    @replayed_backward("prefix_attention, backward")
    def backward(ctx, do, _):
        *tensors, o, lse = ctx.saved_tensors
        scale, route, dtypes = ctx.constants
        call, needs = _call(*tensors, scale), ctx.needs_input_grad[:5]
        return *backward(call, do, o, lse, needs, route, dtypes), *(None for _ in range(8))


@functools.partial(replayed, name="prefix_attention, forward")
def _forward_eager(*args):
    """Return what backward reads of a call: its tensors, with the prefix cast, o and lse."""
    *tensors, scale, route = args
    call = _call(*tensors, scale)
    call = call.ready(call.q.dtype)
    return *_tensors(call), *forward(call, route)


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor? lengths, "
    "Tensor? ids, Tensor? start, Tensor? end, Tensor? first, float scale"
)


@torch.library.custom_op(
    f"{NAMESPACE}::prefix_attention",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, str route) -> (Tensor, Tensor)",
)
def _forward_op(*args):
    o, lse = forward(_call(*args[:-1]), args[-1])
    return _laid_out(o, empty_output(args[0])[0]), lse


@_forward_op.register_fake
def _(*args):
    return empty_output(args[0])


@torch.library.custom_op(
    f"{NAMESPACE}::prefix_attention_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor o, Tensor lse, {_ARGUMENTS}, str route, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(do, o, lse, *args):
    *args, route, needs = args
    grads = backward(_call(*args), do, o, lse, tuple(needs), route)
    fakes = _empty_grads(args, needs)
    return tuple(f if g is None else _laid_out(g, f) for g, f in zip(grads, fakes, strict=True))


@_backward_op.register_fake
def _(do, o, lse, *args):
    *args, route, needs = args
    return _empty_grads(args, needs)


def _empty_grads(args, needs) -> tuple[Tensor, ...]:
    """Return memory for each gradient, of no elements where it is not needed: an operator returns
    no None."""
    layouts = (torch.empty_like, *4 * (_empty_contiguous,))
    pairs = zip(args[:5], needs, layouts, strict=True)
    return tuple(new(x) if need else args[0].new_empty(0) for x, need, new in pairs)


def _empty_contiguous(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """Return x in the memory layout that torch.compile was promised."""
    return x if x.stride() == like.stride() else like.copy_(x)


def _backward_of_op(ctx, do, _):
    *tensors, o, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    grads = _backward_op(do, o, lse, *tensors, *ctx.constants, needs)
    grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
    return *grads, *(None for _ in range(7))


_forward_op.register_autograd(_backward_of_op, setup_context=_setup_context)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: Prefix | None,
    memory_ids: Tensor | None,
    bounds: RowBounds | None,
    scale: float | None,
    route: str | None = None,
) -> Tensor:
    """See ``koffkernels.prefix_attention``; a call that ``supports`` refuses runs in plain torch.

    Args:
        route: "one_pass", or "vendor", which is taken only by causal calls without bounds and of as
            many keys as queries, the others run in one pass; None: what ``routes`` says.
    """
    if supports(q, scale) is not None:
        return plain.run(q, k, v, prefix, memory_ids, bounds, scale)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    call = Call(q, k, v, prefix, memory_ids, bounds, scale)
    tensors = _tensors(call)
    route = route or "auto"
    if torch.compiler.is_compiling():
        return _forward_op(*tensors, scale, route)[0]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return apply(_PrefixAttention, *tensors, scale, route)[0]
    return forward(call, route)[0]
