"""Bytes that the Triton kernels load and store, counted in the interpreter, against the least that
each operation needs.

"Issued" counts every element as often as a program asks for it. "Moved" counts it once per launch
that touches it: what has to come from memory, or go there, if caches answer every repeat. The least
is every input element that the result depends on, once, and every element of the result, once.

    python -m bench.gate.kernel_traffic [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPE = torch.float16
RANK = 16
MEMORIES = 4
# For several memories: four sequences, of memories 0 and 2 and of none. 1 and 3 are not in use.
IDS = (0, 2, -1, 2)


class Op(NamedTuple):
    """One row of the table.

    Args:
        name: what runs, with its sizes.
        call: the launcher, without arguments; what it returns (tensors, None) is the result.
        weights: tensors of which every element is needed.
        others: the other tensors (or views) that the result depends on.
        partials: sums over tokens are split, to fill a GPU, and written once per split: the more
            tokens, the less that counts, so it is set apart here, where there are few.
    """

    name: str
    call: Callable[[], object]
    weights: tuple[Tensor, ...]
    others: tuple[Tensor, ...]
    partials: bool = False


def _normal(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """Return random numbers, so small that products of the layers stay within fp16."""
    return (torch.randn(shape) * 0.1).to(dtype)


class _Memories:
    """LoRA of a k -> n layer: one memory, or MEMORIES of which 0 and 2 are in use."""

    def __init__(self, k: int, n: int, mixed: bool = False):
        from koffkernels import LoRA

        count, self.used = (MEMORIES, [0, 2]) if mixed else (1, [0])
        self.a = _normal(count, RANK, k, dtype=torch.float32)
        self.b = _normal(count, n, RANK, dtype=torch.float32)
        self.scaling = torch.ones(count)
        self.lora = LoRA(self.a, self.b, self.scaling)

    def needed(self) -> tuple[Tensor, ...]:
        """Return what the used memories hold."""
        return tuple(tensor[m] for tensor in self.lora for m in self.used)

    def delta(self, m: int):
        """Return the update of m tokens by a given s."""
        from koffkernels._triton.shared.operands import Delta

        return Delta(_normal(m, RANK), self.b, self.scaling)

    def delta_needed(self, delta: object) -> tuple[Tensor, ...]:
        return delta.s, *(self.b[m] for m in self.used), *(self.scaling[m] for m in self.used)


def _rows(m: int, mixed: bool = False):
    from koffkernels._triton.shared.launch import Rows

    return Rows(torch.tensor(IDS), m // len(IDS)) if mixed else Rows(None, m)


def _shrink() -> Iterator[Op]:
    from koffkernels._triton.lora.shrink import shrink

    for m, k, mixed in ((256, 256, False), (256, 256, True), (4, 1024, False)):
        x, lora, rows = _normal(m, k), _Memories(k, 16, mixed), _rows(m, mixed)
        name = f"shrink M={m} K={k}" + (", memories 0, 2, none, 2" if mixed else "")
        # A row without a memory gives 0 whatever x is.
        used = x.view(len(IDS), -1)[[i for i, m in enumerate(IDS) if m >= 0 or not mixed]]
        others = (used, rows.ids) if mixed else (x,)
        weights = tuple(lora.a[m] for m in lora.used)
        yield Op(name, lambda x=x, a=lora.a, r=rows: shrink(x, [a], r), weights, others)
    x, rows, three = _normal(256, 256), _rows(256), [_Memories(256, 16) for _ in "qkv"]
    name = "shrink of q, k and v M=256 K=256"
    yield Op(
        name,
        lambda: shrink(x, [lora.a for lora in three], rows),
        tuple(lora.a for lora in three),
        (x,),
    )


def _decode() -> Iterator[Op]:
    from koffkernels._triton.lora.decode import decode_linear, decode_linears
    from koffkernels._triton.mlp.decode import decode_mlp_up
    from koffkernels._triton.shared.operands import Linear

    m, k, n = 4, 512, 768
    x, weight, up = _normal(m, k), _normal(n, k), _normal(n, k)
    for mixed in (False, True):
        lora, rows, size = _Memories(k, n, mixed), _rows(m, mixed), f"M={m} K={k} N={n}"
        where = ", memories 0, 2, none, 2" if mixed else ""
        others = (x, *lora.needed(), *([rows.ids] if mixed else []))
        run = (x, weight, None, lora.lora, rows)
        yield Op(f"decode linear {size}{where}", lambda a=run: decode_linear(*a), (weight,), others)
    rows, layers, others = _rows(m), [], [x]
    for width in (n, 256, 256):
        lora = _Memories(k, width)
        layers.append(Linear(_normal(width, k), None, lora.lora))
        others += lora.lora
    name = f"decode q, k and v M={m} K={k} N={n}, 256, 256"
    weights = tuple(layer.weight for layer in layers)
    yield Op(name, lambda: tuple(decode_linears(x, layers, rows)), weights, tuple(others))
    gates, lora, rows = torch.ones(n), _Memories(k, n), _rows(m)
    for share, kept in ((0, n), (1 / 3, n * 2 // 3)):
        closed = gates.clone()
        closed[kept:] = 0
        run = (x, weight, up, closed, lora.lora, lora.lora, rows, "silu")
        others = (x, closed, lora.a[0], lora.b[0, :kept], lora.scaling)
        where = f"decode MLP up M={m} H={k} I={n}" + (
            ", a third of the tiles gated off" * (share > 0)
        )
        # One set of matrices serves gate and up here, so that it is needed once.
        yield Op(where, lambda a=run: decode_mlp_up(*a), (weight[:kept], up[:kept]), others)


def _training() -> Iterator[Op]:
    from koffkernels._triton.lora.expand import expand_
    from koffkernels._triton.lora.grad import lora_grad
    from koffkernels._triton.mlp.hidden import mlp_hidden
    from koffkernels._triton.mlp.hidden_bwd import HiddenDeltas, mlp_hidden_bwd

    m, i = 256, 384
    lora, rows, gates = _Memories(256, i), _rows(m), torch.rand(i) + 0.1
    y, g, u, dh = (_normal(m, i) for _ in range(4))
    delta, second, third = (lora.delta(m) for _ in range(3))
    matrix = lora.delta_needed(delta)
    size, b, scaling = f"M={m} I={i}", matrix[1], matrix[2]
    yield Op(f"expand {size}", lambda: expand_(y, (delta,), rows), (b,), (y, delta.s, scaling))
    hidden = (g, u, gates, delta, second, rows, "silu")
    others = (g, u, gates, delta.s, second.s, scaling)
    yield Op(f"MLP hidden {size}", lambda: mlp_hidden(*hidden), (b,), others)
    deltas, others = HiddenDeltas(delta, second, third), (*others, dh, third.s)
    back = (dh, (g, u), gates, deltas, rows, "silu")

    def backward() -> tuple[Tensor, ...]:
        grads = mlp_hidden_bwd(*back, needs_gates=True, overwrite=False)
        sums = (part.total(torch.float32, scaling, True) for part in grads[3:])
        return (*grads[:3], *sums)

    def gradient() -> Tensor:
        return lora_grad(delta.s, y, 1, rows).total(torch.float32, scaling, True)

    yield Op(f"MLP hidden backward with LoRA sums {size}", backward, (b,), others)
    yield Op(f"LoRA gradient {size}", gradient, (), (delta.s, y), partials=True)


def _gemm() -> Iterator[Op]:
    from koffkernels._triton.lora.gemm import gemm_linear
    from koffkernels._triton.mlp.gemm import gemm_mlp_up

    m, k, n = 256, 256, 512
    x, weight, up, rows, lora = *(_normal(s, k) for s in (m, n, n)), _rows(m), _Memories(k, n)
    delta, second = lora.delta(m), lora.delta(m)
    s, b, scaling = lora.delta_needed(delta)
    call = (x, weight, None, (delta,), rows)
    name = f"fused linear M={m} K={k} N={n}"
    yield Op(name, lambda: gemm_linear(*call), (weight,), (x, s, b, scaling))
    gates = torch.ones(n)
    run = (x, weight, up, gates, delta, second, rows, "silu")
    others = (x, gates, s, second.s, b, scaling)
    yield Op(f"fused MLP up M={m} H={k} I={n}", lambda: gemm_mlp_up(*run)[0], (weight, up), others)


def _attention() -> Iterator[Op]:
    from koffkernels._triton.attention.call import Call
    from koffkernels._triton.attention.decode import decode
    from koffkernels._triton.attention.fwd import one_pass
    from koffkernels.types import Prefix

    rows, heads, kv_heads, width, learned = 4, 8, 2, 64, 128
    k, v = (_normal(MEMORIES, kv_heads, learned, width) for _ in "kv")
    prefix, ids = Prefix(k, v, torch.full((MEMORIES,), learned)), torch.tensor(IDS)
    used = tuple(t[::2] for t in prefix)
    for queries, keys, function in ((128, 128, one_pass), (1, 256, decode)):
        q = _normal(rows, heads, queries, width)
        own = tuple(_normal(rows, kv_heads, keys, width) for _ in "kv")
        call = Call(q, *own, prefix, ids, None, 0.125)
        kind = "decode" if queries == 1 else "forward"
        name = f"prefix attention {kind} B={rows} T={queries} S={keys} P={learned}"
        run = (lambda f=function, c=call: f(c), (*used[:2], *own), (q, used[2], ids))
        yield Op(f"{name}, memories 0, 2, none, 2", *run)


def _attention_backward() -> Iterator[Op]:
    from koffkernels._triton.attention.call import Call
    from koffkernels._triton.attention.dkv import own_grads
    from koffkernels._triton.attention.dq import query_grad, upstream
    from koffkernels._triton.attention.fwd import one_pass
    from koffkernels._triton.attention.prefix_grad import prefix_grads
    from koffkernels.types import Prefix

    rows, heads, kv_heads, width, learned, tokens = 4, 8, 2, 64, 64, 128
    q, do = (_normal(rows, heads, tokens, width) for _ in "qo")
    own = tuple(_normal(rows, kv_heads, tokens, width) for _ in "kv")
    k, v = (_normal(MEMORIES, kv_heads, learned, width) for _ in "kv")
    prefix, ids = Prefix(k, v, torch.full((MEMORIES,), learned)), torch.tensor(IDS)
    used, both = tuple(t[::2] for t in prefix), (True, True)
    call = Call(q, *own, prefix, ids, None, 0.125)
    o, lse = one_pass(call)
    up = upstream(do, o, lse)
    size = f"B={rows} T=S={tokens} P={learned}, memories 0, 2, none, 2"
    name = "prefix attention backward"
    yield Op(f"{name}, delta, {size}", lambda: upstream(do, o, lse).delta, (), (do, o))
    shared = (do, lse, up.delta)
    run = (lambda: query_grad(call, up, None), (q, *own, *used[:2]), (*shared, used[2], ids))
    yield Op(f"{name}, dq, {size}", *run)
    yield Op(f"{name}, dk dv, {size}", lambda: own_grads(call, up, both), own, (q, *shared))
    seen = tuple(t[[0, 1, 3]] for t in (q, *shared))  # the row without a memory gives nothing
    run = (lambda: prefix_grads(call, up, both), used[:2], (*seen, used[2], ids))
    yield Op(f"{name}, dK dV of the prefix, {size}", *run, partials=True)


OPS: tuple[Callable[[], Iterator[Op]], ...] = (
    _shrink,
    _decode,
    _training,
    _gemm,
    _attention,
    _attention_backward,
)


def _size(tensors: tuple[Tensor, ...]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _tensors(result: object) -> tuple[Tensor, ...]:
    """Return the tensors of a result, which may be one, None, or a tuple of results."""
    if isinstance(result, tuple):
        return tuple(t for part in result for t in _tensors(part))
    return () if result is None else (result,)


def measure(op: Op) -> dict[str, object]:
    """Return one row: bytes issued and moved, the least, and how often weights are asked for."""
    from .traffic import count_traffic

    with count_traffic() as traffic:
        result = _tensors(op.call())
    issued, moved = traffic.issued_bytes(), traffic.moved_bytes()
    # Written and then read by the operation itself, once each.
    partials = moved[1] - _size(result) if op.partials else 0
    reads = [traffic.loads(w).double() for w in op.weights]
    return {
        "op": op.name,
        "launches": [launch.kernel for launch in traffic.launches],
        "issued": sum(issued),
        "loaded": moved[0],
        "stored": moved[1],
        "partials": partials,
        "least": _size(op.weights) + _size(op.others) + _size(result),
        "weights_touched": min((float((r > 0).double().mean()) for r in reads), default=None),
        "reads_per_weight": max((float(r.mean()) for r in reads), default=None),
        "most_stores": max(int(traffic.stores(t).max()) for t in result),
        "dtype": str(DTYPE).removeprefix("torch."),
    }


def share_of_least(row: dict) -> float:
    """Return what moves, without partial sums, over the least."""
    return (row["loaded"] + row["stored"] - 2 * row["partials"]) / row["least"]


def table(rows: list[dict]) -> str:
    """Return the rows in Markdown, in KiB."""
    names = ["operation", "launches", "issued", "loaded", "stored", "partials", "least"]
    names += ["moved / least", "reads of a weight"]
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    for row in rows:
        cells = [str(row["op"]), str(len(row["launches"]))]
        cells += [f"{row[name] / 1024:.1f}" for name in names[2:7]]
        cells.append(f"{share_of_least(row):.2f}")
        reads = row["reads_per_weight"]
        cells.append("-" if reads is None else f"{reads:.2f}")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gate.kernel_traffic")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args(arguments)
    # The interpreter must be chosen before triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"
    torch.manual_seed(0)
    rows = [measure(op) for ops in OPS for op in ops()]
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
