"""Kill a process before each of its changes on disk: forked children, counted by an audit hook.

Python reports every open for writing, rename, link, removal and new folder to the hook; what
libraries write without Python (safetensors, torch.save) and fsync are wrapped. A child may also
lose, as it dies, half of every file that was not fsynced, as a power cut can.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

KILLED, FAILED = 77, 78
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_RANDOM = re.compile(r"-[0-9a-f]{8}\b")
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink")
_CHANGES += ("os.truncate", "os.chmod", "os.chown", "os.utime")


class Disk:
    """Counts what happens below ``root`` and dies before change number ``at``."""

    def __init__(self, root: Path, at: int | None, lose: bool):
        self.root, self.at, self.lose = str(root), at, lose
        self.done: list[str] = []
        self.dying = False
        self.safe = {p.stat().st_ino for p in Path(root).rglob("*") if p.is_file()}

    def _forget(self, event, path, **where) -> None:
        """The file's data is no longer known to be on disk; nor is its number's next owner's."""
        try:
            found = os.stat(path, **where)
        except OSError:
            return
        if event == "open" or found.st_nlink == 1:
            self.safe.discard(found.st_ino)

    def change(self, what: str) -> None:
        self.done.append(what)
        if len(self.done) == self.at:
            self.dying = True
            if self.lose:
                for path in Path(self.root).rglob("*"):
                    if path.is_file() and path.stat().st_ino not in self.safe:
                        os.truncate(path, path.stat().st_size // 2)
            os._exit(KILLED)

    def hook(self, event: str, args: tuple) -> None:
        if self.dying or not (event == "open" or event in _CHANGES):
            return
        path = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
        relative = not os.path.isabs(path)  # below a descriptor, as shutil.rmtree does
        folder = args[1] if event in ("os.remove", "os.rmdir") else -1
        if event == "open" and not (isinstance(args[2], int) and args[2] & _WRITING):
            return
        if not path.startswith(self.root) and (not relative or folder == -1):
            return
        self.change(f"{event} {path}")
        if event in ("open", "os.remove"):
            self._forget(event, path, **({"dir_fd": folder} if folder != -1 else {}))

    def install(self) -> None:
        import safetensors.torch
        import torch

        save, serialize = torch.save, safetensors.torch.serialize_file

        def counted_fsync(handle):  # what it does is simulated: the real one takes minutes
            self.change("fsync")
            self.safe.add(os.fstat(handle).st_ino)

        def counted_save(value, file, *args, **kwargs):
            self.change(f"torch.save {file}")
            self._forget("open", file)
            save(value, file, *args, **kwargs)

        def counted_serialize(tensors, file, *args, **kwargs):
            self.change(f"safetensors {file}")
            self._forget("open", file)
            serialize(tensors, file, *args, **kwargs)

        os.fsync, torch.save = counted_fsync, counted_save
        safetensors.torch.serialize_file = counted_serialize
        sys.addaudithook(self.hook)


def run_child(action: Callable[[], None], root: Path, at: int | None, lose: bool) -> list[str]:
    """Run an action in a forked child that dies before its change number ``at``.

    Returns:
        The changes, if it came to its end; [] if it was killed.
    """
    reader, writer = os.pipe()
    numbers = random.getstate()
    child = os.fork()
    if child == 0:
        status = FAILED
        try:
            random.setstate(numbers)  # Python seeds it anew in every child
            disk = Disk(root, at, lose)
            disk.install()
            action()
            os.write(writer, "\n".join(disk.done).encode()[:60000])
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (KILLED if at is not None and not text else 0), (status, at)
    return text.split("\n") if text else []


def tree_digest(folder: Path, without: tuple[str, ...] = ()) -> str:
    """sha256 over names (but for random endings) and contents of everything below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.name not in without:
            name = _RANDOM.sub("-", str(path.relative_to(folder)))
            digest.update(name.encode() + b"\0")
            if path.is_file():
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def report(record_property: Callable, kills: int, states: int) -> None:
    """Put the counts of a test into its report."""
    record_property("kills survived", kills)
    record_property("distinct states on disk", states)
    print(f"\n{kills} kills survived, {states} distinct states on disk")
