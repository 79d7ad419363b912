"""Room on the disk: looked at before a write, asked for before a long run, and kept for its end."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import asker

if TYPE_CHECKING:
    from torch import Tensor

# What goes with the tensors: a tokenizer, configs, a card, logs.
SMALL_FILES = 1 << 24  # 16 MiB

ROOM = ".koff-room"

_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(OSError):
    """There is no room for what is to be written."""


def _disk_full(what: str, needed: int, folder: Path, got: str) -> DiskFull:
    return DiskFull(
        f"{asker()}: {what} must have {size_text(needed)} of room in {folder}, got {got}; make "
        "room, or choose a folder on another disk"
    )


def check_room(what: str, needed: int, folder: Path) -> None:
    """Refuse to begin what the disk of a folder has no room for.

    Args:
        what: is to be written.
        needed: bytes.
        folder: which need not exist yet.

    Raises:
        DiskFull: too little is free.
    """
    free = _free(folder)
    if free < needed:
        raise _disk_full(what, needed, folder, f"{size_text(free)} free")


@contextlib.contextmanager
def writing(what: str, needed: int, folder: Path) -> Iterator[None]:
    """Check that there is room for what the block writes, and say so too if it runs out on the way.

    Args:
        what: is written.
        needed: bytes, at most a little less than it will be.
        folder: where to.

    Raises:
        DiskFull: too little is free, or the disk or a quota was full before the end.
    """
    check_room(what, needed, folder)
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if _says_full(error) or (_is_torchs(error) and _free(folder) < needed):
            raise _disk_full(what, needed, folder, "a disk that is full") from error
        raise


@contextlib.contextmanager
def room_kept(size: int, folder: Path) -> Iterator[None]:
    """Keep some room free on the disk of a folder until the block ends, however it ends: what is
    written next finds it, whoever filled the disk meanwhile.

    Args:
        size: bytes.
        folder: that exists.
    """
    path = folder / ROOM  # also that of a process that was killed
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                with contextlib.suppress(OSError):  # not every file system can
                    os.posix_fallocate(file.fileno(), 0, size)
        yield
    finally:
        path.unlink(missing_ok=True)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return how many bytes tensors have, shared ones once; of tensors in shards, the whole."""
    # Of a DTensor only the shard lies somewhere.
    return sum({getattr(t, "_local_tensor", t).data_ptr(): t.nbytes for t in tensors}.values())


def _free(folder: Path) -> int:
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def _says_full(error: BaseException) -> bool:
    """Whether an error is the system's "no space left", also in the words of safetensors."""
    return (isinstance(error, OSError) and error.errno in _FULL) or "os error 28" in str(error)


def _is_torchs(error: BaseException) -> bool:
    """Whether it is torch.save's, which says of no failed write why it failed."""
    return isinstance(error, RuntimeError) and "inline_container" in str(error)


def size_text(count: int) -> str:
    """Return a number of bytes in words, such as "5.8 GB"; 1 GB is 10^9 bytes."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 10**3:.1f} kB"
