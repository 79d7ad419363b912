"""Counting what kernels load and store, element by element, in Triton's interpreter.

    with count_traffic() as traffic:
        s = shrink(x, [a], rows)
    assert traffic.loads(a[1]).sum() == 0  # memory 1 is not in use
    assert traffic.stores(s).eq(1).all()  # one writer per element

Only lanes whose mask is set count. An element that is read twice counts twice as issued and once
as touched. The interpreter runs the same loads and stores as a GPU, so both numbers hold there; how
many of the repeated reads a cache answers is not known here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from koffkernels._triton.shared.launch import INTERPRETED, tensors_of

_KINDS = ("load", "store")


class Operand:
    """Loads and stores of one tensor of a launch, an argument or inside of one, in elements.

    Attributes:
        loads, stores: elements issued, with repeats.
        loaded, stored: elements touched.
        size: bytes of an element.
    """

    def __init__(self, tensor: Tensor):
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = sum((n - 1) * step for n, step in steps) + 1 if tensor.numel() else 0
        self.size = tensor.element_size()
        self.begin = tensor.data_ptr()
        self.end = self.begin + span * self.size
        self.loads = self.stores = 0
        self._seen = {kind: torch.zeros(span, dtype=torch.bool) for kind in _KINDS}

    def add(self, kind: str, addresses: Tensor) -> None:
        """Note one instruction's addresses, all of them inside the tensor."""
        self._seen[kind][(addresses - self.begin) // self.size] = True
        if kind == "load":
            self.loads += addresses.numel()
        else:
            self.stores += addresses.numel()

    @property
    def loaded(self) -> int:
        return int(self._seen["load"].sum())

    @property
    def stored(self) -> int:
        return int(self._seen["store"].sum())


class LaunchTraffic:
    """One launch: the kernel's name and an ``Operand`` per tensor argument."""

    def __init__(self, kernel: str, tensors: dict[str, Tensor]):
        self.kernel = kernel
        self.operands = {name: Operand(tensor) for name, tensor in tensors.items()}

    def add(self, kind: str, addresses: Tensor) -> None:
        """Note one instruction; an address outside of every tensor argument is an error."""
        for operand in self.operands.values():
            inside = (addresses >= operand.begin) & (addresses < operand.end)
            if inside.any():
                operand.add(kind, addresses[inside])
                addresses = addresses[~inside]
            if not addresses.numel():
                return
        lanes = addresses.numel()
        raise IndexError(f"{self.kernel}: {lanes} lanes {kind} outside of its tensor arguments")


class Traffic:
    """Everything that ran inside ``count_traffic``.

    Attributes:
        launches: one ``LaunchTraffic`` per launch, in order.
    """

    def __init__(self) -> None:
        self.launches: list[LaunchTraffic] = []
        # Address of a storage -> (itself, held so that no other takes its place; counts per byte).
        self._storages: dict[int, tuple[Any, dict[str, Tensor]]] = {}

    def begin(self, kernel: str, tensors: dict[str, Tensor]) -> None:
        """Note that a launch starts."""
        self.launches.append(LaunchTraffic(kernel, tensors))
        for tensor in tensors.values():
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._storages:
                counts = {k: torch.zeros(storage.nbytes(), dtype=torch.int32) for k in _KINDS}
                self._storages[storage.data_ptr()] = storage, counts

    def add(self, kind: str, pointers: Any, mask: Any) -> None:
        """Note one instruction's lanes: arrays of addresses and of what is not masked out."""
        addresses = torch.from_numpy(pointers.astype("int64"))
        lanes = torch.from_numpy(mask.astype("bool"))
        addresses = addresses[lanes.broadcast_to(addresses.shape)]
        if not addresses.numel():
            return
        self.launches[-1].add(kind, addresses)
        for start, (storage, counts) in self._storages.items():
            here = (addresses >= start) & (addresses < start + storage.nbytes())
            offsets = addresses[here] - start
            counts[kind].index_add_(0, offsets, torch.ones(offsets.shape, dtype=torch.int32))

    def _count(self, kind: str, tensor: Tensor) -> Tensor:
        found = self._storages.get(tensor.untyped_storage().data_ptr())
        if found is None:
            return torch.zeros(tensor.shape, dtype=torch.int32)
        size = tensor.element_size()
        strides = [stride * size for stride in tensor.stride()]
        counts = found[1][kind]
        return counts.as_strided(tensor.shape, strides, tensor.storage_offset() * size).clone()

    def loads(self, tensor: Tensor) -> Tensor:
        """Return how often each element of a tensor (or a view) was loaded: int32, its shape."""
        return self._count("load", tensor)

    def stores(self, tensor: Tensor) -> Tensor:
        """Return how often each element of a tensor (or a view) was stored: int32, its shape."""
        return self._count("store", tensor)

    def issued_bytes(self) -> tuple[int, int]:
        """Return (loaded, stored) bytes of all launches, repeats included."""
        each = [o for launch in self.launches for o in launch.operands.values()]
        return sum(o.loads * o.size for o in each), sum(o.stores * o.size for o in each)

    def moved_bytes(self) -> tuple[int, int]:
        """Return (loaded, stored) bytes, each element once per launch that touches it."""
        each = [o for launch in self.launches for o in launch.operands.values()]
        return sum(o.loaded * o.size for o in each), sum(o.stored * o.size for o in each)


def _watch_launches(traffic: Traffic, call: Any) -> Any:
    """Return the interpreter's launch, noting the tensors; it runs CPU tensors where they lie."""

    @functools.wraps(call)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        traffic.begin(self.fn.__name__, tensors_of(values))
        return call(self, *args, **kwargs)

    return counted


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count every load and store of the kernels that run inside, on CPU tensors.

    Yields:
        The counts, which grow as kernels run.

    Raises:
        RuntimeError: triton was imported without TRITON_INTERPRET=1; or an atomic ran inside.
        IndexError: a kernel loads or stores outside of its tensor arguments.
    """
    if not INTERPRETED:
        raise RuntimeError("count_traffic: TRITON_INTERPRET must be 1 before triton is imported")
    from triton.runtime import interpreter

    traffic, builder = Traffic(), interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    # Plain and descriptor loads and stores go through the masked ones, in 3.6, 3.7 and 3.9.
    def counted_load(ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        traffic.add("load", ptrs.data, mask.data)
        return load(ptrs, mask, *rest, **named)

    def counted_store(ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        traffic.add("store", ptrs.data, mask.data)
        return store(ptrs, value, mask, *rest, **named)

    def refused(*_: Any, **__: Any) -> Any:
        raise RuntimeError("count_traffic: a kernel must use no atomics; write partial sums")

    patches = {
        "create_masked_load": counted_load,
        "create_masked_store": counted_store,
        "create_atomic_cas": refused,
        "create_atomic_rmw": refused,
    }
    launch = interpreter.GridExecutor.__call__
    vars(builder).update(patches)
    interpreter.GridExecutor.__call__ = _watch_launches(traffic, launch)
    try:
        yield traffic
    finally:
        interpreter.GridExecutor.__call__ = launch
        for name in patches:
            del vars(builder)[name]
