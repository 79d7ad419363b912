"""Which trainings a table needs, where they lie, and the commands that make them."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from koff.commands.recipe import (
    RECIPE_FILE,
    Recipe,
    first_difference,
    load_recipe,
    stored_recipe,
)
from koff.commands.saved import eval_sources
from koff.commands.train import check_model
from koff.errors import asked_by
from koff.storage.layout import MARKER, current

WHERE = "bench.quality"
DENSE, KOFF, GATES = "dense", "koff", "gates"
# What tells the runs of one table apart: each has its own.
_OWN_KEYS = ("seed", "koff.seed", "koff.target_sparsity")


@dataclass(frozen=True)
class Run:
    """One training and its evaluation.

    Args:
        kind: "dense" (memories on the unpruned model), "koff", or "gates" (no memories).
        sparsity: target; 0 for "dense".
        seed: of the recipe.
        base: whether its evaluation measures the dense base too.
    """

    kind: str
    sparsity: float
    seed: int
    base: bool = False

    @property
    def name(self) -> str:
        """Name of its folder."""
        at = "" if self.kind == DENSE else f"-{self.sparsity}"
        return f"{self.kind}{at}-seed{self.seed}"


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

    @property
    def title(self) -> str:
        """What the table and its files are called."""
        return self.recipe.stem if self.name is None else self.name

    @cached_property
    def runs(self) -> list[Run]:
        """The runs in order: seed by seed, so that whole columns are there early."""
        found = []
        for seed in self.seeds:
            found.append(Run(DENSE, 0.0, seed, base=not found))
            for sparsity in self.sparsities:
                found += [Run(KOFF, sparsity, seed), Run(GATES, sparsity, seed)]
        return found

    def of(self, kind: str, sparsity: float = 0.0) -> list[Run]:
        """The runs of a kind and sparsity, one per seed."""
        return [run for run in self.runs if (run.kind, run.sparsity) == (kind, sparsity)]

    def folder(self, run: Run) -> Path:
        """Where a run's model lies."""
        return self.output / run.name

    def scores(self, run: Run) -> Path:
        """Where the rows of a run's evaluation lie: in its folder, so that they go with it."""
        return self.folder(run) / f"eval-{self.split}.json"

    def log(self, run: Run) -> Path:
        """Where the output of a run's commands goes, after the commands themselves."""
        return self.output / f"{run.name}.log"

    def load(self, run: Run) -> Recipe:
        """The recipe of a run, checked; the overrides are those its command line makes."""
        parts = ["koff.lora=null", "koff.kv=null"] if run.kind == GATES else []
        named = [f"koff.target_sparsity={run.sparsity}", f"seed={run.seed}"]
        return load_recipe(self.recipe, [*self.overrides, *parts, *named])

    def commands(self, run: Run) -> list[list[str]]:
        """The arguments of ``koff`` that make a run: train, then eval."""
        folder = str(self.folder(run))
        train = ["train", str(self.recipe), "--output", folder]
        train += [part for text in self.overrides for part in ("--set", text)]
        train += ["--without", "lora", "--without", "kv"] if run.kind == GATES else []
        train += ["--sparsity", str(run.sparsity), "--seed", str(run.seed)]
        measure = ["eval", folder, "--json", str(self.scores(run)), "--split", self.split]
        measure += ["--base"] if run.base else []
        measure += ["--max-tokens", str(self.max_tokens)] if self.max_tokens else []
        device = ["--device", self.device] if self.device else []
        return [train + device, measure + device]

    def trained(self, run: Run) -> bool:
        """Whether a run's model is there; ``check`` has seen that it is of the same recipe."""
        return (current(self.folder(run)) / MARKER).is_file()

    def measured(self, run: Run) -> bool:
        """Whether all its rows are there."""
        rows = read_rows(self.scores(run)) if self.trained(run) else None
        return rows is not None and (not run.base or any(row["variant"] == "base" for row in rows))

    def left(self, run: Run) -> list[list[str]]:
        """Those of its commands that still have to be run."""
        done = (self.trained(run), self.measured(run))
        pairs = zip(self.commands(run), done, strict=True)
        return [command for command, is_done in pairs if not is_done]

    def check(self) -> None:
        """Refuse whatever would only show once runs are under way; starts and writes nothing.

        Raises:
            FileNotFoundError, KeyError, ValueError: a recipe that cannot be run as planned, or a
                folder that holds a run of another one.
        """
        _check_options(self)
        for run in self.runs:
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


def _check_options(plan: Plan) -> None:
    for sparsity in plan.sparsities:
        if not sparsity > 0:
            raise ValueError(
                f"{WHERE}: --sparsity must be above 0, got {sparsity}; the dense model is in the "
                "table anyway"
            )
    for text in plan.overrides:
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
    if plan.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", plan.name):
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
