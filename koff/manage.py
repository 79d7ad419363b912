"""Memories that come later: train one more, bring one in from PEFT, or take one out, on a model or
on a saved folder. Backbone and other memories stay as they are, bit for bit."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from transformers import PreTrainedModel, Trainer

from .errors import asked_by, require
from .model import arch
from .model.attach import new_memory, use_koff_attention
from .model.config import KVConfig, LoRAConfig, check_memory_name
from .model.memories import Memory
from .model.prefill import fill_from_random_tokens
from .model.state import require_attached
from .storage import adapters as disk
from .storage.change import drop_memory, put_memory, saved_facts, saved_tokenizer
from .storage.peft_import import fill_lora, read_lora
from .storage.save_load import check_memory, load
from .training.arguments import KoffTrainingArguments
from .training.trainer import KoffTrainer

Target = TypeVar("Target", PreTrainedModel, str, Path)
Same = Literal["same"]


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
    folder = check_new_name(target, name, "koff.add_memory")
    model = target if folder is None else load(folder)
    if tokenizer is None and folder is not None:
        tokenizer = saved_tokenizer(folder, "koff.add_memory")
    config, data = model.koff.config, {name: documents}
    parts = (config.lora if lora == "same" else lora, config.kv if kv == "same" else kv)
    with tempfile.TemporaryDirectory(prefix="koff-add-") as place:
        args = args or KoffTrainingArguments(place, save_strategy="no")
        make = functools.partial(
            KoffTrainer, args=args, train_datasets=data, processing_class=tokenizer, **trainer
        )
        writes = learn(model, name, parts, make, args.seed)
    if folder is not None and writes:
        put_memory(folder, model, name)
    return target


def learn(
    model: PreTrainedModel,
    name: str,
    parts: tuple[LoRAConfig | None, KVConfig | None],
    make_trainer: Callable[[PreTrainedModel], Trainer],
    seed: int,
) -> bool:
    """Give a model a new memory and train it alone, in place.

    Args:
        model: an attached model whose mask is fixed.
        name: of the new memory.
        parts: its LoRA and its KV config; not both None.
        make_trainer: makes the trainer of the model, which then holds the new memory alone.
        seed: of the initial values.

    Returns:
        Whether this process is the one that writes files.
    """
    where, (lora, kv), state = "koff.add_memory", parts, model.koff
    settled = state.gates is None or state.gates.fixed
    step = "call koff.binarize first"
    require(settled, where, "the mask", "be fixed", "open gates", step)
    step = "give lora=koff.LoRAConfig(...) or kv=koff.KVConfig(...)"
    some = lora is not None or kv is not None
    require(some, where, "the memory", "have a LoRA or a KV part", "neither", step)
    if kv is not None:
        with asked_by(where):
            arch.check_prefix(model)
    generator = torch.Generator().manual_seed(seed)
    memory, training = new_memory(model, name, lora, kv, generator), model.training
    try:
        with state.memories.only(memory):
            use_koff_attention(model)
            if kv is not None and kv.init == "tokens":
                fill_from_random_tokens(model, name, generator)
            trainer = make_trainer(model)
            trainer.train()
    finally:
        model.train(training)
    return trainer.is_world_process_zero()


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
        kv: folder of the CARTRIDGE adapter, or None.

    Returns:
        The target.

    Raises:
        FileNotFoundError, ValueError: no such folder, an illegal or taken name, or an adapter that
            does not fit or is of another kind; the target is then as before.
    """
    where = f"koff.import_memory {name!r}"
    some, step = lora is not None or kv is not None, "give lora= or kv="
    require(some, where, "the memory", "have a LoRA or a KV part", "neither", step)
    folder = check_new_name(target, name, where)
    model = target if folder is None else load(folder)
    settings, matrices, scaling = None, {}, {}
    if lora is not None:
        settings, matrices, scaling = read_lora(model, Path(lora), where)
    cache = None
    if kv is not None:
        with asked_by(where):
            arch.check_prefix(model)
        cache = disk.kv_config(Path(kv), where)
        disk.check_kv(model, cache, Path(kv), where)  # before what it claims is allocated
    memory: Memory = new_memory(model, name, settings, cache, torch.Generator())
    if lora is not None:
        fill_lora(memory, matrices, scaling)
    if kv is not None:
        disk.read_kv(model, memory, Path(kv), where)
    check_memory(memory, where)
    model.koff.memories.add(memory)
    use_koff_attention(model)
    if folder is not None:
        put_memory(folder, model, name)
    return target


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
    where = "koff.remove_memory"
    if isinstance(target, (str, Path)):
        names = saved_facts(Path(target), where)["memories"]
    else:
        with asked_by(where):
            names = require_attached(target).memories.names
    rule, step = f"be one of {list(names)}", "correct the name"
    require(name in names, where, "the memory", rule, repr(name), step, KeyError)
    if isinstance(target, (str, Path)):
        drop_memory(Path(target), name)
    else:
        target.koff.memories.remove(name)
    return target


def check_new_name(target: PreTrainedModel | str | Path, name: str, where: str) -> Path | None:
    """Refuse a name that is illegal or taken; the target's folder, None for a model.

    Raises:
        FileNotFoundError, TypeError, ValueError: so is the target itself.
    """
    with asked_by(where):
        check_memory_name(name)
    folder = Path(target) if isinstance(target, (str, Path)) else None
    if folder is not None:
        names = saved_facts(folder, where)["memories"]
    else:
        with asked_by(where):
            names = require_attached(target).memories.names
    rule, step = f"differ from those there are, {list(names)}", "choose another or remove it first"
    require(name not in names, where, "the name", rule, repr(name), step)
    return folder
