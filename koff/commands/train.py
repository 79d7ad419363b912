"""From a recipe to a saved model: every check first, then training, pruning, saving."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.blocks import PackedBlocks, pack
from ..data.sources import load_documents
from ..errors import asked_by, refuse, require
from ..storage.files import File
from ..storage.layout import MARKER, current
from ..training.arguments import OWN_FIELDS
from ..training.checkpoint import last_complete
from .progress import TrainProgress
from .recipe import Recipe, first_difference
from .tables import write_json

logger = logging.getLogger("koff")

RECIPE_FILE, LOG_FILE, CHECKPOINTS = "recipe.json", "train_log.json", "checkpoints"


@dataclass
class Prepared:
    """What a run needs before it may write anything."""

    tokenizer: Any
    train: dict[str, PackedBlocks]
    general: dict[str, PackedBlocks]
    weights: dict[str, float]
    checkpoint: str | None


def run(
    recipe: Recipe, output: str | Path, *, device: str | None = None, label: str = "training"
) -> Path:
    """Trains what a recipe describes and saves the pruned model with its memories.

    Everything that can be wrong is looked at first; nothing is written before. A run that was
    interrupted goes on from its last complete checkpoint when it is started again in the same way.

    Args:
        recipe: the recipe.
        output: folder for the model; new, empty, or that of the same run, interrupted.
        device: "cpu" keeps training off an accelerator; None leaves it to transformers.
        label: what stands before the progress bar.

    Returns:
        The folder: backbone, tokenizer, koff.json, memories/, recipe.json, train_log.json.

    Raises:
        FileNotFoundError, KeyError, ValueError: a recipe that cannot run; nothing was written.
    """
    import koff

    output = Path(output)
    prepared = prepare(recipe, check_output(output, recipe))
    model = koff.attach(load_base(recipe), recipe.koff)
    arguments = training_arguments(recipe, output / CHECKPOINTS, device)
    trainer = make_trainer(model, prepared, arguments, label)
    writes = trainer.is_world_process_zero()
    if writes:
        if prepared.checkpoint is None and (output / RECIPE_FILE).exists():
            step = "it starts from the beginning; train.save_every writes checkpoints"
            logger.warning("koff train: the run in %s left no checkpoint: %s", output, step)
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / RECIPE_FILE, {"root": str(recipe.root), "recipe": recipe.to_dict()})
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=prepared.checkpoint)
    log = {"seconds": time.perf_counter() - started, "resumed_from": prepared.checkpoint}
    log |= finish(trainer.model, recipe)
    if writes:
        if not list(output.glob(f"{CHECKPOINTS}/*")) and (output / CHECKPOINTS).is_dir():
            (output / CHECKPOINTS).rmdir()  # transformers makes it even if nothing is saved
        write_json(output / LOG_FILE, log | {"history": trainer.state.log_history})
        metadata = {"base": recipe.model, "revision": recipe.revision, "seed": recipe.seed}
        metadata |= {"data": recipe.data_names(), "general": recipe.data_names(general=True)}
        koff.save(trainer.model, output, tokenizer=prepared.tokenizer, metadata=metadata)
    return output


def make_trainer(model: Any, prepared: Prepared, arguments: Any, label: str) -> Any:
    """The KoffTrainer of a run, with koff's bar for transformers'; leaves no folder if it fails.

    Args:
        model: an attached model.
        prepared: its data.
        arguments: `KoffTrainingArguments`.
        label: what stands before the bar.
    """
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    import koff

    folder = Path(arguments.output_dir)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        trainer = koff.KoffTrainer(
            model,
            args=arguments,
            train_datasets=prepared.train,
            general_datasets=prepared.general or None,
            general_weights=prepared.weights or None,
            processing_class=prepared.tokenizer,
        )
    except Exception:
        # transformers' Trainer makes its folder before it has checked everything.
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(TrainProgress(label=label))
    return trainer


def finish(model: Any, recipe: Recipe) -> dict[str, Any]:
    """Fixes the mask and removes the closed neurons, in place.

    Args:
        model: the trained koff model.
        recipe: its recipe.

    Returns:
        What was reached, ready for JSON; empty for a recipe without gates.
    """
    import koff

    if recipe.koff.target_sparsity == 0:
        return {}
    facts = {}
    if not koff.sparsity(model).hard:  # else the trainer fixed the mask on the way
        report = koff.binarize(model, multiple_of=recipe.train.width_multiple_of)
        facts["binarize"] = _plain(report)
    koff.compact(model, inplace=True)
    return facts | {"sparsity": _plain(koff.sparsity(model))}


def prepare(recipe: Recipe, checkpoint: str | None = None) -> Prepared:
    """Checks files, model and data of a run, and loads what is cheap to load.

    Args:
        recipe: the recipe.
        checkpoint: to resume from, or None.

    Raises:
        FileNotFoundError, KeyError, ValueError: as `run`.
    """
    recipe.check_files()
    config = check_model(recipe)
    limit = getattr(config, "max_position_embeddings", None)
    prefix = recipe.koff.kv.num_tokens if recipe.koff.kv and recipe.koff.memories else 0
    if limit is not None and recipe.train.block_size + prefix > limit:
        raise ValueError(
            f"recipe: train.block_size + koff.kv.num_tokens must be at most the model's {limit} "
            f"positions, got {recipe.train.block_size} + {prefix}; lower one of them"
        )
    tokenizer = load_tokenizer(recipe)
    packed: list[dict[str, PackedBlocks]] = []
    for general in (False, True):
        packed.append(
            {
                name: pack(
                    load_documents(source),
                    tokenizer,
                    recipe.train.block_size,
                    name=f"{'general' if general else 'data'}.{name}.train",
                )
                for name, source in recipe.sources("train", general=general).items()
            }
        )
    weights = {name: part.weight for name, part in recipe.general.items()}
    return Prepared(tokenizer, packed[0], packed[1], weights, checkpoint)


def check_output(output: Path, recipe: Recipe) -> str | None:
    """Checks that a run may write to `output`.

    Args:
        output: folder of the run.
        recipe: the recipe.

    Returns:
        The last complete checkpoint of the same run, or None to start from the beginning.

    Raises:
        ValueError: the folder holds something else.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(
            f"koff train: output {output} must be a folder, got a file; choose another"
        )
    if not output.exists() or not any(output.iterdir()):
        return None
    if (current(output) / MARKER).exists():
        raise ValueError(
            f"koff train: output {output} must not hold a finished model, got one; choose another "
            "folder or remove it"
        )
    if not (output / RECIPE_FILE).is_file():
        others = [item.name for item in output.iterdir() if not _is_start(item)]
        if others:
            raise ValueError(
                f"koff train: output {output} must be empty or hold an interrupted run, got "
                f"{sorted(others)[:5]}; choose another folder"
            )
        return None
    stored, _ = stored_recipe(output, "koff train")
    difference = first_difference(stored, recipe.to_dict())
    if difference is not None:
        raise ValueError(
            f"koff train: output {output} must hold a run of the same recipe to resume, got one "
            f"with another {difference}; choose another folder or restore the recipe"
        )
    return last_checkpoint(output / CHECKPOINTS)


