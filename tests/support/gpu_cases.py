"""Cases of kernels/test_gpu_kernels.py: an operation's arguments as named tensors, its call."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from support.kernel_inputs import (
    LOW,
    attention_tensors,
    eager_attention,
    eager_linear,
    eager_mlp,
    ids_of,
    lora_from,
    lora_tensors,
    master,
    mlp_lora_from,
    normal,
    padded,
    prefix_from,
)
from support.oracle import Call, Tensors
from torch import Tensor

from koffkernels import RowBounds, gated_mlp, lora_linear, lora_linears, prefix_attention

PARTS = ("gate", "up", "down")
NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Case(NamedTuple):
    """Every argument as a tensor on the CPU, and functions of such tensors on any device.

    Args:
        tensors: arguments by name, base weights and integers included.
        call: the operation, by koffkernels' public function.
        eager: the same in the same dtype by plain torch, where its error is to be compared.
        frozen: names without a gradient.
    """

    tensors: Tensors
    call: Call
    eager: Call | None
    frozen: tuple[str, ...]

    def on(self, device: torch.device) -> Tensors:
        """The tensors on a device."""
        return {name: tensor.to(device) for name, tensor in self.tensors.items()}


# x's leading shape, width in, width out (H and I), memories, rank. Sums in fp32 stay as short as
# tolerances.py assumes.
EXACT = [
    ((1, 1), 1, 1, 1, 1),
    ((3, 7), 13, 29, 2, 1),
    ((2, 1), 7, 11, 3, 33),
    ((0, 4), 8, 12, 2, 4),
    ((4, 0), 8, 12, 2, 4),
    ((50, 3), 16, 24, 40, 2),
    ((19,), 12, 20, 4, 3),
    ((9, 33), 64, 160, 3, 8),
    ((1, 5), 72, 136, 1, 256),
]
# In 16 bits the tolerance is a mean over many roundings, so outputs need some hundred numbers.
# Several tiles in every direction, none of them full; rows with every memory and with none.
ROUGH = [
    ((0, 4), 8, 12, 2, 4),
    ((4, 0), 8, 12, 2, 4),
    ((9, 33), 64, 160, 3, 8),
    ((97, 2), 61, 149, 40, 5),
    ((1, 257), 67, 131, 1, 33),
    ((64, 1), 520, 1416, 8, 16),
    ((5, 131), 328, 1064, 3, 16),
]
SHAPES = {"fp32": EXACT, "bf16": ROUGH, "fp16": ROUGH}
ATTENTION = {
    "one-token": dict(B=7, Hq=4, Hkv=2, T=1, S=50, D=64, n=3, P=33),
    "short": dict(B=3, Hq=4, Hkv=1, T=17, S=17, D=128, n=2, P=1),
    "longer": dict(B=5, Hq=8, Hkv=2, T=130, S=150, D=64, n=3, P=512),
    # As many keys as queries, several tiles of both, and a prefix: what the vendor's kernel takes.
    "square-64": dict(B=5, Hq=8, Hkv=2, T=160, S=160, D=64, n=3, P=70),
    "square-128": dict(B=4, Hq=4, Hkv=1, T=160, S=160, D=128, n=3, P=70),
    "square-odd": dict(B=2, Hq=4, Hkv=2, T=261, S=261, D=64, n=2, P=33),
    "torch-only": dict(B=3, Hq=4, Hkv=4, T=17, S=17, D=24, n=2, P=5),
    "no-prefix": dict(B=2, Hq=4, Hkv=2, T=130, S=130, D=128),
    "empty": dict(B=0, Hq=4, Hkv=2, T=3, S=3, D=64, n=2, P=5),
}


def _finish(
    tensors: Tensors, call: Call, eager: Call, shape: tuple, frozen: tuple[str, ...]
) -> Case:
    """Add the memory of each row: all of them and none in turn, none given with one memory.

    Eager's error is comparable in 16 bits, where roundings are many.
    """
    lead, _, _, memories, _ = shape
    low = tensors["x"].dtype in LOW
    if memories > 1:
        tensors["ids"] = ids_of("mixed", lead[0], memories)
    comparable = low and memories < 40 and 0 not in lead
    return Case(tensors, call, eager if comparable else None, frozen)


def linear_case(shape: tuple, dtype: torch.dtype) -> Case:
    """lora_linear with a bias."""
    lead, k, out, memories, rank = shape
    tensors = {
        "x": normal(*lead, k, dtype=dtype),
        "weight": normal(out, k, dtype=dtype, scale=k**-0.5),
        "bias": normal(out, dtype=dtype),
        **lora_tensors("lora", memories, rank, k, out, master(dtype)),
    }

    def call(t: Tensors) -> Tensor:
        lora = lora_from(t, "lora")
        return lora_linear(t["x"], t["weight"], t["bias"], lora=lora, memory_ids=t.get("ids"))

    def eager(t: Tensors) -> Tensor:
        return eager_linear(t["x"], t["weight"], lora_from(t, "lora"), t.get("ids")) + t["bias"]

    return _finish(tensors, call, eager, shape, ("weight", "bias"))


def linears_case(shape: tuple, dtype: torch.dtype) -> Case:
    """lora_linears of three weights of different widths, results side by side; the second one has
    no bias."""
    lead, k, out, memories, rank = shape
    widths = (out, out // 2 + 1, out // 4 + 1)
    tensors = {"x": normal(*lead, k, dtype=dtype)}
    for i, n in enumerate(widths):
        tensors[f"weight{i}"] = normal(n, k, dtype=dtype, scale=k**-0.5)
        tensors |= lora_tensors(f"lora{i}", memories, rank, k, n, master(dtype))
    tensors |= {f"bias{i}": normal(widths[i], dtype=dtype) for i in (0, 2)}

    def parts(t: Tensors) -> tuple[list, list, list]:
        weights, biases = ([t.get(f"{part}{i}") for i in range(3)] for part in ("weight", "bias"))
        return weights, biases, [lora_from(t, f"lora{i}") for i in range(3)]

    def call(t: Tensors) -> Tensor:
        weights, biases, lora = parts(t)
        ys = lora_linears(t["x"], weights, biases, lora=lora, memory_ids=t.get("ids"))
        return torch.cat(ys, -1)

    def eager(t: Tensors) -> Tensor:
        ys = [
            eager_linear(t["x"], w, lora, t.get("ids")) + (0 if b is None else b)
            for w, b, lora in zip(*parts(t), strict=True)
        ]
        return torch.cat(ys, -1)

    frozen = tuple(name for name in tensors if name.startswith(("weight", "bias")))
    return _finish(tensors, call, eager, shape, frozen)


def mlp_case(shape: tuple, dtype: torch.dtype) -> Case:
    """gated_mlp with gates of which some are 0 and some 1."""
    lead, hidden, width, memories, rank = shape
    sizes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    names = tuple(f"{name}.weight" for name in sizes)
    gates = (torch.rand(width) * 2 - 0.5).clamp(0, 1).to(master(dtype))
    tensors = {"x": normal(*lead, hidden, dtype=dtype), "gates": gates}
    for name, (out, k) in sizes.items():
        tensors[f"{name}.weight"] = normal(out, k, dtype=dtype, scale=k**-0.5)
        tensors |= lora_tensors(name, memories, rank, k, out, master(dtype))

    def call(t: Tensors) -> Tensor:
        extra = {"gates": t["gates"], "lora": mlp_lora_from(t), "memory_ids": t.get("ids")}
        return gated_mlp(t["x"], *(t[name] for name in names), **extra)

    def eager(t: Tensors) -> Tensor:
        weights = [t[name] for name in names]
        return eager_mlp(t["x"], weights, t["gates"], mlp_lora_from(t), t.get("ids"), "silu")

    return _finish(tensors, call, eager, shape, names)


def attention_case(
    name: str, dtype: torch.dtype, padding: bool = False, tokens_first: bool = False
) -> Case:
    """prefix_attention, lengths that differ, mixed memories and none; padded or not; q, k and v in
    memory as [B, H, T, D], or as the projections leave them, [B, T, H, D]."""
    shape = ATTENTION[name]
    tensors = attention_tensors(shape, dtype)
    if shape.get("n"):
        lengths = [max(1, shape["P"] - 3 * m) for m in range(shape["n"])]
        tensors["lengths"] = torch.tensor(lengths)
        tensors["ids"] = ids_of("mixed", shape["B"], shape["n"])
    if padding:
        tensors |= padded(shape["B"], shape["T"], shape["S"], 2)._asdict()

    def arguments(t: Tensors) -> tuple:
        prefix = prefix_from(t, t["lengths"]) if "lengths" in t else None
        bounds = RowBounds(t["key_start"], t["key_end"], t["query_start"]) if padding else None
        return prefix, t.get("ids"), bounds

    def call(t: Tensors) -> Tensor:
        prefix, ids, bounds = arguments(t)
        q, k, v = (t[name] for name in "qkv")
        if tokens_first:
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        return prefix_attention(q, k, v, prefix, memory_ids=ids, bounds=bounds)

    def eager(t: Tensors) -> Tensor:
        return eager_attention(t["q"], t["k"], t["v"], *arguments(t))

    comparable = dtype in LOW and not padding and shape["B"] > 0
    return Case(tensors, call, eager if comparable else None, ())


BUILDERS: dict[str, Callable[..., Case]] = {
    "lora_linear": linear_case,
    "lora_linears": linears_case,
    "gated_mlp": mlp_case,
}
