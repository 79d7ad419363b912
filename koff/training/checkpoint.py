"""Training checkpoints: what one holds, and when it is complete.

A checkpoint holds everything learned, and never the base weights. Besides koff's own two files
(``WEIGHTS`` and ``FACTS``) there are those of transformers' Trainer: optimizer, scheduler, random
states, ``trainer_state.json``. ``resume_checks`` looks into those.

It is written below ``.koff-staging-checkpoints``, sealed with the size and sha256 of all its files,
and then renamed to ``checkpoint-<step>``. So under this name there is never a part of one, whatever
moment a process dies at:

    run/.koff-staging-checkpoints/checkpoint-9    being written; once sealed, it counts
    run/checkpoint-9                              complete

Errors begin with "resume: ", since only who resumes meets them.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from ..errors import asked_by
from ..model.config import KoffConfig
from ..model.state import KoffState
from ..storage.files import File, digests, is_plain
from ..storage.publish import STAGING, files_of, rename, sync_tree

WEIGHTS = "koff_state.safetensors"  # gates, multiplier, masks, memories
FACTS = "koff_state.json"  # what no tensor says: the config, whether the mask is fixed
STATE = "trainer_state.json"  # transformers' own: steps, logs
SEAL = "koff_checkpoint.json"  # written last
NEEDED = (WEIGHTS, FACTS, STATE, SEAL)
STAGED = f"{STAGING}-checkpoints"
FORMAT = 1

EARLIER = "resume from an earlier checkpoint"

# A step has at most 18 digits, which is still an int64.
_NAME = re.compile(r"checkpoint-(\d{1,18})")

# What safetensors calls the dtypes of a koff state: memories and gates are fp32 (fp64 where a model
# was turned to it), masks are bool.
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bool: "BOOL"}

logger = logging.getLogger("koff")


# ---- koff's own two files ----


def write_checkpoint(state: KoffState, directory: str | Path) -> None:
    """Write gates, multiplier, masks and memories of a model into a folder.

    Args:
        state: ``model.koff``.
        directory: an existing folder.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.tensors().items()}
    save_file(tensors, str(Path(directory, WEIGHTS)), metadata={"format": "pt"})
    facts = {
        "format": FORMAT,
        "config": state.config.to_dict(),
        "dense_widths": state.dense_widths,
        "mask_fixed": state.gates is not None and state.gates.fixed,
        "kv_filled": {memory.name: memory.kv_filled for memory in state.memories},
    }
    Path(directory, FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")


@asked_by("resume")
def check_state(state: KoffState, directory: str | Path) -> None:
    """Refuse a checkpoint that is not of the model that resumes from it; reads no tensor's data.

    Compared are the config, the widths, and the names, shapes and dtypes of all tensors.

    Args:
        state: ``model.koff`` of the model that resumes.
        directory: a complete checkpoint.

    Raises:
        FileNotFoundError, ValueError: not a koff checkpoint, or one of another model or config.
    """
    facts = File(Path(directory, FACTS)).json()
    if facts.get("format") != FORMAT:
        raise ValueError(
            f"resume: the checkpoint format must be {FORMAT}, got {facts.get('format')}; update "
            "koff"
        )
    found = {"config": _config_of(facts), "dense_widths": facts.get("dense_widths")}
    own_facts = {"config": state.config.to_dict(), "dense_widths": state.dense_widths}
    for name, own in own_facts.items():
        if found[name] != own:
            raise ValueError(
                f"resume: the checkpoint's {name} must be {own}, got {found[name]}; attach "
                "with the settings of the run that wrote it"
            )
    fixed = facts.get("mask_fixed")
    if type(fixed) is not bool or (fixed and state.gates is None):
        raise ValueError(
            "resume: the checkpoint's mask_fixed must be true or false, and false without gates, "
            f"got {fixed!r}; {EARLIER}"
        )
    filled = facts.get("kv_filled")
    if (
        not isinstance(filled, dict)
        or set(filled) != set(state.memory_names)
        or not all(type(value) is bool for value in filled.values())
    ):
        raise ValueError(
            "resume: the checkpoint's kv_filled must be true or false for each memory, got "
            f"{filled!r}; {EARLIER}"
        )
    header = File(Path(directory, WEIGHTS)).header()
    wanted = {name: (_DTYPES[t.dtype], tuple(t.shape)) for name, t in state.tensors().items()}
    differ = sorted(n for n in {*header, *wanted} if header.get(n) != wanted.get(n))
    if differ:
        raise ValueError(
            "resume: the checkpoint's tensors must have the model's names, shapes and dtypes, got "
            f"a difference in {differ[:3]}; check the model"
        )


def _config_of(facts: dict[str, Any]) -> Any:
    """A checkpoint's config, with the defaults of settings that its version of koff did not have;
    what is no config stays as it is."""
    try:
        return KoffConfig.from_dict(facts["config"]).to_dict()
    except (KeyError, TypeError, ValueError):
        return facts.get("config")


@torch.no_grad()
@asked_by("resume")
def read_checkpoint(state: KoffState, directory: str | Path) -> None:
    """Load what ``write_checkpoint`` wrote, in place.

    Args:
        state: ``model.koff`` of a model that ``check_state`` found to fit.
        directory: the checkpoint.

    Raises:
        FileNotFoundError, ValueError: a value that is not finite; nothing was changed.
    """
    facts = File(Path(directory, FACTS)).json()
    tensors = File(Path(directory, WEIGHTS)).tensors()
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"resume: {name} must be finite, got NaN or infinity; {EARLIER}")
    for name, own in state.tensors().items():
        own.copy_(tensors[name])
    if facts["mask_fixed"]:
        # The masks came with the tensors. ``fix_`` also stops the gates' gradients.
        state.gates.fix_([mask.clone() for mask in state.gates.masks])
    elif state.gates is not None:
        state.gates.unfix_()  # this run may have fixed a later mask already
    for name, filled in facts["kv_filled"].items():
        state.memories[name].kv_filled = filled


