"""What the paper claims, sentence by sentence, and what the runs say to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...evaluation.measures import (
    BETTER_THAN_DENSE,
    Undefined,
    confidence,
    offloading_gain,
    share_won_back,
    spread,
)
from .plan import GATES, KOFF, KV, LORA, MASKS, NO_GENERAL, Run

if TYPE_CHECKING:
    from .collect import Table

NATS, SHARE = "nats per token", "share"


@dataclass(frozen=True)
class Claim:
    """A claim and what speaks for it.

    Args:
        sentence: the claim.
        measure: what is measured: above 0 it speaks for the claim.
        sparsity: where.
        unit: "nats per token" or "share".
        values: of each seed, mean of the languages; empty where it has none.
        note: what else belongs to it.
    """

    sentence: str
    measure: str
    sparsity: float
    unit: str
    values: tuple[float, ...]
    note: str = ""

    @property
    def verdict(self) -> str:
        """What the values say: of several seeds, by whether their 95 % interval is above 0."""
        if not self.values:
            return "undefined"
        if len(self.values) == 1:
            return "one seed: for it" if self.values[0] > 0 else "one seed: against it"
        low, high = confidence(spread(self.values))
        return "holds" if low > 0 else "does not hold" if high <= 0 else "undecided"

    def text(self) -> str:
        """Return the number as a table shows it: mean ± standard deviation over seeds."""
        if not self.values:
            return "–"
        if self.unit == SHARE:
            return spread(self.values).text(1, 100.0, " %")
        return spread(self.values).text(4)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        found = asdict(self) | {"verdict": self.verdict, "values": list(self.values)}
        if self.values:
            found |= asdict(spread(self.values))
        if len(self.values) > 1:
            found["interval_95"] = list(confidence(spread(self.values)))
        return found


def claims(table: Table) -> list[Claim]:
    """Return every claim that the runs of a table can test, in the paper's order.

    Args:
        table: of finished runs.
    """
    found: list[Claim] = []
    for sparsity in table.plan.sparsities:
        found += _offloading(table, sparsity)
        if LORA in table.plan.kinds:
            found.append(_parts(table, sparsity))
        if len(table.languages) > 1:
            found.append(_own_domain(table, sparsity))
    first = table.plan.sparsities[0]
    found += [*_halves(table, first), *_pruned_first(table, first), *_general(table, first)]
    return [*found, *_language_sets(table, first), *_neurons(table, first)]


def _mean(values: dict[str, list[float]]) -> tuple[float, ...]:
    """Return the mean of the languages, seed by seed."""
    return tuple(fmean(seed) for seed in zip(*values.values(), strict=True))


def _won_back(dense: float, dense_own: float, gates: float, own: float) -> float:
    return share_won_back(dense, gates, own)


def _shares(call: Callable[[], dict[str, list[float]]]) -> tuple[tuple[float, ...], str]:
    """Return shares won back, or why there are none."""
    try:
        return _mean(call()), ""
    except Undefined as error:
        return (), str(error)


def _offloading(table: Table, at: float) -> Iterator[Claim]:
    bare = _mean(table.per_seed(at, lambda dense, _, gates, own: math.log(gates / dense)))
    with_own = _mean(table.per_seed(at, lambda dense, _, gates, own: math.log(own / dense)))
    yield Claim(
        "pruning without memories costs perplexity",
        "gates only above dense",
        at,
        NATS,
        bare,
        f"{100 * math.expm1(fmean(bare)):.1f} % of perplexity; with memories, the own one is "
        f"{100 * math.expm1(fmean(with_own)):.1f} % above dense",
    )
    shares, note = _shares(lambda: table.per_seed(at, _won_back))
    if shares and fmean(shares) > 1:
        note = BETTER_THAN_DENSE
    yield Claim(
        "memories win back what pruning loses",
        "share won back, perplexity",
        at,
        SHARE,
        shares,
        note,
    )
    yield Claim(
        "what is won back is offloaded knowledge, not adaptation",
        "gain of offloading",
        at,
        NATS,
        _mean(table.per_seed(at, offloading_gain)),
    )


def _own_log(table: Table, run: Run) -> float:
    """Return ln perplexity with the own memory, mean of the run's languages."""
    names = table.plan.load(run).data
    return fmean(math.log(table.cell(run, name, name)) for name in names)


def _parts(table: Table, at: float) -> Claim:
    runs = zip(*(table.plan.of(kind, at) for kind in (KOFF, LORA, KV)), strict=True)
    values, notes = [], []
    for both, lora, kv in runs:
        together, *alone = (_own_log(table, run) for run in (both, lora, kv))
        values.append(min(alone) - together)
        notes.append([value - together for value in alone])
    lora, kv = (fmean(values) for values in zip(*notes, strict=True))
    return Claim(
        "LoRA and KV are complementary",
        "the better half alone, above both",
        at,
        NATS,
        tuple(values),
        f"LoRA alone {lora:+.4f}, KV alone {kv:+.4f}; each with its size in the recipe, so both "
        "together have more parameters",
    )


