"""Argument checks of the public functions, with one wording: ``<where>: <what> must <rule>, got
<value>; <next step>``."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .types import GatedMLPLoRA, LoRA, Prefix, RowBounds

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Reading ids on the host would synchronise a GPU, so values are checked only on request.
CHECK_IDS = os.environ.get("KOFF_CHECK_IDS", "0") == "1"


def require(
    condition: bool,
    where: str,
    what: str,
    rule: str,
    got: object,
    step: str,
    error: type[Exception] = ValueError,
) -> None:
    """Raise ``error`` with the library's one error wording unless ``condition`` holds."""
    if not condition:
        raise error(f"{where}: {what} must {rule}, got {got}; {step}")


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's shape as a plain tuple, for error messages."""
    return tuple(tensor.shape)


def check_tensor(where: str, name: str, value: object, ndims: tuple[int, ...]) -> None:
    """Refuse anything but a floating tensor with one of the given numbers of dimensions."""
    require(
        isinstance(value, Tensor),
        where,
        name,
        "be a torch.Tensor",
        type(value).__name__,
        "pass a tensor",
        TypeError,
    )
    require(
        value.dtype in FLOATING,
        where,
        name,
        "have a floating dtype",
        value.dtype,
        "convert it with .to()",
        TypeError,
    )
    require(
        value.dim() in ndims,
        where,
        name,
        f"have {' or '.join(str(n) for n in ndims)} dimensions",
        shape_of(value),
        "reshape it",
    )


def check_weight(where: str, name: str, weight: Tensor, x: Tensor, shape: tuple[int, int]) -> None:
    """Check a frozen base weight: shape, device, dtype, and that nobody expects a gradient for
    it."""
    check_tensor(where, name, weight, (2,))
    require(
        shape_of(weight) == shape,
        where,
        name,
        f"have shape {shape}",
        shape_of(weight),
        "check the layout",
    )
    check_device(where, name, weight, x)
    autocast = torch.is_autocast_enabled(x.device.type)
    require(
        weight.dtype == x.dtype or autocast,
        where,
        name,
        f"have the dtype of x ({x.dtype})",
        weight.dtype,
        "cast one of them, or use torch.autocast",
        TypeError,
    )
    require(
        not (weight.requires_grad and torch.is_grad_enabled()),
        where,
        name,
        "be frozen (base weights get no gradient here)",
        "requires_grad=True",
        "call weight.requires_grad_(False)",
    )


def check_device(where: str, name: str, value: Tensor, x: Tensor) -> None:
    """Refuse a tensor on another device than x."""
    require(
        value.device == x.device,
        where,
        name,
        f"be on the device of x ({x.device})",
        value.device,
        "move it with .to()",
    )


def check_ids(where: str, memory_ids: Tensor | None, n: int, rows: int, x: Tensor) -> None:
    """Check memory ids: int64 [rows]; required when there is more than one memory."""
    if memory_ids is None:
        require(
            n == 1,
            where,
            "memory_ids",
            "be given when there is more than one memory",
            f"None with {n} memories",
            "pass an int64 tensor with one id per row, -1 for none",
        )
        return
    require(
        isinstance(memory_ids, Tensor) and memory_ids.dtype == torch.int64,
        where,
        "memory_ids",
        "be an int64 tensor",
        getattr(memory_ids, "dtype", type(memory_ids).__name__),
        "convert it with .long()",
        TypeError,
    )
    require(
        shape_of(memory_ids) == (rows,),
        where,
        "memory_ids",
        f"have shape ({rows},)",
        shape_of(memory_ids),
        "pass one id per row",
    )
    check_device(where, "memory_ids", memory_ids, x)
    if CHECK_IDS and rows:
        low, high = int(memory_ids.min()), int(memory_ids.max())
        require(
            -1 <= low and high < n,
            where,
            "memory_ids",
            f"lie in -1..{n - 1}",
            f"{low}..{high}",
            "check the names",
        )


def check_lora(where: str, name: str, lora: LoRA, x: Tensor, width_in: int, width_out: int) -> int:
    """Check one stacked LoRA against its layer and return its number of memories."""
    check_tensor(where, f"{name}.a", lora.a, (3,))
    check_tensor(where, f"{name}.b", lora.b, (3,))
    n, rank, _ = lora.a.shape
    require(
        n >= 1 and rank >= 1,
        where,
        f"{name}.a",
        "hold at least one memory and rank",
        shape_of(lora.a),
        "check it",
    )
    require(
        shape_of(lora.a) == (n, rank, width_in),
        where,
        f"{name}.a",
        f"have shape (n, r, {width_in})",
        shape_of(lora.a),
        "check the layer it belongs to",
    )
    require(
        shape_of(lora.b) == (n, width_out, rank),
        where,
        f"{name}.b",
        f"have shape ({n}, {width_out}, {rank})",
        shape_of(lora.b),
        "check the layer it belongs to",
    )
    require(
        isinstance(lora.scaling, Tensor) and shape_of(lora.scaling) == (n,),
        where,
        f"{name}.scaling",
        f"be a tensor of shape ({n},)",
        getattr(lora.scaling, "shape", lora.scaling),
        "pass alpha / r of each memory",
    )
    for part in lora:
        check_device(where, name, part, x)
    return n


