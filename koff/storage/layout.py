"""The folder of a saved model: what ``koff.json`` says, which files belong to it, and how one
version takes the place of another."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import asked_by, require
from ..model.config import KoffConfig, check_memory_name
from . import adapters as disk
from . import publish as atomic
from .metadata import check_shapes

MARKER, MEMORIES = "koff.json", "memories"
FORMAT = 1
COMMITTED = ".koff-committed"
WEIGHTS = re.compile(r"model[A-Za-z0-9_-]*\.safetensors")
# What must not change without notice; the rest of koff.json (metadata, dates) may be edited.
SEALED = (
    "format",
    "config",
    "memories",
    "dense_widths",
    "widths",
    "kept",
    "sparsity",
    "backbone_sha256",
    "files",
)
_PART = r"[A-Za-z0-9_][A-Za-z0-9._ -]{0,127}"
_NAME = re.compile(rf"{_PART}(/{_PART}){{0,4}}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FEW_BYTES = 1 << 24
_WIDEST = 1 << 31
_AGAIN = "copy the folder again"


# ---- hashes ----


def sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """name -> sha256 of files below a folder, large ones several at a time."""
    paths = {name: folder / name for name in names}
    if sum(path.stat().st_size for path in paths.values()) < _FEW_BYTES:
        return {name: sha256(path) for name, path in paths.items()}
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(paths, pool.map(sha256, paths.values()), strict=True))


def backbone_digest(files: dict[str, str]) -> str:
    """One sha256 for the backbone: over the names and hashes of its weight files."""
    lines = [f"{name} {files[name]}\n" for name in sorted(files) if WEIGHTS.fullmatch(name)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def seal_of(facts: dict[str, Any]) -> str:
    """sha256 over the fields of koff.json that must not change without notice."""
    fields = {name: facts.get(name) for name in SEALED}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


# ---- reading ----


def current(directory: str | Path) -> Path:
    """Where the saved model of a folder is: in it or, if a save was interrupted after its commit,
    in the complete new version inside it."""
    directory = Path(directory)
    committed = directory / COMMITTED
    return committed if committed.is_dir() and not committed.is_symlink() else directory


def read_facts(directory: Path, where: str, *, sealed: bool = True) -> dict[str, Any]:
    """koff.json, with the format version and the type of every field checked.

    Args:
        directory: as ``current`` gives it.
        where: for errors.
        sealed: check the seal too; False leaves that to the caller.

    Raises:
        FileNotFoundError, ValueError: missing, malformed, or of another format.
    """
    check_inside(directory, MARKER, where)
    facts = disk.read_json(directory / MARKER, where)
    version = facts.get("format")
    rule = f"be {FORMAT}"
    good = type(version) is int and version == FORMAT
    require(good, where, "the format version", rule, repr(version), "update koff")
    _check_types(facts, where)
    for name in ("base", "revision"):  # may be null, and are not sealed: left out is null too
        facts.setdefault(name, None)
    if sealed:
        check_seal(facts, where)
    return facts


def check_seal(facts: dict[str, Any], where: str) -> None:
    """Refuse a koff.json whose structure is not what was saved."""
    good = facts.get("checksum") == seal_of(facts)
    require(good, where, MARKER, "match its checksum", "another content", _AGAIN)


def _is_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 1 <= v < _WIDEST for v in values)


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_sparsity(value: Any) -> bool:
    scopes = ("mlp", "model", "non_embedding")
    return isinstance(value, dict) and all(_is_share(value.get(scope)) for scope in scopes)


def _is_kept(value: Any) -> bool:
    if value is None:
        return True
    rows = value if isinstance(value, list) else [None]
    return all(isinstance(row, list) and all(type(i) is int for i in row) for row in rows)


_SIZES = f"be a list of whole numbers of at least 1 and below {_WIDEST}"
_TYPES = {
    "koff": ("be a text", lambda v: isinstance(v, str)),
    "created": ("be a text", lambda v: isinstance(v, str)),
    "base": ("be a text or null", _is_text_or_none),
    "revision": ("be a text or null", _is_text_or_none),
    "versions": ("be an object", lambda v: isinstance(v, dict)),
    "metadata": ("be an object", lambda v: isinstance(v, dict)),
    "config": ("be an object", lambda v: isinstance(v, dict)),
    "memories": ("be a list", lambda v: isinstance(v, list)),
    "dense_widths": (_SIZES, _is_sizes),
    "widths": (_SIZES, _is_sizes),
    "kept": ("be null or one list of whole numbers per layer", _is_kept),
    "sparsity": ("hold the shares mlp, model and non_embedding", _is_sparsity),
    "backbone_sha256": ("be a sha256", lambda v: _is_sha256(v)),
    "files": ("be an object of file names and their sha256", lambda v: _is_files(v)),
}


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_files(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_sha256, value.values()))


def _check_types(facts: dict[str, Any], where: str) -> None:
    for name, (rule, good) in _TYPES.items():
        got = repr(facts.get(name, "nothing"))[:80]
        require(good(facts.get(name)), where, f"{name!r} in {MARKER}", rule, got, _AGAIN)
    try:
        with asked_by(where):
            for name in facts["memories"]:
                check_memory_name(name)
        KoffConfig.from_dict(facts["config"])
    except TypeError as error:  # a wrong type in a file is a damaged file
        raise ValueError(str(error)) from None
    distinct = len(set(facts["memories"])) == len(facts["memories"])
    require(distinct, where, "the memories", "differ", facts["memories"], _AGAIN)
    widths, dense = facts["widths"], facts["dense_widths"]
    good = len(widths) == len(dense) and facts["kept"] is not None or widths == dense
    rule = f"be {dense} without kept neurons, and one per layer with them"
    require(good, where, "the backbone's widths", rule, widths, _AGAIN)
    rows = None if facts["kept"] is None else len(facts["kept"])
    rule = f"have one list of kept neurons for each of {len(dense)} layers"
    require(rows in (None, len(dense)), where, f"'kept' in {MARKER}", rule, rows, _AGAIN)
    check_shapes(facts["metadata"], where, f"the metadata of {MARKER}", "correct or remove it")
    for name in facts["files"]:
        good = is_plain(name)
        require(good, where, "a file name", "lie in the folder", repr(name), _AGAIN)


def is_plain(name: object) -> bool:
    """Whether a file name is relative, leads nowhere else, and is legal on every system."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def _allowed_roots(directory: Path) -> list[Path]:
    """Where a file of a folder may lie: in it, or, for a snapshot in huggingface_hub's cache
    (models--X/snapshots/REVISION), in that cache folder's blobs."""
    real = directory.resolve()
    repo = real.parent.parent
    if real.parent.name == "snapshots" and repo.name.startswith("models--"):
        return [real, repo / "blobs"]
    return [real]


