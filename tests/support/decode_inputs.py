"""What the tests of both decode kernels share: the memories of a case, and which elements a call
read."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from support.kernel_inputs import lora_from, lora_tensors
from torch import Tensor
from triton.runtime import interpreter

from koffkernels import LoRA
from koffkernels._triton.shared.launch import Rows, leaves_of, recording

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("none", "off", "one", "mixed")


def memories(n: int, r: int, k: int, out: int) -> LoRA:
    """n memories in fp32, as masters are."""
    return lora_from(lora_tensors("l", n, r, k, out, torch.float32), "l")


def wide(lora: LoRA | None) -> LoRA | None:
    return None if lora is None else LoRA(*(t.double() for t in lora))


def token_ids(rows: Rows, m: int) -> Tensor | None:
    """One id per token, for the oracle."""
    return None if rows.ids is None else rows.ids.repeat_interleave(rows.tokens)[:m]


class Reads:
    """Addresses of all elements that the interpreter loaded."""

    def __init__(self) -> None:
        self.addresses: list[np.ndarray] = []

    def of(self, tensor: Tensor) -> Tensor:
        """How often each element of a tensor was read."""
        size, start = tensor.element_size(), tensor.data_ptr()
        span = tensor.untyped_storage().nbytes() // size
        counts = np.zeros(span, np.int64)
        for addresses in self.addresses:
            index = (addresses.astype(np.int64) - start) // size
            np.add.at(counts, index[(index >= 0) & (index < span)], 1)
        return torch.from_numpy(counts).as_strided(tensor.shape, tensor.stride())


@contextlib.contextmanager
def reading() -> Iterator[Reads]:
    """Record which elements are read."""
    reads, load = Reads(), interpreter.InterpreterBuilder.create_masked_load

    def recorded(self, ptrs, mask, *args, **kwargs):
        reads.addresses.append(ptrs.data[mask.data.astype(bool)])
        return load(self, ptrs, mask, *args, **kwargs)

    interpreter.InterpreterBuilder.create_masked_load = recorded
    try:
        yield reads
    finally:
        interpreter.InterpreterBuilder.create_masked_load = load


def variants(launcher, sizes: range) -> dict[object, set]:
    """kernel -> what is compiled in, over calls ``launcher(m)`` on meta tensors."""
    found: dict[object, set] = {}
    for m in sizes:
        with recording() as launches:
            launcher(m)
        for launch in launches:
            fixed = {name: v for name, v in leaves_of(launch.args) if not isinstance(v, Tensor)}
            for name in ("M", "tokens", "blocks", "splits", "stride_x"):
                fixed.pop(name, None)
            found.setdefault(launch.kernel, set()).add(tuple(sorted(fixed.items(), key=str)))
    return found
