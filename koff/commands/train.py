"""From a recipe to a saved model: every check first, then training, pruning, saving."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import os
import shutil
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TorchAoConfig,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import is_torch_xla_available

from ..data.blocks import PackedBlocks, pack
from ..data.sources import DataSource
from ..errors import Stopped, asked_by
from ..evaluation.perplexity import evaluate
from ..model import arch
from ..model.attach import attach
from ..model.sharding import accelerate_shards, in_shards
from ..model.state import count_weights
from ..pruning.binarize import binarize, check_multiple, sparsity
from ..pruning.compact import compact
from ..pruning.original import Original
from ..storage.layout import MARKER, current
from ..storage.lock import LOCK, check_unlocked, locked
from ..storage.processes import one_writes, said_by_first
from ..storage.save_load import save
from ..storage.space import SMALL_FILES, DiskFull, bytes_of, check_room, room_kept
from ..training.arguments import KoffTrainingArguments
from ..training.checkpoint import last_complete
from ..training.settings import OWN_FIELDS, checkpointing_name
from ..training.trainer import KoffTrainer
from . import plan
from .progress import TrainProgress
from .recipe import LOG_FILE, RECIPE_FILE, Recipe, first_difference, parse, stored_recipe
from .report.write import write_report
from .saved import first_documents
from .tables import write_json

logger = logging.getLogger("koff")

CHECKPOINTS = "checkpoints"
# Seconds for which a network file system may hide a file that another machine has just written: NFS
# keeps what it knows of a folder for up to 60.
UNSEEN_FOR = 90.0
# Of each domain, where a base in few bits is compared with what is saved: nats scatter by about 2
# from token to token, so that a mean over so many is known to about 1 %.
MEASURED_TOKENS = 1 << 15


@dataclass
class Prepared:
    """What a run needs before it may write anything.

    Args:
        tokenizer: of the recipe's model.
        train: {domain: its blocks, or its source if that is streamed}.
        general: the same of the parts of the general mixture; may be empty.
        weights: {part: its share in the draws}, relative to the others.
        checkpoint: folder to resume from, or None.
        measured: {domain: its blocks} that a base in few bits is compared on with what is saved.
    """

    tokenizer: Any
    train: dict[str, PackedBlocks | DataSource]
    general: dict[str, PackedBlocks | DataSource]
    weights: dict[str, float]
    checkpoint: str | None
    measured: dict[str, PackedBlocks] = field(default_factory=dict)


def run(
    recipe: Recipe,
    output: str | Path,
    *,
    device: str | None = None,
    label: str = "training",
    stops_on_signals: bool = True,
    fsdp: bool = False,
) -> Path:
    """Train what a recipe describes and save the pruned model with its memories.

    Everything that can be wrong is looked at first; nothing is written before. A run that was
    interrupted goes on from its last complete checkpoint when it is started again in the same way.

    Args:
        recipe: the recipe.
        output: folder for the model; new, empty, or that of the same run, interrupted.
        device: "cpu" keeps training off an accelerator; None leaves it to transformers.
        label: what stands before the progress bar.
        stops_on_signals: end behind a step, with a checkpoint, on SIGTERM and Ctrl-C; in another
            thread than the main one nothing does, since signals are not heard there.
        fsdp: share the base among the processes; each loads its shard alone.

    Returns:
        The folder: backbone, tokenizer, koff.json, memories/, recipe.json, train_log.json,
        report.html.

    Raises:
        FileNotFoundError, KeyError, ValueError: a recipe that cannot run, or a folder that another
            run is using; nothing was written. OSError: the disk has no room for what is to come,
            or in the end for the model. Then what was learned lies in a checkpoint: the same
            command, given again, saves it. Stopped: by a signal, with a checkpoint.
    """
    output = Path(output)
    # `accelerate launch` means several processes alone.
    shared = fsdp or (accelerate_shards() and _processes() > 1)
    if shared:
        _check_fsdp(recipe, device, "--fsdp" if fsdp else "accelerate's --use_fsdp")
    prepared = prepare(recipe, check_output(output, recipe))
    # The processes find each other here, which they must before they load a base in shards.
    arguments = training_arguments(recipe, output / CHECKPOINTS, device, fsdp=fsdp)
    # Python hears signals in its main thread alone.
    in_main = threading.current_thread() is threading.main_thread()
    arguments.enable_jit_checkpoint = stops_on_signals and in_main
    if recipe.quantization is None:
        base = load_base(recipe, arguments.world_size if shared else 1)
    else:
        # Where it is to train: transformers' Trainer does not move what bitsandbytes holds.
        base = load_quantised(recipe, arguments.device)
    model = attach(base, recipe.koff)
    trainer = make_trainer(model, prepared, arguments, label)
    if trainer.is_world_process_zero() and model.num_parameters() >= plan.WORTH_COUNTING:
        expected = plan.plan(
            recipe,
            check_model(recipe),
            devices=arguments.world_size,
            fsdp=shared,
        )
        Console().print(
            f"{label}: {expected.headline()}", markup=False, highlight=False, soft_wrap=True
        )
    with contextlib.ExitStack() as held, asked_by("koff train"):
        # From here on files are written: by one process of a distributed run alone.
        with one_writes(f"koff train {output}") as writes:
            if writes:
                if prepared.checkpoint is None and (output / RECIPE_FILE).exists():
                    logger.warning(
                        "koff train: the run in %s left no checkpoint: it starts from the "
                        "beginning; train.save_every writes checkpoints",
                        output,
                    )
                output.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(output))
                check_room("the run", room_for(trainer, recipe), output)
                facts = {"root": str(recipe.root), "recipe": recipe.to_dict()}
                write_json(output / RECIPE_FILE, facts)
        checkpoint = _agreed_checkpoint(output, prepared.checkpoint)
        started = time.perf_counter()
        _train(trainer, output, checkpoint)
        if trainer.stopped_by is not None:
            done, wanted = trainer.state.global_step, recipe.train.steps
            raise Stopped(
                f"stopped by {trainer.stopped_by.name} after step {done} of {wanted}, with a "
                f"checkpoint in {output}; the same command, given again, goes on from there",
                trainer.stopped_by,
            )
        log = {"seconds": time.perf_counter() - started, "resumed_from": checkpoint}
        model, facts = finish(trainer.model, recipe, prepared.measured)
        for name, (trained, saved) in facts.get("quantization", {}).get("perplexity", {}).items():
            if writes:
                logger.warning(
                    "koff train: the perplexity of %s is %.2f with the base in %s, as it trained, "
                    "and %.2f with the weights that are saved",
                    name,
                    trained,
                    recipe.quantization,
                    saved,
                )
        metadata = {
            "base": recipe.model,
            "revision": recipe.revision,
            "seed": recipe.seed,
            "data": recipe.data_names(),
            "general": recipe.data_names(general=True),
        }
        if writes:
            write_json(output / LOG_FILE, log | facts | {"history": trainer.state.log_history})
        save(model, output, tokenizer=prepared.tokenizer, metadata=metadata)
        if writes and not recipe.train.save_every:
            shutil.rmtree(output / CHECKPOINTS)  # it kept what was learned until now
        if writes:
            _write_page(output)
    return output


def _agreed_checkpoint(output: Path, checkpoint: str | None) -> str | None:
    """Return the checkpoint that the first process found, as this process names it.

    Raises:
        ValueError: this process does not see what the first one wrote: its disk is another one.
    """
    own = "" if checkpoint is None else Path(checkpoint).relative_to(output).as_posix()
    chosen = said_by_first(f"koff train {output}", own)
    wanted = output / (chosen or RECIPE_FILE)
    deadline = time.monotonic() + UNSEEN_FOR
    while not wanted.exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"koff train: output {output} must be one folder that every process sees, got no "
                f"{wanted.name} here, which the first process has; choose a folder on a shared "
                "file system"
            )
        time.sleep(0.5)
    return str(wanted) if chosen else None


def _write_page(output: Path) -> None:
    """Write the page about a run that is saved, which no trouble with a page shall undo."""
    try:
        write_report([output])
    except (OSError, ValueError) as error:
        logger.warning("koff train: the model is saved, but not the page about it: %s", error)


def _train(trainer: KoffTrainer, output: Path, checkpoint: str | None) -> None:
    """Train, with a checkpoint at the end in any case, also if the disk fills up on the way."""
    try:
        with contextlib.ExitStack() as kept:
            if trainer.is_world_process_zero():
                kept.enter_context(room_kept(trainer.checkpoint_bytes() + SMALL_FILES, output))
            trainer.train(resume_from_checkpoint=checkpoint)
    except DiskFull:
        if trainer.state.global_step:
            trainer.save_checkpoint()  # in the room that was kept
        raise
    if trainer.args.save_strategy == "no" and trainer.stopped_by is None:
        trainer.save_checkpoint()


def room_for(trainer: KoffTrainer, recipe: Recipe) -> int:
    """Return how many bytes a run needs for its checkpoints and, at its end, for the model."""
    model, state, train = trainer.model, trainer.koff, recipe.train
    base = bytes_of(p for name, p in model.named_parameters() if not name.startswith("koff."))
    counted, each = count_weights(model), model.dtype.itemsize
    if recipe.quantization is not None:  # what is saved is not
        each = plan.saved_dtype(recipe, check_model(recipe)).itemsize
        base = counted["total"] * each
    if state.gates is not None:
        mlps = counted["mlp"] * each
        base -= int(state.gates.target * mlps)
    # A new checkpoint is there before the oldest goes, and there is room for one that is not asked
    # for.
    made = train.steps // train.save_every + 1 if train.save_every else 0
    checkpoints = min(made, train.keep_checkpoints + 1) + 1
    memories = bytes_of(state.memories.parameters())
    return base + memories + checkpoints * trainer.checkpoint_bytes() + SMALL_FILES


def make_trainer(
    model: PreTrainedModel, prepared: Prepared, arguments: KoffTrainingArguments, label: str
) -> KoffTrainer:
    """Make the trainer of a run, with koff's bar for transformers'; leave no folder if it fails.

    Args:
        model: an attached model.
        prepared: its data.
        arguments: of the training.
        label: what stands before the bar.
    """
    folder = Path(arguments.output_dir)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        trainer = KoffTrainer(
            model,
            args=arguments,
            train_datasets=prepared.train,
            general_datasets=prepared.general or None,
            general_weights=prepared.weights or None,
            processing_class=prepared.tokenizer,
        )
    except Exception:
        # transformers' Trainer makes its folder before it has checked everything.
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(TrainProgress(label=label))
    return trainer


def finish(
    model: PreTrainedModel, recipe: Recipe, measured: dict[str, PackedBlocks] | None = None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Fix the mask and remove the closed neurons, in place where the model is not sharded; a base
    in few bits becomes plain, and is measured before and after.

    Args:
        model: the trained koff model.
        recipe: its recipe.
        measured: {domain: blocks} that a base in few bits is measured on; None: it is not.

    Returns:
        The narrow model, and what was reached, ready for JSON; nothing for a recipe without gates
        and quantization.
    """
    facts: dict[str, Any] = {}
    if recipe.koff.target_sparsity > 0 and not sparsity(model).hard:
        # Else the trainer fixed the mask on the way.
        report = binarize(model, multiple_of=recipe.train.width_multiple_of)
        facts["binarize"] = asdict(report)
    if recipe.quantization is not None:
        # What was learned has learned with the rounded weights, and is saved with the others: both
        # are measured, so that nobody has to believe that it is none the worse.
        before = _perplexities(model, recipe, measured or {})
        model = compact(model, inplace=True)
        after = _perplexities(model, recipe, measured or {})
        facts["quantization"] = {
            "format": recipe.quantization,
            "perplexity": {name: [before[name], after[name]] for name in before},
        }
    elif recipe.koff.target_sparsity > 0:
        model = compact(model, inplace=True)
    if recipe.koff.target_sparsity > 0:
        facts["sparsity"] = asdict(sparsity(model))
    return model, facts


