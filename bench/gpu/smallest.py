"""Every operation once, forward and backward, at the smallest awkward shapes: what memcheck runs.

python -m bench.gpu.smallest [--route vendor|fused|decode] [--dry-run]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import koffkernels
from koffkernels import GatedMLPLoRA, LoRA, Prefix, RowBounds
from koffkernels.routes import ROUTES, force_route

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _normal(like: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=like, dtype=torch.float32).to(dtype).requires_grad_()


def _lora(where: torch.device, n: int, r: int, k: int, out: int) -> LoRA:
    a, b = _normal(where, n, r, k), _normal(where, n, out, r)
    return LoRA(a, b, torch.ones(n, device=where))


def _ids(where: torch.device, rows: int, memories: int) -> Tensor:
    return torch.arange(rows, device=where) * 7 % (memories + 1) - 1


def lora_linear(where: torch.device, dtype: torch.dtype, decode: bool) -> Tensor:
    """Three memories and none; sizes that are no multiple of anything."""
    rows, tokens, k, out = 7, 1 if decode else 19, 37, 29
    x = _normal(where, rows, tokens, k, dtype=dtype)
    weight, bias = (_normal(where, *s, dtype=dtype).detach() for s in ((out, k), (out,)))
    lora = _lora(where, 3, 5, k, out)
    return koffkernels.lora_linear(x, weight, bias, lora=lora, memory_ids=_ids(where, rows, 3))


def lora_linears(where: torch.device, dtype: torch.dtype, decode: bool) -> Tensor:
    """Three layers of one x, the second without memories; widths and ranks differ."""
    rows, tokens, k, outs = 7, 1 if decode else 19, 37, (29, 13, 17)
    x = _normal(where, rows, tokens, k, dtype=dtype)
    weights = [_normal(where, out, k, dtype=dtype).detach() for out in outs]
    lora = [_lora(where, 3, 5, k, outs[0]), None, _lora(where, 3, 3, k, outs[2])]
    ys = koffkernels.lora_linears(x, weights, lora=lora, memory_ids=_ids(where, rows, 3))
    return torch.cat(ys, -1)


def gated_mlp(where: torch.device, dtype: torch.dtype, decode: bool) -> Tensor:
    """The same with gates, a third of them closed."""
    rows, tokens, hidden, width = 7, 1 if decode else 19, 37, 67
    x = _normal(where, rows, tokens, hidden, dtype=dtype)
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    weights = [_normal(where, *s, dtype=dtype).detach() for s in shapes]
    lora = GatedMLPLoRA(*(_lora(where, 3, 5, s[1], s[0]) for s in shapes))
    gates = torch.rand(width, device=where)
    gates[: width // 3] = 0.0
    return koffkernels.gated_mlp(
        x, *weights, gates=gates.requires_grad_(), lora=lora, memory_ids=_ids(where, rows, 3)
    )


def square_attention(where: torch.device, dtype: torch.dtype, decode: bool) -> Tensor:
    """As many keys as queries and no bounds, which the vendor's kernel takes; or one query."""
    rows, heads, kv, width, length = 5, 4, 2, 128, 70
    queries, keys = (1, 160) if decode else (160, 160)
    q = _normal(where, rows, heads, queries, width, dtype=dtype)
    k, v = (_normal(where, rows, kv, keys, width, dtype=dtype) for _ in range(2))
    pk, pv = (_normal(where, 3, kv, length, width) for _ in range(2))
    prefix = Prefix(pk, pv, torch.tensor([length, 7, 33], device=where))
    return koffkernels.prefix_attention(q, k, v, prefix, memory_ids=_ids(where, rows, 3))


def prefix_attention(where: torch.device, dtype: torch.dtype, decode: bool) -> Tensor:
    """Two memories of different length and none, padding on the left, unwritten keys behind."""
    rows, heads, kv, queries, keys, length, width = 4, 4, 2, 1 if decode else 17, 33, 19, 64
    q = _normal(where, rows, heads, queries, width, dtype=dtype)
    k, v = (_normal(where, rows, kv, keys, width, dtype=dtype) for _ in range(2))
    pk, pv = (_normal(where, 2, kv, length, width) for _ in range(2))
    prefix = Prefix(pk, pv, torch.tensor([length, 7], device=where))
    start = torch.arange(rows, device=where)
    end = torch.full((rows,), keys - 2, device=where)
    bounds = RowBounds(start, end, end - queries)
    ids = _ids(where, rows, 2)
    return koffkernels.prefix_attention(q, k, v, prefix, memory_ids=ids, bounds=bounds)


OPERATIONS: dict[str, Callable[[torch.device, torch.dtype, bool], Tensor]] = {
    "gated_mlp": gated_mlp,
    "lora_linear": lora_linear,
    "lora_linears": lora_linears,
    "prefix_attention": prefix_attention,
    "square_attention": square_attention,
}


def run(route: str, where: torch.device) -> int:
    """How many cases ran; the decode route has no backward. NaN or inf is an error."""
    ran = 0
    train = route != "decode"
    for op, dtype in itertools.product(OPERATIONS, DTYPES):
        for _ in range(3):  # as it is written, recorded, replayed
            with torch.set_grad_enabled(train):
                y = OPERATIONS[op](where, dtype, not train)
            if train:
                y.backward(torch.randn_like(y))
            if not bool(y.isfinite().all()):
                raise ArithmeticError(f"{op}: the output must be finite, got NaN or inf; {dtype}")
        ran += 1
    return ran


def main() -> int:
    """Run one route's cases."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.smallest", description=__doc__)
    parser.add_argument("--route", choices=ROUTES, default="vendor")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, by the torch backend")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.dry_run:
        with koffkernels.force_backend("torch"):
            ran = run(args.route, torch.device("cpu"))
    else:
        with force_route(args.route):
            ran = run(args.route, torch.device("cuda"))
        torch.cuda.synchronize()
    print(f"{ran} cases ran", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