# ---- complete or not ----


def seal(folder: Path) -> None:
    """Write down what a complete checkpoint holds, as the last of its files, and fsync them all."""
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in digests(folder, files_of(folder)).items()
    }
    text = json.dumps({"format": FORMAT, "files": files}, indent=1)
    (folder / SEAL).write_text(text, encoding="utf-8")
    sync_tree(folder)


@asked_by("resume")
def check_complete(folder: Path) -> list[str]:
    """Return the names of a checkpoint's files, if all are there and as they were written.

    Files that the seal does not name are not looked at: somebody put them there.

    Raises:
        FileNotFoundError, ValueError: an incomplete or changed checkpoint.
    """
    what = f"checkpoint {folder.name}"
    if not folder.is_dir():
        raise FileNotFoundError(f"resume: {what} must be a folder, got none there; {EARLIER}")
    for name in NEEDED:
        _check_there(folder, name)
    sealed = File(folder / SEAL).json()
    version = sealed.get("format")
    if type(version) is not int or version != FORMAT:  # true == 1, but is no version
        raise ValueError(
            f"resume: the format of {what} must be {FORMAT}, got {version}; update koff"
        )
    files = sealed.get("files")
    if (
        not isinstance(files, dict)
        or not all(map(is_plain, files))  # before a name becomes a path
        or not {WEIGHTS, FACTS, STATE} <= set(files)
        or not all(isinstance(entry, dict) for entry in files.values())
    ):
        raise ValueError(
            f"resume: {SEAL} of {what} must list its files, got {repr(files)[:80]}; {EARLIER}"
        )
    # All sizes before the first hash: a file that was cut is found without reading gigabytes.
    for name, entry in files.items():
        _check_there(folder, name)
        size = (folder / name).stat().st_size
        if size != entry.get("size"):
            raise ValueError(
                f"resume: {name} of {what} must have {entry.get('size')} bytes, got {size}; "
                f"{EARLIER}"
            )
    for name, digest in digests(folder, files).items():
        if digest != files[name].get("sha256"):
            raise ValueError(
                f"resume: {name} of {what} must have sha256 {files[name].get('sha256')}, got "
                f"{digest}; {EARLIER}"
            )
    return list(files)


