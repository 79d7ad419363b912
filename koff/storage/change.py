"""Change a saved folder without ever leaving it broken: one memory comes or goes, or new
measurements; nothing else is touched.

koff.json says which memories there are. A new memory's folder is whole and on disk before koff.json
names it; a removed one loses its name first.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .adapters import check_memory, write_memory
from .card import model_card
from .files import digests, is_plain
from .layout import CARD, MARKER, MEMORIES, memory_names
from .lock import locked
from .manifest import Manifest
from .metadata import plain_rows
from .publish import check_place, files_of, new_staging, rename, settle, sync, sync_tree
from .saved_folder import open_saved
from .space import SMALL_FILES, bytes_of, writing


def put_memory(
    directory: Path, model: PreTrainedModel, name: str, record: dict[str, Any] | None = None
) -> None:
    """Write one memory of a model into the folder that its backbone was loaded from.

    Args:
        directory: of the saved model; it must not list the name yet.
        model: loaded from there, and holding the memory.
        name: of the memory.
        record: JSON values for koff.json: what it was trained on ("source") and how.

    Raises:
        FileNotFoundError, OSError, ValueError: a memory that is not finite, or a folder that is
            damaged, has no room or is being changed by another process; it is then as before.
    """
    memory = model.koff.memories[name]
    check_memory(memory)
    needed = bytes_of(memory.parameters()) + SMALL_FILES
    with _changed(directory, f"memory {name!r}", needed) as (manifest, staging):
        target, new = directory / MEMORIES / name, staging / MEMORIES / name
        # A link in the place of memories/ would put the new folder elsewhere.
        check_place(directory, f"{MEMORIES}/{name}/file")
        if target.exists():  # not listed: an earlier attempt was cut short here
            shutil.rmtree(target)
        write_memory(model, memory, new, manifest)
        manifest.files |= digests(staging, filter(is_plain, files_of(staging)))
        manifest.memories = [*manifest.memories, name]
        forget(manifest.metadata, name)  # of one that had this name before
        if record is not None:
            added = manifest.metadata.get("added") or {}
            manifest.metadata["added"] = added | {name: record}
        # Whole and on disk before koff.json names it; memories/ may be new in the folder, too.
        sync_tree(staging)
        target.parent.mkdir(exist_ok=True)
        rename(new, target)
        sync(directory)


def drop_memory(directory: Path, name: str) -> None:
    """Take one memory out of a saved folder; what was measured with it goes too.

    Args:
        directory: of the saved model.
        name: of the memory.
    """
    with _changed(directory) as (manifest, _):
        manifest.memories = [other for other in manifest.memories if other != name]
        for file in memory_names(manifest.files, name):
            del manifest.files[file]
        forget(manifest.metadata, name)
    # koff.json no longer names it, so a crash here leaves files that nobody reads.
    shutil.rmtree(directory / MEMORIES / name, ignore_errors=True)


def write_results(directory: Path, rows: list[dict[str, Any]], kind: str = "results") -> None:
    """Replace what koff.json and the model card say was measured.

    Args:
        directory: of the saved model.
        rows: of ``koff.evaluate``, or of `koff eval --tasks`.
        kind: "results" or "tasks": under which name of the metadata.
    """
    with _changed(directory) as (manifest, _):
        manifest.metadata[kind] = plain_rows(rows)


@contextlib.contextmanager
def _changed(
    directory: Path, what: str = "koff.json and the card", needed: int = 0
) -> Iterator[tuple[Manifest, Path]]:
    """Give the manifest of a saved folder and a staging folder in it; if the block ends well, the
    manifest and the card made from it take the place of the old ones, each whole at any time.

    An interrupted save is finished first, and what a killed change left in staging removed.

    Args:
        directory: of a saved model.
        what: is written.
        needed: bytes of it.
    """
    if not directory.is_dir():
        open_saved(directory)  # which says what is wrong with it
    with locked(directory), writing(what, needed, directory):
        settle(directory)
        staging = new_staging(directory, "new")
        staging.mkdir()
        try:
            manifest = open_saved(directory).manifest
            yield manifest, staging
            # Also in the place of a card that somebody edited: what it says of memories is wrong
            # now.
            card = model_card(manifest, directory)
            manifest.files[CARD] = hashlib.sha256(card.encode()).hexdigest()
            for name, text in ((MARKER, manifest.to_text()), (CARD, card)):
                (staging / name).write_text(text, encoding="utf-8", newline="\n")
                sync(staging / name)
                rename(staging / name, directory / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def forget(metadata: dict[str, Any], name: str) -> None:
    """Drop what metadata says of a memory that goes, or went before another takes its name."""
    for kind in ("data", "added"):
        (metadata.get(kind) or {}).pop(name, None)
    for kind in ("results", "tasks"):
        if metadata.get(kind):
            metadata[kind] = [row for row in metadata[kind] if row["memory"] != name]
