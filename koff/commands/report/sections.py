"""What a page says about finished runs: each section with one sentence of what was found."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from ...evaluation.measures import (
    BETTER_THAN_DENSE,
    Undefined,
    offloading_gain,
    share_won_back,
    spread,
)
from ...storage.files import DamagedFolder
from ..recipe import Recipe
from ..tables import millions
from .content import Interval, Intervals, Lines, Page, Part, Section, Series, Table, Text
from .runs import Finished, Group, alike, group_runs

_NONE = "–"
_MOST_SERIES = 6  # lines that one chart can show and an eye tell apart
_MOST_POINTS = 300  # of a line: a page has at most 400 pixels for them
_MOST_LINES, _MOST_COLUMNS = 60, 24  # of a table
_MOST_TEXT = 160  # characters of a text that comes from a folder


def make_page(runs: Sequence[Finished], split: str) -> Page:
    """Say what finished runs of one base model are.

    Args:
        runs: at least one.
        split: whose measurements ``runs`` hold.

    Raises:
        ValueError: runs that cannot stand on one page.
    """
    groups = group_runs(runs)
    missing: list[str] = []
    sections = [
        make(groups, split, missing)
        for make in (
            _overview,
            _pruned,
            _neurons,
            _perplexity,
            _won_back,
            _swaps,
            _tasks,
            _attention,
        )
    ]
    sections += [_training(groups, missing), _sizes(groups), _speed(groups, missing)]
    sections.append(_settings(groups, missing))
    return Page(f"koff: {base_name(runs[0])}", [s for s in sections if s is not None], missing)


def base_name(run: Finished) -> str:
    """Return what the dense model is called: its id, or the name of its folder."""
    return public_path(run.manifest.base or "an unnamed model")


def public_path(text: str) -> str:
    """Return an id of the hub as it is, and of a path of this machine its name alone: a page is
    shown to others."""
    is_path = text.startswith(("/", "~", ".")) or "\\" in text
    return cut(re.split(r"[/\\]", text.rstrip("/\\"))[-1] if is_path else text)


def cut(text: str) -> str:
    """Return a text from a folder at a length that a page can bear."""
    return text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 1] + "…"


def share(value: float) -> str:
    """Return a share as the page writes it."""
    return f"{100 * value:.1f} %"


def table(
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    heat: Sequence[Sequence[float]] | None = None,
    note: str = "",
) -> Table:
    """Make a table no larger than a page can bear, which says what it leaves out."""
    left = []
    if len(lines) > _MOST_LINES:
        left.append(f"{len(lines) - _MOST_LINES} more lines")
    if len(header) > _MOST_COLUMNS:
        left.append(f"{len(header) - _MOST_COLUMNS} more columns")
    if left:
        note = f"{note} Left out: {', '.join(left)}.".strip()
    return Table(
        [cut(cell) for cell in header[:_MOST_COLUMNS]],
        [[cut(cell) for cell in line[:_MOST_COLUMNS]] for line in lines[:_MOST_LINES]],
        None if heat is None else [line[:_MOST_COLUMNS] for line in heat[:_MOST_LINES]],
        note,
    )


def _overview(groups: list[Group], split: str, missing: list[str]) -> Section:
    lines = [
        [group.label, ", ".join(run.name for run in group.runs), _seeds(group)] for group in groups
    ]
    made = groups[0].first.manifest
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    text = f"{_count(sum(len(g.runs) for g in groups), 'run')} of {base_name(groups[0].first)}, "
    text += f"{_count(len(made.dense_widths), 'layer')}; saved {made.created} by koff {made.koff}, "
    text += f"{versions}."
    return Section("Runs", [Text(cut(text)), table(["kind", "folders", "seeds"], lines)])


def _seeds(group: Group) -> str:
    return ", ".join(str(run.recipe.seed) if run.recipe else "?" for run in group.runs)


# ---- what was pruned where ----


def _pruned(groups: list[Group], split: str, missing: list[str]) -> Section | None:
    pruned = [group for group in groups if group.pruned]
    if not pruned:
        missing.append("What was pruned: nothing was, in any of these runs.")
        return None
    shares = {group.label: [_layer_shares(run) for run in group.runs] for group in pruned}
    first = [fmean(values) for values in zip(*shares[pruned[0].label], strict=True)]
    most = max(range(len(first)), key=first.__getitem__)
    least = min(range(len(first)), key=first.__getitem__)
    text = f"{_removed(pruned[0], 'mlp')} of the MLP neurons are gone, "
    text += f"{_removed(pruned[0], 'model')} of all weights: most in layer {most} "
    text += f"({share(first[most])}), fewest in layer {least} ({share(first[least])})."
    series = [_banded(label, values) for label, values in shares.items()]
    lines = [
        [group.label, *(_removed(group, of) for of in ("mlp", "model", "non_embedding"))]
        for group in pruned
    ]
    parts: list[Part] = [
        Text(text),
        Lines("Pruned neurons of each layer", "layer", "pruned", series[:_MOST_SERIES], True),
        table(["removed", "of the MLP neurons", "of all weights", "of all but embeddings"], lines),
        *_overlaps(pruned),
    ]
    return Section("What was pruned where", parts)


def _layer_shares(run: Finished) -> list[float]:
    widths = zip(run.manifest.widths, run.manifest.dense_widths, strict=True)
    return [1 - width / dense for width, dense in widths]


def _removed(group: Group, of: str) -> str:
    values = spread(run.manifest.sparsity[of] for run in group.runs)
    return values.text(1, 100, " %")


def _banded(label: str, values: list[list[float]]) -> Series:
    """Return the mean over runs layer by layer, with the range of the runs as its band."""
    layers = list(zip(*values, strict=True))
    points = [(float(at), fmean(layer)) for at, layer in enumerate(layers)]
    if len(values) == 1:
        return Series(cut(label), _thinned(points))
    step = _step(len(points))
    low, high = [min(layer) for layer in layers], [max(layer) for layer in layers]
    return Series(cut(label), points[::step], low[::step], high[::step])


def _step(count: int) -> int:
    return max(1, math.ceil(count / _MOST_POINTS))


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return every so many of the points, and the last."""
    step = _step(len(points))
    return [*points[::step], *(points[-1:] if (len(points) - 1) % step else [])]


