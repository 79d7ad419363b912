"""Which trainings a table needs, where they lie, and the commands that make them."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

from koff.commands.recipe import (
    RECIPE_FILE,
    Recipe,
    TrainSettings,
    first_difference,
    load_recipe,
    stored_recipe,
)
from koff.commands.saved import eval_sources
from koff.commands.train import check_model
from koff.data.sources import DataSource, check_source
from koff.errors import asked_by
from koff.model.config import check_memory_name
from koff.storage.layout import MARKER, current
from koff.storage.saved_folder import open_saved

WHERE = "bench.quality"
DENSE, KOFF, GATES = "dense", "koff", "gates"
# What tells the runs of one table apart: each has its own.
_OWN_KEYS = ("seed", "koff.seed", "koff.target_sparsity")
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # of what names files


@dataclass(frozen=True)
class Run:
    """One training and its evaluation.

    Args:
        kind: "dense" (memories on the unpruned model), "koff", "gates" (no memories), or the name
            of a variant of koff.
        sparsity: target; 0 for "dense".
        seed: of the recipe.
        base: whether its evaluation measures the dense base too.
        added: None; or the name of a memory that is added to what the run without it has trained.
    """

    kind: str
    sparsity: float
    seed: int
    base: bool = False
    added: str | None = None

    @property
    def name(self) -> str:
        """What it and its log are called."""
        at = "" if self.kind == DENSE else f"-{self.sparsity}"
        later = f"+{self.added}" if self.added else ""
        return f"{self.kind}{at}-seed{self.seed}{later}"


@dataclass(frozen=True)
class Plan:
    """All runs of a table, and what they share.

    Args:
        recipe: the recipe file.
        output: folder of the runs, absolute, one folder each.
        sparsities: targets, above 0, all different.
        seeds: all different, the same for every kind of run.
        overrides: "KEY=VALUE" texts for every run.
        split: split that is measured.
        device: for every run; None leaves it to koff.
        name: of the table; None: the recipe's.
        max_tokens: as ``koff eval --max-tokens``, for every run.
        batch_size: as ``koff eval --batch-size``, for every run; None leaves it to koff.
        variants: {name: "KEY=VALUE" texts}: koff once more, with other settings.
        later: {name: folder with its <name>.train.jsonl and so on}: domains whose memories are
            added to koff's finished models and to the dense ones.
    """

    recipe: Path
    output: Path
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    overrides: tuple[str, ...] = ()
    split: str = "test"
    device: str | None = None
    name: str | None = None
    max_tokens: int | None = None
    batch_size: int | None = None
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    later: Mapping[str, Path] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What the table and its files are called."""
        return self.recipe.stem if self.name is None else self.name

    @cached_property
    def runs(self) -> list[Run]:
        """The runs in order: seed by seed, so that whole columns are there early; then variants,
        then memories that are added later."""
        found = []
        for seed in self.seeds:
            found.append(Run(DENSE, 0.0, seed, base=not found))
            for sparsity in self.sparsities:
                found += [Run(KOFF, sparsity, seed), Run(GATES, sparsity, seed)]
        main = [run for run in found if run.kind != GATES]
        found += [
            Run(name, sparsity, seed)
            for seed in self.seeds
            for sparsity in self.sparsities
            for name in self.variants
        ]
        return found + [replace(run, added=name) for run in main for name in self.later]

    def of(self, kind: str, sparsity: float = 0.0, added: str | None = None) -> list[Run]:
        """The runs of a kind and sparsity, one per seed."""
        wanted = (kind, sparsity, added)
        return [run for run in self.runs if (run.kind, run.sparsity, run.added) == wanted]

    def parent(self, run: Run) -> Run | None:
        """The run whose model gets the memory that this one adds."""
        return replace(run, added=None) if run.added else None

    def folder(self, run: Run) -> Path:
        """Where a run's model lies: a memory is added in place."""
        return self.output / (self.parent(run) or run).name

    def scores(self, run: Run) -> Path:
        """Where the rows of a run's evaluation lie: in its folder, so that they go with it."""
        later = f"+{run.added}" if run.added else ""
        return self.folder(run) / f"eval-{self.split}{later}.json"

    def log(self, run: Run) -> Path:
        """Where the output of a run's commands goes, after the commands themselves."""
        return self.output / f"{run.name}.log"

    def load(self, run: Run) -> Recipe:
        """The recipe of a run, checked; the overrides are those its command line makes."""
        parts = ["koff.lora=null", "koff.kv=null"] if run.kind == GATES else []
        named = [f"koff.target_sparsity={run.sparsity}", f"seed={run.seed}"]
        return load_recipe(self.recipe, [*self._overrides(run), *parts, *named])

    def _overrides(self, run: Run) -> tuple[str, ...]:
        return (*self.overrides, *self.variants.get(run.kind, ()))

    def commands(self, run: Run) -> list[list[str]]:
        """The arguments of ``koff`` that make a run: train or add-memory, then eval."""
        folder = str(self.folder(run))
        if run.added:
            train = self._add_memory(run)
        else:
            train = ["train", str(self.recipe), "--output", folder]
            train += [part for text in self._overrides(run) for part in ("--set", text)]
            train += ["--without", "lora", "--without", "kv"] if run.kind == GATES else []
            train += ["--sparsity", str(run.sparsity), "--seed", str(run.seed)]
        measure = ["eval", folder, "--json", str(self.scores(run)), "--split", self.split]
        measure += ["--base"] if run.base else []
        measure += ["--max-tokens", str(self.max_tokens)] if self.max_tokens else []
        measure += ["--batch-size", str(self.batch_size)] if self.batch_size else []
        device = ["--device", self.device] if self.device else []
        return [train + device, measure + device]

    def _add_memory(self, run: Run) -> list[str]:
        """The command that adds a memory, with the recipe's own settings of training. A compacted
        model has no teacher left, and for comparison the dense one does without."""
        files = {split: file for split, file in self.files(run.added).items() if file.is_file()}
        train = self.load(replace(run, added=None)).train
        usual = TrainSettings()
        changed = {
            f.name: getattr(train, f.name)
            for f in fields(TrainSettings)
            if getattr(train, f.name) != getattr(usual, f.name)
        }
        command = ["add-memory", str(self.folder(run)), "--name", run.added]
        command += ["--data", str(files.pop("train"))]
        changed = {f"train.{key}": value for key, value in changed.items()}
        changed |= {f"data.{run.added}.{split}": file for split, file in files.items()}
        changed |= {"train.distillation_weight": 0, "seed": run.seed}
        # Values as YAML reads them: JSON is YAML.
        for key, value in changed.items():
            text = str(value) if isinstance(value, Path) else json.dumps(value)
            command += ["--set", f"{key}={text}"]
        return command

    def files(self, name: str) -> dict[str, Path]:
        """The files of a domain that is added later, there or not."""
        splits = ("train", "validation", "test")
        return {split: self.later[name] / f"{name}.{split}.jsonl" for split in splits}

    def trained(self, run: Run) -> bool:
        """Whether a run's model is there; ``check`` has seen that it is of the same recipe."""
        there = (current(self.folder(run)) / MARKER).is_file()
        if run.added and there:
            return run.added in open_saved(self.folder(run)).manifest.memories
        return there

    def measured(self, run: Run) -> bool:
        """Whether all its rows are there."""
        rows = read_rows(self.scores(run)) if self.trained(run) else None
        return rows is not None and (not run.base or any(row["variant"] == "base" for row in rows))

    def left(self, run: Run) -> list[list[str]]:
        """Those of its commands that still have to be run."""
        done = (self.trained(run), self.measured(run))
        pairs = zip(self.commands(run), done, strict=True)
        return [command for command, is_done in pairs if not is_done]

    def whole(self) -> Plan:
        """The part of the plan that is finished: seeds of which every run is there, and with them
        variants and added memories that are there for all of these seeds."""

        def finished(plan: Plan) -> bool:
            return all(plan.measured(run) for run in plan.runs)

        bare = replace(self, variants={}, later={})
        seeds = tuple(seed for seed in self.seeds if finished(replace(bare, seeds=(seed,))))
        found = replace(bare, seeds=seeds)
        for extra in ("variants", "later"):
            for name, value in getattr(self, extra).items() if seeds else ():
                more = replace(found, **{extra: getattr(found, extra) | {name: value}})
                found = more if finished(more) else found
        return found

    def check(self) -> None:
        """Refuse whatever would only show once runs are under way; starts and writes nothing.

        Raises:
            FileNotFoundError, KeyError, ValueError: a recipe that cannot be run as planned, or a
                folder that holds a run of another one.
        """
        _check_options(self)
        for run in self.runs:
            if run.added:
                continue
            recipe = self.load(run)
            folder = self.folder(run)
            if (folder / RECIPE_FILE).is_file():
                with asked_by(WHERE):
                    stored, _ = stored_recipe(folder)
                difference = first_difference(stored, recipe.to_dict())
                if difference is not None:
                    raise ValueError(
                        f"{WHERE}: {folder} must hold a run of the same recipe ({run.name}), got "
                        f"one with another {difference}; choose another --output or remove it"
                    )
            elif self.trained(run):
                raise ValueError(
                    f"{WHERE}: {folder} must be a folder of this table, got a model without a "
                    "recipe; choose another --output"
                )
        # Of one run alone: they share model and data.
        recipe.check_files()
        check_model(recipe)
        eval_sources(recipe, self.split)
        missing = sorted(set(recipe.data) - set(recipe.sources(self.split)))
        if missing:
            raise ValueError(
                f"{WHERE}: every domain must have a {self.split} split, got none for "
                f"{', '.join(missing)}; add it, or choose another --split"
            )
        for name in self.later:
            with asked_by(WHERE):
                check_memory_name(name)
            if name in recipe.data:
                raise ValueError(
                    f"{WHERE}: --later must name no domain of the recipe, got {name!r}; it has a "
                    "memory from the start"
                )
            for split in ("train", self.split):
                check_source(DataSource(path=self.files(name)[split]))