def last_checkpoint(folder: Path) -> str | None:
    """Returns the newest complete checkpoint under `folder`, None if there is none; incomplete ones
    are ignored with a warning.

    Args:
        folder: where the trainer writes `checkpoint-<step>`.
    """
    found = last_complete(folder)
    return None if found is None else str(found)


def stored_recipe(output: Path, where: str) -> tuple[dict[str, Any], str]:
    """Returns what a run stored of its recipe: the values, and the folder it was read from.

    Args:
        output: folder of the run, with its recipe.json.
        where: for errors.

    Raises:
        ValueError: a damaged recipe.json.
    """
    with asked_by(where):
        values = File(output / RECIPE_FILE).json()
    recipe, root = values.get("recipe"), values.get("root")
    good = isinstance(recipe, dict) and isinstance(root, str)
    rule, step = "hold the recipe and its folder", "copy the file again"
    require(good, where, RECIPE_FILE, rule, repr(values)[:80], step)
    return recipe, root


def _is_start(item: Path) -> bool:
    """Whether a run that was killed at its very beginning leaves this: an empty folder for
    checkpoints, or a recipe.json under its temporary name."""
    empty = item.name == CHECKPOINTS and item.is_dir() and not any(item.iterdir())
    return empty or item.name.startswith(f".{RECIPE_FILE}.")


