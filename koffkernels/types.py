"""Small tensor records that the public functions take.

Dimension names used throughout: B rows (sequences), T tokens per row, S keys per row, H hidden
width, I MLP neurons, K/N input/output width of a linear layer, n memories, r LoRA rank, P prefix
length, D head width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LoRA(NamedTuple):
    """Stacked low-rank updates of one linear layer, one per memory: W_m = W + scaling[m] * b[m] @
    a[m].

    Args:
        a: [n, r, K], any floating dtype (fp32 master weights are usual); or [r, K] of one memory,
            as PEFT has it.
        b: [n, N, r]; or [N, r] likewise.
        scaling: fp32 [n], alpha / r of each memory. Memories of a lower rank are padded with zeros.

    No result depends on the memory of another row, as long as a, b and scaling b are finite in the
    dtype that is computed in. Kernels multiply a memory by 0 for those tokens of their tile that
    have another one, and 0 times infinity is NaN. A memory that no row has may hold anything in a,
    and in b too unless scaling is trained, whose gradient is a sum of products with b.
    """

    a: Tensor
    b: Tensor
    scaling: Tensor

    def stacked(self) -> LoRA:
        """Return the same with [1, r, K] and [1, N, r] of one memory."""
        return self if self.a.dim() == 3 else LoRA(self.a[None], self.b[None], self.scaling)


class GatedMLPLoRA(NamedTuple):
    """LoRA of the three linear layers of a gated MLP; any of them may be None."""

    gate: LoRA | None = None
    up: LoRA | None = None
    down: LoRA | None = None


class Prefix(NamedTuple):
    """Learned keys and values that stand before every sequence, one set per memory.

    Args:
        k: [n, Hkv, P, D], post-RoPE keys at positions -P..-1 (relative to the sequence's position
            0).
        v: [n, Hkv, P, D].
        lengths: int64 [n], how many of the P entries each memory has (the first ``lengths[m]``).
    """

    k: Tensor
    v: Tensor
    lengths: Tensor


class RowGroups(NamedTuple):
    """Which memory each row has, sorted out once for all operations of a forward; made by
    ``koffkernels.group_rows``.

    Args:
        ids: int64 [B], each one of the n memories, or -1 for none.
        counts: how many rows each memory has; None where nobody can look at ids, on a GPU or under
            torch.compile, and then there is nothing but ids.
        order: int64 [R], the rows that have a memory, by memory.
        slots: int64 [n G], G rows of each memory, G the most that one has; what a memory has fewer
            is filled up with any row.
        places: int64 [R], where among ``slots`` each of ``order`` stands.
        aligned: whether ``slots`` is 0, 1, ..., B - 1.
    """

    ids: Tensor
    counts: tuple[int, ...] | None = None
    order: Tensor | None = None
    slots: Tensor | None = None
    places: Tensor | None = None
    aligned: bool = False


class RowBounds(NamedTuple):
    """Which keys each row may see: query t of row b sees key j iff
    ``key_start[b] <= j < key_end[b]`` and ``j <= query_start[b] + t``.

    Args:
        key_start: int64 [B], first visible key (the number of left-padding tokens).
        key_end: int64 [B], one past the last written key.
        query_start: int64 [B], index among the keys of the row's first query.
    """

    key_start: Tensor
    key_end: Tensor
    query_start: Tensor
