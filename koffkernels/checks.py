"""Argument checks of the public functions, with one wording: ``<where>: <what> must <rule>, got
<value>; <next step>``.

A message is put together only once a check has failed: it costs time, and under torch.compile a
message that mentions a size would fix that size, so that each new batch compiled anew.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .types import GatedMLPLoRA, LoRA, Prefix, RowBounds, RowGroups

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Reading ids on the host would synchronise a GPU, so values are checked only on request.
CHECK_IDS = os.environ.get("KOFF_CHECK_IDS", "0") == "1"


def refuse(
    where: str,
    what: str,
    rule: str,
    got: object,
    step: str,
    error: type[Exception] = ValueError,
) -> NoReturn:
    """Raise ``error`` with the library's one error wording."""
    raise error(f"{where}: {what} must {rule}, got {got}; {step}")


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the tensor's shape as a plain tuple, for error messages."""
    return tuple(tensor.shape)


def _is(value: object, shape: tuple[int, ...], x: Tensor) -> bool:
    """Whether a value is a floating tensor of this shape on the device of x. Seven layers of each
    block ask in every forward, and a question costs as much as a small operator: so one look, and
    the checks that can say what is wrong only where something is."""
    return (
        isinstance(value, Tensor)
        and value.shape == shape
        and value.dtype in FLOATING
        and value.device == x.device
    )


def check_there(where: str, device: torch.device | str) -> None:
    """Refuse a GPU where there is none."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        rule, step = "be one that torch finds", 'pass device="cpu", or install a torch with CUDA'
        refuse(where, "device", rule, f"{device} without a CUDA GPU", step)


def check_type(where: str, name: str, value: object, kind: type) -> None:
    """Refuse anything but an instance of one of the library's records."""
    if not isinstance(value, kind):
        rule, got = f"be a koffkernels.{kind.__name__}", type(value).__name__
        refuse(where, name, rule, got, f"wrap it in {kind.__name__}(...)", TypeError)


def check_tensor(where: str, name: str, value: object, ndims: tuple[int, ...]) -> None:
    """Refuse anything but a floating tensor with one of the given numbers of dimensions."""
    if not isinstance(value, Tensor):
        got = type(value).__name__
        refuse(where, name, "be a torch.Tensor", got, "pass a tensor", TypeError)
    if value.dtype not in FLOATING:
        step = "convert it with .to()"
        refuse(where, name, "have a floating dtype", value.dtype, step, TypeError)
    if value.dim() not in ndims:
        rule = f"have {' or '.join(str(n) for n in ndims)} dimensions"
        refuse(where, name, rule, shape_of(value), "reshape it")


def check_shape(where: str, name: str, value: Tensor, shape: tuple[int, ...], step: str) -> None:
    """Refuse a tensor of another shape."""
    if shape_of(value) != shape:
        refuse(where, name, f"have shape {tuple(shape)}", shape_of(value), step)


def check_device(where: str, name: str, value: Tensor, x: Tensor, first: str = "x") -> None:
    """Refuse a tensor on another device than ``first``, which is x."""
    if value.device != x.device:
        rule = f"be on the device of {first} ({x.device})"
        refuse(where, name, rule, value.device, "move it with .to()")


def check_integers(
    where: str,
    name: str,
    value: object,
    length: int,
    x: Tensor,
    dtypes: tuple[torch.dtype, ...] = (torch.int64, torch.int32),
) -> None:
    """Refuse anything but integers [length] on the device of x, the first argument."""
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        rule = f"be an {' or '.join(str(d)[len('torch.') :] for d in dtypes)} tensor"
        got = getattr(value, "dtype", type(value).__name__)
        refuse(where, name, rule, got, "convert it with .long()", TypeError)
    check_shape(where, name, value, (length,), "pass one number per row or memory")
    check_device(where, name, value, x, "the first argument")


