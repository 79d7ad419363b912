"""Results for people and for programs: tables for the terminal (rich) and in Markdown, and JSON."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from ..storage.publish import rename, sync

if TYPE_CHECKING:
    from ..evaluation.attention_mass import PrefixMass
    from ..evaluation.neurons import NeuronReport
    from ..evaluation.perplexity import EvalRow
    from ..evaluation.swaps import SwapRow
    from ..pruning.binarize import SparsityReport

OWN, NONE, DENSE, GATES = "own memory", "no memory", "dense", "gates only"


def pivot(
    rows: Iterable[EvalRow],
    *,
    gates_only: Iterable[EvalRow] = (),
    metric: str = "perplexity",
) -> tuple[list[str], list[list[str]]]:
    """Arrange rows as one line per domain and one column per variant and memory.

    Args:
        rows: rows of the koff model and, if measured, of the dense base.
        gates_only: rows of a model that was pruned the same way without memories.
        metric: "perplexity" or "bits_per_byte".

    Returns:
        The header, and lines of formatted cells. A column is left out when no row fills it; a
        domain's own memory has its own column and a dot in the memories' columns.

    Raises:
        ValueError: an unknown metric.
    """
    if metric not in ("perplexity", "bits_per_byte"):
        raise ValueError(
            f"report: metric must be 'perplexity' or 'bits_per_byte', got {metric!r}; choose one"
        )
    rows = list(rows)
    cells: dict[str, dict[str, float]] = {}
    memories = list(dict.fromkeys(row.memory for row in rows if row.memory is not None))
    for row in rows:
        column = DENSE if row.variant == "base" else _column(row)
        cells.setdefault(row.domain, {})[column] = getattr(row, metric)
    for row in gates_only:
        if row.memory is None:
            cells.setdefault(row.domain, {})[GATES] = getattr(row, metric)
    wanted = [DENSE, GATES, OWN, *(_memory_column(name) for name in memories), NONE]
    header = [name for name in wanted if any(name in line for line in cells.values())]
    digits = 2 if metric == "perplexity" else 3
    lines = []
    for domain, values in cells.items():
        own = _memory_column(domain) if OWN in values else None
        numbers = ["·" if name == own else _number(values.get(name), digits) for name in header]
        lines.append([domain, *numbers])
    return ["domain", *header], lines


def eval_table(
    rows: Iterable[EvalRow],
    *,
    gates_only: Iterable[EvalRow] = (),
    metric: str = "perplexity",
    title: str | None = None,
) -> Table:
    """Return the rows as a ``rich`` table, own memory in bold; arguments as ``pivot``."""
    header, lines = pivot(rows, gates_only=gates_only, metric=metric)
    table = Table(title=escape(title or f"{metric.replace('_', ' ')} (lower is better)"))
    for name in header:
        style = "bold green" if name == OWN else None
        justify = "left" if name == "domain" else "right"
        table.add_column(escape(name), style=style, justify=justify)
    for line in lines:
        table.add_row(*map(escape, line))
    return table


def tasks_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Return measured tasks as a ``rich`` table, one line for each measure and memory."""
    table = Table(title="tasks")
    for name in ("task", "measure", "memory"):
        table.add_column(name)
    for name in ("value", "standard error", "questions"):
        table.add_column(name, justify="right")
    for row in rows:
        memory = DENSE if row["variant"] == "base" else row["memory"] or NONE
        measure = row["metric"] if row["filter"] == "none" else f"{row['metric']}, {row['filter']}"
        error = "–" if row["stderr"] is None else f"{row['stderr']:.4f}"
        cells = (row["task"], measure, memory, f"{row['value']:.4f}", error, str(row["samples"]))
        table.add_row(*map(escape, cells))
    return table


def swaps_table(rows: Iterable[SwapRow], *, title: str) -> Table:
    """Return perplexities with swapped halves as a ``rich`` table: a line for each pair of LoRA and
    cache, the domains' own pairs in bold."""
    cells: dict[tuple[str | None, str | None], dict[str, float]] = {}
    for row in rows:
        cells.setdefault((row.lora, row.kv), {})[row.domain] = row.perplexity
    domains = list(next(iter(cells.values())))
    table = Table(title=escape(title))
    for name in ("LoRA of", "KV of"):
        table.add_column(name)
    for name in domains:
        table.add_column(escape(name), justify="right")
    for pair, values in cells.items():
        line = [escape(_number(values[domain], 2)) for domain in domains]
        line = [
            f"[bold]{cell}[/bold]" if pair == (domain, domain) else cell
            for domain, cell in zip(domains, line, strict=True)
        ]
        table.add_row(*(escape(name or "–") for name in pair), *line)
    return table