def _perplexities(
    model: PreTrainedModel, recipe: Recipe, measured: dict[str, PackedBlocks]
) -> dict[str, float]:
    """The perplexity of each domain under its own memory, if it has one."""
    found = {}
    for name, blocks in measured.items():
        (row,) = evaluate(
            model,
            None,
            {name: blocks},
            memories=[name if name in model.koff.memory_names else None],
            block_size=recipe.train.block_size,
            batch_size=recipe.train.batch_size,
        )
        found[name] = row.perplexity
    return found


def prepare(recipe: Recipe, checkpoint: str | None = None) -> Prepared:
    """Check files, model and data of a run, and load what is cheap to load.

    Args:
        recipe: the recipe.
        checkpoint: to resume from, or None.

    Raises:
        FileNotFoundError, KeyError, ValueError: as ``run``.
    """
    recipe.check_files()
    config = check_model(recipe)
    check_widths(recipe, config)
    # A row finds its memory's keys at positions -P..-1: both together must fit the context.
    limit = getattr(config, "max_position_embeddings", None)
    prefix = recipe.koff.kv.num_tokens if recipe.koff.kv and recipe.koff.memories else 0
    if limit is not None and recipe.train.block_size + prefix > limit:
        raise ValueError(
            f"recipe: train.block_size + koff.kv.num_tokens must be at most the model's {limit} "
            f"positions, got {recipe.train.block_size} + {prefix}; lower one of them"
        )
    tokenizer = load_tokenizer(recipe)

    def packed(general: bool) -> dict[str, PackedBlocks | DataSource]:
        kind, size = "general" if general else "data", recipe.train.block_size
        return {
            name: source
            if source.streaming
            else pack(
                source,
                tokenizer,
                size,
                name=f"{kind}.{name}.train",
                num_proc=recipe.train.dataset_num_proc,
            )
            for name, source in recipe.sources("train", general=general).items()
        }

    weights = {name: part.weight for name, part in recipe.general.items()}
    prepared = Prepared(tokenizer, packed(False), packed(True), weights, checkpoint)
    if recipe.quantization is not None:
        splits = {"train": recipe.sources("train"), "validation": recipe.sources("validation")}
        for name in recipe.data:
            split = "validation" if name in splits["validation"] else "train"
            prepared.measured[name] = pack(
                first_documents(splits[split][name], tokenizer, MEASURED_TOKENS),
                tokenizer,
                recipe.train.block_size,
                name=f"data.{name}.{split}",
            )
    return prepared


