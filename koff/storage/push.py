"""Put a saved model on the Hugging Face hub."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import asked_by
from ..model.narrow import REMOTE_FILE
from ..model.sharding import whole_model
from ..model.state import the_attached
from .card import model_card
from .files import File, sha256
from .hub import PATTERNS
from .layout import ADAPTER_CONFIG, CARD, MARKER, MEMORIES, current
from .manifest import Manifest
from .processes import one_writes, said_by_first
from .publish import files_of
from .save_load import save
from .saved_folder import open_saved
from .space import SMALL_FILES, writing

_RECIPE = "recipe.json"
_UPLOADED = [*PATTERNS, REMOTE_FILE]
# They name the base model.
_ADAPTER = re.compile(rf"{MEMORIES}/[^/]+/[^/]+/{re.escape(ADAPTER_CONFIG)}")
# Of this system or another; one line, and not a lone slash.
_ABSOLUTE = re.compile(r"(/|~[\w.-]*/|[A-Za-z]:[/\\]|\\\\)[^\n]*[^\n/\\][/\\]*")


@asked_by("koff.push_to_hub")
def push_to_hub(
    source: PreTrainedModel | str | Path,
    repo_id: str,
    *,
    tokenizer: Any = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload koff model",
    token: str | None = None,
) -> str:
    """Upload a saved model: one commit, after which the repository holds what the folder holds.

    Checkpoints and the training log stay here. Of absolute paths that recipe, koff.json, card and
    adapters name, the last part is left, or as many parts as tell two of them apart. Of a
    distributed run the first process uploads, and the others wait.

    Args:
        source: folder of a saved model, or an attached model that could be saved.
        repo_id: "user/repo"; created if there is none.
        tokenizer: saved beside the model; for a model only.
        private: of a new repository; None: the account's default.
        revision: an existing branch to push to; None: main.
        message: of the commit.
        token: of the hub; None: the one that ``hf auth login`` stored, or ``HF_TOKEN``.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError, ValueError: no saved model, or one that cannot be saved; nothing is
            uploaded then.
        OSError: there is no room for a copy among the temporary files (of a model, or of a folder
            on another disk).
    """
    if isinstance(source, nn.Module):
        source = whole_model(the_attached(source))
    what, address = f"koff.push_to_hub {repo_id}", ""
    with one_writes(what) as writes:
        if writes:
            address = _push(source, repo_id, tokenizer, private, revision, message, token)
    return said_by_first(what, address)


def _push(
    source: PreTrainedModel | str | Path,
    repo_id: str,
    tokenizer: Any,
    private: bool | None,
    revision: str | None,
    message: str,
    token: str | None,
) -> str:
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory(prefix="koff-push-") as place:
        if isinstance(source, PreTrainedModel):
            source = save(source, Path(place, "saved"), tokenizer=tokenizer)
        folder = current(source)
        with writing("the copy to upload", _copied(folder, Path(place)), Path(place)):
            staging = _portable(folder, Path(place, "staging"))
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=staging,
            revision=revision,
            commit_message=message,
            allow_patterns=_UPLOADED,
            delete_patterns=_UPLOADED,  # what is there and not in the folder: a removed memory
        )
    return commit.commit_url


def _copied(folder: Path, place: Path) -> int:
    """How many bytes a folder takes on the disk of another: on the same disk it is linked there."""
    if not folder.is_dir() or folder.stat().st_dev == place.stat().st_dev:
        return SMALL_FILES
    return sum((folder / name).stat().st_size for name in files_of(folder))


def _link(source: str, target: str) -> None:
    """A hard link where that works: nothing large is copied for an upload."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _portable(directory: Path, staging: Path) -> Path:
    """A copy of a saved model's folder without checkpoints, log and local paths."""
    manifest = open_saved(directory).manifest
    left = shutil.ignore_patterns("checkpoints", "train_log.json", ".*")
    shutil.copytree(directory, staging, copy_function=_link, ignore=left)
    for memory in staging.glob(f"{MEMORIES}/*"):
        if memory.name not in manifest.memories:  # left by an interrupted change
            shutil.rmtree(memory)
    card_is_ours = _is_as_written(staging, CARD, manifest)
    names = [_RECIPE, *(n for n in manifest.files if _ADAPTER.fullmatch(n))]
    files = {n: File(staging / n).json() for n in names if (staging / n).is_file()}
    added = manifest.metadata.get("added") or {}
    # What relative paths in a recipe start from is a folder of this machine.
    for record in (files.get(_RECIPE, {}), *added.values()):
        if "root" in record:
            record["root"] = "."
    public = {"base": manifest.base, "metadata": manifest.metadata}
    short = _short_names([public, files])
    manifest.base = _renamed(manifest.base, short)
    manifest.metadata = _renamed(manifest.metadata, short)
    manifest.files = {n: digest for n, digest in manifest.files.items() if _travels(n)}
    # Other content, other hashes; the manifest's own seal comes with its text, last.
    for name, values in files.items():
        _rewrite(staging / name, json.dumps(_renamed(values, short), indent=1))
        if name in manifest.files:
            manifest.files[name] = sha256(staging / name)
    if card_is_ours:  # one that somebody edited holds their own words
        _rewrite(staging / CARD, model_card(manifest, staging))
        manifest.files[CARD] = sha256(staging / CARD)
    _rewrite(staging / MARKER, manifest.to_text())
    return staging


def _travels(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _UPLOADED)


def _is_as_written(folder: Path, name: str, manifest: Manifest) -> bool:
    """Whether a file is as koff wrote it."""
    path = folder / name
    return path.is_file() and manifest.files.get(name) == sha256(path)


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(the key it stands under, text) of every text in JSON values."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, str):
        yield key, value


def _short_names(values: Any) -> dict[str, str]:
    """Absolute path -> its last part, or as many as tell it from the other data: two domains that
    shared a file name would otherwise be measured on one text."""
    texts = set(_texts(values))
    paths = {text for _, text in texts if _ABSOLUTE.fullmatch(text)}
    data = {text for key, text in texts if key in ("train", "validation", "test")}
    parts = {path: tuple(filter(None, re.split(r"[/\\]", path))) for path in paths | data}
    short = {}
    for path in paths:
        own = parts[path]
        others = {part for part in parts.values() if part != own}
        sizes = range(1, len(own) + 1)
        size = next((n for n in sizes if own[-n:] not in {o[-n:] for o in others}), len(own))
        short[path] = "/".join(own[-size:])
    return short


def _renamed(value: Any, short: dict[str, str]) -> Any:
    """JSON values with absolute paths under their short names."""
    if isinstance(value, dict):
        return {key: _renamed(item, short) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, short) for item in value]
    return short.get(value, value) if isinstance(value, str) else value


def _rewrite(path: Path, text: str) -> None:
    path.unlink()  # a hard link: writing into it would change the original too
    path.write_text(text, encoding="utf-8", newline="\n")
