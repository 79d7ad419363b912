"""Training checkpoints: everything learned, and never the base weights.

A checkpoint is written below ``.koff-staging-checkpoints``, sealed with the sha256 of its files,
and then renamed to ``checkpoint-<step>``, so that under this name there is never a part of one.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import asked_by, require
from ..model.state import KoffState
from ..storage.files import File, digests, is_plain
from ..storage.publish import STAGING, files_of, rename, sync_tree

WEIGHTS, FACTS = "koff_state.safetensors", "koff_state.json"
FORMAT = 1
SEAL, STATE = "koff_checkpoint.json", "trainer_state.json"
STAGED = f"{STAGING}-checkpoints"
_WHERE = "resume"
_EARLIER = "resume from an earlier checkpoint"
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bool: "BOOL"}
_STEP = re.compile(r"checkpoint-(\d{1,18})")

logger = logging.getLogger("koff")


def write_checkpoint(
    state: KoffState, directory: str | Path, tensors: dict[str, Tensor] | None = None
) -> None:
    """Write gates, multiplier, masks and memories of a model into a folder.

    Args:
        state: ``model.koff``.
        directory: an existing folder.
        tensors: the state's tensors, gathered, where they are sharded; None: the state's own.
    """
    tensors = state.state_dict() if tensors is None else tensors
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(tensors, str(Path(directory, WEIGHTS)), metadata={"format": "pt"})
    facts = {
        "format": FORMAT,
        "config": state.config.to_dict(),
        "dense_widths": state.dense_widths,
        "mask_fixed": state.gates is not None and state.gates.fixed,
        "kv_filled": {memory.name: memory.kv_filled for memory in state.memories},
    }
    Path(directory, FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")


@asked_by(_WHERE)
def check_state(state: KoffState, directory: str | Path) -> dict[str, Any]:
    """The facts of a checkpoint, checked, with the names, shapes and dtypes of its tensors, against
    the model that resumes from it; reads no data.

    Raises:
        FileNotFoundError, ValueError: not a koff checkpoint, or one of another model or config.
    """
    path = Path(directory)
    for name in (WEIGHTS, FACTS):
        there, what = (path / name).is_file(), f"checkpoint {path.name}"
        require(there, _WHERE, what, f"hold {name}", "none", _EARLIER, FileNotFoundError)
    facts = File(path / FACTS).json()
    got = facts.get("format")
    require(got == FORMAT, _WHERE, "the checkpoint format", f"be {FORMAT}", got, "update koff")
    for name, own in (("config", state.config.to_dict()), ("dense_widths", state.dense_widths)):
        got, step = facts.get(name), "attach with the settings of the run that wrote it"
        require(got == own, _WHERE, f"the checkpoint's {name}", f"be {own}", got, step)
    fixed, filled = facts.get("mask_fixed"), facts.get("kv_filled")
    good = type(fixed) is bool and (state.gates is not None or not fixed)
    rule, what = "be true or false, and false without gates", "the checkpoint's mask_fixed"
    require(good, _WHERE, what, rule, repr(fixed), _EARLIER)
    good = isinstance(filled, dict) and set(filled) == set(state.memory_names)
    good = good and all(type(value) is bool for value in filled.values())
    rule, what = "be true or false for each memory", "the checkpoint's kv_filled"
    require(good, _WHERE, what, rule, repr(filled), _EARLIER)
    header, own = File(path / WEIGHTS).header(), state.state_dict()
    wanted = {name: (_DTYPES[t.dtype], tuple(t.shape)) for name, t in own.items()}
    differ = sorted(n for n in {*header, *wanted} if header.get(n) != wanted.get(n))
    rule = "have the model's names, shapes and dtypes"
    got = f"a difference in {differ[:3]}"
    require(not differ, _WHERE, "the checkpoint's tensors", rule, got, "check the model")
    return facts


@asked_by(_WHERE)
@torch.no_grad()
def read_checkpoint(state: KoffState, directory: str | Path) -> None:
    """Load what ``write_checkpoint`` wrote, in place, after checking that it belongs to this model.

    Args:
        state: ``model.koff`` of a model attached with the same config.
        directory: the checkpoint.

    Raises:
        FileNotFoundError, ValueError: not a koff checkpoint, or one of another model or config.
    """
    facts, own = check_state(state, directory), state.state_dict()
    tensors = File(Path(directory, WEIGHTS)).tensors()
    for name, tensor in tensors.items():
        good = bool(tensor.isfinite().all())
        require(good, _WHERE, name, "be finite", "NaN or infinity", _EARLIER)
    for name, t in own.items():
        t.copy_(tensors[name])
    if facts["mask_fixed"]:
        state.gates.fix_([mask.clone() for mask in state.gates.masks])
    elif state.gates is not None:
        state.gates.unfix_()
    for name, filled in facts["kv_filled"].items():
        state.memories[name].kv_filled = filled


# ---- complete ones ----


def seal(folder: Path) -> None:
    """Write down what a complete checkpoint holds, as the last of its files, and fsync them all."""
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in digests(folder, files_of(folder)).items()
    }
    text = json.dumps({"format": FORMAT, "files": files}, indent=1)
    (folder / SEAL).write_text(text, encoding="utf-8")
    sync_tree(folder)


@asked_by(_WHERE)
def check_complete(folder: Path) -> list[str]:
    """Names of a checkpoint's files, after checking that all are there and as they were written.

    Raises:
        FileNotFoundError, ValueError: an incomplete or changed checkpoint.
    """
    what, missing = f"checkpoint {folder.name}", FileNotFoundError
    require(folder.is_dir(), _WHERE, what, "be a folder", "none there", _EARLIER, missing)
    for name in (WEIGHTS, FACTS, STATE, SEAL):
        _check_there(folder, name)
    sealed = File(folder / SEAL).json()
    got, files = sealed.get("format"), sealed.get("files")
    same = type(got) is int and got == FORMAT
    require(same, _WHERE, f"the format of {what}", f"be {FORMAT}", got, "update koff")
    good = isinstance(files, dict) and all(map(is_plain, files))
    good = good and {WEIGHTS, FACTS, STATE} <= set(files)
    good = good and all(isinstance(entry, dict) for entry in files.values())
    require(good, _WHERE, f"{SEAL} of {what}", "list its files", repr(files)[:80], _EARLIER)
    for name, entry in files.items():
        _check_there(folder, name)
        size, rule = (folder / name).stat().st_size, f"have {entry.get('size')} bytes"
        require(size == entry.get("size"), _WHERE, f"{name} of {what}", rule, size, _EARLIER)
    for name, got in digests(folder, files).items():
        wanted = files[name].get("sha256")
        require(got == wanted, _WHERE, f"{name} of {what}", f"have sha256 {wanted}", got, _EARLIER)
    return list(files)


def _check_there(folder: Path, name: str) -> None:
    """Refuse a file that is missing, or that a link leads out of the checkpoint."""
    path, what = folder / name, f"checkpoint {folder.name}"
    there, missing = path.is_file(), FileNotFoundError
    require(there, _WHERE, what, f"hold {name}", "none", _EARLIER, missing)
    inside, got = path.resolve().is_relative_to(folder.resolve()), f"a link to {path.resolve()}"
    require(inside, _WHERE, f"{name} of {what}", "lie in it", got, _EARLIER)


def _found(run_dir: Path) -> Iterator[tuple[int, bool, Path]]:
    """(step, is in place, folder) of what may be a checkpoint: those in place, and a complete one
    that only awaits its rename."""
    for parent in (run_dir, run_dir / STAGED):
        for path in parent.iterdir() if parent.is_dir() else ():
            match = _STEP.fullmatch(path.name)
            if match and path.is_dir() and (parent == run_dir or (path / SEAL).is_file()):
                yield int(match[1]), parent == run_dir, path


def last_complete(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, None if there is none; others are ignored with a
    warning.

    Args:
        run_dir: where the trainer writes ``checkpoint-<step>``.
    """
    for _, _, path in sorted(_found(Path(run_dir)), reverse=True):
        try:
            check_complete(path)
        except (FileNotFoundError, ValueError) as error:
            logger.warning("koff: checkpoint %s is ignored: %s", path.name, error)
        else:
            return path
    return None