def check_frozen(where: str, name: str, weight: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    """Check a base weight or bias: shape, device, dtype, and that nobody expects a gradient for
    it."""
    if _is(weight, shape, x) and weight.dtype == x.dtype and not weight.requires_grad:
        return
    check_tensor(where, name, weight, (len(shape),))
    check_shape(where, name, weight, shape, "check the layout")
    check_device(where, name, weight, x)
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        rule, step = f"have the dtype of x ({x.dtype})", "cast one of them, or use torch.autocast"
        refuse(where, name, rule, weight.dtype, step, TypeError)
    if weight.requires_grad and torch.is_grad_enabled():
        rule, step = "be frozen (base weights get no gradient here)", "requires_grad_(False)"
        refuse(where, name, rule, "requires_grad=True", f"call {name}.{step}")


def check_ids(
    where: str, memory_ids: Tensor | RowGroups | None, n: int, rows: int, x: Tensor
) -> None:
    """Check memory ids: int64 [rows], or rows that were grouped by such; required when there is
    more than one memory."""
    name = "memory_ids"
    if isinstance(memory_ids, RowGroups):
        counts = memory_ids.counts
        if len(memory_ids.ids) != rows or (counts is not None and len(counts) != n):
            rule = f"group {rows} rows by {n} memories"
            got = f"{len(memory_ids.ids)} rows" + f" and {len(counts)}" * (counts is not None)
            refuse(where, name, rule, got, "call group_rows with the ids of this batch")
        check_device(where, f"{name}.ids", memory_ids.ids, x, "the first argument")
        return
    if memory_ids is None:
        if n != 1:
            rule = "be given when there is more than one memory"
            step = "pass an int64 tensor with one id per row, -1 for none"
            refuse(where, name, rule, f"None with {n} memories", step)
        return
    check_integers(where, name, memory_ids, rows, x, (torch.int64,))
    if CHECK_IDS and rows:
        low, high = int(memory_ids.min()), int(memory_ids.max())
        if low < -1 or high >= n:
            refuse(where, name, f"lie in -1..{n - 1}", f"{low}..{high}", "check the names")


def check_lora(where: str, name: str, lora: LoRA, x: Tensor, width_in: int, width_out: int) -> int:
    """Check the LoRA of one layer, of several memories or of one, and return how many they are."""
    check_type(where, name, lora, LoRA)
    a, b, scaling = lora
    dims = a.dim() if isinstance(a, Tensor) else 0
    if dims == 2:  # of one memory
        n, rank = 1, a.shape[0]
        shapes = (rank, width_in), (width_out, rank), (1,)
    else:
        n, rank = a.shape[:2] if dims == 3 else (0, 0)
        shapes = (n, rank, width_in), (n, width_out, rank), (n,)
    fits = n > 0 and rank > 0
    if fits and _is(a, shapes[0], x) and _is(b, shapes[1], x) and _is(scaling, shapes[2], x):
        return n
    # Something is wrong: what it is.
    check_tensor(where, f"{name}.a", a, (2, 3))
    check_tensor(where, f"{name}.b", b, (dims,))
    check_tensor(where, f"{name}.scaling", scaling, (1,))
    if n < 1 or rank < 1:
        rule, step = "hold at least one memory and rank", "pass lora=None for none"
        refuse(where, f"{name}.a", rule, shape_of(a), step)
    step = "check the layer it belongs to"
    check_shape(where, f"{name}.a", a, shapes[0], step)
    check_shape(where, f"{name}.b", b, shapes[1], step)
    check_shape(where, f"{name}.scaling", scaling, shapes[2], "pass alpha / r of each memory")
    for part, value in zip(LoRA._fields, lora, strict=True):
        check_device(where, f"{name}.{part}", value, x)
    return n


def check_linear(
    where: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoRA | None,
    memory_ids: Tensor | RowGroups | None,
) -> None:
    """Check the arguments of ``lora_linear``."""
    check_tensor(where, "x", x, (2, 3))
    check_tensor(where, "weight", weight, (2,))
    width_out, width_in = weight.shape
    if x.shape[-1] != width_in:
        refuse(where, "x", f"have last dimension {width_in}", shape_of(x), "check the layer")
    check_frozen(where, "weight", weight, x, (width_out, width_in))
    if bias is not None:
        check_frozen(where, "bias", bias, x, (width_out,))
    if lora is not None:
        n = check_lora(where, "lora", lora, x, width_in, width_out)
        check_ids(where, memory_ids, n, x.shape[0], x)


def check_linears(
    where: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora: Sequence[LoRA | None],
    memory_ids: Tensor | RowGroups | None,
) -> None:
    """Check the arguments of ``lora_linears``."""
    if not 1 <= len(weights) <= 3:
        rule, step = "be one to three", "call it once for every three"
        refuse(where, "weights", rule, len(weights), step)
    for name, parts in (("biases", biases), ("lora", lora)):
        if len(parts) != len(weights):
            rule = f"have an entry for each of {len(weights)} weights"
            refuse(where, name, rule, len(parts), "pass None for those without")
    check_tensor(where, "x", x, (2, 3))
    counts = set()
    for i, (weight, bias, part) in enumerate(zip(weights, biases, lora, strict=True)):
        check_tensor(where, f"weights[{i}]", weight, (2,))
        width_out, width_in = weight.shape
        if x.shape[-1] != width_in:
            refuse(where, "x", f"have last dimension {width_in}", shape_of(x), "check the layers")
        check_frozen(where, f"weights[{i}]", weight, x, (width_out, width_in))
        if bias is not None:
            check_frozen(where, f"biases[{i}]", bias, x, (width_out,))
        if part is not None:
            counts.add(check_lora(where, f"lora[{i}]", part, x, width_in, width_out))
    if len(counts) > 1:
        rule = "hold equally many memories for each weight"
        refuse(where, "lora", rule, sorted(counts), "stack them alike")
    for n in counts:
        check_ids(where, memory_ids, n, x.shape[0], x)


def check_gated_mlp(
    where: str,
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    gates: Tensor | None,
    lora: GatedMLPLoRA | None,
    memory_ids: Tensor | RowGroups | None,
) -> None:
    """Check the arguments of ``gated_mlp``."""
    check_tensor(where, "x", x, (2, 3))
    check_tensor(where, "w_gate", weights[0], (2,))
    width, hidden = weights[0].shape
    if x.shape[-1] != hidden:
        refuse(where, "x", f"have last dimension {hidden}", shape_of(x), "check the layer")
    check_frozen(where, "w_gate", weights[0], x, (width, hidden))
    check_frozen(where, "w_up", weights[1], x, (width, hidden))
    check_frozen(where, "w_down", weights[2], x, (hidden, width))
    if gates is not None:
        check_tensor(where, "gates", gates, (1,))
        check_shape(where, "gates", gates, (width,), "check the mask")
        check_device(where, "gates", gates, x)
    if lora is None:
        return
    check_type(where, "lora", lora, GatedMLPLoRA)
    sizes = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
    counts = {
        name: check_lora(where, f"lora.{name}", part, x, *sizes[name])
        for name, part in zip(GatedMLPLoRA._fields, lora, strict=True)
        if part is not None
    }
    if len(set(counts.values())) > 1:
        rule = "hold equally many memories in each part"
        refuse(where, "lora", rule, counts, "stack them alike")
    for n in set(counts.values()):
        check_ids(where, memory_ids, n, x.shape[0], x)


def check_prefix_attention(
    where: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: Prefix | None,
    memory_ids: Tensor | RowGroups | None,
    bounds: RowBounds | None,
    scale: float | None,
) -> None:
    """Check the arguments of ``prefix_attention``; q, k and v are floating [., ., ., .] already."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_device(where, name, value, q, "q")
        if value.dtype != q.dtype:
            rule = f"have the dtype of q ({q.dtype})"
            refuse(where, name, rule, value.dtype, "cast it", TypeError)
    rows, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    check_shape(where, "k", k, (rows, kv_heads, keys, width), "check the layout [B, Hkv, S, D]")
    check_shape(where, "v", v, shape_of(k), "it must match k")
    if kv_heads == 0 or heads % kv_heads:
        refuse(where, "q", f"have a multiple of {kv_heads} heads", heads, "check the heads")
    if bounds is None:
        if keys < queries:
            rule, got = "hold at least as many keys as there are queries", shape_of(k)
            refuse(where, "k", rule, got, f"pass bounds for {queries} queries")
    else:
        check_type(where, "bounds", bounds, RowBounds)
        for name, value in zip(RowBounds._fields, bounds, strict=True):
            check_integers(where, f"bounds.{name}", value, rows, q)
    if prefix is not None:
        check_prefix(where, prefix, q, kv_heads)
        check_ids(where, memory_ids, prefix.k.shape[0], rows, q)
    if isinstance(scale, Tensor):  # calls are replayed by their numbers, which a tensor hides
        refuse(where, "scale", "be a number", "a tensor", "pass scale.item()", TypeError)
    if scale is not None and not torch.compiler.is_compiling():
        if not isinstance(scale, (int, float)):
            got = type(scale).__name__
            refuse(where, "scale", "be a number", got, "pass None for 1 / sqrt(D)", TypeError)
        if not math.isfinite(scale):
            refuse(where, "scale", "be finite", scale, "pass None for 1 / sqrt(D)")


def check_prefix(where: str, prefix: Prefix, q: Tensor, kv_heads: int) -> None:
    """Check learned keys and values against the attention that they stand before."""
    check_type(where, "prefix", prefix, Prefix)
    check_tensor(where, "prefix.k", prefix.k, (4,))
    check_tensor(where, "prefix.v", prefix.v, (4,))
    n, _, length, _ = prefix.k.shape
    if n < 1 or length < 1:
        rule, step = "hold at least one memory and token", "pass prefix=None instead"
        refuse(where, "prefix.k", rule, shape_of(prefix.k), step)
    shape = (n, kv_heads, length, q.shape[-1])
    step = "check the heads of the model it was made for"
    for name, value in (("prefix.k", prefix.k), ("prefix.v", prefix.v)):
        check_shape(where, name, value, shape, step)
        check_device(where, name, value, q, "q")
    check_integers(where, "prefix.lengths", prefix.lengths, n, q)
