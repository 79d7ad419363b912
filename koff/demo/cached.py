"""Folders of the cache that a demo makes once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def made_once(folder: Path, mark: str, make: Callable[[Path], None]) -> Path:
    """Make a folder of a cache, or find it there.

    Args:
        folder: its place; the parent is made if need be.
        mark: a file in it that is there if it is.
        make: makes the folder at the path that it is given; beside it is room for what it needs on
            the way.

    Returns:
        ``folder``.

    Raises:
        OSError: the cache cannot be written.
    """
    if (folder / mark).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and renamed: what is there is whole, also after an interruption.
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        make(temporary / folder.name)
        try:
            os.replace(temporary / folder.name, folder)
        except OSError:
            # Another process finished first; its folder is as good as this one.
            if not (folder / mark).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
