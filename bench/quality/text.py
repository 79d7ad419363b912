"""The record as Markdown: per sparsity one table, the shares, the gains and the budget."""

from __future__ import annotations

from koff.commands.tables import markdown
from koff.evaluation.measures import Spread

from .collect import Table
from .plan import DENSE, GATES, KOFF

OWN = "·"  # stands in the columns of single memories where the memory is the row's own


def page(record: dict, table: Table) -> str:
    """The whole text.

    Args:
        record: what `collect` returned.
        table: its table.
    """
    environment = record["environment"]
    seeds = " ".join(map(str, record["seeds"]))
    machine = f"{environment['device']}, {environment['processor']}, "
    machine += f"torch {environment['torch']}, transformers {environment['transformers']}"
    first = f", its first {record['max_tokens']} tokens" if record["max_tokens"] else ""
    lines = [
        f"# Quality of {table.plan.title}, {record['split']} split{first}",
        "",
        "Perplexity of the compacted model reloaded from disk; mean ± sample standard deviation "
        f"over seeds {seeds}. {machine}.",
    ]
    for part in record["sparsities"]:
        lines += ["", *_section(record, part, table)]
    lines += ["", "Commands, in the order of the runs:", ""]
    lines += [f"    {command}" for run in record["runs"] for command in run["commands"]]
    return "\n".join(lines) + "\n"


def _section(record: dict, part: dict, table: Table) -> list[str]:
    sparsity = part["target_sparsity"]
    scope = {"mlp": "of the MLP neurons", "model": "of all weights"}
    what = scope[record["recipe"]["koff"]["sparsity_scope"]]
    return [
        f"## Target: {sparsity:g} {what}",
        "",
        _cells(table, sparsity).rstrip("\n"),
        "",
        f"- removed: {_removed(record, sparsity)}",
        f"- {_budget(part['budget'])}",
        f"- {_shares(part['share_won_back'])}",
        f"- {_gain(part['offloading_gain_nats'])}",
        f"- {_seconds(record, sparsity)}",
        *_variants(part, table),
        *_later(table, sparsity),
    ]


def _variants(part: dict, table: Table) -> list[str]:
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
        f"- {name}: {' '.join(facts['overrides'])}" for name, facts in part["variants"].items()
    ]
    return ["", "### Other settings", "", markdown(header, lines).rstrip("\n"), "", *settings]


def _later(table: Table, sparsity: float) -> list[str]:
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
    return ["", "### Memories added later", "", markdown(header, lines).rstrip("\n")]


def _cells(table: Table, sparsity: float) -> str:
    """Rows: domains and general parts; columns: every variant and memory."""
    memories = table.languages
    header = ["", "dense", "dense, own memory", "gates only", "koff, own memory"]
    header += [*(f"koff, memory {name}" for name in memories), "koff, no memory"]
    lines = []
    for domain in table.domains:
        own = domain if domain in memories else None
        line = [domain, f"{table.dense(domain):.2f}"]
        line.append(table.seeds(DENSE, 0.0, domain, own).text() if own else "–")
        line.append(table.seeds(GATES, sparsity, domain, None).text())
        line.append(table.seeds(KOFF, sparsity, domain, own).text() if own else "–")
        for name in memories:
            line.append(OWN if name == own else table.seeds(KOFF, sparsity, domain, name).text())
        line.append(table.seeds(KOFF, sparsity, domain, None).text())
        lines.append(line)
    return markdown(header, lines)


def _removed(record: dict, sparsity: float) -> str:
    """What koff and gates alone really removed: they must be comparable."""
    parts = []
    for kind in (KOFF, GATES):
        runs = _runs(record, kind, sparsity)
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
    mark = "**EXCEEDED**, " if found["exceeded"] else ""
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
    return text.rstrip(";")


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
        runs = _runs(record, kind, at)
        longest = max(run["training_seconds"] for run in runs)
        resumed = sum(run["resumed"] for run in runs)
        note = f" ({resumed} resumed: the last piece alone)" if resumed else ""
        parts.append(f"{'gates only' if kind == GATES else kind} {longest:.0f} s{note}")
    return f"training, longest of the seeds: {', '.join(parts)}"


def _runs(record: dict, kind: str, sparsity: float) -> list[dict]:
    wanted = (kind, sparsity, None)
    keys = ("kind", "target_sparsity", "added")
    return [run for run in record["runs"] if tuple(run[key] for key in keys) == wanted]


def _each(found: dict, show) -> str:
    return ", ".join(f"{name} {show(values)}" for name, values in found["languages"].items())


def _percent(values: dict) -> str:
    return Spread(**values).text(1, 100.0, " %")


def _nats(values: dict) -> str:
    return Spread(**values).text(4)
