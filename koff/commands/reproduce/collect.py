"""From the folders of finished runs to one record: cells, shares, gains, budget."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

from ...errors import asked_by
from ...evaluation.measures import (
    Cells,
    Spread,
    Undefined,
    cells,
    finite,
    offloading_gain,
    perplexity,
    share_won_back,
    spread,
)
from ...model import arch
from ...storage.files import File
from ...storage.layout import CONFIG, MEMORIES
from ...storage.saved_folder import open_saved
from ..machine import environment
from ..recipe import LOG_FILE
from ..saved import count_saved, eval_sources
from .claims import claims
from .plan import (
    DENSE,
    GATES,
    KOFF,
    SWAP_KEYS,
    WHERE,
    Kind,
    Plan,
    Run,
    read_neurons,
    read_rows,
    shown,
    threads_of,
)

# A memory may have so many of the parameters that pruning removed: with as many or more, the
# neurons might as well have stayed.
BUDGET = 0.4
_PACKAGE = Path(__file__).parents[2]


class Table:
    """The perplexities of all runs of a plan.

    Args:
        plan: of which every run is finished.

    Raises:
        ValueError: rows that are missing; the message names the run.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        recipe = plan.load(plan.runs[0])
        self.languages = list(recipe.data)
        self.domains = list(eval_sources(recipe, plan.split))
        left = [run.name for run in plan.runs if plan.left(run)]
        if left:
            raise ValueError(
                f"{WHERE}: every run must be finished for the answers, got none of "
                f"{', '.join(left)}; run the plan again"
            )
        rows = {run: read_rows(plan.scores(run)) for run in plan.runs}
        self._cells: dict[Run, Cells] = {run: cells(found, "koff") for run, found in rows.items()}
        self._base: Cells = {}
        for run in plan.runs:
            if run.base:
                self._base |= cells(rows[run], "base")
        _check_tokens(rows)
        for run in plan.runs:  # a hole is found here, and not once a table shows it
            own = plan.load(run)
            memories = list(own.data) if plan.kinds.get(run.kind, Kind()).has_memories else []
            later = [run.added] if run.added else []
            for domain in (*eval_sources(own, plan.split), *later):
                self.dense(domain)
                for memory in (None, *memories, *later):
                    self.cell(run, domain, memory)

    def swapped(self, run: Run) -> dict[tuple[str | None, str | None, str], float] | None:
        """Return {(LoRA of, KV of, domain): perplexity} of a run with swapped halves, None of one
        without."""
        file = self.plan.swaps(run)
        if file is None:
            return None
        found = {}
        for row in read_rows(file, SWAP_KEYS) or []:
            cell = row["lora"], row["kv"], row["domain"]
            found[cell] = finite(row["perplexity"], f"{run.name}: the perplexity of {cell}")
        for cell in product(self.languages, self.languages, self.languages):
            if cell not in found:
                raise ValueError(
                    f"{WHERE}: {run.name}: the LoRA of {cell[0]} with the KV of {cell[1]} must "
                    f"have been measured on {cell[2]}, got no such row; remove {file}"
                )
        return found

    def neurons(self, run: Run) -> dict | None:
        """Return what is known of the neurons that a run's mask takes, None where nobody asked."""
        file = self.plan.neurons(run)
        return None if file is None else read_neurons(file)

    def dense(self, domain: str) -> float:
        """The dense base: one number, it has no seed."""
        return perplexity(self._base, domain, None, "dense base")

    def cell(self, run: Run, domain: str, memory: str | None) -> float:
        """One run's cell."""
        return perplexity(self._cells[run], domain, memory, run.name)

    def seeds(
        self,
        kind: str,
        sparsity: float,
        domain: str,
        memory: str | None,
        added: str | None = None,
    ) -> Spread:
        """One cell over the seeds."""
        runs = self.plan.of(kind, sparsity, added)
        return spread(self.cell(run, domain, memory) for run in runs)

    def per_seed(
        self,
        sparsity: float,
        function: Callable[..., float],
        kind: str = KOFF,
        gates: str = GATES,
        languages: Sequence[str] | None = None,
    ) -> dict[str, list[float]]:
        """language -> per seed ``function(dense, dense_own, gates, own)`` of perplexities.

        Args:
            sparsity: of the runs.
            function: as above.
            kind: whose own memory is taken: koff, a variant, ...
            gates: what is pruned without memories.
            languages: of the runs, if not all; a kind of one seed is compared with that seed alone.
        """
        kinds = (self.plan.of(DENSE), self.plan.of(gates, sparsity), self.plan.of(kind, sparsity))
        seeds = {run.seed for run in kinds[1]} & {run.seed for run in kinds[2]}
        kinds = tuple([run for run in runs if run.seed in seeds] for runs in kinds)
        found: dict[str, list[float]] = {name: [] for name in languages or self.languages}
        for name, values in found.items():
            for dense, bare, own in zip(*kinds, strict=True):
                dense_own, pruned = self.cell(dense, name, name), self.cell(bare, name, None)
                try:
                    own_memory = self.cell(own, name, name)
                    values.append(function(self.dense(name), dense_own, pruned, own_memory))
                except Undefined as error:
                    raise Undefined(f"{name}, seed {own.seed}: {error}") from None
        return found


