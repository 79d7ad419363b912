"""Save and load a backbone with its memories: safetensors and JSON, staged and moved into place."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import PreTrainedModel

from ..errors import asked_by, require
from ..model import arch
from ..model.attach import install, new_memory, use_koff_attention
from ..model.config import KoffConfig
from ..model.memories import Memory
from ..model.memory_argument import write_backbone
from ..model.state import KoffState, require_attached
from ..pruning.binarize import sparsity
from ..version import __version__
from . import adapters as disk
from . import backbone
from . import layout as folder
from . import publish as atomic
from .card import model_card
from .hub import resolve
from .layout import FORMAT, MARKER, MEMORIES
from .metadata import plain_metadata

MEMORY = "memory.json"
_LOAD = "koff.load"


def check_memory(memory: Memory, where: str) -> None:
    """Refuse a memory that no folder may hold: one that waits for text, or is not finite."""
    what = f"the KV part of memory {memory.name!r}"
    step = "train it with KoffTrainer, or use KVConfig(init='tokens')"
    require(memory.kv_filled, where, what, "be filled", "one that waits for text", step)
    finite = all(bool(t.isfinite().all()) for t in memory.state_dict().values())
    what, step = f"memory {memory.name!r}", "lower the learning rates and train it again"
    require(finite, where, what, "be finite", "NaN or infinity", step)


def _check_savable(state: KoffState, directory: Path, overwrite: bool) -> None:
    where = "koff.save"
    step = "call koff.binarize and koff.compact first"
    require(state.gates is None, where, "the model", "be compacted", "one with gates", step)
    for memory in state.memories:
        check_memory(memory, where)
    good = directory.is_dir() or not (directory.exists() or directory.is_symlink())
    require(good, where, "the directory", "be a folder", "a file or a dead link", "choose another")
    step = "choose another folder or pass overwrite=True"
    taken = (folder.current(directory) / MARKER).exists() and not overwrite
    require(not taken, where, "the directory", "not hold a saved model", str(directory), step)


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
    Files that koff did not write stay. One process at a time may save into a directory.

    Args:
        model: an attached model without gates (compacted, or attached with target_sparsity=0).
        directory: where; created if needed.
        tokenizer: saved beside the model if given.
        metadata: JSON values to keep: "base" (id of the dense model) and "revision", texts; "data"
            and "general" ({name: what it was trained on}) and "results" (rows of
            ``koff.evaluate``), which the card shows; "added", koff's own; and whatever else.
        overwrite: replace a model saved there before.

    Returns:
        The directory.

    Raises:
        ValueError: gates that are not compacted, a KV memory that was never filled, a taken
            directory, or metadata that cannot be kept; nothing is written then.
    """
    directory = Path(directory)
    with asked_by("koff.save"):
        state = require_attached(model)
    _check_savable(state, directory, overwrite)
    metadata = plain_metadata(metadata, "koff.save")
    base = metadata.pop("base", None) or (model.config._name_or_path or None)
    staging = _new_staging(directory)
    try:
        write_backbone(model, staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        facts = _facts(model, staging, base, metadata)
        for memory in state.memories:
            _write_memory(
                model, memory, staging / MEMORIES / memory.name, facts["backbone_sha256"], base
            )
        (staging / "README.md").write_text(model_card(facts, staging), encoding="utf-8")
        _write_facts(facts, staging)
        folder.publish(staging, directory, "koff.save")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return directory


def _new_staging(directory: Path) -> Path:
    """A new folder beside a directory, or in it if it exists (it may be a mount point), after
    settling what an earlier save left."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    folder.settle(directory)
    if directory.exists():
        staging = atomic.new_staging(directory, "new")
    else:
        target = Path(os.path.abspath(directory))
        staging = atomic.new_staging(target.parent, target.name)
    staging.mkdir()
    return staging


def _facts(
    model: PreTrainedModel, staging: Path, base: str | None, metadata: dict
) -> dict[str, Any]:
    state, report = model.koff, sparsity(model)
    files = folder.digests(staging, filter(folder.is_plain, atomic.files_of(staging)))
    return {
        "format": FORMAT,
        "koff": __version__,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "base": base,
        "revision": metadata.pop("revision", None),
        "config": state.config.to_dict(),
        "memories": list(state.memory_names),
        "dense_widths": state.dense_widths,
        "widths": report.widths,
        "kept": None if state.kept is None else [rows.tolist() for rows in state.kept],
        "sparsity": {
            "mlp": report.mlp,
            "model": report.model,
            "non_embedding": report.non_embedding,
        },
        "backbone_sha256": folder.backbone_digest(files),
        "files": files,
        "metadata": metadata,
    }


def _write_facts(facts: dict[str, Any], staging: Path) -> None:
    """Write koff.json into a folder that is complete otherwise, with the sha256 of every file in it
    and a checksum of its own."""
    new = [n for n in atomic.files_of(staging) if folder.is_plain(n) and n not in facts["files"]]
    facts["files"] |= folder.digests(staging, new)
    facts["checksum"] = folder.seal_of(facts)
    (staging / MARKER).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _write_memory(
    model: PreTrainedModel, memory, directory: Path, backbone: str, base: str | None
) -> None:
    directory.mkdir(parents=True)
    if memory.lora_config is not None:
        disk.write_lora(model, memory, directory / "lora", base)
    if memory.kv_config is not None:
        disk.write_kv(model, memory, directory / "kv", base)
    facts = {"format": FORMAT, "name": memory.name, "backbone_sha256": backbone}
    (directory / MEMORY).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def load(
    directory: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    verify: bool = True,
) -> PreTrainedModel:
    """Load what ``save`` wrote, in eval mode. Nothing but safetensors and JSON is read, and no code
    from the folder. Nothing is allocated before its size is compared with what the files hold.

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
        FileNotFoundError, ValueError: not a saved model, damaged, or memories that do not belong to
            the backbone.
    """
    directory = folder.current(resolve(directory, revision, _LOAD))
    facts = folder.read_facts(directory, _LOAD, sealed=False)
    built = backbone.check_backbone(directory, facts, _LOAD)
    kept = _kept(facts, _LOAD)
    folder.check_seal(facts, _LOAD)
    if verify:
        folder.check_files(directory, facts, backbone.names(facts["files"]), _LOAD)
    model = backbone.build_backbone(directory, facts, built, dtype, _LOAD)
    settings = KoffConfig.from_dict(facts["config"])
    kv = any(re.match(rf"{MEMORIES}/[^/]+/kv/", name) for name in facts["files"])
    with asked_by(_LOAD):
        arch.check_supported(model, kv)
    generator = torch.Generator().manual_seed(0)
    state = KoffState(model, settings, generator, with_gates=False)
    state.dense_widths, state.kept = facts["dense_widths"], kept
    for name in facts["memories"]:
        state.memories.add(_read_memory(model, directory, name, facts, generator))
    install(model, state)
    use_koff_attention(model)
    return model.to(device or "cpu").eval()


def _kept(facts: dict[str, Any], where: str) -> list[torch.Tensor] | None:
    """The kept neurons of each layer, checked against the widths; None for a dense backbone."""
    if facts["kept"] is None:
        return None
    widths = zip(facts["kept"], facts["widths"], facts["dense_widths"], strict=True)
    for index, (rows, width, dense) in enumerate(widths):
        good = len(rows) == width and rows == sorted(set(rows)) and 0 <= rows[0] <= rows[-1] < dense
        rule = f"be {width} increasing indices below {dense}"
        what = f"the kept neurons of layer {index}"
        require(good, where, what, rule, f"{len(rows)} entries", "copy koff.json again")
    return [torch.tensor(rows) for rows in facts["kept"]]


def _read_memory(model: PreTrainedModel, directory: Path, name: str, facts: dict, generator):
    where, path = f"memory {name!r}", directory / MEMORIES / name
    names = [n for n in facts["files"] if n.startswith(f"{MEMORIES}/{name}/")]
    for file in names:
        folder.check_inside(directory, file, where)
    own = disk.read_json(path / MEMORY, where)
    for field, wanted in (("format", FORMAT), ("name", name)):
        got, step = own.get(field), "copy the memory again"
        same = got == wanted and not isinstance(got, bool)
        require(same, where, f"its {field} in {MEMORY}", f"be {wanted!r}", repr(got), step)
    same = own.get("backbone_sha256") == facts["backbone_sha256"]
    step = "a memory works only on the backbone it was trained with"
    require(same, where, "the memory", "belong to this backbone", own.get("backbone_sha256"), step)
    parts = {file.split("/")[2] for file in names}
    lora = disk.lora_config(path / "lora", where) if "lora" in parts else None
    kv = disk.kv_config(path / "kv", where) if "kv" in parts else None
    require(bool(lora or kv), where, "it", "have a LoRA or a KV part", "none", "copy it again")
    read = [MEMORY, *(f"{p}/{n}" for p in parts & {"lora", "kv"} for n in disk.FILES)]
    names = {*names, *(f"{MEMORIES}/{name}/{file}" for file in read)}
    if lora is not None:
        disk.check_lora(model, lora, path / "lora", where)
    if kv is not None:
        disk.check_kv(model, kv, path / "kv", where)
    folder.check_files(directory, facts, names, where)
    memory = new_memory(model, name, lora, kv, generator)
    if lora is not None:
        disk.read_lora(model, memory, path / "lora", where)
    if kv is not None:
        disk.read_kv(model, memory, path / "kv", where)
    return memory
