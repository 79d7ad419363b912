"""Bytes that the Triton kernels load and store, counted in the interpreter, against the least that
each operation needs.

"Issued" counts every element as often as a program asks for it. "Touched" counts it once per
launch: what has to come from memory if caches answer every repeat. The least is every input element
that the result depends on, once, and every output element, once.

    python -m bench.kernel_traffic [--json FILE]
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
TOKENS, HIDDEN, RANK = 256, 512, 16


class Op(NamedTuple):
    """One row of the table.

    Args:
        name: what runs, with its sizes.
        call: the launcher, without arguments.
        needed: tensors (or views) that the result depends on.
        outputs: how many bytes the result has.
        formula: the least, in words.
    """

    name: str
    call: Callable[[], object]
    needed: tuple[Tensor, ...]
    outputs: int
    formula: str


def _normal(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape).to(dtype)


def _lora(n: int, k: int, out: int) -> tuple[Tensor, Tensor, Tensor]:
    a, b = _normal(n, RANK, k, dtype=torch.float32), _normal(n, out, RANK, dtype=torch.float32)
    return a, b, torch.ones(n)


def _size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _shrink() -> Iterator[Op]:
    from koffkernels._triton.common import Rows
    from koffkernels._triton.shrink import shrink

    x, (a, _, _) = _normal(TOKENS, HIDDEN), _lora(4, HIDDEN, 1)
    one, few = Rows(None, TOKENS), x[:4]
    ids = torch.tensor([0, 2, -1, 2])
    mixed = Rows(ids, TOKENS // 4)
    used = torch.cat([x[: TOKENS // 2], x[TOKENS * 3 // 4 :]])
    out = TOKENS * RANK * DTYPE.itemsize
    sizes = f"M={TOKENS} K={HIDDEN} r={RANK}"
    yield Op(f"shrink {sizes}", lambda: shrink(x, a, None, one), (x, a[0]), out, "x + A + s")
    yield Op(
        f"shrink of gate and up {sizes}",
        lambda: shrink(x, a, a[1:], one),
        (x, a[0], a[1]),
        2 * out,
        "x + 2 A + s",
    )
    yield Op(
        f"shrink, memories 0, 2, none, 2 of 4, {sizes}",
        lambda: shrink(x, a, None, mixed),
        (used, a[0], a[2], ids),
        out,
        "x of rows with a memory + 2 A + s + ids",
    )
    yield Op(
        f"shrink M=4 K={HIDDEN} r={RANK}",
        lambda: shrink(few, a, None, Rows(None, 4)),
        (few, a[0]),
        4 * RANK * DTYPE.itemsize,
        "x + A + s",
    )


OPS: tuple[Callable[[], Iterator[Op]], ...] = (_shrink,)


def measure(op: Op) -> dict[str, object]:
    """One row: bytes issued and touched, loads and stores, and the least."""
    from koffkernels._triton.traffic import count_traffic

    with count_traffic() as traffic:
        op.call()
    issued, touched = traffic.issued_bytes(), traffic.touched_bytes()
    return {
        "op": op.name,
        "launches": [launch.kernel for launch in traffic.launches],
        "issued_loads": issued[0],
        "issued_stores": issued[1],
        "touched_loads": touched[0],
        "touched_stores": touched[1],
        "least": _size(*op.needed) + op.outputs,
        "formula": op.formula,
        "dtype": str(DTYPE).removeprefix("torch."),
    }


def table(rows: list[dict]) -> str:
    """The rows in Markdown, in KiB."""
    names = ["operation", "launches", "issued", "loaded", "stored", "least", "loaded + stored"]
    lines = [" | ".join(names), "---|" * 6 + "---"]
    for row in rows:
        touched = row["touched_loads"] + row["touched_stores"]
        kib = (row["issued_loads"] + row["issued_stores"], row["touched_loads"])
        kib += (row["touched_stores"], row["least"])
        cells = [str(row["op"]), str(len(row["launches"]))]
        cells += [f"{value / 1024:.1f}" for value in kib]
        lines.append(" | ".join([*cells, f"{touched / row['least']:.2f} x least"]))
    return "\n".join(f"| {line} |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_traffic")
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
