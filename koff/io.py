"""Save and load a backbone with its memories: safetensors and JSON, staged and moved into place."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from . import arch, disk
from .attach import install, new_memory, use_koff_attention
from .card import model_card
from .config import KoffConfig, check_memory_name
from .errors import require
from .hub import resolve
from .masking import sparsity
from .state import KoffState, require_attached
from .version import __version__

MARKER, MEMORIES = "koff.json", "memories"
_LOAD = "koff.load"
FORMAT = 1


def _check_savable(state: KoffState, directory: Path, overwrite: bool) -> None:
    where = "koff.save"
    step = "call koff.binarize and koff.compact first"
    require(state.gates is None, where, "the model", "be compacted", "one with gates", step)
    for memory in state.memories:
        what = f"the KV part of memory {memory.name!r}"
        step = "train it with KoffTrainer, or use KVConfig(init='tokens')"
        require(memory.kv_filled, where, what, "be filled", "one that waits for text", step)
    require(
        not directory.is_file(), where, "the directory", "be a folder", "a file", "choose another"
    )
    step = "choose another folder or pass overwrite=True"
    taken = (directory / MARKER).exists() and not overwrite
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

    Everything is written into a new folder first and moved in at the end, ``koff.json`` last, so a
    folder without ``koff.json`` is not a saved model.

    Args:
        model: an attached model without gates (compacted, or attached with target_sparsity=0).
        directory: where; created if needed.
        tokenizer: saved beside the model if given.
        metadata: JSON values to keep: "base" (id of the dense model), "revision", "results" (rows
            of ``koff.evaluate``), and whatever else.
        overwrite: replace a model saved there before.

    Returns:
        The directory.

    Raises:
        ValueError: gates that are not compacted, a KV memory that was never filled, or a taken
            directory; nothing is written then.
    """
    directory, metadata = Path(directory), dict(metadata or {})
    state = require_attached(model, "koff.save")
    _check_savable(state, directory, overwrite)
    base = metadata.pop("base", None) or (model.config._name_or_path or None)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        facts = _facts(model, staging, base, metadata)
        for memory in state.memories:
            _write_memory(
                model, memory, staging / MEMORIES / memory.name, facts["backbone_sha256"], base
            )
        (staging / "README.md").write_text(model_card(facts, staging), encoding="utf-8")
        (staging / MARKER).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        _publish(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return directory


def _facts(
    model: PreTrainedModel, folder: Path, base: str | None, metadata: dict
) -> dict[str, Any]:
    state, report = model.koff, sparsity(model)
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
        "backbone_sha256": _digest(folder),
        "metadata": metadata,
    }


def _digest(folder: Path) -> str:
    """sha256 over the backbone's weight files, in order of name."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _write_memory(
    model: PreTrainedModel, memory, folder: Path, backbone: str, base: str | None
) -> None:
    folder.mkdir(parents=True)
    if memory.lora_config is not None:
        disk.write_lora(model, memory, folder / "lora", base)
    if memory.kv_config is not None:
        disk.write_kv(model, memory, folder / "kv", base)
    facts = {"format": FORMAT, "name": memory.name, "backbone_sha256": backbone}
    (folder / "memory.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _sync(folder: Path) -> None:
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _publish(staging: Path, directory: Path) -> None:
    """Move the finished folder's entries in, the marker last; a model saved there before loses its
    marker first."""
    _sync(staging)
    if not directory.exists():
        os.replace(staging, directory)
        return
    (directory / MARKER).unlink(missing_ok=True)
    for entry in sorted(staging.iterdir(), key=lambda e: e.name == MARKER):
        target = directory / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(entry, target)


def load(
    directory: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
) -> PreTrainedModel:
    """Load what ``save`` wrote, in eval mode. Nothing but safetensors and JSON is read, and no code
    from the folder.

    Args:
        directory: the saved folder, or the id of a repository of the Hugging Face hub.
        device: where to put the model; None: the CPU.
        dtype: of the backbone; "auto": as saved. Memories stay fp32.
        revision: branch, tag or commit of a hub repository.

    Returns:
        An attached model with all its memories, computing bit for bit what the saved one did.

    Raises:
        FileNotFoundError, ValueError: not a saved model, damaged, or memories that do not belong to
            the backbone.
    """
    directory = resolve(directory, revision, _LOAD)
    facts = disk.read_json(directory / MARKER, _LOAD)
    version = facts.get("format")
    rule = f"be {FORMAT}"
    require(version == FORMAT, _LOAD, "the format version", rule, repr(version), "update koff")
    model = _read_backbone(directory, facts, dtype)
    settings = KoffConfig.from_dict(facts["config"])
    kv = any((directory / MEMORIES / name / "kv").is_dir() for name in facts["memories"])
    arch.check_supported(model, kv, _LOAD)
    generator = torch.Generator().manual_seed(0)
    state = KoffState(model, settings, generator, with_gates=False)
    state.dense_widths = facts["dense_widths"]
    state.kept = _kept(facts, _LOAD)
    for name in facts["memories"]:
        state.memories.add(_read_memory(model, directory, name, facts, generator))
    install(model, state)
    use_koff_attention(model)
    return model.to(device or "cpu").eval()


def _read_backbone(directory: Path, facts: dict[str, Any], dtype) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    arch.architecture(config.model_type, _LOAD)
    model = AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True
    )
    widths, got = facts.get("widths"), arch.widths(model)
    same = got == widths
    require(same, _LOAD, "the backbone's widths", f"be {widths}", got, "copy the folder again")
    return model


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
    check_memory_name(name, _LOAD)
    where, folder = f"memory {name!r}", directory / MEMORIES / name
    own = disk.read_json(folder / "memory.json", where)
    same = own.get("backbone_sha256") == facts["backbone_sha256"]
    step = "a memory works only on the backbone it was trained with"
    require(same, where, "the memory", "belong to this backbone", own.get("backbone_sha256"), step)
    lora = disk.lora_config(folder / "lora", where) if (folder / "lora").is_dir() else None
    kv = disk.kv_config(folder / "kv", where) if (folder / "kv").is_dir() else None
    memory = new_memory(model, name, lora, kv, generator)
    if lora is not None:
        disk.read_lora(model, memory, folder / "lora", where)
    if kv is not None:
        disk.read_kv(model, memory, folder / "kv", where)
    return memory
