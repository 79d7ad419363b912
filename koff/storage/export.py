"""Write one memory into the weights: a checkpoint for those who want one model and no koff."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import asked_by, require
from ..model import arch
from ..model.memory_argument import write_backbone
from ..model.state import require_attached
from . import adapters as disk
from . import publish as atomic
from .card import export_card
from .change import saved_facts, saved_tokenizer
from .hub import resolve
from .save_load import load

KV = "kv"


def export_merged(
    source: PreTrainedModel | str | Path,
    name: str,
    output: str | Path,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
) -> Path:
    """Write a checkpoint with a memory's LoRA folded in, W + alpha / r * B A, computed in fp32 and
    rounded once to the dtype of W.

    With equal widths it is a stock checkpoint; otherwise it loads with koff, or without by
    ``trust_remote_code=True``. The learned cache, if the memory has one, lies beside it as PEFT's
    CARTRIDGE in ``kv/``.

    Args:
        source: an attached model without gates, the folder of a saved one, or its id on the hub.
        name: of the memory.
        output: folder to make; it may exist if it is empty.
        tokenizer: saved with it; None: that of the folder.
        revision: of a hub repository.

    Returns:
        The output folder, with a README.md that says how to load it.

    Raises:
        FileNotFoundError, KeyError, ValueError: no saved model, no such memory, gates that are not
            compacted, or a taken folder; nothing is written then.
    """
    where, output = "koff.export_merged", Path(output)
    free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    require(free, where, "the output", "be a new or empty folder", str(output), "choose another")
    model, tokenizer = _opened(source, tokenizer, revision, where)
    with asked_by(where):
        state = require_attached(model)
    step = "call koff.binarize and koff.compact first"
    require(state.gates is None, where, "the model", "be compacted", "one with gates", step)
    names = list(state.memory_names)
    rule = f"be one of {names}"
    require(name in names, where, "the memory", rule, repr(name), "correct the name", KeyError)
    with _new_folder(output.absolute()) as staging:
        _write(model, name, tokenizer, staging)
    return output


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder that takes the place of a free or empty one, in one step, if the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in atomic.left_over(target.parent, target.name):
        shutil.rmtree(left)
    staging = atomic.new_staging(target.parent, target.name)
    staging.mkdir()
    try:
        yield staging
        atomic.sync_tree(staging)
        if target.exists():
            target.rmdir()
        atomic.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(model: PreTrainedModel, name: str, tokenizer: Any, folder: Path) -> None:
    write_backbone(model, folder, merged_weights(model, name))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if model.koff.memories[name].kv_config is not None:
        disk.write_kv(model, model.koff.memories[name], folder / KV, None)
    text = export_card(model, name, tokenizer is not None)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _opened(source: Any, tokenizer: Any, revision: str | None, where: str):
    if isinstance(source, PreTrainedModel):
        return source, tokenizer
    folder = resolve(source, revision, where)
    saved_facts(folder, where)
    return load(folder), tokenizer or saved_tokenizer(folder, where)


@torch.no_grad()
def merged_weights(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """The backbone's state dict with a memory's LoRA folded in; the model stays as it is.

    Args:
        model: an attached model.
        name: of the memory.

    Returns:
        name -> tensor, in the backbone's dtypes.
    """
    memory = model.koff.memories[name]
    tensors = {key: t for key, t in model.state_dict().items() if not key.startswith("koff.")}
    for site, lora in memory.sites():
        key = f"{arch.site_path(site, model)}.weight"
        weight = tensors[key]
        merged = (weight.float() + memory.scaling * (lora.b @ lora.a)).to(weight.dtype)
        finite, step = bool(torch.isfinite(merged).all()), "load the backbone in another dtype"
        require(finite, "koff.export_merged", key, "be finite when merged", "NaN or inf", step)
        tensors[key] = merged
    return tensors
