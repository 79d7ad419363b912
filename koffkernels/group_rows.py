"""Rows sorted by their memories."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import refuse
from .types import RowGroups


def group_rows(memory_ids: Tensor, memories: int) -> RowGroups:
    """Return the rows of each memory, for operations that share them: each takes it in the place
    of ``memory_ids``, and then neither looks at the ids nor sorts rows itself.

    Args:
        memory_ids: int64 [B]; -1, or any that is none of the memories: none for that row.
        memories: n.

    Returns:
        The groups. On a GPU and under torch.compile, where reading ids would wait, ids alone.

    Raises:
        TypeError: anything but an int64 tensor.
    """
    if not isinstance(memory_ids, Tensor) or memory_ids.dtype != torch.int64:
        got = memory_ids.dtype if isinstance(memory_ids, Tensor) else type(memory_ids).__name__
        step = "pass torch.tensor(ids), of whole numbers"
        refuse("group_rows", "memory_ids", "be an int64 tensor", got, step, TypeError)
    if memory_ids.device.type != "cpu" or torch.compiler.is_compiling():
        known = (memory_ids >= 0) & (memory_ids < memories)
        return RowGroups(torch.where(known, memory_ids, -1))
    ids = memory_ids.tolist()
    own: list[list[int]] = [[] for _ in range(memories)]
    for row, memory in enumerate(ids):
        if 0 <= memory < memories:
            own[memory].append(row)
    counts = tuple(map(len, own))
    size = max(counts)
    order = [row for rows in own for row in rows]
    slots = [row for rows in own for row in rows + [0] * (size - len(rows))]
    places = [memory * size + i for memory, n in enumerate(counts) for i in range(n)]
    if any(not -1 <= memory < memories for memory in ids):
        ids = [memory if 0 <= memory < memories else -1 for memory in ids]
        memory_ids = torch.tensor(ids, dtype=torch.int64)
    tensors = [torch.tensor(part, dtype=torch.int64) for part in (order, slots, places)]
    return RowGroups(memory_ids, counts, *tensors, aligned=slots == list(range(len(ids))))
