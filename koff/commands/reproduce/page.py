"""The record as a page: each claim with what the runs say to it, then every number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ...evaluation.measures import BETTER_THAN_DENSE, Spread, confidence, spread
from ..report.content import Interval, Intervals, Page, Part, Section, Table, Text
from .claims import NATS, SHARE, Claim, claims
from .collect import Table as Cells
from .collect import facts_of
from .plan import DENSE, GATES, KOFF, Run

OWN = "·"  # stands in the columns of single memories where the memory is the row's own


def page(record: dict, table: Cells) -> Page:
    """Return what the files with the answers say.

    Args:
        record: what `collect` returned.
        table: its table.
    """
    environment = record["environment"]
    seeds = " ".join(map(str, record["seeds"]))
    machine = f"{environment['device']}, {environment['processor']}, "
    machine += f"torch {environment['torch']}, transformers {environment['transformers']}"
    first = f", its first {record['max_tokens']} tokens" if record["max_tokens"] else ""
    text = f"{record['split']} split{first}; perplexities of compacted models reloaded from disk; "
    text += f"mean ± sample standard deviation over seeds {seeds}. {machine}."
    commands = [command for run in record["runs"] for command in run["commands"]]
    return Page(
        f"Knowledge offloading with {table.plan.recipe.stem}",
        [
            Section("The claims", [Text(text), *_claims(claims(table))]),
            *(_sparsity(record, part, table) for part in record["sparsities"]),
            *_swaps(table),
            *_ablations(table),
            Section("Commands", [Table(["command"], [[c] for c in commands])], folded=True),
        ],
    )


def _claims(found: list[Claim]) -> Iterator[Part]:
    lines = []
    for claim in found:
        at = f"{claim.sparsity:g}"
        lines.append([claim.sentence, at, claim.measure, claim.text(), claim.verdict, claim.note])
    note = "Above 0 a number speaks for its claim. Of several seeds a claim holds if the 95 % "
    note += "interval of the mean, by Student's t, lies above 0."
    yield Table(["claim", "pruned", "measured", "here", "verdict", "more"], lines, note=note)
    what = "mean, with its 95 % interval over seeds"
    for unit in (SHARE, NATS):
        rows = [
            interval(f"{claim.sparsity:g}: {claim.measure}", claim.values)
            for claim in found
            if claim.unit == unit and claim.values
        ]
        if rows:
            title = f"The claims, {'as shares' if unit == SHARE else f'in {unit}'}"
            yield Intervals(title, what, rows, percent=unit == SHARE, mark=0.0)


def interval(name: str, values: Iterable[float]) -> Interval:
    """Return a mean over seeds and its 95 % interval, which a single seed does not have.

    Args:
        name: of the row.
        values: of each seed.
    """
    found = spread(values)
    low, high = confidence(found) if found.count > 1 else (found.mean, found.mean)
    return Interval(name, found.mean, low, high)


def _sparsity(record: dict, part: dict, table: Cells) -> Section:
    sparsity = part["target_sparsity"]
    scope = {"mlp": "of the MLP neurons", "model": "of all weights"}
    what = scope[record["recipe"]["koff"]["sparsity_scope"]]
    facts = [
        f"removed: {_removed(record, sparsity)}",
        _budget(part["budget"]),
        _shares(part["share_won_back"]),
        _gain(part["offloading_gain_nats"]),
        _seconds(record, sparsity),
    ]
    return Section(
        f"Pruned to {sparsity:g} {what}",
        [
            _cells(table, sparsity),
            *(Text(fact) for fact in facts),
            *_variants(part, table),
            *_later(table, sparsity),
        ],
    )


def _variants(part: dict, table: Cells) -> list[Part]:
    """koff with other settings: one row each, beside koff itself."""
    if not part["variants"]:
        return []
    at = part["target_sparsity"]
    header = ["", "budget", *(f"{name}, own memory" for name in table.languages), "won back"]
    header += ["gain, nats", *(f"{domain}, no memory" for domain in table.domains)]
    lines = []
    for kind, facts in {KOFF: part, **part["variants"]}.items():
        own = [table.seeds(kind, at, name, name).text() for name in table.languages]
        none = [table.seeds(kind, at, name, None).text() for name in table.domains]
        shares = facts["share_won_back"]["perplexity"]
        won = "undefined" if "undefined" in shares else _percent(shares["mean"])
        ratio = facts["budget"]["ratio"]
        size = "–" if ratio is None else _share(ratio)
        gain = _nats(facts["offloading_gain_nats"]["mean"])
        lines.append([kind, size, *own, won, gain, *none])
    settings = [
        f"{name}: {' '.join(facts['overrides'])}" for name, facts in part["variants"].items()
    ]
    return [Text("Other settings:"), Table(header, lines, note="; ".join(settings))]


def _later(table: Cells, sparsity: float) -> list[Part]:
    """Memories added to finished models, and the same training on the dense one."""
    if not table.plan.later:
        return []
    header = ["", "dense", "dense, own memory", "koff, own memory"]
    header += [*(f"koff, memory {name}" for name in table.languages), "koff, no memory"]
    lines = []
    for name in table.plan.later:
        own = table.seeds(DENSE, 0.0, name, name, name).text()
        line = [name, f"{table.dense(name):.2f}", own]
        for memory in (name, *table.languages, None):
            line.append(table.seeds(KOFF, sparsity, name, memory, name).text())
        lines.append(line)
    return [Text("Memories added later:"), Table(header, lines)]


def _cells(table: Cells, sparsity: float) -> Table:
    """Rows: domains and general parts; columns: every variant and memory."""
    memories = table.languages
    parts = [kind for kind in ("lora", "kv") if kind in table.plan.kinds]
    header = ["", "dense", "dense, own memory", "gates only", "koff, own memory"]
    header += [f"{ {'lora': 'LoRA', 'kv': 'KV'}[kind] } alone, own memory" for kind in parts]
    header += [*(f"koff, memory {name}" for name in memories), "koff, no memory"]
    lines = []
    for domain in table.domains:
        own = domain if domain in memories else None
        line = [domain, f"{table.dense(domain):.2f}"]
        line.append(table.seeds(DENSE, 0.0, domain, own).text() if own else "–")
        line.append(table.seeds(GATES, sparsity, domain, None).text())
        for kind in (KOFF, *parts):
            line.append(table.seeds(kind, sparsity, domain, own).text() if own else "–")
        for name in memories:
            line.append(OWN if name == own else table.seeds(KOFF, sparsity, domain, name).text())
        line.append(table.seeds(KOFF, sparsity, domain, None).text())
        lines.append(line)
    return Table(header, lines)


def _swaps(table: Cells) -> Iterator[Section]:
    if "swaps" not in table.plan.asked:
        return
    at = table.plan.sparsities[0]
    found = [table.swapped(run) for run in table.plan.of(KOFF, at)]
    lines = []
    for pair in dict.fromkeys(cell[:2] for cell in found[0]):
        values = [spread(cells[*pair, name] for cells in found) for name in table.languages]
        lines.append([*(name or "none" for name in pair), *(value.text() for value in values)])
    text = f"The LoRA of one memory beside the KV of another, pruned to {at:g}; perplexity of each "
    yield Section("Swaps", [Text(f"{text}domain."), Table(["LoRA", "KV", *table.languages], lines)])


def _ablations(table: Cells) -> Iterator[Section]:
    """The kinds of run that were made at one sparsity and seed alone."""
    plan = table.plan
    at = plan.sparsities[0]
    lines = []
    for kind, facts in plan.kinds.items():
        if facts.everywhere:
            continue
        for run in plan.of(kind, at):
            memories = facts.has_memories
            lines.append([kind, *(_own(table, run, domain, memories) for domain in table.domains)])
    if lines:
        text = f"Pruned to {at:g}, seed {plan.seeds[0]}: perplexity with the own memory; where a "
        text += "domain or a run has none, with no memory."
        yield Section("One thing changed", [Text(text), Table(["", *table.domains], lines)])


def _own(table: Cells, run: Run, domain: str, memories: bool) -> str:
    learned = table.plan.load(run).data
    if domain in table.languages and domain not in learned:
        return "–"
    own = domain if memories and domain in learned else None
    return f"{table.cell(run, domain, own):.2f}"


def _removed(record: dict, sparsity: float) -> str:
    """What koff and gates alone really removed: they must be comparable."""
    parts = []
    for kind in (KOFF, GATES):
        runs = facts_of(record["runs"], kind, sparsity)
        neurons, weights, inner = (
            _range([run["sparsity"][of] for run in runs])
            for of in ("mlp", "model", "non_embedding")
        )
        name = "gates only" if kind == GATES else kind
        text = f"{name} {neurons} of the MLP neurons, {weights} of all weights"
        parts.append(f"{text} ({inner} of all but the embeddings)")
    return "; ".join(parts)


def _range(shares: list[float]) -> str:
    low, high = _share(min(shares), 2), _share(max(shares), 2)
    return low if low == high else f"{low} to {high}"


def _share(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def _budget(found: dict) -> str:
    removed, limit = found["removed_parameters"], f"at most {_share(found['limit'], 0)}"
    mark = "EXCEEDED, " if found["exceeded"] else ""
    if found["ratio"] is None:
        return f"budget: {mark}nothing was removed ({limit})"
    text = f"budget: {mark}{_share(found['ratio'])} of the {removed} parameters removed"
    return f"{text}: a memory has {found['memory_parameters']} ({limit})"


def _shares(found: dict[str, dict]) -> str:
    text = "share won back, (gates only - own) / (gates only - dense), mean of the languages:"
    for scale, values in found.items():
        name = f" on {scale.replace('_', '-')}"
        if "undefined" in values:
            text += f"{name} undefined ({values['undefined']});"
            continue
        text += f"{name} {_percent(values['mean'])} ({_each(values, _percent)});"
    text = text.rstrip(";")
    if any(values["mean"]["mean"] > 1 for values in found.values() if "mean" in values):
        text += f". {BETTER_THAN_DENSE.capitalize()}"
    return text


def _gain(found: dict) -> str:
    text = "offloading gain, (ln gates only - ln own) - (ln dense - ln dense with own memory), "
    text += f"nats: mean of the languages {_nats(found['mean'])} ({_each(found, _nats)})"
    if found["mean"]["mean"] <= 0:
        text += ". Not positive: memories gain no more on the pruned model than on the dense one, "
        text += "so nothing was offloaded"
    return text


def _seconds(record: dict, sparsity: float) -> str:
    parts = []
    for kind, at in ((KOFF, sparsity), (GATES, sparsity), (DENSE, 0.0)):
        runs = facts_of(record["runs"], kind, at)
        longest = max(run["training_seconds"] for run in runs)
        resumed = sum(run["resumed"] for run in runs)
        note = f" ({resumed} resumed: the last piece alone)" if resumed else ""
        parts.append(f"{'gates only' if kind == GATES else kind} {longest:.0f} s{note}")
    return f"training, longest of the seeds: {', '.join(parts)}"


def _each(found: dict, show) -> str:
    return ", ".join(f"{name} {show(values)}" for name, values in found["languages"].items())


def _percent(values: dict) -> str:
    return Spread(**values).text(1, 100.0, " %")


def _nats(values: dict) -> str:
    return Spread(**values).text(4)
