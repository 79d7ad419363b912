"""Memories that come later: train one more, bring one in from PEFT, or take one out, on a model or
on a saved folder. Backbone and other memories stay as they are, bit for bit."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from transformers import PreTrainedModel, Trainer

from .errors import asked_by, asker
from .model import arch
from .model.attach import new_memory, use_koff_attention
from .model.config import KVConfig, LoRAConfig, check_memory_name
from .model.prefill import fill_from_random_tokens
from .model.state import require_attached
from .storage.adapters import check_kv, check_memory, fill_kv, kv_config, kv_files
from .storage.change import drop_memory, put_memory
from .storage.files import File
from .storage.layout import ADAPTER_CONFIG
from .storage.peft_import import import_lora
from .storage.processes import one_writes
from .storage.save_load import load
from .storage.saved_folder import open_saved
from .storage.space import SMALL_FILES, bytes_of, check_room, room_kept
from .training.arguments import KoffTrainingArguments
from .training.trainer import KoffTrainer

Target = TypeVar("Target", PreTrainedModel, str, Path)
Same = Literal["same"]


@asked_by("koff.add_memory")
def add_memory(
    target: Target,
    name: str,
    documents: Any,
    *,
    lora: LoRAConfig | None | Same = "same",
    kv: KVConfig | None | Same = "same",
    args: KoffTrainingArguments | None = None,
    tokenizer: Any = None,
    **trainer: Any,
) -> Target:
    """Train the memory of one more domain against a fixed backbone.

    Nothing else has gradients: the backbone is frozen and the other memories are set aside.

    Args:
        target: an attached model whose mask is fixed, which gets the memory, or the folder of a
            saved one, into which the memory is written.
        name: of the new memory.
        documents: of its domain, as ``KoffTrainer`` takes them.
        lora, kv: its parts; "same": as the model's other memories have them.
        args: of the training; None: the defaults of ``KoffTrainingArguments``, without checkpoints.
        tokenizer: None: the folder's; not needed for documents that are token ids.
        trainer: further arguments of ``KoffTrainer`` (general_datasets, callbacks, ...).

    Returns:
        The target.

    Raises:
        FileNotFoundError, KeyError, TypeError, ValueError: no saved model, an illegal or taken
            name, gates that are still open, or arguments that KoffTrainer refuses; the target is
            then as before.
    """
    folder = check_new_name(target, name)
    model = target if folder is None else load(folder)
    if tokenizer is None and folder is not None:
        saved = open_saved(folder)
        tokenizer = saved.load_tokenizer() if saved.has_tokenizer else None
    config = model.koff.config
    # transformers' Trainer makes its output folder, whether it writes checkpoints or not.
    with tempfile.TemporaryDirectory(prefix="koff-add-") as place:
        args = args or KoffTrainingArguments(place, save_strategy="no")
        learn(
            model,
            name,
            lora=config.lora if lora == "same" else lora,
            kv=config.kv if kv == "same" else kv,
            make_trainer=functools.partial(
                KoffTrainer,
                args=args,
                train_datasets={name: documents},
                processing_class=tokenizer,
                **trainer,
            ),
            seed=args.seed,
            folder=folder,
        )
    if folder is not None:
        with one_writes(f"koff.add_memory {folder} {name}") as writes:
            if writes:
                put_memory(folder, model, name)
    return target


@asked_by("koff.add_memory")
def learn(
    model: PreTrainedModel,
    name: str,
    *,
    lora: LoRAConfig | None,
    kv: KVConfig | None,
    make_trainer: Callable[[PreTrainedModel], Trainer],
    seed: int,
    folder: Path | None = None,
) -> None:
    """Give a model a new memory and train it alone, in place.

    Args:
        model: an attached model whose mask is fixed.
        name: of the new memory.
        lora, kv: its parts; not both None.
        make_trainer: makes the trainer of the model, which then holds the new memory alone.
        seed: of the initial values.
        folder: where the memory will be written, and has room kept for it; None: nowhere.

    Raises:
        ValueError: gates that are still open, or a memory without parts. OSError: no room.
    """
    state = model.koff
    if state.gates is not None and not state.gates.fixed:
        raise ValueError(
            "koff.add_memory: the mask must be fixed, got open gates; call koff.binarize first"
        )
    if lora is None and kv is None:
        raise ValueError(
            "koff.add_memory: the memory must have a LoRA or a KV part, got neither; give "
            "lora=koff.LoRAConfig(...) or kv=koff.KVConfig(...)"
        )
    if kv is not None:
        arch.check_prefix(model)
        arch.check_dropout(model)
    generator = torch.Generator().manual_seed(seed)
    memory = new_memory(model, name, lora, kv, generator)
    was_training = model.training  # the trainer leaves it in train mode
    kept = nullcontext()
    if folder is not None:
        needed = bytes_of(memory.parameters()) + 2 * SMALL_FILES
        check_room(f"memory {name!r}", needed, folder)
        kept = room_kept(needed, folder)
    try:
        # The others are out of the model meanwhile: no gradient and no weight decay can reach them.
        # If training fails, they come back without the new one.
        with state.memories.only(memory), kept:
            use_koff_attention(model)
            if kv is not None and kv.init == "tokens":
                fill_from_random_tokens(model, name, generator)
            make_trainer(model).train()
    finally:
        model.train(was_training)


@torch.no_grad()
def import_memory(
    target: Target, name: str, *, lora: str | Path | None = None, kv: str | Path | None = None
) -> Target:
    """Make a memory of adapters that PEFT trained elsewhere: a LORA, a CARTRIDGE, or both.

    A LoRA of the dense base is cut to the neurons that were kept: rows of B of gate and up, columns
    of A of down. It then computes what it would on the masked dense model. One that was trained on
    this backbone is taken as it is. rsLoRA and patterns of ranks and alphas are converted; what
    changes the formula (DoRA, biases, saved modules, ...) is refused.

    Args:
        target: an attached model, which gets the memory, or the folder of a saved one, into which
            the memory is written.
        name: of the new memory.
        lora: folder of the LORA adapter, or None.
        kv: folder of the CARTRIDGE adapter, or None; for a model with recurrent layers the ``kv``
            folder of a koff memory.

    Returns:
        The target.

    Raises:
        FileNotFoundError, ValueError: no such folder, an illegal or taken name, or an adapter that
            does not fit or is of another kind; the target is then as before.
    """
    with asked_by(f"koff.import_memory {name!r}"):
        if lora is None and kv is None:
            raise ValueError(
                f"{asker()}: the memory must have a LoRA or a KV part, got neither; give lora= or "
                "kv="
            )
        if not isinstance(target, (str, Path)):
            check_new_name(target, name)
            _import_into(target, name, lora, kv)
            return target
        with one_writes(f"koff.import_memory {target} {name}") as writes:
            if writes:
                folder = check_new_name(target, name)
                model = load(folder)
                _import_into(model, name, lora, kv)
                put_memory(folder, model, name)
        return target


def _import_into(
    model: PreTrainedModel, name: str, lora: str | Path | None, kv: str | Path | None
) -> None:
    imported = cache = None
    if lora is not None:
        imported = import_lora(model, Path(lora))
    if kv is not None:
        arch.check_prefix(model)
        settings, tensors = (Path(kv, name) for name in kv_files(model))
        if not settings.exists() and Path(kv, ADAPTER_CONFIG).exists():
            raise ValueError(
                f"{asker()}: the learned cache must be koff's own ({settings.name}) for a "
                "model with recurrent layers, got a CARTRIDGE; it has no states for them"
            )
        cache = kv_config(model, File(settings).json())
        weights = File(tensors)
        check_kv(model, cache, weights.header())  # before what the settings claim is allocated
    # Its initial values are overwritten, so any generator will do.
    own = None if imported is None else imported.config
    memory = new_memory(model, name, own, cache, torch.Generator())
    if imported is not None:
        imported.copy_to(memory)
    if cache is not None:
        fill_kv(model, memory, weights.tensors())
    check_memory(memory)
    model.koff.memories.add(memory)
    use_koff_attention(model)  # it may be the first memory with a KV part


@asked_by("koff.remove_memory")
def remove_memory(target: Target, name: str) -> Target:
    """Take a memory out; backbone and other memories stay as they are.

    Args:
        target: an attached model, or the folder of a saved one.
        name: of the memory.

    Returns:
        The target.

    Raises:
        FileNotFoundError, ValueError: no saved model there, or koff is not attached. KeyError: no
            such memory; nothing has changed then.
    """
    folder = Path(target) if isinstance(target, (str, Path)) else None
    with one_writes(f"koff.remove_memory {target} {name}") if folder else nullcontext(True) as here:
        if here:
            names = _memory_names(target, folder)
            if name not in names:
                raise KeyError(
                    f"koff.remove_memory: the memory must be one of {names}, got {name!r}; correct "
                    "the name"
                )
            if folder is not None:
                drop_memory(folder, name)
            else:
                target.koff.memories.remove(name)
    return target


def check_new_name(target: PreTrainedModel | str | Path, name: str) -> Path | None:
    """Refuse a name that is illegal or taken.

    Args:
        target: an attached model, or the folder of a saved one.
        name: of a memory to come.

    Returns:
        The folder; None for a model.

    Raises:
        FileNotFoundError, TypeError, ValueError: so is the name, or the target is neither.
    """
    check_memory_name(name)
    folder = Path(target) if isinstance(target, (str, Path)) else None
    names = _memory_names(target, folder)
    if name in names:
        raise ValueError(
            f"{asker()}: the name must differ from those there are, {names}, got {name!r}; choose "
            "another or remove it first"
        )
    return folder


def _memory_names(target: Any, folder: Path | None) -> list[str]:
    if folder is not None:
        return open_saved(folder).manifest.memories
    return list(require_attached(target).memories.names)
