"""One process at a time changes a folder."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..errors import asker

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".koff-lock"

# Locks of this process and the thread that took each: what holds a folder may change it.
_held: dict[Path, int] = {}


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep others from changing a folder inside the block; the same thread may lock it again.

    The lock is the operating system's: it goes with its process, however that ends. So one that a
    dead process left is no lock. The file is there to say who holds it. On file systems without
    locks there is none.

    Args:
        directory: to be changed. If it does not exist yet, the lock's file lies beside it.

    Raises:
        ValueError: another process (or thread) holds it.
    """
    with contextlib.ExitStack() as held:
        for path in _lock_files(directory):
            held.enter_context(_locked(path, directory))
        yield


def check_unlocked(directory: Path) -> None:
    """Refuse a folder that another process is changing.

    Raises:
        ValueError: one is.
    """
    if any(path.exists() for path in _lock_files(directory)):
        with locked(directory):
            pass


def _lock_files(directory: Path) -> list[Path]:
    """In a folder that exists; beside one that does not. If that is made meanwhile, both count."""
    target = Path(os.path.abspath(directory))  # "." has no name
    inside, beside = target / LOCK, target.parent / f"{LOCK}-{target.name}"
    if not target.is_dir():
        return [beside]
    return [inside, beside] if beside.exists() else [inside]


@contextlib.contextmanager
def _locked(path: Path, directory: Path) -> Iterator[None]:
    if _held.get(path) == threading.get_ident():
        yield
        return
    file = _take(path, directory)
    _held[path] = threading.get_ident()
    try:
        yield
    finally:
        del _held[path]
        # Its name goes while it is still locked: who opens it now makes a new one.
        path.unlink(missing_ok=True)
        file.close()


def _take(path: Path, directory: Path) -> IO[str]:
    """Open and lock a file, and write into it who we are."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                holder = _read_holder(file)
                file.close()
                raise ValueError(
                    f"{asker()}: no other process may be changing {directory}, got {holder}; wait "
                    "for it, or choose another folder"
                ) from None
        # Between opening and locking, whoever held it may have removed the file: then this one has
        # no name, and would keep nobody out.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    file.truncate(0)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": now}, file)
    file.flush()
    return file


def _read_holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        who = json.load(file)
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (ValueError, KeyError, TypeError):  # it has not written it yet
        return "one"
