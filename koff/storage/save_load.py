"""Save and load a backbone with its memories: safetensors and JSON, staged and moved into place."""

from __future__ import annotations

import copy
import datetime
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import PreTrainedModel

from koffkernels.checks import check_there

from ..data.records import check_tokenizer
from ..errors import asked_by
from ..model import arch
from ..model.attach import install
from ..model.memory_argument import write_backbone
from ..model.sharding import whole_model
from ..model.state import KoffState, the_attached
from ..pruning.binarize import sparsity
from ..version import __version__
from .adapters import check_memory, read_memory, write_memory
from .backbone import build_backbone, check_backbone, check_writable
from .card import model_card
from .change import forget
from .files import digests, is_plain
from .hub import resolve
from .layout import (
    CARD,
    CONFIG,
    INDEX,
    KV,
    MARKER,
    MEMORIES,
    backbone_names,
    current,
    memory_parts,
    tokenizer_names,
    weight_names,
)
from .lock import locked
from .manifest import Manifest, backbone_digest
from .metadata import plain_metadata
from .processes import one_writes
from .publish import files_of, new_staging, publish, settle
from .saved_folder import SavedFolder, open_saved
from .space import SMALL_FILES, bytes_of, writing


@asked_by("koff.save")
def save(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the backbone, the memories and a model card.

    Everything is written into a new folder first and takes the place of what was there in one step,
    so that at every moment either the old or the new model loads completely, also after a crash.
    Files that koff did not write stay; where one has the name of a file of the model, such as
    config.json, nothing is written unless ``overwrite`` says so. One process at a time may save
    into a directory: another is refused meanwhile. Of a distributed run the first process writes,
    and the others, which may or may not come here too, return when it is done.

    Args:
        model: an attached model without gates (compacted, or attached with target_sparsity=0).
        directory: where; created if needed.
        tokenizer: saved beside the model. None: where a saved model is replaced that has as many
            tokens, its tokenizer stays.
        metadata: JSON values to store, beside those that ``koff.load`` has read: "base" (id of the
            dense model) and "revision", texts; "data" and "general" ({name: what it was trained
            on}) and "results" (rows of ``koff.evaluate``), which the card shows; "added", koff's
            own; and whatever else.
        overwrite: replace a model that is there, saved by koff or by others.

    Returns:
        The directory.

    Raises:
        ValueError: gates that are not compacted, an adapter around a layer, a KV memory that was
            never filled, a taken directory, one that another process is changing, or metadata that
            JSON cannot hold; nothing is written then.
        OSError: there is no room for it on the disk; what was there before is as it was.
    """
    directory = Path(directory)
    model = the_attached(model)
    check_tokenizer(tokenizer)
    model = whole_model(model)
    with one_writes(f"koff.save {directory}") as writes:
        if writes:
            metadata = _carried(model) | plain_metadata(metadata)
            _check_model(model)
            _check_place(directory, overwrite)
            directory.parent.mkdir(parents=True, exist_ok=True)
            with locked(directory):
                _check_place(directory, overwrite)  # nobody else can change it any more
                # A model that it replaces goes only when this one is there.
                needed = bytes_of(model.parameters()) + SMALL_FILES
                with writing("the model", needed, directory):
                    _write(model, directory, tokenizer, metadata, overwrite)
    return directory


def _carried(model: PreTrainedModel) -> dict[str, Any]:
    """What was read beside the model, of the memories that are still there."""
    metadata = copy.deepcopy(model.koff.metadata)
    named = {*(metadata.get("data") or ()), *(metadata.get("added") or ())}
    for name in named - {*model.koff.memory_names}:
        forget(metadata, name)
    return metadata


def _check_model(model: PreTrainedModel) -> None:
    if model.koff.gates is not None:
        raise ValueError(
            "koff.save: the model must be compacted, got one with gates; call koff.binarize and "
            "koff.compact first"
        )
    check_writable(model)
    for memory in model.koff.memories:
        check_memory(memory)


def _check_place(directory: Path, overwrite: bool) -> None:
    # A dead link neither exists nor is free.
    if not directory.is_dir() and (directory.exists() or directory.is_symlink()):
        raise ValueError(
            "koff.save: the directory must be a folder, got a file or a dead link; choose another"
        )
    if overwrite or not directory.is_dir():
        return
    if (current(directory) / MARKER).exists():
        raise ValueError(
            f"koff.save: the directory must not hold a saved model, got {directory}; choose "
            "another folder or pass overwrite=True"
        )
    _check_free(directory, [CONFIG, INDEX, *weight_names(p.name for p in directory.iterdir())])


def _check_free(directory: Path, names: Iterable[str]) -> None:
    """Refuse to write over somebody else's files."""
    taken = next((name for name in names if os.path.lexists(directory / name)), None)
    if taken is not None:
        raise ValueError(
            f"koff.save: the directory must not hold files that koff did not write under the names "
            f"of a model's, got {taken} in {directory}; choose another folder or pass "
            "overwrite=True"
        )


def _write(
    model: PreTrainedModel,
    directory: Path,
    tokenizer: Any,
    metadata: dict[str, Any],
    overwrite: bool,
) -> None:
    """Write everything into a staging folder, and move it into place."""
    base = metadata.pop("base", None) or (model.config._name_or_path or None)
    revision = metadata.pop("revision", None)
    staging = _new_staging(directory)
    try:
        write_backbone(model, staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        elif overwrite:
            _keep_tokenizer(model, directory, staging)
        # The backbone's hash is known before the memories are written, each of which repeats it.
        # A name that is not legal everywhere, as a tokenizer's file may have it, is not listed.
        files = digests(staging, filter(is_plain, files_of(staging)))
        manifest = _describe(model, files, base, revision, metadata)
        for memory in model.koff.memories:
            write_memory(model, memory, staging / MEMORIES / memory.name, manifest)
        (staging / CARD).write_text(model_card(manifest, staging), encoding="utf-8")
        new = [n for n in files_of(staging) if is_plain(n) and n not in manifest.files]
        manifest.files |= digests(staging, new)
        (staging / MARKER).write_text(manifest.to_text(), encoding="utf-8")  # it lists the others
        if not overwrite:
            _check_free(directory, files_of(staging))
        publish(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _keep_tokenizer(model: PreTrainedModel, directory: Path, staging: Path) -> None:
    """Copy the tokenizer of the model that is replaced, unless it cannot be this one's, too."""
    try:
        old = open_saved(directory)
        names = tokenizer_names(old.manifest.files)
        old.verify(names)
        tokens = old.file(CONFIG).json().get("vocab_size")
    except (OSError, ValueError):  # no saved model, or a damaged one
        return
    if tokens == model.config.vocab_size:
        for name in names:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(old.path / name, staging / name)


def _new_staging(directory: Path) -> Path:
    """A new folder beside a directory, or in it if it exists (it may be a mount point, and a rename
    does not cross file systems), after settling what an earlier save left."""
    settle(directory)
    if directory.exists():
        staging = new_staging(directory, "new")
    else:
        target = Path(os.path.abspath(directory))  # "." has no name
        staging = new_staging(target.parent, target.name)
    staging.mkdir()
    return staging


def _describe(
    model: PreTrainedModel,
    files: dict[str, str],
    base: str | None,
    revision: str | None,
    metadata: dict[str, Any],
) -> Manifest:
    """The manifest of a model whose backbone has been written."""
    state, report = model.koff, sparsity(model)
    return Manifest(
        koff=__version__,
        versions={
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        base=base,
        revision=revision,
        config=state.config,
        memories=list(state.memory_names),
        dense_widths=state.dense_widths,
        widths=report.widths,
        kept=None if state.kept is None else [rows.tolist() for rows in state.kept],
        sparsity={
            "mlp": report.mlp,
            "model": report.model,
            "non_embedding": report.non_embedding,
        },
        backbone_sha256=backbone_digest(files),
        files=files,
        metadata=metadata,
    )


@asked_by("koff.load")
def load(
    directory: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    verify: bool = True,
) -> PreTrainedModel:
    """Load what ``koff.save`` wrote, in eval mode.

    Nothing but safetensors and JSON is read, and no code from the folder. Nothing is allocated
    before its size is compared with what the files hold.

    Args:
        directory: the saved folder, or the id of a repository of the Hugging Face hub.
        device: where to put the model; None: the CPU.
        dtype: of the backbone; "auto": as saved. Memories stay fp32.
        revision: branch, tag or commit of a hub repository.
        verify: compare the sha256 of the backbone's files too; the memories' always are. It costs
            one reading of the files at about the speed of a disk.

    Returns:
        An attached model with all its memories, computing bit for bit what the saved one did.

    Raises:
        FileNotFoundError, ValueError: not a saved model, damaged, memories that do not belong to
            the backbone, or a device that is not there.
    """
    check_there("koff.load", device or "cpu")
    # From the cheapest check to the dearest, and each before what it protects: types and names in
    # koff.json, sizes against the headers, hashes, then the data.
    folder = SavedFolder(resolve(directory, revision))
    manifest = folder.manifest
    config, model_class = check_backbone(folder)
    kept = manifest.kept_neurons()
    folder.check_seal()
    if verify:
        folder.verify(backbone_names(manifest.files))
    model = build_backbone(folder, config, model_class, dtype)
    with_kv = any(KV in memory_parts(manifest.files, name) for name in manifest.memories)
    arch.check_supported(model, with_kv)
    # Every parameter is overwritten by what is read; the generator only makes the numbers definite.
    generator = torch.Generator().manual_seed(0)
    state = KoffState(model, manifest.config, generator, with_gates=False)
    state.dense_widths, state.kept = manifest.dense_widths, kept
    state.metadata = manifest.metadata | {"revision": manifest.revision}
    for name in manifest.memories:
        state.memories.add(read_memory(folder, model, name, generator))
    install(model, state)
    return model.to(device or "cpu").eval()