def check_output(output: Path, recipe: Recipe) -> str | None:
    """Check that a run may write to a folder.

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
    with asked_by("koff train"):
        check_unlocked(output)
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
    with asked_by("koff train"):
        stored, root = stored_recipe(output)
    # As a recipe: then one of an earlier koff has the defaults of settings that it did not know.
    difference = first_difference(parse(stored, Path(root)).to_dict(), recipe.to_dict())
    if difference is not None:
        raise ValueError(
            f"koff train: output {output} must hold a run of the same recipe to resume, got one "
            f"with another {difference}; choose another folder or restore the recipe"
        )
    return last_checkpoint(output / CHECKPOINTS)


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint under ``folder``, None if there is none; incomplete
    ones are ignored with a warning.

    Args:
        folder: where the trainer writes ``checkpoint-<step>``.
    """
    found = last_complete(folder)
    return None if found is None else str(found)


def _is_start(item: Path) -> bool:
    """Whether a run that was killed at its very beginning leaves this: an empty folder for
    checkpoints, a lock that nobody holds, or a recipe.json under its temporary name."""
    empty = item.name == CHECKPOINTS and item.is_dir() and not any(item.iterdir())
    return empty or item.name == LOCK or item.name.startswith(f".{RECIPE_FILE}.")


def check_model(recipe: Recipe) -> PreTrainedConfig:
    """Load the model's configuration, of a multimodal one that of its language model, and refuse
    architectures that koff does not know.

    Raises:
        FileNotFoundError, OSError: no such folder or hub id. ValueError: an unsupported model.
    """
    config = _load(recipe, AutoConfig).get_text_config()
    with asked_by("koff train"):
        arch.architecture(config.model_type)
    return config


