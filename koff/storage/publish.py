"""Changes on disk that a crash cannot leave half done: write beside, fsync, then one rename.

A rename is atomic, but neither it nor the data is on disk until the file and the folder are synced.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

STAGING = ".koff-staging"


def sync(path: Path) -> None:
    """fsync a file or, where the system can, a folder."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """fsync every file of a folder, then every folder, the innermost first."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def rename(source: Path, target: Path) -> None:
    """Rename, and return only when the new name is on disk."""
    os.replace(source, target)
    for parent in {source.parent, target.parent}:
        sync(parent)


def link(source: Path, target: Path) -> None:
    """Give a file a second name (or, where there are no hard links, a second copy)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


def remove(folder: Path) -> None:
    """Remove a folder in such a way that its name never stands for a part of it."""
    hidden = new_staging(folder.parent, folder.name)
    rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def new_staging(parent: Path, name: str) -> Path:
    """A new path in ``parent`` for a folder that is to become ``name``."""
    return parent / f"{STAGING}-{name}-{secrets.token_hex(4)}"


def left_over(parent: Path, name: str) -> Iterator[Path]:
    """What processes that died while they made ``name`` left in ``parent``."""
    wanted = re.compile(rf"{re.escape(f'{STAGING}-{name}-')}[0-9a-f]{{8}}")
    if parent.is_dir():
        yield from (path for path in parent.iterdir() if wanted.fullmatch(path.name))


def files_of(folder: Path) -> list[str]:
    """Names of all files below a folder, relative to it, with "/" between the parts."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
