"""What the folders of finished runs hold that a page can show: JSON alone, each value looked at
before it is used, and the headers of safetensors files. No weights are read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import asker
from ...evaluation.measures import Cells, cells
from ...storage.files import DamagedFolder
from ...storage.layout import MEMORIES
from ...storage.manifest import Manifest
from ...storage.metadata import check_shapes
from ...storage.saved_folder import SavedFolder, open_saved
from ..recipe import LOG_FILE, RECIPE_FILE, Recipe, parse, stored_recipe
from ..saved import count_saved

# How files of measurements are named that lie beside a model; `koff eval` and `koff analyse` write
# them with --json.
SCORES, ATTENTION, TASKS = "eval-*.json", "attention-*.json", "tasks-*.json"
NEURONS = "neurons.json"


@dataclass(frozen=True)
class Neurons:
    """How a mask treats language-specific and other neurons.

    Args:
        sentence: the finding in words.
        rates: {kind of neuron: (how many, share pruned, low and high end of its interval, share
            that random masks prune, p or None)}; kinds of which there are none are left out.
        layers: shares pruned of specific and of other neurons, layer by layer; None where a layer
            has none.
    """

    sentence: str
    rates: dict[str, tuple[int, float, float, float, float, float | None]]
    layers: list[tuple[float | None, float | None]]


@dataclass(frozen=True, eq=False)
class Finished:
    """One finished run.

    Args:
        name: of its folder.
        manifest: its koff.json.
        recipe: what it was trained with, if that lies there.
        seconds: that training took, if known.
        history: {logged name: [(step, value), ...]} of the training.
        koff, dense: perplexities of its model, and of the dense base where that was measured.
        tokens: {domain: number of scored tokens}.
        splits: those for which there are rows.
        tasks: rows of `koff eval --tasks`.
        attention: {(domain, memory): attention on the memory's learned keys, layer by layer}.
        neurons: what `koff analyse --neurons` found, or None.
        sizes: {part: (parameters, bytes)}; the parts are "backbone" and the memories.
    """

    name: str
    manifest: Manifest
    recipe: Recipe | None
    seconds: float | None
    history: dict[str, list[tuple[float, float]]]
    koff: Cells
    dense: Cells
    tokens: dict[str, int]
    splits: list[str]
    tasks: list[dict[str, Any]]
    attention: dict[tuple[str, str], list[float]]
    neurons: Neurons | None
    sizes: dict[str, tuple[int, int]]

    @property
    def pruned(self) -> bool:
        """Whether it has fewer neurons than its base."""
        return self.manifest.widths != self.manifest.dense_widths


def read_finished(directory: str | Path, split: str) -> Finished:
    """Read a finished run.

    Args:
        directory: output folder of `koff train`, or any folder that ``koff.save`` wrote.
        split: whose measurements are wanted.

    Raises:
        FileNotFoundError, KeyError, ValueError: no saved model there, or something damaged.
    """
    saved = open_saved(directory)
    names = {path.name for path in saved.directory.iterdir()}
    recipe = None
    if RECIPE_FILE in names:
        saved.beside(RECIPE_FILE)  # no link
        values, root = stored_recipe(saved.directory)
        recipe = parse(values, Path(root))
    log = saved.beside(LOG_FILE).json() if LOG_FILE in names else {}
    rows = list(_rows(saved, "results", SCORES))
    # Of a card that somebody edited, rows may lack what tells them apart.
    named = [row for row in rows if row.get("domain") and row.get("variant")]
    shown = [row for row in named if row.get("split") == split]
    return Finished(
        name=saved.directory.resolve().name,
        manifest=saved.manifest,
        recipe=recipe,
        seconds=_number(log.get("seconds")),
        history=_history(log.get("history")),
        koff=_measured(cells(shown, "koff")),
        dense=_measured(cells(shown, "base")),
        tokens=_tokens(shown),
        splits=list(dict.fromkeys(str(row.get("split")) for row in named)),
        tasks=[row for row in _rows(saved, "tasks", TASKS) if _number(row["value"]) is not None],
        attention=dict(_attention(saved)),
        neurons=_neurons(saved) if NEURONS in names else None,
        sizes=_sizes(saved),
    )


def _rows(saved: SavedFolder, kind: str, pattern: str) -> Iterator[dict[str, Any]]:
    """Yield what was measured: first what the card shows, then what files hold, which may be newer.

    Args:
        saved: the run.
        kind: "results" or "tasks", as koff.json calls them.
        pattern: of the names of the files.
    """
    yield from saved.manifest.metadata.get(kind) or []
    for path in sorted(saved.directory.glob(pattern)):
        found = saved.beside(path.name).json(list)
        check_shapes({kind: found}, path.name, "measure again")
        yield from found


def _measured(found: Cells) -> Cells:
    """Leave out what is no perplexity: a model that diverged has null, NaN or infinity."""
    return {cell: v for cell, v in found.items() if (_number(v) or 0.0) >= 1.0}


def _tokens(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in rows:
        count, domain = row.get("tokens"), str(row.get("domain"))
        if type(count) is not int:
            continue
        if found.setdefault(domain, count) != count:
            raise ValueError(
                f"{asker()}: the text of {domain!r} must be the same in all rows, got {count} and "
                f"{found[domain]} tokens; measure again"
            )
    return found


def _number(value: Any) -> float | None:
    """Return a value that can be drawn, None for anything else; true is no number."""
    known = type(value) in (int, float) and abs(value) < 1e300  # math.isfinite fails on huge ints
    return float(value) if known and math.isfinite(value) else None


def _history(log: Any) -> dict[str, list[tuple[float, float]]]:
    """Return what a training logged, by name; whatever is not a number is left out."""
    found: dict[str, list[tuple[float, float]]] = {}
    for entry in log if isinstance(log, list) else []:
        step = _number(entry.get("step")) if isinstance(entry, dict) else None
        if step is None:
            continue
        for name, value in entry.items():
            if name != "step" and _number(value) is not None:
                found.setdefault(name, []).append((step, float(value)))
    return found


def _attention(saved: SavedFolder) -> Iterator[tuple[tuple[str, str], list[float]]]:
    """Yield ((domain, memory), mean over heads of each layer) of what `koff analyse` wrote."""
    for path in sorted(saved.directory.glob(ATTENTION)):
        found = saved.beside(path.name).json()
        domain, memory, heads = (found.get(name) for name in ("domain", "memory", "heads"))
        layers = heads if isinstance(heads, list) else [None]
        whole = all(isinstance(h, list) and h and None not in map(_number, h) for h in layers)
        if not (isinstance(domain, str) and isinstance(memory, str) and layers and whole):
            raise DamagedFolder(f"{path.name} must be as koff analyse writes it, got another shape")
        yield (domain, memory), [sum(h) / len(h) for h in layers]


def _neurons(saved: SavedFolder) -> Neurons:
    """Return what `koff analyse --neurons` wrote."""
    values = saved.beside(NEURONS).json()
    try:
        rates = {}
        for name, rate in values["rates"].items():
            keys = ("rate", "low", "high", "expected")
            shares = [_number(rate[key]) for key in keys]
            if rate["neurons"] and None not in shares:
                rates[name] = (int(rate["neurons"]), *shares, _number(rate["p"]))
        layers = [
            tuple(
                _number(layer[f"{kind}_pruned"] / layer[kind]) if layer[kind] else None
                for kind in ("specific", "others")
            )
            for layer in values["layers"]
        ]
        if len(layers) != len(saved.manifest.widths) or not isinstance(values["sentence"], str):
            raise ValueError(f"{len(layers)} layers")
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DamagedFolder(
            f"{NEURONS} must be as koff analyse --neurons writes it, got another shape ({error})"
        ) from None
    return Neurons(values["sentence"], rates, layers)


def _sizes(saved: SavedFolder) -> dict[str, tuple[int, int]]:
    """Return the size of the backbone and of each memory, from the headers of their files."""
    folders = {"backbone": (saved.path, False)}
    folders |= {n: (saved.path / MEMORIES / n, True) for n in saved.manifest.memories}
    found = {}
    for name, (folder, deep) in folders.items():
        paths = folder.rglob("*.safetensors") if deep else folder.glob("*.safetensors")
        size = sum(path.stat().st_size for path in paths)
        found[name] = (count_saved(folder, deep=deep), size)
    return found


# ---- runs that belong together ----


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in their seed alone.

    Args:
        label: what tells it from the other groups.
        runs: at least one, by seed.
    """

    label: str
    runs: list[Finished] = field(default_factory=list)

    @property
    def first(self) -> Finished:
        """The one that stands for what all have in common."""
        return self.runs[0]

    @property
    def memories(self) -> list[str]:
        """The memories that every run has."""
        others = [set(run.manifest.memories) for run in self.runs[1:]]
        return [name for name in self.first.manifest.memories if all(name in o for o in others)]

    @property
    def pruned(self) -> bool:
        """Whether its runs have fewer neurons than their base."""
        return self.first.pruned


def group_runs(runs: Sequence[Finished]) -> list[Group]:
    """Put runs together that differ in their seed alone, in the order of their first ones.

    Raises:
        ValueError: runs of different models, or measured on different text.
    """
    _check_alike(runs)
    found: dict[str, list[Finished]] = {}
    for run in runs:
        found.setdefault(alike(run), []).append(run)
    labels = [_label(members[0]) for members in found.values()]
    groups = []
    for label, members in zip(labels, found.values(), strict=True):
        if labels.count(label) > 1:
            label += f" ({members[0].name})"
        ordered = sorted(members, key=lambda run: run.recipe.seed if run.recipe else 0)
        groups.append(Group(label, ordered))
    return groups


def _check_alike(runs: Sequence[Finished]) -> None:
    first, tokens = runs[0], {}
    for run in runs:
        if (run.manifest.base, run.manifest.dense_widths) != (
            first.manifest.base,
            first.manifest.dense_widths,
        ):
            raise ValueError(
                f"{asker()}: all folders of a page must be of the same base model, got "
                f"{first.manifest.base} in {first.name} and {run.manifest.base} in {run.name}; "
                "write one page for each"
            )
        for domain, count in run.tokens.items():
            known, name = tokens.setdefault(domain, (count, run.name))
            if known != count:
                raise ValueError(
                    f"{asker()}: all folders of a page must be measured on the same text, got "
                    f"{known} tokens of {domain!r} in {name} and {count} in {run.name}; measure "
                    "one of them again"
                )


def alike(run: Finished, *others: str) -> str:
    """Return a text that is equal for runs whose recipes differ only in their seed and these keys
    of ``koff``."""
    if run.recipe is None:
        return f"{run.name} has no recipe"
    values = run.recipe.to_dict()
    del values["seed"]
    for name in ("seed", *others):
        values["koff"].pop(name, None)
    return json.dumps(values, sort_keys=True)


def _label(run: Finished) -> str:
    """Return a run's kind in words: what it was pruned to, and what its memories are made of."""
    config = run.manifest.config
    parts = [name for name, part in (("LoRA", config.lora), ("KV", config.kv)) if part]
    memories = " + ".join(parts) if config.memories else ""
    if not config.target_sparsity:
        return f"dense, with {memories} memories"
    of = "" if config.sparsity_scope == "mlp" else " of all weights"
    at = f"{config.target_sparsity:g}{of} pruned"
    return f"{at}, {memories} memories" if memories else f"{at}, gates only"