def _overlaps(groups: list[Group]) -> list[Part]:
    """Say how much masks have in common: those of the seeds of a group, and those of two groups."""
    runs = {run: group.label for group in groups for run in group.runs}
    found: dict[str, list[tuple[float, float]]] = {}
    pairs = [pair for pair in combinations(runs, 2) if all(run.manifest.kept for run in pair)]
    for a, b in pairs[:200]:
        same = runs[a] == runs[b]
        name = f"seeds of: {runs[a]}" if same else f"{runs[a]} and {runs[b]}"
        found.setdefault(name, []).append(overlap(a, b))
    if not found:
        return []
    lines = [
        [name, share(fmean(o for o, _ in values)), share(fmean(c for _, c in values))]
        for name, values in found.items()
    ]
    text = "Of the neurons that two masks prune, so many are the same; by chance would be, with "
    text += "the same numbers in each layer, the share in the last column."
    return [Text(text), table(["masks of", "in common", "by chance"], lines)]


def overlap(a: Finished, b: Finished) -> tuple[float, float]:
    """Return the share of their pruned neurons that two runs have in common, |A and B| over the
    mean of |A| and |B|, and what it would be if each layer were pruned at random as much.

    Raises:
        ValueError: kept neurons that are none of the layer's.
    """
    common = chance = pruned = 0.0
    layers = zip(_kept_sets(a), _kept_sets(b), a.manifest.dense_widths, strict=True)
    for mine, others, dense in layers:
        common += dense - len(mine | others)
        chance += (dense - len(mine)) * (dense - len(others)) / dense
        pruned += dense - (len(mine) + len(others)) / 2
    return (common / pruned, chance / pruned) if pruned else (0.0, 0.0)


def _kept_sets(run: Finished) -> list[set[int]]:
    """Return the kept neurons of each layer; ``Manifest.kept_neurons`` needs torch."""
    found = []
    manifest = run.manifest
    layers = zip(manifest.kept or [], manifest.widths, manifest.dense_widths, strict=True)
    for rows, width, dense in layers:
        kept = set(rows)
        if len(kept) != width or min(kept) < 0 or max(kept) >= dense:
            raise DamagedFolder(
                f"the kept neurons of {run.name} must be {width} different ones below {dense} in "
                f"each layer, got {len(kept)}"
            )
        found.append(kept)
    return found


# ---- which neurons ----