def _check_there(folder: Path, name: str) -> None:
    """Refuse a file that is missing, or that a link leads out of the checkpoint."""
    path = folder / name
    what = f"checkpoint {folder.name}"
    if not path.is_file():
        raise FileNotFoundError(f"resume: {what} must hold {name}, got none; {EARLIER}")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"resume: {name} of {what} must lie in it, got a link to {path.resolve()}; {EARLIER}"
        )


def _is_complete(folder: Path) -> bool:
    try:
        check_complete(folder)
    except (FileNotFoundError, ValueError):
        return False
    return True


# ---- the checkpoints of a run ----


class _Candidate(NamedTuple):
    """A folder that may be a checkpoint. Candidates sort by step; of two of one step, the one in
    place is the greater."""

    step: int
    in_place: bool
    path: Path


def _candidates(run_dir: Path) -> Iterator[_Candidate]:
    """Yield every folder that has a checkpoint's name: those in place, and a sealed one that only
    awaits its rename."""
    for parent in (run_dir, run_dir / STAGED):
        for path in parent.iterdir() if parent.is_dir() else ():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir() and (parent == run_dir or (path / SEAL).is_file()):
                yield _Candidate(int(match[1]), parent == run_dir, path)


def last_complete(run_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint of a run, None if there is none; others are ignored
    with a warning.

    Args:
        run_dir: where the trainer writes ``checkpoint-<step>``.
    """
    for candidate in sorted(_candidates(Path(run_dir)), reverse=True):
        try:
            check_complete(candidate.path)
        except (FileNotFoundError, ValueError) as error:
            logger.warning("koff: checkpoint %s is ignored: %s", candidate.path.name, error)
        else:
            return candidate.path
    return None


def clean_up(run_dir: Path) -> None:
    """Finish the rename of a complete staged checkpoint that has no complete one in its place, and
    remove what interrupted saves left."""
    for candidate in list(_candidates(run_dir)):  # listed first: renames change the folders
        staged, target = candidate.path, run_dir / candidate.path.name
        if not candidate.in_place and _is_complete(staged) and not _is_complete(target):
            _rename_into_place(staged, target)
    shutil.rmtree(run_dir / STAGED, ignore_errors=True)


def put_in_place(run_dir: Path, name: str) -> None:
    """Seal a staged checkpoint and rename it into place."""
    seal(run_dir / STAGED / name)
    _rename_into_place(run_dir / STAGED / name, run_dir / name)
    shutil.rmtree(run_dir / STAGED, ignore_errors=True)


def _rename_into_place(staged: Path, target: Path) -> None:
    """Rename a sealed checkpoint into place; what stands there makes room first."""
    if target.exists():
        # A folder cannot be swapped for another in one step. In the moment between the two renames
        # the staged one counts, since it is sealed.
        rename(target, staged.with_name(f"replaced-{target.name}"))
    rename(staged, target)


def rotate(run_dir: Path, newest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest complete checkpoints beyond ``limit``; never the newest or the best.

    Args:
        run_dir: folder of the run.
        newest: the one just written.
        limit: how many may stay; None or 0: all.
        best: path of the best one, if there is one.
    """
    if not limit:
        return
    # Only sealed ones count and go: an incomplete one may be somebody's, and must not take the
    # place of one that can be resumed from.
    complete = [c.path for c in _candidates(run_dir) if c.in_place and (c.path / SEAL).is_file()]
    # By time and not by step: a run that went back to step 3 leaves older ones of higher numbers.
    complete.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
    spared = {newest.name, Path(best or newest).name}
    others = [path for path in complete if path.name not in spared]
    for path in others[: max(0, len(complete) - max(limit, len(spared)))]:
        # Renamed first, so that no kill leaves half of one under its name.
        (run_dir / STAGED).mkdir(exist_ok=True)
        rename(path, run_dir / STAGED / f"old-{path.name}")
    shutil.rmtree(run_dir / STAGED, ignore_errors=True)