def check_model(recipe: Recipe) -> Any:
    """Loads the model's configuration and refuses architectures that koff does not know.

    Args:
        recipe: the recipe.

    Returns:
        The transformers configuration.

    Raises:
        FileNotFoundError, OSError: no such folder or hub id. ValueError: an unsupported model.
    """
    from transformers import AutoConfig

    from ..model import arch

    config = _load(recipe, AutoConfig)
    with asked_by("koff train"):
        arch.architecture(config.model_type)
    return config


def load_tokenizer(recipe: Recipe) -> Any:
    """Returns the tokenizer of the recipe's model."""
    from transformers import AutoTokenizer

    return _load(recipe, AutoTokenizer)


def load_base(recipe: Recipe) -> Any:
    """Returns the dense base model of a recipe, on the CPU."""
    from transformers import AutoModelForCausalLM

    return _load(recipe, AutoModelForCausalLM, dtype=recipe.dtype)


def _load(recipe: Recipe, cls: Any, **options: Any) -> Any:
    """What one of transformers' Auto classes makes of the recipe's model; an OSError where there is
    none."""
    path = recipe.model_path()
    try:
        return cls.from_pretrained(
            path, revision=recipe.revision, trust_remote_code=False, **options
        )
    except OSError as error:
        rule = f"be a folder (below {recipe.root}) or a model of the hub"
        got = f"{path!r} ({str(error).splitlines()[0]})"
        refuse("koff", "the base model", rule, got, "correct it, or set KOFF_DATA", OSError)


def training_arguments(recipe: Recipe, folder: str | Path, device: str | None = None) -> Any:
    """Returns the `KoffTrainingArguments` of a recipe.

    Args:
        recipe: the recipe.
        folder: where checkpoints go.
        device: "cpu" keeps training off an accelerator; None leaves it to transformers.

    Raises:
        ValueError: another device.
    """
    import koff

    rule, step = "be cpu (or left out)", "CUDA_VISIBLE_DEVICES chooses among GPUs"
    require(device in (None, "cpu"), "koff train", "device", rule, repr(device), step)
    train = recipe.train
    own = {name: getattr(train, name) for name in OWN_FIELDS}
    own["general_every"] = train.general_every if recipe.general else 0
    # Named only where it is wanted: newer transformers warn about the name.
    checkpointing = {"gradient_checkpointing": True} if train.gradient_checkpointing else {}
    return koff.KoffTrainingArguments(
        output_dir=str(folder),
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation,
        lr_scheduler_type=train.lr_scheduler,
        warmup_steps=int(train.warmup_ratio * train.steps),
        save_strategy="steps" if train.save_every else "no",
        save_steps=train.save_every or train.steps,
        save_total_limit=train.keep_checkpoints,
        logging_steps=train.logging_every,
        seed=recipe.seed,
        report_to=[],
        use_cpu=device == "cpu" or not _has_accelerator(),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        bf16=train.bf16,
        **checkpointing,
        **own,
    )


def _has_accelerator() -> bool:
    """Whether transformers would find one. It takes bf16 on the CPU only if told so: use_cpu."""
    import torch
    from transformers.utils import is_torch_xla_available

    return torch.accelerator.is_available() or is_torch_xla_available()


def _plain(report: Any) -> Any:
    """A report dataclass as values that JSON has."""
    return json.loads(json.dumps(dataclasses.asdict(report), default=str))