def _neurons(groups: list[Group], split: str, missing: list[str]) -> Section | None:
    parts: list[Part] = []
    for group in groups:
        for run in group.runs:
            found = run.neurons
            if found is None:
                continue
            label = _run_label(group.label, run, groups)
            parts.append(Text(cut(f"{label}:")))
            parts.append(Text(found.sentence[: 3 * _MOST_TEXT]))
            rows, lines = [], []
            for name, (count, rate, low, high, expected, p) in found.rates.items():
                rows.append(Interval(cut(name), rate, low, high))
                shown = _NONE if p is None else f"{p:.2g}"
                lines.append([name, str(count), share(rate), share(expected), shown])
            if rows:
                # What a random mask removes of any neurons, on average.
                gone = 1 - sum(run.manifest.widths) / sum(run.manifest.dense_widths)
                what = "pruned, with 95 % interval; dashed: of all neurons"
                parts.append(Intervals("Pruned, by kind", what, rows[:_MOST_LINES], True, gone))
            series = []
            for index, kind in enumerate(("specific", "others")):
                points = [(float(at), both[index]) for at, both in enumerate(found.layers)]
                points = [(at, value) for at, value in points if value is not None]
                if points:
                    series.append(Series(kind, _thinned(points)))
            if series:
                parts.append(Lines("Pruned, by layer", "layer", "pruned", series, True))
            header = ["neurons", "all", "pruned", "by random masks", "p"]
            parts.append(table(header, lines))
    if not parts:
        missing.append("Which neurons went: koff analyse DIR --neurons --json DIR/neurons.json")
        return None
    text = "Specific are the neurons that one language uses far more than the others (LAPE, on the "
    text += "unpruned base); general ones are used much by all. Random masks remove as many "
    text += "neurons of each layer as the mask did; p is how often they are as far from their mean."
    return Section("Which neurons", [Text(text), *parts])


# ---- perplexity ----


def value_of(group: Group, domain: str, memory: str | None) -> list[float] | None:
    """Return one cell of each run of a group, None if one of them lacks it."""
    values = [run.koff[domain, memory] for run in group.runs if (domain, memory) in run.koff]
    return values if len(values) == len(group.runs) else None


def dense_of(groups: list[Group]) -> dict[str, float]:
    """Return {domain: perplexity of the dense base}, from the first run that measured it."""
    found: dict[str, float] = {}
    for group in groups:
        for run in group.runs:
            for (domain, _), value in run.dense.items():
                found.setdefault(domain, value)
    return found


def domains_of(groups: Iterable[Group]) -> list[str]:
    """Return every domain that a run was measured on, in order."""
    cells = (cell for group in groups for run in group.runs for cell in (run.koff | run.dense))
    return list(dict.fromkeys(domain for domain, _ in cells))


def _perplexity(groups: list[Group], split: str, missing: list[str]) -> Section | None:
    domains, dense = domains_of(groups), dense_of(groups)
    if not domains:
        names = sorted({name for group in groups for run in group.runs for name in run.splits})
        others = f" (there are measurements of: {', '.join(map(cut, names))})" if names else ""
        missing.append(f"Perplexity on the {split} split{others}: koff eval DIR --base --card")
        return None
    if not dense:
        missing.append("Perplexity of the dense base: koff eval DIR --base --card")
    parts: list[Part] = []
    for group in groups:
        if any(run.koff for run in group.runs):
            parts += [Text(f"{group.label}:"), _matrix(group, domains, dense)]
    text = f"Perplexity on the {split} split, lower is better"
    several = any(len(group.runs) > 1 for group in groups)
    text += ", mean ± standard deviation over seeds" if several else ""
    text += ". The darker a cell, the further above the " + (
        "dense base: at the darkest twice its perplexity." if dense else "best cell of its line."
    )
    return Section("Perplexity", [Text(text), *parts])


def _matrix(group: Group, domains: list[str], dense: dict[str, float]) -> Table:
    """Return the perplexity of every domain (line) with every memory and none (column)."""
    columns: list[str | None] = [*group.memories, None]
    header = ["domain", *(["dense"] if dense else [])]
    header += [f"memory {name}" if name else "no memory" for name in columns]
    lines, heat = [], []
    for domain in domains:
        cells = [value_of(group, domain, memory) for memory in columns]
        if not any(cells):
            continue
        means = [fmean(cell) if cell else None for cell in cells]
        best = dense.get(domain, min(mean for mean in means if mean))
        line = [domain, *([_shown(dense.get(domain))] if dense else [])]
        for name, cell in zip(columns, cells, strict=True):
            own = "own: " if name == domain and cell else ""
            line.append(own + (spread(cell).text() if cell else _NONE))
        lines.append(line)
        # Doubled perplexity, ln 2 nats, is as dark as it gets.
        marks = [math.log(mean / best) / math.log(2) if mean else 0.0 for mean in means]
        plain = [0.0] * (len(line) - len(marks))
        heat.append([*plain, *(min(1.0, max(0.0, mark)) for mark in marks)])
    return table(header, lines, heat)