def check_widths(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Refuse a recipe's ``width_multiple_of`` by which its target is out of reach. (Of a share of
    all weights KoffTrainer does, which knows how many there are.)

    Args:
        recipe: the recipe.
        config: of its model.

    Raises:
        ValueError: so.
    """
    if recipe.koff.sparsity_scope != "mlp":
        return
    full = [config.intermediate_size] * config.num_hidden_layers
    with asked_by("recipe: in train"):
        check_multiple(full, recipe.koff.target_sparsity, recipe.train.width_multiple_of)


def load_tokenizer(recipe: Recipe) -> Any:
    """Load the tokenizer of the recipe's model."""
    return _load(recipe, AutoTokenizer)


def load_quantised(recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """Load the base model of a recipe in the few bits that it asks for.

    Args:
        recipe: with ``quantization``.
        device: where to put it.

    Raises:
        ImportError: the package that does it is not installed. ValueError: ``compact`` could not
            take the weights from where the model is.
    """
    package = {"nf4": "bitsandbytes", "int8": "torchao"}[recipe.quantization]
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"recipe: quantization: {recipe.quantization} must have the package `{package}`, got "
            'no such package; install it with pip install "koff[quantized]"'
        )
    config = _base_config(recipe)
    options: dict[str, Any] = {"dtype": recipe.dtype, "device_map": {"": device}}
    if recipe.quantization == "nf4":
        dtype = recipe.dtype
        if recipe.train.bf16:
            dtype = "bfloat16"
        elif dtype == "auto":
            dtype = str(config.get_text_config().dtype or "float32").removeprefix("torch.")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,  # the scales, too: 4.1 bits for a weight, not 4.5
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        options["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
    model = _load(recipe, AutoModelForCausalLM, config=config, **options)
    with asked_by("koff train"), Original(model):
        return model


def _base_config(recipe: Recipe) -> PreTrainedConfig:
    config = _load(recipe, AutoConfig)
    if recipe.koff.kv is not None:
        # Some are published with attention dropout, which attention over a learned cache has not.
        # Set here, since from_pretrained does not find it in the text part of a multimodal config.
        config.get_text_config().attention_dropout = 0.0
    return config


def load_base(recipe: Recipe, processes: int = 1) -> PreTrainedModel:
    """Load the dense base model of a recipe, on the CPU, in its own dtype or the recipe's; or,
    shared by several processes, in shards where they train."""
    config = _base_config(recipe)
    if recipe.gguf_file is None:
        shards = in_shards(processes) if processes > 1 else {}
        return _load(recipe, AutoModelForCausalLM, config=config, dtype=recipe.dtype, **shards)
    model = _load(recipe, AutoModelForCausalLM, config=config, dtype="float32")
    return _plain(model, torch.float32 if recipe.dtype == "auto" else getattr(torch, recipe.dtype))


def _plain(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model that was read from a GGUF file as an ordinary one, of the same tensors.

    transformers dequantises the weights, but goes on to say that they are quantised: such a model
    cannot be saved.
    """
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain.eval()


def _load(recipe: Recipe, cls: Any, **options: Any) -> Any:
    """Load the recipe's model by one of transformers' Auto classes, running no code from it."""
    path = recipe.model_path()
    if recipe.gguf_file is not None:
        if importlib.util.find_spec("gguf") is None:
            raise ImportError(
                "recipe: gguf_file must have the package `gguf`, got no such package; install it "
                'with pip install "koff[gguf]"'
            )
        options["gguf_file"] = recipe.gguf_file
    try:
        return cls.from_pretrained(
            path, revision=recipe.revision, trust_remote_code=False, **options
        )
    except OSError as error:
        # transformers explains at length; the first line says what is the matter.
        raise OSError(
            f"koff: the base model must be a folder (below {recipe.root}) or a model of the hub, "
            f"got {path!r} ({str(error).splitlines()[0]}); correct it, or set KOFF_DATA"
        ) from error


def _processes() -> int:
    """How many were started together; before they have found each other."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _check_fsdp(recipe: Recipe, device: str | None, option: str) -> None:
    """Refuse to share a base that cannot be shared, before its data are read.

    Args:
        recipe, device: as ``run``.
        option: by which it was asked for.
    """
    if _processes() == 1:
        raise ValueError(
            f"koff train: {option} must have several processes to share the base, got one; start "
            "them with torchrun (docs/scale.md), or leave it out"
        )
    if device == "cpu":
        raise ValueError(
            f"koff train: {option} must have a GPU for each process, got --device cpu; leave one "
            "of them out"
        )
    if recipe.quantization is not None:
        raise ValueError(
            f"koff train: {option} must have a plain base, got quantization: "
            f"{recipe.quantization}; leave one of them out"
        )
    if recipe.gguf_file is not None:
        raise ValueError(
            f"koff train: {option} must have a base in safetensors, of which each process can read "
            f"its part alone, got gguf_file: {recipe.gguf_file!r}; leave one of them out"
        )


def training_arguments(
    recipe: Recipe, folder: str | Path, device: str | None = None, *, fsdp: bool = False
) -> KoffTrainingArguments:
    """Return the arguments of a recipe's training.

    Args:
        recipe: the recipe.
        folder: where checkpoints go.
        device: "cpu" keeps training off an accelerator; None leaves it to transformers.
        fsdp: share the base among the processes.

    Raises:
        ValueError: another device.
    """
    if device not in (None, "cpu"):
        raise ValueError(
            f"koff train: device must be cpu (or left out), got {device!r}; CUDA_VISIBLE_DEVICES "
            "chooses among GPUs"
        )
    train = recipe.train
    own = {name: getattr(train, name) for name in OWN_FIELDS}
    own["general_every"] = train.general_every if recipe.general else 0
    return KoffTrainingArguments(
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
        # Without an accelerator transformers takes bf16 only if it is told to use the CPU.
        use_cpu=device == "cpu" or not _has_accelerator(),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        bf16=train.bf16,
        fsdp=fsdp,
        **{checkpointing_name(KoffTrainingArguments): train.activation_checkpointing},
        **own,
    )


def _has_accelerator() -> bool:
    """Whether transformers would find one."""
    return torch.accelerator.is_available() or is_torch_xla_available()