def settle(run_dir: Path) -> None:
    """Finish the rename of a complete staged checkpoint that has no complete one in its place, and
    remove what interrupted saves left."""
    staged = run_dir / STAGED
    for _, in_place, path in list(_found(run_dir)):
        if not in_place and _is_complete(path) and not _is_complete(run_dir / path.name):
            _put(path, run_dir / path.name)
    shutil.rmtree(staged, ignore_errors=True)


def _is_complete(folder: Path) -> bool:
    try:
        check_complete(folder)
    except (FileNotFoundError, ValueError):
        return False
    return True


def _put(staged: Path, target: Path) -> None:
    """Rename a complete checkpoint into place; what stands there makes room first."""
    if target.exists():
        rename(target, staged.with_name(f"replaced-{target.name}"))
    rename(staged, target)


def publish(run_dir: Path, name: str) -> None:
    """Seal a staged checkpoint and rename it into place; one of the same step makes room first."""
    seal(run_dir / STAGED / name)
    _put(run_dir / STAGED / name, run_dir / name)
    shutil.rmtree(run_dir / STAGED, ignore_errors=True)


def rotate(run_dir: Path, newest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest complete checkpoints beyond ``limit``; never the newest or the best.

    Args:
        run_dir: folder of the run.
        newest: the one just written.
        limit: how many to keep; None or 0: all.
        best: path of the best one, if there is one.
    """
    if not limit:
        return
    complete = [p for _, there, p in _found(run_dir) if there and (p / SEAL).is_file()]
    complete.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
    kept = {newest.name, Path(best or newest).name}
    others = [path for path in complete if path.name not in kept]
    for path in others[: max(0, len(complete) - max(limit, len(kept)))]:
        (run_dir / STAGED).mkdir(exist_ok=True)
        rename(path, run_dir / STAGED / f"old-{path.name}")
    shutil.rmtree(run_dir / STAGED, ignore_errors=True)