def _shown(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}"


# ---- what memories win back ----


def _won_back(groups: list[Group], split: str, missing: list[str]) -> Section | None:
    dense = dense_of(groups)
    lines, shares, gains, reasons = [], [], [], []
    pruned = [group for group in groups if group.pruned and group.memories]
    alone = len(pruned) == 1
    for group in pruned:
        gates = _partner(groups, group, "memories", "lora", "kv")
        unpruned = _partner(groups, group, "target_sparsity")
        if gates is None or not dense:
            continue
        found = _per_language(group, gates, dense, share_won_back, reasons)
        if found:
            shares += _intervals(group, found, alone)
        gain = None
        if unpruned is not None:
            gain = _gains(group, gates, unpruned, dense)
            gains += _intervals(group, gain, alone) if gain else []
        mean = spread(_means(found)).text(1, 100, " %") if found else _NONE
        if found and fmean(_means(found)) > 1:
            reasons.append(f"{BETTER_THAN_DENSE.capitalize()}.")
        lines.append([group.label, mean, spread(_means(gain)).text(4) if gain else _NONE])
    if not lines:
        missing.append(
            "Share won back by memories: needs the same recipe without memories beside (koff train "
            "RECIPE --without lora --without kv), and the dense base measured (koff eval --base)"
        )
        return None
    parts: list[Part] = [table(["", "won back", "gain of offloading, nats"], lines)]
    if shares:
        what = "share won back by a domain's own memory"
        parts.append(Intervals("Won back", what, shares[:_MOST_LINES], True, mark=1.0))
    if gains:
        what = "gain of offloading, nats per token"
        parts.append(Intervals("Gain of offloading", what, gains[:_MOST_LINES], mark=0.0))
    else:
        missing.append(
            "Gain of offloading: needs the same recipe on the unpruned model beside (koff train "
            "RECIPE --sparsity 0)"
        )
    text = "Of the perplexity that gates alone lose, the memories win back the share below (1: as "
    text += "good as dense). The gain of offloading is what they win on the pruned model beyond "
    text += "what the same training wins on the dense one; above 0, knowledge was offloaded. "
    text += "Bars are one standard deviation over seeds, where there are several."
    for reason in dict.fromkeys(reasons):
        parts.append(Text(reason))
    return Section("Won back", [Text(text), *parts])


def _partner(groups: list[Group], group: Group, *keys: str) -> Group | None:
    """Return the group whose recipe differs in these keys alone: that without memories, or that on
    the unpruned model."""
    if group.first.recipe is None:
        return None
    wanted = alike(group.first, *keys)
    for other in groups:
        fits = not other.memories if "memories" in keys else not other.pruned
        if other is not group and fits and alike(other.first, *keys) == wanted:
            return other
    return None


def _by_seed(*groups: Group) -> list[tuple[Finished, ...]]:
    """Return the runs of each seed that every group has."""
    named = [{run.recipe.seed: run for run in g.runs if run.recipe} for g in groups]
    seeds = [seed for seed in named[0] if all(seed in runs for runs in named)]
    return [tuple(runs[seed] for runs in named) for seed in seeds]


def _per_language(
    group: Group,
    gates: Group,
    dense: dict[str, float],
    function: Callable[[float, float, float], float],
    reasons: list[str],
) -> dict[str, list[float]]:
    """Return {domain: share won back of each seed}."""
    found: dict[str, list[float]] = {}
    for own, without in _by_seed(group, gates):
        for name in group.memories:
            pair = without.koff.get((name, None)), own.koff.get((name, name))
            if name not in dense or None in pair:
                continue
            try:
                found.setdefault(name, []).append(function(dense[name], *pair))
            except Undefined as error:
                reasons.append(cut(f"{name}: {error}"))
    return found