def _check_tokens(rows: dict[Run, list[dict]]) -> None:
    """Refuse evaluations on different data: a split may have changed between two runs."""
    seen: dict[str, tuple[int, str]] = {}
    for run, found in rows.items():
        for row in found:
            tokens, other = seen.setdefault(row["domain"], (row["tokens"], run.name))
            if row["tokens"] != tokens:
                raise ValueError(
                    f"{WHERE}: {run.name}: the {row['domain']} text must have {tokens} tokens as "
                    f"for {other}, got {row['tokens']}; remove the eval file of one"
                )


def over_languages(per_seed: dict[str, list[float]]) -> dict[str, dict]:
    """Spread over seeds of every language, and of the mean of the languages of each seed.

    Args:
        per_seed: language -> value of each seed.
    """
    means = [sum(values) / len(values) for values in zip(*per_seed.values(), strict=True)]
    named = {name: asdict(spread(values)) for name, values in per_seed.items()}
    return {"mean": asdict(spread(means)), "languages": named}


def won_back(table: Table, sparsity: float, kind: str = KOFF) -> dict[str, dict]:
    """Shares won back on log-perplexity and on perplexity, by koff or by a variant; "undefined"
    with the reason where gates alone lost nothing."""

    def share(scale: Callable[[float], float]) -> dict:
        def one(dense: float, dense_own: float, gates: float, own: float) -> float:
            return share_won_back(scale(dense), scale(gates), scale(own))

        try:
            return over_languages(table.per_seed(sparsity, one, kind))
        except Undefined as error:
            return {"undefined": str(error)}

    return {"log_perplexity": share(math.log), "perplexity": share(float)}


def run_facts(plan: Plan, run: Run, threads: int) -> dict:
    """What a finished run is, beside its perplexities.

    Args:
        plan: the plan.
        run: one of its runs.
        threads: of each child process, where a log does not say.
    """
    folder = plan.folder(run)
    with asked_by(WHERE):
        saved = open_saved(folder)
        hidden = saved.file(CONFIG).json()["hidden_size"]
        log = File(folder / LOG_FILE).json()
    manifest = saved.manifest
    neurons = sum(manifest.dense_widths) - sum(manifest.widths)
    removed = len(arch.MLP_LINEARS) * hidden * neurons
    names = [run.added] if run.added else manifest.memories
    sizes = [count_saved(saved.path / MEMORIES / name) for name in names]
    return {
        "name": run.name,
        "kind": run.kind,
        "added": run.added,
        "target_sparsity": run.sparsity,
        "seed": run.seed,
        "commands": [
            shown(public(command, plan), threads_of(plan.log(run), command[0], threads))
            for command in plan.commands(run)
        ],
        "versions": manifest.versions | {"koff": manifest.koff},
        "sparsity": manifest.sparsity,
        "memory_parameters": max(sizes, default=0),
        "removed_parameters": removed,
        "ratio": max(sizes) / removed if sizes and removed else None,
        # Of the model; nobody writes down how long a memory took that is added to it.
        "training_seconds": finite(log["seconds"], f"{run.name}: training seconds"),
        "resumed": log["resumed_from"] is not None,
        "rows": read_rows(plan.scores(run)),
        "swaps": read_rows(swaps, SWAP_KEYS) if (swaps := plan.swaps(run)) else None,
        "neurons": read_neurons(neurons) if (neurons := plan.neurons(run)) else None,
    }