def check_inside(directory: Path, name: str, where: str) -> None:
    """Refuse a file that a symbolic link leads out of its folder, before it is opened.

    Args:
        directory: the saved folder.
        name: of a file in it; one that is not there passes, as reading it says so.
        where: for errors.

    Raises:
        ValueError: a link to elsewhere.
    """
    path = directory / name
    if not path.is_file():
        return
    real = path.resolve()
    good = any(real.is_relative_to(root) for root in _allowed_roots(directory))
    step = "copy the folder again, with its files instead of links"
    require(good, where, name, "lie in its folder", f"a link to {real}", step)


def check_files(directory: Path, facts: dict[str, Any], names: Iterable[str], where: str) -> None:
    """Refuse files whose sha256 is not the one that koff.json recorded.

    Raises:
        FileNotFoundError, ValueError: a missing, foreign or changed file.
    """
    names = sorted(names)
    for name in names:
        disk.require_file(directory / name, where)
    for name, got in digests(directory, names).items():
        wanted = facts["files"].get(name)
        rule = f"have the sha256 {wanted}" if wanted else "be one of the files that were saved"
        require(got == wanted, where, name, rule, got, _AGAIN)


# ---- one version in the place of another ----


def publish(staged: Path, directory: Path, where: str) -> None:
    """Make a complete staged folder the saved model of ``directory``.

    A new directory is the staged one, renamed. In one that exists, files that koff did not write
    stay, so it cannot be swapped as a whole: the staged folder is renamed to ``.koff-committed``
    inside it (from here on the new version counts, see ``current``), then ``settle`` puts its files
    into place.

    Args:
        staged: on the same file system.
        directory: the target.
        where: for errors.

    Raises:
        ValueError: a folder or a link stands in the place of a file; nothing was changed.
    """
    if directory.exists():
        for name in atomic.files_of(staged):
            check_place(directory, name, where)
    atomic.sync_tree(staged)
    if not directory.exists():
        atomic.rename(staged, directory)
        return
    atomic.rename(staged, directory / COMMITTED)
    settle(directory)


def settle(directory: Path) -> None:
    """Finish what an interrupted save began, and remove what it left; may itself be interrupted
    and called again.

    The old version's files go first and config files come last, so that a reader that does not know
    ``.koff-committed`` finds a model missing rather than a mixture of two.
    """
    committed = directory / COMMITTED
    target = Path(os.path.abspath(directory))
    for parent, name in ((target.parent, target.name), (directory, "new"), (directory, COMMITTED)):
        for left in atomic.left_over(parent, name):
            shutil.rmtree(left, ignore_errors=True)
    if not committed.is_dir():
        return
    for name in _owned(directory):
        path = directory / name
        path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == directory or not parent.is_dir() or any(parent.iterdir()):
                break
            parent.rmdir()
    names, touched = atomic.files_of(committed), {directory}
    for name in sorted(names, key=lambda n: (n == MARKER, n.endswith(".json"), n)):
        atomic.link(committed / name, directory / name)
        touched.update(p for p in (directory / name).parents if p.is_relative_to(directory))
    for folder in sorted(touched, reverse=True):
        atomic.sync(folder)
    atomic.remove(committed)


def _owned(directory: Path) -> list[str]:
    """Files of the version that lies in a folder, koff.json last; without a readable koff.json,
    what a backbone would be loaded from."""
    try:
        facts = disk.read_json(directory / MARKER, "koff.save")
        names = [n for n in facts["files"] if is_plain(n)]
    except (OSError, ValueError, KeyError, TypeError):
        names = [p.name for p in directory.iterdir() if WEIGHTS.fullmatch(p.name)]
        names.append("model.safetensors.index.json")
    root = directory.resolve()
    inside = [n for n in names if (directory / n).parent.resolve().is_relative_to(root)]
    return [*sorted(n for n in inside if not (directory / n).is_dir()), MARKER]


def check_place(directory: Path, name: str, where: str) -> None:
    """Refuse a target in which something else than a file stands in the place of a file."""
    path = directory / name
    good = not path.is_dir() and not path.is_symlink()
    require(good, where, f"{path}", "be a file or free", "a folder or a link", "move it away")
    for parent in path.parents:
        if parent == directory:
            break
        good = not parent.is_symlink() and (parent.is_dir() or not parent.exists())
        require(good, where, f"{parent}", "be a folder", "a file or a link", "move it away")
