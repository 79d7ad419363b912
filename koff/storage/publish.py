"""Changes on disk that a crash cannot leave half done: write beside, fsync, then one rename.

A rename is atomic, but neither it nor the data is on disk until the file and the folder are synced.
The first half of this file are the steps; the second is how one saved version takes the place of
another (``publish``, ``settle``).
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import asker
from .files import File, is_plain
from .layout import COMMITTED, INDEX, MARKER, weight_names

STAGING = ".koff-staging"


def sync(path: Path) -> None:
    """fsync a file or, where the system can, a folder."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
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
    target.unlink(missing_ok=True)  # of an earlier, interrupted attempt
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


def remove(folder: Path) -> None:
    """Remove a folder in such a way that its name never stands for a part of it."""
    hidden = new_staging(folder.parent, folder.name)  # rmtree may be killed half way
    rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def new_staging(parent: Path, name: str) -> Path:
    """Return a new path in ``parent`` for a folder that is to become ``name``."""
    return parent / f"{STAGING}-{name}-{secrets.token_hex(4)}"


def left_over(parent: Path, name: str) -> Iterator[Path]:
    """Yield what processes that died while they made ``name`` left in ``parent``."""
    wanted = re.compile(rf"{re.escape(f'{STAGING}-{name}-')}[0-9a-f]{{8}}")
    if parent.is_dir():
        yield from (path for path in parent.iterdir() if wanted.fullmatch(path.name))


def files_of(folder: Path) -> list[str]:
    """Return the names of all files below a folder, relative to it, with "/" between the parts."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# ---- one saved version in the place of another ----


def publish(staged: Path, directory: Path) -> None:
    """Make a complete staged folder the saved model of ``directory``.

    A new directory is the staged one, renamed. In one that exists, files that koff did not write
    stay, and it may be a mount point, so it cannot be swapped as a whole: the staged folder is
    renamed to ``.koff-committed`` inside it (from here on the new version counts, see
    ``layout.current``), then ``settle`` puts its files into place.

    Args:
        staged: on the same file system.
        directory: the target.

    Raises:
        ValueError: a folder or a link stands in the place of a file; nothing was changed.
    """
    if directory.exists():  # all of them first: after the commit there is no way back
        for name in files_of(staged):
            check_place(directory, name)
    sync_tree(staged)
    if not directory.exists():
        rename(staged, directory)
        return
    rename(staged, directory / COMMITTED)
    settle(directory)


def settle(directory: Path) -> None:
    """Finish what an interrupted save began, and remove what it left; may itself be interrupted
    and called again.

    A reader that knows ``.koff-committed`` has the new version all the while. One that does not
    must find a model missing rather than a mixture of two, so the old version's files go first,
    config files come after weights, and koff.json comes last.
    """
    committed = directory / COMMITTED
    target = Path(os.path.abspath(directory))
    # Staged beside a new directory, inside an old one, or renamed away by ``remove`` below.
    for parent, name in ((target.parent, target.name), (directory, "new"), (directory, COMMITTED)):
        for left in left_over(parent, name):
            shutil.rmtree(left, ignore_errors=True)
    if not committed.is_dir():
        return
    for name in _files_of_old_version(directory):
        path = directory / name
        path.unlink(missing_ok=True)
        for parent in path.parents:  # folders that are empty now
            if parent == directory or not parent.is_dir() or any(parent.iterdir()):
                break
            parent.rmdir()
    touched = {directory}
    names = files_of(committed)
    for name in sorted(names, key=lambda n: (n == MARKER, n.endswith(".json"), n)):
        link(committed / name, directory / name)
        touched.update(p for p in (directory / name).parents if p.is_relative_to(directory))
    for folder in sorted(touched, reverse=True):  # the innermost first
        sync(folder)
    remove(committed)  # only once every file is in place, on disk


def _files_of_old_version(directory: Path) -> list[str]:
    """Files of the version that lies in a folder, koff.json last; without a readable koff.json,
    what a backbone would be loaded from."""
    try:
        names = [name for name in File(directory / MARKER).json()["files"] if is_plain(name)]
    except (OSError, ValueError, KeyError, TypeError):
        names = [*weight_names(path.name for path in directory.iterdir()), INDEX]
    # A forged list must not lead to files of others, neither by its names nor through a link.
    root = directory.resolve()
    inside = [n for n in names if (directory / n).parent.resolve().is_relative_to(root)]
    return [*sorted(n for n in inside if not (directory / n).is_dir()), MARKER]


def check_place(directory: Path, name: str) -> None:
    """Refuse a target in which a folder or a link stands in the way of a file.

    Raises:
        ValueError: one does.
    """
    path = directory / name
    if path.is_dir() or path.is_symlink():
        raise ValueError(
            f"{asker()}: {path} must be a file or free, got a folder or a link; move it away"
        )
    for parent in path.parents:
        if parent == directory:
            break
        if parent.is_symlink() or (parent.exists() and not parent.is_dir()):
            raise ValueError(
                f"{asker()}: {parent} must be a folder, got a file or a link; move it away"
            )