def check_linear(
    where: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoRA | None,
    memory_ids: Tensor | None,
) -> None:
    """Check the arguments of ``lora_linear``."""
    check_tensor(where, "x", x, (2, 3))
    check_tensor(where, "weight", weight, (2,))
    width_out, width_in = weight.shape
    require(
        x.shape[-1] == width_in,
        where,
        "x",
        f"have last dimension {width_in}",
        shape_of(x),
        "check the layer",
    )
    check_weight(where, "weight", weight, x, (width_out, width_in))
    if bias is not None:
        check_tensor(where, "bias", bias, (1,))
        require(
            shape_of(bias) == (width_out,),
            where,
            "bias",
            f"have shape ({width_out},)",
            shape_of(bias),
            "check it",
        )
        require(
            not (bias.requires_grad and torch.is_grad_enabled()),
            where,
            "bias",
            "be frozen (base weights get no gradient here)",
            "requires_grad=True",
            "call bias.requires_grad_(False)",
        )
    if lora is not None:
        n = check_lora(where, "lora", lora, x, width_in, width_out)
        check_ids(where, memory_ids, n, x.shape[0], x)


def check_gated_mlp(
    where: str,
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    gates: Tensor | None,
    lora: GatedMLPLoRA | None,
    memory_ids: Tensor | None,
) -> None:
    """Check the arguments of ``gated_mlp``."""
    check_tensor(where, "x", x, (2, 3))
    check_tensor(where, "w_gate", weights[0], (2,))
    width, hidden = weights[0].shape
    require(
        x.shape[-1] == hidden,
        where,
        "x",
        f"have last dimension {hidden}",
        shape_of(x),
        "check the layer",
    )
    for name, weight, shape in zip(
        ("w_gate", "w_up", "w_down"),
        weights,
        ((width, hidden), (width, hidden), (hidden, width)),
        strict=True,
    ):
        check_weight(where, name, weight, x, shape)
    if gates is not None:
        check_tensor(where, "gates", gates, (1,))
        require(
            shape_of(gates) == (width,),
            where,
            "gates",
            f"have shape ({width},)",
            shape_of(gates),
            "check the mask",
        )
        check_device(where, "gates", gates, x)
    counts = set()
    for name, part, k, n in zip(
        ("lora.gate", "lora.up", "lora.down"),
        lora or (),
        (hidden, hidden, width),
        (width, width, hidden),
        strict=False,
    ):
        if part is not None:
            counts.add(check_lora(where, name, part, x, k, n))
    require(
        len(counts) <= 1,
        where,
        "lora",
        "hold equally many memories in each part",
        sorted(counts),
        "stack them alike",
    )
    if counts:
        check_ids(where, memory_ids, counts.pop(), x.shape[0], x)


def check_prefix_attention(
    where: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: Prefix | None,
    memory_ids: Tensor | None,
    bounds: RowBounds | None,
) -> None:
    """Check the arguments of ``prefix_attention``."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_tensor(where, name, value, (4,))
        check_device(where, name, value, q)
        require(
            value.dtype == q.dtype,
            where,
            name,
            f"have the dtype of q ({q.dtype})",
            value.dtype,
            "cast it",
            TypeError,
        )
    rows, heads, _, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    require(
        shape_of(k) == (rows, kv_heads, keys, width),
        where,
        "k",
        f"have shape ({rows}, Hkv, S, {width})",
        shape_of(k),
        "check the layout [B, Hkv, S, D]",
    )
    require(
        shape_of(v) == shape_of(k),
        where,
        "v",
        f"have the shape of k {shape_of(k)}",
        shape_of(v),
        "check the layout",
    )
    require(
        kv_heads > 0 and heads % kv_heads == 0,
        where,
        "q",
        f"have a multiple of {kv_heads} heads",
        heads,
        "check the heads",
    )
    require(
        bounds is not None or keys >= q.shape[2],
        where,
        "k",
        "hold at least as many keys as there are queries",
        f"{keys} keys for {q.shape[2]} queries",
        "pass bounds",
    )
    for name, value in zip(RowBounds._fields, bounds or (), strict=False):
        require(
            isinstance(value, Tensor) and shape_of(value) == (rows,) and value.dtype == torch.int64,
            where,
            f"bounds.{name}",
            f"be an int64 tensor of shape ({rows},)",
            getattr(value, "shape", value),
            "pass one number per row",
        )
    if prefix is None:
        return
    check_tensor(where, "prefix.k", prefix.k, (4,))
    n, _, length, _ = prefix.k.shape
    for name, value in (("prefix.k", prefix.k), ("prefix.v", prefix.v)):
        require(
            shape_of(value) == (n, kv_heads, length, width),
            where,
            name,
            f"have shape (n, {kv_heads}, P, {width})",
            shape_of(value),
            "check the heads of the model it was made for",
        )
        check_device(where, name, value, q)
    require(
        length >= 1,
        where,
        "prefix.k",
        "hold at least one token",
        shape_of(prefix.k),
        "pass prefix=None instead",
    )
    require(
        shape_of(prefix.lengths) == (n,),
        where,
        "prefix.lengths",
        f"have shape ({n},)",
        shape_of(prefix.lengths),
        "check it",
    )
    check_ids(where, memory_ids, n, rows, q)
