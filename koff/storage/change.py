"""Change a saved folder without ever leaving it broken: one memory comes or goes, nothing else is
touched.

``koff.json`` says which memories there are. A new memory's folder is whole and on disk before
``koff.json`` names it; a removed one loses its name first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from ..errors import refuse, require
from . import backbone
from . import publish as atomic
from .card import model_card
from .layout import (
    MARKER,
    MEMORIES,
    check_files,
    check_inside,
    check_place,
    current,
    digests,
    is_plain,
    read_facts,
    seal_of,
    settle,
)
from .metadata import plain_rows
from .save_load import _write_memory, check_memory

CARD, _INDEX = "README.md", "model.safetensors.index.json"


def saved_facts(directory: Path, where: str) -> dict[str, Any]:
    """The content of koff.json of a local folder.

    Raises:
        FileNotFoundError, ValueError: not a saved model, or damaged.
    """
    place = current(directory)
    there, step = (place / MARKER).is_file(), "give the folder that koff.save wrote"
    got = "a folder without koff.json" if directory.is_dir() else "no folder there"
    rule = "be a saved model"
    require(there, where, str(directory), rule, got, step, FileNotFoundError)
    return read_facts(place, where)


def load_saved_tokenizer(directory: str | Path, where: str = "koff") -> Any:
    """Returns the tokenizer that was saved with a model; runs no code from the folder.

    Args:
        directory: of the saved model.
        where: for errors.

    Raises:
        FileNotFoundError, ValueError: none there, one of its files is not as it was saved, or
            transformers cannot load it.
    """
    place, facts = current(directory), saved_facts(Path(directory), where)
    step = "save the model again with tokenizer=..."
    there, got = _has_tokenizer(place), "a folder without one"
    rule = "hold a tokenizer"
    require(there, where, str(directory), rule, got, step, FileNotFoundError)
    names = tokenizer_names(facts["files"])
    for name in names:
        check_inside(place, name, where)
    check_files(place, facts, names, where)  # another tokenizer would read other text, silently
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # transformers' and tokenizers' own, of many types
        first = str(error).strip().partition("\n")[0]
        got = f"{type(error).__name__}: {first}"
        refuse(where, f"the tokenizer in {directory}", "be one that transformers loads", got, step)


def saved_tokenizer(directory: Path, where: str = "koff") -> Any:
    """The tokenizer that was saved with a model, None if there is none; errors as
    ``load_saved_tokenizer``."""
    there = _has_tokenizer(current(directory))
    return load_saved_tokenizer(directory, where) if there else None


def _has_tokenizer(place: Path) -> bool:
    return any((place / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))


def tokenizer_names(files: dict[str, str]) -> list[str]:
    """Which of the saved files make the tokenizer: those that nothing else accounts for. Code is
    none of them: it is never run, and does not travel over the hub.

    Args:
        files: "files" of koff.json.
    """
    others = {*backbone.names(files), CARD, _INDEX}
    own = [name for name in files if name not in others and not name.endswith(".py")]
    return [name for name in own if not name.startswith(f"{MEMORIES}/")]


def write_results(directory: Path, rows: list[dict[str, Any]]) -> None:
    """Replace what koff.json and the model card say was measured: rows of ``koff.evaluate``."""
    with _staging(directory) as staging:
        facts = saved_facts(directory, "koff")
        facts["metadata"]["results"] = plain_rows(rows)
        _replace_facts(directory, facts, staging)


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
    memory = model.koff.memories[name]
    check_memory(memory, "koff")
    with _staging(directory) as staging:
        facts = saved_facts(directory, "koff")
        target, new = directory / MEMORIES / name, staging / MEMORIES / name
        check_place(directory, f"{MEMORIES}/{name}/file", "koff")
        if target.exists():  # not listed: an earlier attempt was cut short here
            shutil.rmtree(target)
        _write_memory(model, memory, new, facts["backbone_sha256"], facts["base"])
        facts["files"] |= digests(staging, filter(is_plain, atomic.files_of(staging)))
        facts["memories"] = [*facts["memories"], name]
        _forget(facts["metadata"], name)
        if record is not None:
            facts["metadata"]["added"] = (facts["metadata"].get("added") or {}) | {name: record}
        atomic.sync_tree(staging)
        target.parent.mkdir(exist_ok=True)
        atomic.rename(new, target)
        atomic.sync(directory)
        _replace_facts(directory, facts, staging)


def drop_memory(directory: Path, name: str) -> None:
    """Take one memory out of a saved folder; what was measured with it goes too."""
    with _staging(directory) as staging:
        facts = saved_facts(directory, "koff.remove_memory")
        facts["memories"] = [other for other in facts["memories"] if other != name]
        gone = f"{MEMORIES}/{name}/"
        facts["files"] = {n: d for n, d in facts["files"].items() if not n.startswith(gone)}
        _forget(facts["metadata"], name)
        _replace_facts(directory, facts, staging)
        shutil.rmtree(directory / MEMORIES / name, ignore_errors=True)


def _forget(metadata: dict[str, Any], name: str) -> None:
    """Drop what metadata says of a memory that goes, or went before another takes its name."""
    for kind in ("data", "added"):
        (metadata.get(kind) or {}).pop(name, None)
    if metadata.get("results"):
        metadata["results"] = [row for row in metadata["results"] if row["memory"] != name]


@contextlib.contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """A new folder inside a saved one, whose leftovers the next change removes; an interrupted save
    is finished first."""
    settle(directory)
    staging = atomic.new_staging(directory, "new")
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace_facts(directory: Path, facts: dict[str, Any], staging: Path) -> None:
    """Replace koff.json, then the model card made from it; each is whole at any time."""
    card = model_card(facts, directory)
    facts["files"][CARD] = hashlib.sha256(card.encode()).hexdigest()
    facts["checksum"] = seal_of(facts)
    for name, text in ((MARKER, json.dumps(facts, indent=1)), (CARD, card)):
        (staging / name).write_text(text, encoding="utf-8", newline="\n")
        atomic.sync(staging / name)
        atomic.rename(staging / name, directory / name)
