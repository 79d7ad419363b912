"""Which file the memory of a tensor is mapped from."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor


def mapped_from(tensor: Tensor) -> str | None:
    """Return the path of the file that a tensor's memory is mapped from, None if from none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        first, end = (int(address, 16) for address in addresses.split("-"))
        if first <= tensor.data_ptr() < end:
            return path.strip() if path.startswith("/") else None
    return None
