"""`koff add-memory`: one more domain for a saved model, described by the keys of a recipe."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import asked_by
from ..manage import check_new_name, learn
from ..storage.change import put_memory
from ..storage.layout import current
from ..storage.processes import one_writes
from ..storage.save_load import load
from ..storage.saved_folder import open_saved
from .recipe import RECIPE_FILE, Recipe, apply_overrides, parse, stored_recipe
from .train import make_trainer, prepare, training_arguments

_WHERE = "koff add-memory"
# The rest of a recipe describes the backbone, which is there already.
_SETTABLE = ("data", "general", "train", "koff.lora", "koff.kv", "seed", "dtype")

# Settings of the folder's run that say nothing of one memory on a fixed backbone: those of gates,
# of rows with another memory or none, and of checkpoints, for which there is no folder.
_OF_THE_RUN = (
    "gate_learning_rate", "multiplier_learning_rate", "sparsity_penalty", "sparsity_warmup_ratio",
    "saliency_batches", "mask", "fix_mask_at", "width_multiple_of", "no_memory_rows",
    "distractor_rows", "save_every", "keep_checkpoints",
)  # fmt: skip


def addition(
    directory: Path, name: str, data: dict[str, Any], overrides: Iterable[str] = ()
) -> Recipe:
    """Return the recipe of one more memory: its parts as the folder's model was attached with, seed
    and training as in the recipe that lies there, the rest at the defaults of a recipe.

    Args:
        directory: of a saved model.
        name: of the new memory.
        data: its section of a recipe, {"train": file, ...}; relative paths start from the working
            directory.
        overrides: "key.path=value" texts, as for `koff train`.

    Returns:
        The recipe, with the memory as its only domain.

    Raises:
        FileNotFoundError, KeyError, ValueError: no saved model, a damaged recipe in it, a taken
            name, or values that no recipe may have.
    """
    with asked_by(_WHERE):
        check_new_name(directory, name)
        config = open_saved(directory).manifest.config.to_dict()
        begins = _of_the_folder(directory)
    overrides = list(overrides)
    for text in overrides:
        key = text.partition("=")[0].strip()
        if not any(key == known or key.startswith(f"{known}.") for known in _SETTABLE):
            raise KeyError(
                f"{_WHERE}: --set must name a key under {', '.join(_SETTABLE)}, got {key!r}; the "
                "backbone is fixed"
            )
    parts = {part: config[part] for part in ("lora", "kv")}
    values = {
        "model": str(current(directory).resolve()),
        "data": {name: data},
        # The backbone is pruned already. One that was pruned with gates alone says nothing about
        # the parts of memories: theirs are a recipe's defaults.
        "koff": {"target_sparsity": 0} | (parts if any(parts.values()) else {}),
        **begins,
    }
    recipe = parse(apply_overrides(values, overrides), Path.cwd())
    if set(recipe.data) != {name}:
        raise KeyError(
            f"{_WHERE}: data must name {name!r} alone, got {sorted(recipe.data)}; correct --set"
        )
    return recipe


def has_recipe(directory: Path) -> bool:
    """Return whether a saved model lies with the recipe that it was trained by."""
    return (Path(directory) / RECIPE_FILE).is_file()


def _of_the_folder(directory: Path) -> dict[str, Any]:
    """What the recipe in the folder says of a memory's training; nothing where there is none."""
    if not has_recipe(directory):
        return {}
    saved = open_saved(directory)
    saved.beside(RECIPE_FILE)  # no link
    values, root = stored_recipe(directory)
    run = parse(values, Path(root))
    train = {k: v for k, v in dataclasses.asdict(run.train).items() if k not in _OF_THE_RUN}
    if saved.manifest.widths != saved.manifest.dense_widths:
        del train["distillation_weight"]  # the teacher, which was not pruned, is gone
    return {"train": train, "seed": run.seed}


def extend(directory: Path, recipe: Recipe, *, device: str | None = None) -> Path:
    """Train the memory that a recipe describes and write it into the saved folder.

    Args:
        directory: of the saved model; nothing but its list of memories and its card changes.
        recipe: what ``addition`` returned.
        device: "cpu" keeps training off an accelerator; None leaves it to transformers.

    Returns:
        The folder.

    Raises:
        FileNotFoundError, KeyError, ValueError: data or settings that cannot be used; the folder is
            then as before.
    """
    (name,) = recipe.koff.memories
    prepared = prepare(recipe)
    model = load(directory, dtype=recipe.dtype)
    with tempfile.TemporaryDirectory(prefix="koff-add-") as place:
        arguments = training_arguments(recipe, place, device)
        learn(
            model,
            name,
            lora=recipe.koff.lora,
            kv=recipe.koff.kv,
            make_trainer=lambda model: make_trainer(model, prepared, arguments, f"memory {name}"),
            seed=recipe.seed,
            folder=directory,
        )
    values = recipe.to_dict()
    record = {
        "train": values["train"],
        "general": values["general"],
        "seed": values["seed"],
        "source": recipe.data_names()[name],
        "data": values["data"][name],
        "root": str(recipe.root),
    }
    with one_writes(f"{_WHERE} {directory} {name}") as writes:
        if writes:
            put_memory(directory, model, name, record)
    return directory
