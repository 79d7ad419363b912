"""What was tokenised once stays on the disk, for later runs and for the other ranks of this one.

An entry is a folder named by a digest of all that decides what is in it: the contents of the files,
the tokenizer, the settings. So it is never out of date, needs no times of files, and may be removed
whenever no run is using it. It lies in ``blocks`` of $KOFF_CACHE or, where that is not set, of
``koff`` in $XDG_CACHE_HOME or ~/.cache:

    blocks/<digest>.lock                    who holds it makes the entry; others wait
    blocks/.staging-<digest>/               being written
    blocks/<digest>/entry.json              what it was made of, sizes, statistics: written last
                    blocks.safetensors, ... of one tensor each, memory-mapped by who reads them
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

FACTS = "entry.json"

# Bytes in front of a tensor: its header, which is known once the last row is written. Ample for one
# tensor's, and a multiple of 8, so that int64 values are aligned.
_HEADER = 256

_FULL = (errno.ENOSPC, errno.EDQUOT)

logger = logging.getLogger("koff")


def default_cache() -> Path:
    """Return $KOFF_CACHE if set, else the folder ``koff`` in the user's cache directory."""
    if os.environ.get("KOFF_CACHE"):
        return Path(os.environ["KOFF_CACHE"])
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "koff"


def root() -> Path:
    """Return the folder that entries lie in."""
    return default_cache().expanduser() / "blocks"


def entry(
    made_of: dict[str, Any], what: str, make: Callable[[Path], dict[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """Return the folder of an entry and its facts, and make it if it is not there.

    One process makes it, and the others that want it wait: by a lock of the operating system, which
    goes with its process however that ends.

    Args:
        made_of: all that decides what is in it, ready for JSON.
        what: it is, for errors.
        make: writes the files into a folder and returns their facts, ready for JSON.

    Raises:
        OSError: no room for it; nothing is left of it.
    """
    import filelock  # of huggingface_hub, as `datasets` locks its own cache

    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:40]
    folder, staging = root() / digest, root() / f".staging-{digest}"
    try:
        root().mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(root() / f"{digest}.lock"):
            facts = _facts(folder, made_of)
            if facts is not None:
                return folder, facts
            for rest in (folder, staging):  # of another content, or of a process that was killed
                shutil.rmtree(rest, ignore_errors=True)
            staging.mkdir()
            try:
                facts = make(staging)
                sizes = {file.name: file.stat().st_size for file in staging.iterdir()}
                text = json.dumps({"made_of": made_of, "sizes": sizes, "facts": facts}, indent=1)
                (staging / FACTS).write_text(text, encoding="utf-8")
                staging.rename(folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            return folder, facts
    except OSError as error:
        if error.errno not in (*_FULL, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        got = "a disk that is full" if error.errno in _FULL else f"none ({error.strerror})"
        raise OSError(
            f"pack: the cache {root()} must have room for {what}, got {got}; make room, or set "
            "KOFF_CACHE to another folder"
        ) from error


def _facts(folder: Path, made_of: dict[str, Any]) -> dict[str, Any] | None:
    """Return the facts of an entry; None, with a warning if there is something, if it is not as it
    was written."""
    if not folder.exists():
        return None
    try:
        found = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        for name, size in found["sizes"].items():
            now = (folder / name).stat().st_size
            if now != size:
                raise ValueError(f"{name} of {now} bytes instead of {size}")
        for name, value in made_of.items():
            if found["made_of"].get(name) != value:
                raise ValueError(f"one made with another {name}")
        return dict(found["facts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("koff: %s must be as it was written, got %s; making it anew", folder, error)
        return None


@contextlib.contextmanager
def tensor_file(folder: Path, name: str) -> Iterator[IO[bytes]]:
    """Open a file for the values of one tensor; ``finish_tensor`` says what they are.

    Args:
        folder: of the entry.
        name: of the tensor.
    """
    with (folder / f"{name}.safetensors").open("wb") as file:
        file.write(bytes(_HEADER))
        yield file


def finish_tensor(file: IO[bytes], name: str, dtype: str, shape: list[int]) -> None:
    """Write the header of a file of ``tensor_file``.

    Args:
        file: with all values.
        name: of the tensor.
        dtype: as safetensors names it.
        shape: of the tensor.
    """
    told = {"dtype": dtype, "shape": shape, "data_offsets": [0, file.tell() - _HEADER]}
    header = json.dumps({name: told}).encode()
    file.seek(0)
    file.write(struct.pack("<Q", _HEADER - 8) + header.ljust(_HEADER - 8))
    file.flush()
    os.fsync(file.fileno())  # before entry.json says that it is there