def facts_of(runs: list[dict], kind: str, sparsity: float) -> list[dict]:
    """Return the facts of the runs of a kind and sparsity, none of a memory that was added."""
    wanted = (kind, sparsity, None)
    keys = ("kind", "target_sparsity", "added")
    return [run for run in runs if tuple(run[key] for key in keys) == wanted]


def public(command: list[str], plan: Plan) -> list[str]:
    """A command without the folders of this machine: output and recipe by their names.

    Args:
        command: arguments of ``koff``.
        plan: the plan.
    """
    recipe = plan.recipe.resolve()
    inside = recipe.is_relative_to(_PACKAGE)
    name = recipe.stem if inside else recipe.name  # koff's own go by their name
    shorter = []
    for part in command:
        if part == str(plan.recipe):
            part = name
        elif Path(part).is_relative_to(plan.output):
            part = str(Path(plan.output.name, Path(part).relative_to(plan.output)))
        shorter.append(part)
    return shorter


def budget(runs: list[dict]) -> dict:
    """The largest memory relative to what the pruning removed.

    Args:
        runs: facts of the koff runs of one sparsity.

    Returns:
        ratio (None if nothing was removed), limit, whether it is exceeded, and both numbers.
    """
    worst = max(runs, key=lambda run: math.inf if run["ratio"] is None else run["ratio"])
    named = {key: worst[key] for key in ("memory_parameters", "removed_parameters", "ratio")}
    ratio = worst["ratio"]
    return named | {"limit": BUDGET, "exceeded": ratio is None or ratio > BUDGET}


@asked_by(WHERE)
def collect(plan: Plan, threads: int) -> tuple[dict, Table]:
    """Everything that is known of a finished plan.

    Args:
        plan: of which every run is finished.
        threads: of each child process.

    Returns:
        The record, ready for JSON, and its table.

    Raises:
        ValueError: a run or a cell that is missing or not a number; the message names it.
    """
    table = Table(plan)
    runs = [run_facts(plan, run, threads) for run in plan.runs]
    recipe = plan.load(plan.of(KOFF, plan.sparsities[0])[0])
    found = []
    for sparsity in plan.sparsities:

        def won(kind: str, sparsity: float = sparsity) -> dict:
            """What memories do, in koff or in a variant."""
            gains = table.per_seed(sparsity, offloading_gain, kind)
            return {
                "share_won_back": won_back(table, sparsity, kind),
                "offloading_gain_nats": over_languages(gains),
                "budget": budget(facts_of(runs, kind, sparsity)),
            }

        found.append(
            {
                "target_sparsity": sparsity,
                **won(KOFF),
                "variants": {
                    name: {"overrides": list(texts), **won(name)}
                    for name, texts in plan.variants.items()
                },
            }
        )
    values = recipe.to_dict()
    del values["seed"], values["koff"]["seed"], values["koff"]["target_sparsity"]
    record = {
        "environment": environment(threads) | {"device": _device(plan)},
        "split": plan.split,
        "max_tokens": plan.max_tokens,
        "seeds": list(plan.seeds),
        "overrides": list(plan.overrides),
        "recipe": values,
        "claims": [claim.to_dict() for claim in claims(table)],
        "sparsities": found,
        "runs": runs,
    }
    return json.loads(json.dumps(record, allow_nan=False)), table


def _device(plan: Plan) -> str:
    on_gpu = torch.cuda.is_available() and plan.device != "cpu"
    return torch.cuda.get_device_name(0) if on_gpu else "cpu"