def _gains(
    group: Group, gates: Group, unpruned: Group, dense: dict[str, float]
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for own, without, plain in _by_seed(group, gates, unpruned):
        for name in group.memories:
            cells = (
                plain.koff.get((name, name)),
                without.koff.get((name, None)),
                own.koff.get((name, name)),
            )
            if name in dense and None not in cells:
                found.setdefault(name, []).append(offloading_gain(dense[name], *cells))
    return found


def _means(values: dict[str, list[float]]) -> list[float]:
    """Return the mean of the domains for each seed."""
    return [fmean(seed) for seed in zip(*values.values(), strict=False)]


def _intervals(group: Group, values: dict[str, list[float]], alone: bool) -> list[Interval]:
    rows = []
    for name, found in values.items():
        value = spread(found)
        sd = value.sd or 0.0
        label = cut(name if alone else f"{name}, {group.label}")
        rows.append(Interval(label, value.mean, value.mean - sd, value.mean + sd))
    return rows


# ---- memory i on domain j ----


def _swaps(groups: list[Group], split: str, missing: list[str]) -> Section | None:
    parts: list[Part] = []
    for group in groups:
        names = [name for name in group.memories if value_of(group, name, name)]
        if len(names) < 2 or not group.pruned:
            continue
        lines, heat, costs, best = [], [], [], 0
        for domain in names:
            own = fmean(math.log(v) for v in value_of(group, domain, domain) or [])
            line, marks = [domain], [0.0]
            others = []
            for memory in [*names, None]:
                cell = value_of(group, domain, memory)
                cost = fmean(map(math.log, cell)) - own if cell else None
                line.append("own" if memory == domain else _NONE if cost is None else f"{cost:.3f}")
                marks.append(min(1.0, max(0.0, (cost or 0.0) / math.log(2))))
                if cost is not None and memory != domain:
                    others.append(cost)
                    costs += [cost] if memory is not None else []
            best += all(cost > 0 for cost in others)
            lines.append(line)
            heat.append(marks)
        text = f"{group.label}: the own memory is the best one on {best} of {len(names)} domains"
        text += (
            f"; another one costs {fmean(costs):.3f} nats per token on average." if costs else "."
        )
        header = ["domain", *(f"memory {name}" for name in names), "no memory"]
        parts += [Text(text), table(header, lines, heat)]
    if not parts:
        missing.append("Swapped memories: need two memories, each measured on both domains")
        return None
    text = "What it costs to read a domain with another memory than its own, in nats per token. "
    return Section("Swapped memories", [Text(text), *parts])


# ---- tasks ----


def _tasks(groups: list[Group], split: str, missing: list[str]) -> Section | None:
    tables: list[Part] = []
    for group in groups:
        # {(task, measure): {column: values}}, over the runs of the group.
        found: dict[tuple[str, str], dict[str, list[float]]] = {}
        errors: dict[tuple[str, str], dict[str, float | None]] = {}
        for run in group.runs:
            for row in run.tasks:
                measure = row["metric"]
                measure += "" if row["filter"] == "none" else f", {row['filter']}"
                what = row["task"], measure
                column = f"memory {row['memory']}" if row["memory"] else "no memory"
                column = "dense" if row["variant"] == "base" else column
                found.setdefault(what, {}).setdefault(column, []).append(row["value"])
                errors.setdefault(what, {})[column] = row["stderr"]
        columns = list(dict.fromkeys(name for cells in found.values() for name in cells))
        lines = [
            [f"{task}: {measure}", *(_task_cell(cells, errors[task, measure], n) for n in columns)]
            for (task, measure), cells in found.items()
        ]
        if lines:
            tables += [Text(f"{group.label}:"), table(["task", *columns], lines)]
    if not tables:
        missing.append("Tasks: koff eval DIR --tasks NAME,... --card")
        return None
    text = "Measured by lm-eval: of one run with the standard error over its questions, of several "
    text += "the mean with the standard deviation over seeds."
    return Section("Tasks", [Text(text), *tables])


def _task_cell(cells: dict[str, list[float]], errors: dict[str, float | None], column: str) -> str:
    values = cells.get(column)
    if not values:
        return _NONE
    if len(values) == 1 and errors[column] is not None:
        return f"{values[0]:.3f} ± {errors[column]:.3f}"
    return spread(values).text(3)


# ---- attention on the learned keys ----


def _attention(groups: list[Group], split: str, missing: list[str]) -> Section | None:
    charts: list[Part] = []
    for group in groups:
        found: dict[tuple[str, str], list[list[float]]] = {}
        for run in group.runs:
            for pair, layers in run.attention.items():
                if len(layers) != len(run.manifest.widths):
                    raise DamagedFolder(
                        f"the attention in {run.name} must be of {len(run.manifest.widths)} "
                        f"layers, got {len(layers)}"
                    )
                found.setdefault(pair, []).append(layers)
        series = [
            _banded(domain if domain == memory else f"{domain} with memory {memory}", values)
            for (domain, memory), values in found.items()
        ]
        if series:
            title = cut(f"Attention on learned keys: {group.label}")
            charts.append(Lines(title, "layer", "mass", series[:_MOST_SERIES], True))
    if not charts:
        missing.append(
            "Attention on learned keys: koff analyse DIR --domain NAME --json "
            "DIR/attention-NAME.json"
        )
        return None
    text = "The share of its attention that a domain's text gives to the learned keys of a memory."
    return Section("Attention on the memories", [Text(text), *charts])


# ---- how it was trained ----

_CURVES = (
    ("Loss", "loss", ("loss",), False),
    ("Sparsity", "of the MLP neurons", ("sparsity_mlp", "sparsity_target"), True),
    ("Undecided gates", "share", ("undecided",), True),
)


def _training(groups: list[Group], missing: list[str]) -> Section | None:
    runs = [(group.label, run) for group in groups for run in group.runs]
    charts: list[Part] = []
    for title, axis, names, percent in _CURVES:
        series = []
        for label, run in runs:
            for name in names:
                points = run.history.get(name)
                if points:
                    what = {"sparsity_target": ", target"}.get(name, "")
                    series.append(
                        Series(cut(_run_label(label, run, groups) + what), _thinned(points))
                    )
        if series:
            left = len(series) - _MOST_SERIES
            charts.append(Lines(title, "step", axis, series[:_MOST_SERIES], percent))
            if left > 0:
                charts.append(Text(f"Left out: {left} more lines."))
    if not charts:
        missing.append("Curves of the training: no train_log.json in these folders")
        return None
    return Section("Training", charts)


def _run_label(label: str, run: Finished, groups: list[Group]) -> str:
    several = any(len(group.runs) > 1 for group in groups)
    return f"{label}, seed {run.recipe.seed}" if several and run.recipe else label


def _sizes(groups: list[Group]) -> Section:
    lines = []
    for group in groups:
        run = group.first
        for part, (count, size) in run.sizes.items():
            named = part if part == "backbone" else f"memory {part}"
            lines.append([group.label, named, millions(count), f"{size / 1e6:.2f} MB"])
    text = "Parameters, and bytes on disk, of the first run of each kind."
    return Section("Sizes", [Text(text), table(["", "part", "parameters", "on disk"], lines)])


def _speed(groups: list[Group], missing: list[str]) -> Section | None:
    lines = []
    for group in groups:
        for run in group.runs:
            rate = dict(run.history.get("train_steps_per_second", []))
            if run.seconds is None:
                continue
            steps = f"{next(iter(rate.values())):.3g}" if rate else _NONE
            lines.append([group.label, run.name, f"{run.seconds:,.0f} s", steps])
    missing.append("Speed of the trained model: no file of a run tells it (python -m bench.serve)")
    if not lines:
        return None
    header = ["", "folder", "training took", "steps per second"]
    return Section("Speed", [table(header, lines, note="A resumed run: its last piece alone.")])


def _settings(groups: list[Group], missing: list[str]) -> Section | None:
    known = [group for group in groups if group.first.recipe]
    if not known:
        missing.append("Settings: no recipe.json in these folders")
        return None
    flat = [dict(_flat(_public(group.first.recipe))) for group in known]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    lines = []
    for key in keys:
        values = [values.get(key, _NONE) for values in flat]
        # One value where all have the same: what differs is what is looked for.
        lines.append(
            [key, *(values if len(set(values)) > 1 else [values[0], *[""] * (len(flat) - 1)])]
        )
    header = ["recipe", *(group.label for group in known)]
    return Section("Settings", [table(header, lines)], folded=True)


def _public(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's values with its model and data by their names."""
    values = recipe.to_dict() | {"data": recipe.data_names()}
    values["model"] = public_path(recipe.model)
    values["general"] = {
        name: {"train": source, "weight": recipe.general[name].weight}
        for name, source in recipe.data_names(general=True).items()
    }
    return values


def _flat(values: Any, path: str = "") -> Iterable[tuple[str, str]]:
    """Yield (key path, value) of nested mappings."""
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from _flat(value, f"{path}.{name}" if path else str(name))
    else:
        yield path, values if isinstance(values, str) else json.dumps(values, ensure_ascii=False)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
