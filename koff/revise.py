"""Change a saved folder without ever leaving it broken: one memory comes or goes, nothing else is
touched.

``koff.json`` says which memories there are. A new memory's folder is whole and on disk before
``koff.json`` names it; a removed one loses its name first.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from .card import model_card
from .disk import read_json
from .errors import require
from .io import MARKER, MEMORIES, _sync, _write_memory


def saved_facts(directory: Path, where: str) -> dict[str, Any]:
    """The content of koff.json of a local folder.

    Raises:
        FileNotFoundError, ValueError: not a saved model, or damaged.
    """
    there, step = (directory / MARKER).is_file(), "give the folder that koff.save wrote"
    got = "a folder without koff.json" if directory.is_dir() else "no folder there"
    rule = "be a saved model"
    require(there, where, str(directory), rule, got, step, FileNotFoundError)
    return read_json(directory / MARKER, where)


def saved_tokenizer(directory: Path) -> Any:
    """The tokenizer saved in a folder, None if there is none; runs no code from there."""
    if not (directory / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def write_facts(directory: Path, facts: dict[str, Any]) -> None:
    """Replace koff.json, then the model card made from it; each is whole at any time."""
    _replace(directory / MARKER, json.dumps(facts, indent=1))
    _replace(directory / "README.md", model_card(facts, directory))


def write_results(directory: Path, rows: list[dict[str, Any]]) -> None:
    """Replace what koff.json and the model card say was measured: rows of ``koff.evaluate``."""
    facts = saved_facts(directory, "koff")
    facts["metadata"]["results"] = rows
    write_facts(directory, facts)


def put_memory(
    directory: Path, model: PreTrainedModel, name: str, record: dict[str, Any] | None = None
) -> None:
    """Write one memory of a model into the folder that its backbone was loaded from.

    Args:
        directory: of the saved model; it must not list the name yet.
        model: loaded from there, and holding the memory.
        name: of the memory.
        record: JSON values to keep in koff.json: what it was trained on ("source") and how.
    """
    facts = saved_facts(directory, "koff")
    target, staging = directory / MEMORIES / name, directory / f".{name}.new"
    for left in (staging, target):  # not listed: an earlier attempt was cut short here
        if left.exists():
            shutil.rmtree(left)
    try:
        memory = model.koff.memories[name]
        _write_memory(model, memory, staging, facts["backbone_sha256"], facts["base"])
        _sync(staging)
        _sync_folders(staging)
        target.parent.mkdir(exist_ok=True)
        os.replace(staging, target)
        _sync_folder(target.parent)
        _sync_folder(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if record is not None:
        facts["metadata"].setdefault("added", {})[name] = record
    write_facts(directory, facts | {"memories": [*facts["memories"], name]})


def drop_memory(directory: Path, name: str) -> None:
    """Take one memory out of a saved folder; what was measured with it goes too."""
    facts = saved_facts(directory, "koff.remove_memory")
    facts["memories"] = [other for other in facts["memories"] if other != name]
    metadata = facts["metadata"]
    metadata.get("added", {}).pop(name, None)
    if metadata.get("results"):
        metadata["results"] = [row for row in metadata["results"] if row["memory"] != name]
    write_facts(directory, facts)
    shutil.rmtree(directory / MEMORIES / name, ignore_errors=True)


def publish_folder(staging: Path, directory: Path) -> None:
    """Move a finished folder to where there is none yet, or an empty one."""
    _sync(staging)
    _sync_folders(staging)
    os.chmod(staging, 0o755)  # mkdtemp makes it private, which a result is not
    if directory.exists():
        directory.rmdir()
    os.replace(staging, directory)
    _sync_folder(directory.parent)


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    _sync_folder(path.parent)


def _sync_folders(folder: Path) -> None:
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        _sync_folder(path)


def _sync_folder(folder: Path) -> None:
    """Make a folder's entries last; only POSIX systems can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