def prefix_table(found: PrefixMass, *, title: str) -> Table:
    """Return per layer what a memory's learned keys get of the attention, as a ``rich`` table."""
    first = "frozen tokens" if found.frozen > 1 else "first token"
    table = Table(title=escape(title))
    for name in ("layer", "mass on the prefix", f"of it on the {first}", "largest head"):
        table.add_column(name, justify="right")
    layers = zip(found.heads, found.share_of_first().tolist(), strict=True)
    for index, (heads, share) in enumerate(layers):
        largest, head = heads.max(0)
        shown = "–" if math.isnan(share) else f"{share:.1%}"
        table.add_row(str(index), f"{heads.mean():.4f}", shown, f"{largest:.4f} (head {int(head)})")
    return table


def neuron_table(report: NeuronReport) -> Table:
    """Return what a mask does to kinds of neurons, as a ``rich`` table."""
    table = Table(title="pruned neurons of the base")
    table.add_column("neurons")
    for name in ("all", "pruned", "95 % interval", "random masks", "p"):
        table.add_column(name, justify="right")
    for name, rate in report.rates.items():
        if not rate.neurons:
            table.add_row(escape(name), "0", *["–"] * 4)
            continue
        interval = f"{rate.low:.1%} to {rate.high:.1%}"
        p = "–" if rate.p is None else f"{rate.p:.2g}"
        shares = (f"{rate.rate:.1%}", interval, f"{rate.expected:.1%}", p)
        table.add_row(escape(name), str(rate.neurons), *shares)
    return table


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, first column left-aligned, the others right-aligned.

    Args:
        header: names of the columns.
        lines: cells, as many per line as there are columns.
    """
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines)) + "\n"


def facts_table(facts: Mapping[str, str], *, title: str) -> Table:
    """Return a two-column ``rich`` table of {name: value}, both ready to print."""
    table = Table(title=escape(title), show_header=False)
    table.add_column(style="cyan")
    table.add_column(justify="right")
    for name, value in facts.items():
        table.add_row(escape(name), escape(value))
    return table


def sparsity_facts(report: SparsityReport) -> dict[str, str]:
    """Return the named facts of what ``koff.sparsity`` reports: shares removed, whether the gates
    are decided, and widths.
    """
    widths = list(report.widths)
    span = str(widths[0]) if len(set(widths)) == 1 else f"{min(widths)} to {max(widths)}"
    return {
        "sparsity, of the MLP neurons": f"{report.mlp:.1%}",
        "sparsity, of all weights": f"{report.model:.1%}",
        "sparsity, of all but embeddings": f"{report.non_embedding:.1%}",
        "gates": "hard" if report.hard else f"soft, {report.undecided:.0%} undecided",
        "kept MLP widths": f"{span} in {len(widths)} layers",
    }


def millions(count: int) -> str:
    """Return a number of parameters in millions or thousands, such as "5.77 M"."""
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count / 1e3:.1f} k"


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON so that the file is either whole or not there.

    Args:
        path: file to write; its folder must exist.
        value: plain values; numbers that JSON lacks (NaN, infinity) become null.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file so that it is either whole or not there.

    Args:
        path: file to write; its folder must exist.
        text: its content, written as UTF-8.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    check_writable(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp makes it private, which a result is not
        sync(Path(temporary))
        rename(Path(temporary), path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_writable(path: str | Path) -> None:
    """Refuse a path that no file can be written to.

    Raises:
        FileNotFoundError: its folder does not exist. ValueError: it is a folder itself.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"report: {path} must lie in an existing folder, got none at {path.parent}; create it"
        )
    if path.is_dir():
        raise ValueError(f"report: {path} must be a file, got a folder; add a file name")


def _column(row: EvalRow) -> str:
    if row.memory is None:
        return NONE
    return OWN if row.memory == row.domain else _memory_column(row.memory)


def _memory_column(name: str) -> str:
    return f"memory {name}"


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "–"
    # A model that diverged measures 1e30 or infinity, which would tear the columns apart.
    return f"{value:.{digits}f}" if math.isfinite(value) and value < 1e5 else f"{value:.3g}"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
