"""Which trainings the answers need, where they lie, and the commands that make them."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ...data.sources import DataSource, check_source
from ...errors import asked_by
from ...model.config import check_memory_name
from ...storage.layout import MARKER, current
from ...storage.saved_folder import open_saved
from ..recipe import (
    RECIPE_FILE,
    Recipe,
    first_difference,
    load_recipe,
    parse,
    stored_recipe,
)
from ..report.runs import NEURONS
from ..saved import eval_sources

WHERE = "koff reproduce"
DENSE, KOFF, GATES, LORA, KV = "dense", "koff", "gates", "lora", "kv"
NO_GENERAL = "no-general"
MASKS = {name: f"mask-{name}" for name in ("random", "magnitude", "saliency")}
# What is asked. "main" is always answered: memories, gates alone, and memories on the dense model.
QUESTIONS = {
    "parts": "LoRA alone and KV alone",
    "general": "no general steps",
    "masks": "masks that are fixed before the memories train",
    "languages": "the recipe's first domain alone, its first two, ...",
    "swaps": "the LoRA of one memory with the KV of another",
    "neurons": "which neurons the masks take",
}
# Of each language, to see which neurons it uses: the intervals are as wide as there are few such
# neurons, and more text moves them little.
NEURON_TOKENS = 20_000
# What tells the runs of one grid apart: each has its own.
_OWN_KEYS = ("seed", "koff.seed", "koff.target_sparsity")
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # of what names files


@dataclass(frozen=True)
class Kind:
    """How the runs of a kind differ from the recipe.

    Args:
        settings: "KEY=VALUE" texts.
        without: parts of a memory that are left out.
        everywhere: at every sparsity and seed; else at the first ones alone.
    """

    settings: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    everywhere: bool = True

    @property
    def has_memories(self) -> bool:
        """Whether anything of a memory is left."""
        return set(self.without) != {LORA, KV}


@dataclass(frozen=True)
class Run:
    """One training and its measurements.

    Args:
        kind: "dense" (memories on the unpruned model), "koff", or another of the plan's kinds.
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
    """All runs of a grid, and what they share.

    Args:
        recipe: the recipe file, or the name of one of koff's own.
        output: folder of the runs, absolute, one folder each.
        sparsities: targets, above 0, all different.
        seeds: all different, the same for every kind of run that is made at all of them.
        questions: what is asked beside the main one, of ``QUESTIONS``; None: all that the recipe
            can answer.
        overrides: "KEY=VALUE" texts for every run.
        split: split that is measured.
        device: for every run; None leaves it to koff.
        name: of the files with the answers.
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
    questions: tuple[str, ...] | None = None
    overrides: tuple[str, ...] = ()
    split: str = "test"
    device: str | None = None
    name: str = "reproduction"
    max_tokens: int | None = None
    batch_size: int | None = None
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    later: Mapping[str, Path] = field(default_factory=dict)

    @cached_property
    def _recipe(self) -> Recipe:
        return load_recipe(self.recipe, self.overrides)

    def lacks(self, question: str) -> str | None:
        """Return what the recipe lacks to answer a question, None if it lacks nothing."""
        recipe = self._recipe
        if question in ("languages", "swaps", "neurons") and len(recipe.data) < 2:
            return "a second domain"
        if question in ("parts", "swaps") and None in (recipe.koff.lora, recipe.koff.kv):
            return "both a LoRA and a KV part of its memories"
        if question == "general" and not (recipe.general and recipe.train.general_every):
            return "general steps"
        return None

    @cached_property
    def asked(self) -> tuple[str, ...]:
        """The questions that are answered."""
        if self.questions is not None:
            return self.questions
        return tuple(name for name in QUESTIONS if self.lacks(name) is None)

    @cached_property
    def prefixes(self) -> dict[tuple[str, ...], tuple[str, str]]:
        """{first domains of the recipe, fewer than all: (their kind, their kind of gates only)}."""
        if "languages" not in self.asked:
            return {}
        names = list(self._recipe.data)
        found = {}
        for count in range(1, len(names)):
            chosen = tuple(names[:count])
            found[chosen] = tuple(f"{kind}-{'-'.join(chosen)}" for kind in (KOFF, GATES))
        return found

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """Every kind of run by name, but for the dense one."""
        both = (LORA, KV)
        found = {KOFF: Kind(), GATES: Kind(without=both)}
        if "parts" in self.asked:
            found |= {LORA: Kind(without=(KV,)), KV: Kind(without=(LORA,))}
        if "general" in self.asked:
            found[NO_GENERAL] = Kind(("train.general_every=0",), everywhere=False)
        if "masks" in self.asked:
            for mask, kind in MASKS.items():
                found[kind] = Kind((f"train.mask={mask}",), everywhere=False)
        for chosen, (koff, gates) in self.prefixes.items():
            others = [name for name in self._recipe.data if name not in chosen]
            settings = tuple(f"data.{name}=null" for name in others)
            found[koff] = Kind(settings, everywhere=False)
            found[gates] = Kind(settings, both, everywhere=False)
        return found | {name: Kind(texts) for name, texts in self.variants.items()}

    @cached_property
    def runs(self) -> list[Run]:
        """The runs in order: seed by seed, so that whole columns are there early; then those of one
        seed, variants, and memories that are added later."""
        every = [n for n, kind in self.kinds.items() if kind.everywhere and n not in self.variants]
        once = [name for name, kind in self.kinds.items() if not kind.everywhere]
        found = []
        for seed in self.seeds:
            found.append(Run(DENSE, 0.0, seed, base=not found))
            found += [Run(kind, at, seed) for at in self.sparsities for kind in every]
        grown = [run for run in found if run.kind in (DENSE, KOFF)]
        if self.seeds:
            found += [Run(kind, self.sparsities[0], self.seeds[0]) for kind in once]
        found += [
            Run(name, at, seed)
            for seed in self.seeds
            for at in self.sparsities
            for name in self.variants
        ]
        return found + [replace(run, added=name) for run in grown for name in self.later]

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

    def swaps(self, run: Run) -> Path | None:
        """Where the rows with swapped halves lie, of a run that has them."""
        wanted = "swaps" in self.asked and not run.added and run.kind == KOFF
        if not wanted or run.sparsity != self.sparsities[0]:
            return None
        return self.folder(run) / f"swaps-{self.split}.json"

    def neurons(self, run: Run) -> Path | None:
        """Where it stands which neurons a run's mask takes, of a run that is asked."""
        wanted = "neurons" in self.asked and not run.added and run.kind in (KOFF, GATES)
        if not wanted or run.sparsity != self.sparsities[0]:
            return None
        return self.folder(run) / NEURONS

    def log(self, run: Run) -> Path:
        """Where the output of a run's commands goes, after the commands themselves."""
        return self.output / f"{run.name}.log"

    def load(self, run: Run) -> Recipe:
        """The recipe of a run, checked; the overrides are those its command line makes."""
        kind = self.kinds.get(run.kind, Kind())
        parts = [f"koff.{part}=null" for part in kind.without]
        named = [f"koff.target_sparsity={run.sparsity}", f"seed={run.seed}"]
        return load_recipe(self.recipe, [*self.overrides, *kind.settings, *parts, *named])

    def commands(self, run: Run) -> list[list[str]]:
        """The arguments of ``koff`` that make a run: train or add-memory, then what measures it."""
        folder, kind = str(self.folder(run)), self.kinds.get(run.kind, Kind())
        device = ["--device", self.device] if self.device else []
        if run.added:
            train = self._add_memory(run)
        else:
            train = ["train", str(self.recipe), "--output", folder]
            settings = (*self.overrides, *kind.settings)
            train += [part for text in settings for part in ("--set", text)]
            train += [text for part in kind.without for text in ("--without", part)]
            train += ["--sparsity", str(run.sparsity), "--seed", str(run.seed)]
        options = ["--split", self.split]
        first = ["--max-tokens", str(self.max_tokens)] if self.max_tokens else []
        batch = ["--batch-size", str(self.batch_size)] if self.batch_size else []
        measure = ["eval", folder, "--json", str(self.scores(run)), *options]
        measure += [*(["--base"] if run.base else []), *first, *batch]
        made = [train, measure]
        if (file := self.swaps(run)) is not None:
            made.append(["eval", folder, "--swaps", "--json", str(file), *options, *first, *batch])
        if (file := self.neurons(run)) is not None:
            tokens = str(min(self.max_tokens or NEURON_TOKENS, NEURON_TOKENS))
            made.append(["analyse", folder, "--neurons", "--json", str(file), *options])
            made[-1] += ["--max-tokens", tokens, *batch]
        return [command + device for command in made]

    def _add_memory(self, run: Run) -> list[str]:
        """The command that adds a memory; it takes the settings of training from the recipe in the
        folder. A compacted model has no teacher left, and for comparison the dense one does
        without."""
        files = {split: file for split, file in self.files(run.added).items() if file.is_file()}
        command = ["add-memory", str(self.folder(run)), "--name", run.added]
        command += ["--data", str(files.pop("train"))]
        for split, file in files.items():
            command += ["--set", f"data.{run.added}.{split}={file}"]
        return [*command, "--set", "train.distillation_weight=0"]

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

    def left(self, run: Run) -> list[list[str]]:
        """Those of its commands that still have to be run."""
        if not self.trained(run):
            return self.commands(run)
        rows = read_rows(self.scores(run))
        based = not run.base or any(row["variant"] == "base" for row in rows or [])
        done = [True, rows is not None and based]
        if (file := self.swaps(run)) is not None:
            done.append(read_rows(file, SWAP_KEYS) is not None)
        if (file := self.neurons(run)) is not None:
            done.append(read_neurons(file) is not None)
        pairs = zip(self.commands(run), done, strict=True)
        return [command for command, is_done in pairs if not is_done]

    def finished(self) -> bool:
        """Whether nothing is left to run."""
        return not any(self.left(run) for run in self.runs)

    def whole(self) -> Plan:
        """The part of the plan that is finished: seeds of which every main run is there, and with
        them the questions, variants and added memories that are there for all of these seeds."""
        bare = replace(self, questions=(), variants={}, later={})
        left = {run.seed for run in bare.runs if bare.left(run)}
        found = replace(bare, seeds=tuple(seed for seed in self.seeds if seed not in left))
        if not found.finished():  # the seed that has the dense base is not whole
            return replace(bare, seeds=())
        for name in self.asked:
            more = replace(found, questions=(*found.questions, name))
            found = more if more.finished() else found
        for extra in ("variants", "later"):
            for name, value in getattr(self, extra).items():
                more = replace(found, **{extra: getattr(found, extra) | {name: value}})
                found = more if more.finished() else found
        return found

    def check(self) -> None:
        """Refuse whatever would only show once runs are under way; starts and writes nothing.

        Raises:
            FileNotFoundError, KeyError, ValueError: a recipe that cannot be run as planned, or a
                folder that holds a run of another one.
        """
        _check_options(self)
        for name in self.questions or ():
            if (missing := self.lacks(name)) is not None:
                raise ValueError(
                    f"{WHERE}: the recipe must have {missing} for --only {name}, got one without; "
                    "ask something else"
                )
        for run in self.runs:
            if run.added:
                continue
            recipe = self.load(run)
            folder = self.folder(run)
            if (folder / RECIPE_FILE).is_file():
                with asked_by(WHERE):
                    stored, root = stored_recipe(folder)
                # As a recipe, which has the defaults of settings that are newer than the run.
                stored = parse(stored, Path(root)).to_dict()
                difference = first_difference(stored, recipe.to_dict())
                if difference is not None:
                    raise ValueError(
                        f"{WHERE}: {folder} must hold a run of the same recipe ({run.name}), got "
                        f"one with another {difference}; choose another --output or remove it"
                    )
            elif self.trained(run):
                raise ValueError(
                    f"{WHERE}: {folder} must be a folder of this grid, got a model without a "
                    "recipe; choose another --output"
                )
        # Of one run alone: they share the model, and the first has all data.
        recipe = self.load(self.runs[0])
        recipe.check_files()

        from ..train import check_model, check_widths  # transformers, which takes seconds

        config = check_model(recipe)  # which all runs share
        for run in self.runs:
            if not run.added:
                check_widths(self.load(run), config)
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
    for name in plan.questions or ():
        if name not in QUESTIONS:
            raise ValueError(
                f"{WHERE}: --only must name main, {', '.join(QUESTIONS)}, got {name!r}; correct it"
            )
    taken = [DENSE, *replace(plan, questions=None, variants={}).kinds]
    for name in plan.variants:
        if name in taken or not re.fullmatch(_NAME, name):
            raise ValueError(
                f"{WHERE}: --variant must begin with a name of letters, digits, '.', '-' and '_' "
                f"other than {', '.join(taken)}, got {name!r}; it names folders; choose another"
            )
    for sparsity in plan.sparsities:
        if not sparsity > 0:
            raise ValueError(
                f"{WHERE}: --sparsity must be above 0, got {sparsity}; the dense model is in the "
                "grid anyway"
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
    if not re.fullmatch(_NAME, plan.name):
        raise ValueError(
            f"{WHERE}: --name must be letters, digits, '.', '-' and '_', got {plan.name!r}; it "
            "names files; choose another"
        )
    if plan.output.is_file():
        raise ValueError(
            f"{WHERE}: --output must be a folder, got the file {plan.output}; rename it"
        )


_EVAL_KEYS = {"variant", "memory", "domain", "split", "perplexity", "tokens"}
SWAP_KEYS = {"lora", "kv", "domain", "split", "perplexity", "tokens"}


def read_rows(path: Path, needed: set[str] = _EVAL_KEYS) -> list[dict] | None:
    """The rows that ``koff eval --json`` wrote, None if they are not there or not whole.

    Args:
        path: of the file.
        needed: keys that each row must have.
    """
    rows = _json(path)
    whole = isinstance(rows, list) and all(isinstance(r, dict) and needed <= set(r) for r in rows)
    return rows if whole and rows else None


def read_neurons(path: Path) -> dict | None:
    """What ``koff analyse --neurons --json`` wrote, None if it is not there or not whole."""
    found = _json(path)
    return found if isinstance(found, dict) and {"rates", "sentence"} <= set(found) else None


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def threads_of(log: Path, what: str, default: int) -> int:
    """With how many threads a run's last command of a kind was started, by its log.

    Args:
        log: of the run.
        what: "train", "add-memory", "eval" or "analyse".
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