def _own_domain(table: Table, at: float) -> Claim:
    names, values, pairs = table.languages, [], []
    for run in table.plan.of(KOFF, at):
        costs = [
            math.log(table.cell(run, domain, memory) / table.cell(run, domain, domain))
            for domain in names
            for memory in names
            if memory != domain
        ]
        values.append(fmean(costs))
        pairs += costs
    worse = sum(cost > 0 for cost in pairs)
    return Claim(
        "a memory serves its own domain",
        "another memory above the own one",
        at,
        NATS,
        tuple(values),
        f"worse in {worse} of {len(pairs)} swaps, the least by {min(pairs):+.4f}",
    )


def _halves(table: Table, at: float) -> Iterator[Claim]:
    if "swaps" not in table.plan.asked:
        return
    names = table.languages
    pairs = [(own, other) for own in names for other in names if own != other]
    found: dict[str, list[float]] = {"LoRA": [], "KV": []}
    for run in table.plan.of(KOFF, at):
        cells = table.swapped(run)
        for half in found:
            costs = []
            for own, other in pairs:
                swapped = (other, own, own) if half == "LoRA" else (own, other, own)
                costs.append(math.log(cells[swapped] / cells[own, own, own]))
            found[half].append(fmean(costs))
    for half, values in found.items():
        yield Claim(
            f"the {half} of a memory is its domain's",
            f"another domain's {half} above the own one",
            at,
            NATS,
            tuple(values),
        )


def _pruned_first(table: Table, at: float) -> Iterator[Claim]:
    for mask, kind in MASKS.items():
        runs = table.plan.of(kind, at)
        if not runs:
            continue
        joint = {run.seed: run for run in table.plan.of(KOFF, at)}
        values = [_own_log(table, run) - _own_log(table, joint[run.seed]) for run in runs]
        note = f"as many neurons pruned by {mask} before the first step, memories trained as long"
        yield Claim(
            f"learning the mask with the memories is better than pruning by {mask} first",
            f"mask by {mask} above a learned one",
            at,
            NATS,
            tuple(values),
            note,
        )


def _general(table: Table, at: float) -> Iterator[Claim]:
    runs = table.plan.of(NO_GENERAL, at)
    general = [domain for domain in table.domains if domain not in table.languages]
    if not runs or not general:
        return
    usual = {run.seed: run for run in table.plan.of(KOFF, at)}
    values, costs = [], []
    for run in runs:
        pair = run, usual[run.seed]
        without, with_them = (
            fmean(math.log(table.cell(r, part, m)) for part in general for m in table.languages)
            for r in pair
        )
        values.append(without - with_them)
        costs.append(_own_log(table, run) - _own_log(table, usual[run.seed]))
    yield Claim(
        "general steps keep general ability",
        f"{', '.join(general)}: no general steps, above some",
        at,
        NATS,
        tuple(values),
        f"own memories without general steps: {fmean(costs):+.4f}",
    )


def _language_sets(table: Table, at: float) -> Iterator[Claim]:
    for names, (koff, gates) in table.plan.prefixes.items():
        runs = table.plan.of(koff, at)
        shares, why = _shares(
            lambda koff=koff, gates=gates, names=names: table.per_seed(
                at, _won_back, koff, gates, names
            )
        )
        all_of_them = {run.seed: run for run in table.plan.of(KOFF, at)}
        costs = [
            math.log(table.cell(all_of_them[run.seed], name, name) / table.cell(run, name, name))
            for run in runs
            for name in names
        ]
        note = f"own memories with all of {', '.join(table.languages)}: {fmean(costs):+.4f} nats"
        yield Claim(
            f"memories win back what pruning loses, with {', '.join(names)} alone",
            f"share won back, {', '.join(names)} alone",
            at,
            SHARE,
            shares,
            "; ".join(part for part in (why, note) if part),
        )


def _neurons(table: Table, at: float) -> Iterator[Claim]:
    if "neurons" not in table.plan.asked:
        return
    for kind, name in ((KOFF, "with memories"), (GATES, "gates only")):
        found = [table.neurons(run)["rates"] for run in table.plan.of(kind, at)]
        for sort, sentence, sign in (
            ("specific", "language-specific neurons go", 1),
            ("general", "general neurons stay", -1),
        ):
            rates = [rates[sort] for rates in found if sort in rates and rates[sort]["neurons"]]
            p = ", ".join("–" if rate["p"] is None else f"{rate['p']:.2g}" for rate in rates)
            yield Claim(
                f"{sentence} ({name})",
                f"{sort}, {name}: pruned {'above' if sign > 0 else 'below'} chance",
                at,
                SHARE,
                tuple(sign * (rate["rate"] - rate["expected"]) for rate in rates),
                f"{rates[0]['neurons']} neurons; p of each seed: {p}" if rates else "none found",
            )