def _check_options(plan: Plan) -> None:
    for name in plan.variants:
        if name in (DENSE, KOFF, GATES) or not re.fullmatch(_NAME, name):
            raise ValueError(
                f"{WHERE}: --variant must begin with a name of letters, digits, '.', '-' and '_' "
                f"other than {DENSE}, {KOFF} and {GATES}, got {name!r}; it names folders; choose "
                "another"
            )
    for sparsity in plan.sparsities:
        if not sparsity > 0:
            raise ValueError(
                f"{WHERE}: --sparsity must be above 0, got {sparsity}; the dense model is in the "
                "table anyway"
            )
    for text in (*plan.overrides, *(text for texts in plan.variants.values() for text in texts)):
        key = text.partition("=")[0].strip()
        if key in _OWN_KEYS:
            raise ValueError(
                f"{WHERE}: --set must not set {', '.join(_OWN_KEYS)}, got {text!r}; use --seeds "
                "and --sparsity"
            )
    if plan.max_tokens is not None and plan.max_tokens < 1:
        raise ValueError(
            f"{WHERE}: --max-tokens must be at least 1, got {plan.max_tokens}; leave it out for "
            "the whole split"
        )
    if plan.batch_size is not None and plan.batch_size < 1:
        raise ValueError(
            f"{WHERE}: --batch-size must be at least 1, got {plan.batch_size}; leave it out"
        )
    if plan.name is not None and not re.fullmatch(_NAME, plan.name):
        raise ValueError(
            f"{WHERE}: --name must be letters, digits, '.', '-' and '_', got {plan.name!r}; it "
            "names files; choose another"
        )
    if plan.output.is_file():
        raise ValueError(
            f"{WHERE}: --output must be a folder, got the file {plan.output}; rename it"
        )


def read_rows(path: Path) -> list[dict] | None:
    """The rows that ``koff eval --json`` wrote, None if they are not there or not whole."""
    try:
        rows = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    needed = {"variant", "memory", "domain", "split", "perplexity", "tokens"}
    whole = isinstance(rows, list) and all(isinstance(r, dict) and needed <= set(r) for r in rows)
    return rows if whole and rows else None


def threads_of(log: Path, what: str, default: int) -> int:
    """With how many threads a run's last "train" or "eval" was started, by its log.

    Args:
        log: of the run.
        what: "train" or "eval".
        default: where the log does not say.
    """
    text = log.read_text("utf-8", errors="replace") if log.is_file() else ""
    found = re.findall(rf"^\$ OMP_NUM_THREADS=(\d+) koff {what} ", text, re.MULTILINE)
    return int(found[-1]) if found else default


def child(command: list[str]) -> list[str]:
    """What is executed for a ``koff`` command: the same, by this Python."""
    return [sys.executable, "-m", "koff.cli", *command]


def shown(command: list[str], threads: int) -> str:
    """A ``koff`` command as one types it."""
    return f"OMP_NUM_THREADS={threads} {shlex.join(['koff', *command])}"
