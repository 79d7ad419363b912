"""Write one memory into the weights: a checkpoint for those who want one model and no koff."""

from __future__ import annotations

import contextlib
import functools
import inspect
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.records import check_tokenizer
from ..errors import asked_by, asker
from ..model import arch
from ..model.memory_argument import write_backbone
from ..model.sharding import whole_model
from ..model.state import require_attached, the_attached
from .adapters import write_kv
from .backbone import check_writable
from .card import export_card
from .hub import resolve
from .layout import CARD, KV
from .processes import one_writes
from .publish import left_over, new_staging, rename, sync_tree
from .save_load import load
from .saved_folder import open_saved
from .space import SMALL_FILES, bytes_of, writing


def first_writes(export: Callable[..., Path]) -> Callable[..., Path]:
    """Decorate an export: of a distributed run the first process writes, and the others wait.

    A model that FSDP shards is gathered before, on all of them.

    Args:
        export: takes a ``source`` and an ``output``, which it returns.
    """
    signature = inspect.signature(export)

    @functools.wraps(export)
    def on_every_process(source: PreTrainedModel | str | Path, *args: Any, **kwargs: Any) -> Path:
        output = Path(signature.bind(source, *args, **kwargs).arguments["output"])
        if isinstance(source, nn.Module):
            source = whole_model(the_attached(source))
        with one_writes(f"{asker()} {output}") as writes:
            if writes:
                export(source, *args, **kwargs)
        return output

    return on_every_process


@asked_by("koff.export_merged")
@first_writes
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
    CARTRIDGE in ``kv/``. Of a distributed run the first process writes, and the others wait.

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
            compacted, an adapter around a layer, or a taken folder; nothing is written then.
        OSError: there is no room for it on the disk; nothing stays there.
    """
    output = check_output(output)
    model, tokenizer = open_source(source, tokenizer, revision)
    if name not in model.koff.memory_names:
        raise KeyError(
            f"koff.export_merged: the memory must be one of {list(model.koff.memory_names)}, "
            f"got {name!r}; correct the name"
        )
    memory = model.koff.memories[name]
    if memory.kv_config is not None and arch.is_hybrid(model):
        raise ValueError(
            f"koff.export_merged: the memory must have no learned cache where layers are "
            f"recurrent, got {name!r} on {model.config.model_type}: PEFT's CARTRIDGE has no place "
            "for their states, and the weights alone would be another model; use koff.save"
        )
    with new_folder(output.absolute(), bytes_of(model.parameters())) as staging:
        write_backbone(model, staging, merged_weights(model, name))
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        if memory.kv_config is not None:
            write_kv(model, memory, staging / KV, None)  # its base is the folder around it
        card = export_card(model, name, tokenizer is not None)
        (staging / CARD).write_text(card, encoding="utf-8")
    return output


def check_output(output: str | Path) -> Path:
    """Refuse the output of an export unless it is a new or empty folder.

    Raises:
        ValueError: it is taken.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(
            f"{asker()}: the output must be a new or empty folder, got {output}; choose another"
        )
    return output


def open_source(
    source: PreTrainedModel | str | Path, tokenizer: Any, revision: str | None
) -> tuple[PreTrainedModel, Any]:
    """Return what is to be exported: a model without gates, and a tokenizer if there is one.

    Args:
        source: an attached model, the folder of a saved one, or its id on the hub.
        tokenizer: to take; None: that of the folder.
        revision: of a hub repository.

    Raises:
        FileNotFoundError, TypeError, ValueError: no saved model, gates that are not compacted, or
            an adapter around a layer.
    """
    check_tokenizer(tokenizer)
    if isinstance(source, PreTrainedModel):
        model = source
    else:
        folder = open_saved(resolve(source, revision))
        model = load(folder.directory)
        if not tokenizer and folder.has_tokenizer:
            tokenizer = folder.load_tokenizer()
    if require_attached(model).gates is not None:
        raise ValueError(
            f"{asker()}: the model must be compacted, got one with gates; call koff.binarize and "
            "koff.compact first"
        )
    check_writable(model)
    return model, tokenizer


@contextlib.contextmanager
def new_folder(target: Path, needed: int) -> Iterator[Path]:
    """A folder that takes the place of a free or empty one, in one step, if the block ends well.

    Args:
        target: the place.
        needed: bytes of the tensors that are written there.

    Raises:
        OSError: there is no room for them.
    """
    with writing("the export", needed + SMALL_FILES, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in left_over(target.parent, target.name):  # of an export that was killed
            shutil.rmtree(left)
        staging = new_staging(target.parent, target.name)
        staging.mkdir()
        try:
            yield staging
            sync_tree(staging)
            if target.exists():  # os.replace does not take the place of a folder on every system
                target.rmdir()
            rename(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@torch.no_grad()
def merged_weights(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """Return the backbone's state dict with a memory's LoRA folded in; the model stays as it is.

    W + alpha / r * B A in fp32, rounded once: in 16 bits the product and the sum would be rounded
    too, and a LoRA is small beside its weight.

    Args:
        model: an attached model.
        name: of the memory.

    Returns:
        name -> tensor, in the backbone's dtypes.

    Raises:
        ValueError: a sum that the backbone's dtype cannot hold.
    """
    memory = model.koff.memories[name]
    tensors = {key: t for key, t in model.state_dict().items() if not key.startswith("koff.")}
    for site, lora in memory.sites():
        key = f"{arch.site_path(site, model)}.weight"
        weight = tensors[key]
        merged = (weight.float() + memory.scaling * (lora.b @ lora.a)).to(weight.dtype)
        if not bool(torch.isfinite(merged).all()):
            raise ValueError(
                f"koff.export_merged: {key} must be finite when merged, got NaN or inf; load the "
                "backbone in another dtype"
            )
        tensors[key] = merged
    return tensors
