"""``docs/bench.md``, its figures, its CSV and README's table, from the files in ``bench/results``.

Text is a function of those files alone, so that a test can hold what is committed against them.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

Row = dict
FIRST, LAST = "<!-- written by python -m bench report -->", "<!-- end of what it wrote -->"
PHASES = {"prefill": "prefill", "decode": "decode", "train": "training step"}
BACKBONES = ("dense", "12-equal", "12-different", "25-equal", "25-different")
WAYS = {
    "transformers": "transformers",
    "compiled": "transformers, compiled",
    "peft": "PEFT",
    "koff": "koff",
    "koff-dynamic": "koff, launched one by one",
}
# As Liger-Kernel's benchmarks write them, so that its scripts draw these too.
COLUMNS = (
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "x_name",
    "x_label",
    "x_value",
    "y_value_50",
    "y_value_20",
    "y_value_80",
    "extra_benchmark_config_str",
    "gpu_name",
    "timestamp",
    "liger_version",
)


INTRODUCTION = """# Benchmarks

Written by `python -m bench report` from the files in `bench/results`; `docs/bench.csv` has every
time, with Liger-Kernel's columns.

    make bench                              # two cores, 5 minutes: all here that needs no GPU
    python -m bench e2e                     # whole models; --model FOLDER, --device cuda
    make gpu PART=e2e                       # the same cases on a GPU, most telling first, 110 s
    pytest bench/micro --benchmark-only     # every public operation against its peers

A backbone has lost 12 or 25 % of **all** weights, with equal widths or with different ones. Which
neurons is random: the time does not depend on it. A memory is LoRA of rank 16 on all linear
layers, the same numbers for PEFT and koff; "with keys": learned keys too. In PEFT's favour its
adapters are in the base's dtype, and its head takes the last tokens of several prompts as one
product. Before a case is timed its logits, or the gradients of its LoRA, are compared with those
of transformers or PEFT: what is wrong has no time. On a processor the cases of one phase and batch
are read in turns, and compared reading by reading. The ideal is the longer of moving the bytes and
doing the operations, at the rates of a copy and of a large product that were measured in the same
run. A training step here is forward, backward and AdamW. transformers' compiled `generate` takes
half a minute per model and batch before its first token, and was measured where a row says so."""


WHY = """Both cores were free for these runs; the H100's are of an earlier version.

**Compacted forward in bf16, equal widths: under 0.95.** A profile of both forwards (two threads)
says why. The products themselves become 1.22 times as fast, and 1.21 is possible; the activation
1.5 times. But with AMX products are only half of a dense forward's time. Attention (11 %), RoPE,
norms, residuals and casts (a quarter) do not get narrower, and the bound counts products alone.

**Eight memories at the 3B shape: under twice PEFT's speed.** A forward without any memory is 1.7
times as fast as PEFT with eight at 8 rows, and 1.5 times at 64: reading the base's weights sets
that limit, and koff with eight memories reaches 1.3 of it. On SmolLM2-135M, whose base is smaller
beside its memories, it is twice as fast at 8 rows and 1.7 times at 64, which was not profiled."""


def load(folder: Path, pattern: str) -> dict[str, dict]:
    """The result files of one kind, by name."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob(pattern))}
    return {name: record for name, record in found.items() if not record.get("dry")}


def end_to_end(folder: Path) -> dict[str, dict]:
    """The result files of ``bench.e2e``; an earlier one of another kind is left out."""
    found = load(folder, "*-e2e*.json")
    return {name: record for name, record in found.items() if _timed(record["rows"])}


def _timed(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "readings" in row]


def _is_drawn(record: dict) -> bool:
    """Whether there are pruned backbones to draw."""
    return len({row["backbone"] for row in _timed(record["rows"])}) > 1


def ratios(over: Row, under: Row) -> list[float]:
    """How many times as long ``over`` takes: pair by pair where both were read in turns."""
    a, b = over["readings"], under["readings"]
    if len(a) == len(b) > 1:
        return [x / y for x, y in zip(a, b, strict=True)]
    return [statistics.median(a) / statistics.median(b)]


def ratio(over: Row, under: Row) -> float:
    """The median of ``ratios``."""
    return statistics.median(ratios(over, under))


def _verdict(found: list[float]) -> str:
    """Faster or slower only where every pair says so, and by more than two percent."""
    if max(found) < 0.98:
        return "koff is **slower**"
    return "koff is faster" if min(found) > 1.02 else "no difference that is sure"


def _same(row: Row) -> tuple:
    """What two ways must agree in to be compared."""
    return row["phase"], row["rows"], row["backbone"], row["memories"], row["keys"]


def _backbone(name: str) -> str:
    if name in ("dense", "gated"):
        return {"dense": "dense", "gated": "dense, gates learn"}[name]
    removed, widths = name.split("-")
    return f"{removed} % removed, {widths} widths"


def _memories(row: Row) -> str:
    words = {0: "none", 1: "one", 8: "eight mixed"}[row["memories"]]
    return words + " with keys" * row["keys"]


def _what(row: Row) -> str:
    return f"{PHASES[row['phase']]}, {row['rows']} row{'s' * (row['rows'] > 1)}"


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def verdicts(rows: list[Row]) -> str:
    """koff against the fastest peer that computes the same, and who wins: a table."""
    timed, lines = _timed(rows), []
    for ours in timed:
        if ours["way"] != "koff":
            continue
        peers = [r for r in timed if _same(r) == _same(ours) and not r["way"].startswith("koff")]
        if not peers:
            continue
        peer = min(peers, key=lambda r: r["us"])
        gain = ratio(peer, ours)
        lines.append(
            (
                _what(ours),
                _backbone(ours["backbone"]),
                _memories(ours),
                f"{ours['tokens_per_second']:.0f}",
                f"{peer['tokens_per_second']:.0f} ({WAYS[peer['way']]})",
                f"{gain:.2f}",
                _verdict(ratios(peer, ours)),
                f"{ours['share_of_ideal']:.2f}",
            )
        )
    head = (
        "what",
        "backbone",
        "memories",
        "koff, tokens/s",
        "fastest peer, tokens/s",
        "times as fast",
        "",
        "share of the ideal",
    )
    return _table(head, lines)


def pruning(rows: list[Row]) -> str:
    """What a backbone of fewer neurons gains, and what bytes and operations would allow."""
    timed, lines = _timed(rows), []
    for row in timed:
        if row["backbone"] not in BACKBONES[1:] or row["way"] == "koff-dynamic":
            continue
        dense = [r for r in timed if _same(r) == _same(row | {"backbone": "dense"})]
        dense = [r for r in dense if r["way"] == row["way"]]
        if dense:
            gain, possible = ratio(dense[0], row), dense[0]["least_seconds"] / row["least_seconds"]
            lines.append(
                (
                    _what(row),
                    WAYS[row["way"]],
                    _memories(row),
                    _backbone(row["backbone"]),
                    f"{gain:.2f}",
                    f"{possible:.2f}",
                    f"{gain / possible:.2f}",
                )
            )
    lines.sort(key=lambda line: line[:3])
    head = ("what", "by", "memories", "backbone", "times as fast as dense", "possible", "share")
    return _table(head, lines)


def memory(rows: list[Row]) -> str:
    """Bytes of weights, of the memories that a batch uses, and of its cache."""
    lines, seen = [], set()
    for row in _timed(rows):
        key = (row["rows"], row["backbone"], row["memories"], row["keys"])
        if row["phase"] == "decode" and row["way"].startswith("koff") and key not in seen:
            seen.add(key)
            mib = [row[name] / 2**20 for name in ("weight_bytes", "memory_bytes", "kv_bytes")]
            lines.append(
                (
                    _backbone(row["backbone"]),
                    _memories(row),
                    row["rows"],
                    *(f"{m:.0f}" for m in mib),
                )
            )
    lines.sort(key=lambda line: (line[0] != "dense", line[0], line[2], line[1]))
    return _table(("backbone", "memories", "rows", "weights, MiB", "memories", "own cache"), lines)


def _machine(record: dict) -> str:
    facts = record["environment"]
    gpu = facts.get("gpu")
    name = (gpu or {}).get("name") if isinstance(gpu, dict) else gpu
    place = name or f"{facts['processor']}, {_threads(record)}"
    return f"{place}; torch {facts['torch']}, transformers {facts['transformers']}"


def _threads(record: dict) -> str:
    threads = record["environment"]["threads"]
    return f"{threads} thread{'s' * (threads > 1)}"


def _model(record: dict) -> str:
    model = record["model"]
    name = model.get("name", "Llama-3.2-3B's shape, random weights")
    sizes = f"hidden {model['hidden']}, {model['intermediate']} neurons"
    return f"{name}: {model['layers']} layers, {sizes}"


def _steps(folder: Path) -> list[tuple]:
    """Training steps of ``bench.train_step``: (what, ours, peer, ratio, command)."""
    lines = []
    peers = {
        "cpu-train-step": ("three memories mixed and gates", "PEFT LoRA, hooks and a joined cache"),
        "cpu-train-step-peft": ("PEFT LoRA under koff.apply_kernels", "the same without"),
    }
    for name, record in load(folder, "cpu-train-step*.json").items():
        what, peer = peers[name]
        ratios, runs = record["ratios"], record["runs"]
        seconds = [ratios["seconds"][side]["median"] for side in ("koff", "peer")]
        lines.append(
            (
                f"training step, fp32, {_threads(record)}: {what}, against {peer}",
                *(f"{s:.1f} s" for s in seconds),
                f"{ratios['time']['median']:.2f}",
                record["command"],
            )
        )
        for key, words in (
            ("peak_rss", "its peak of memory"),
            ("saved_bytes", "its bytes saved for backward"),
        ):
            mib = [statistics.median(r[s][key] for r in runs) / 2**20 for s in ("koff", "peer")]
            lines.append(
                (words, *(f"{m:.0f} MiB" for m in mib), f"{ratios[key]['median']:.2f}", "")
            )
    return lines


def _forwards(folder: Path) -> list[tuple]:
    """Compacted forwards of ``bench.compact_forward``."""
    lines = []
    for record in load(folder, "cpu-compact-forward*.json").values():
        for name, result in record["results"].items():
            dtype, _, widths = name.partition("-")
            seconds = [result["seconds"][s]["median"] for s in ("compacted", "dense")]
            possible = f"{result['speedup']['median']:.2f} of {result['flop_ratio']:.2f} possible"
            lines.append(
                (
                    f"forward without a quarter of the neurons, {widths or 'different'} widths, "
                    f"{dtype}, {_threads(record)}, against dense",
                    *(f"{s:.2f} s" for s in seconds),
                    f"{possible}, {result['share_of_ideal']:.2f}",
                    record["command"],
                )
            )
    return lines


def operations(folder: Path) -> str:
    """koff's operations against each peer: times as fast, the median over the models."""
    times: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for record in load(folder, "*-micro.json").values():
        groups: dict[str, dict[str, float]] = {}
        for found in record["benchmarks"]:
            peer = found["params"]["peer"]
            groups.setdefault(found["group"], {})[peer] = found["stats"]["median"]
            if peer == "koff":
                share = found["extra_info"].get("share_of_limit", 0.0)
                key = tuple(found["group"].split()[:3])
                times.setdefault(key, {}).setdefault("share", []).append(share)
        for group, peers in groups.items():
            key = tuple(group.split()[:3])
            for peer, seconds in peers.items():
                if peer != "koff" and "koff" in peers:
                    times.setdefault(key, {}).setdefault(peer, []).append(seconds / peers["koff"])
    peers = ("eager", "compiled", "peft", "hand-written", "concatenated", "flex")
    lines = [
        (
            " ".join(key),
            *(
                f"{statistics.median(found[p]):.2f}" if p in found else ""
                for p in (*peers, "share")
            ),
        )
        for key, found in times.items()
    ]
    head = ("operation", "eager torch", "torch.compile", "PEFT", "written by hand")
    return _table((*head, "joined + SDPA", "FlexAttention", "share of the limit"), lines)


def targets(folder: Path) -> str:
    """What koff is to reach, and what it reached."""
    lines = []

    def add(what: str, value: float, bound: float, at_most: bool) -> None:
        reached = value <= bound if at_most else value >= bound
        sign = "<=" if at_most else ">="
        verdict = "reached" if reached else "**missed**"
        lines.append((what, f"{sign} {bound:g}", f"{value:.2f}", verdict))

    for record in load(folder, "cpu-compact-forward*.json").values():
        for name, result in record["results"].items():
            kind, _, widths = name.partition("-")
            rounds = result["speedup"]["count"]
            what = f"forward of a compacted model, {kind}, {widths or 'different'} widths, "
            what += f"{rounds} rounds, {_threads(record)}: share"
            add(what, result["share_of_ideal"], 0.95, False)
    steps = {
        "cpu-train-step": ("training step over PEFT with hooks", 0.85, 0.65),
        "cpu-train-step-peft": (
            "PEFT's LoRA step under koff.apply_kernels over without",
            1.0,
            0.75,
        ),
    }
    for name, record in load(folder, "cpu-train-step*.json").items():
        what, time, peak = steps[name]
        add(f"{what}: time", record["ratios"]["time"]["median"], time, True)
        add(f"{what}: peak of memory", record["ratios"]["peak_rss"]["median"], peak, True)
    for name, record in end_to_end(folder).items():
        timed = _timed(record["rows"])
        for ours in timed:
            what = f"{_what(ours)}, {name}"
            dense = ours["way"] == "koff" and ours["backbone"] == "dense" and not ours["keys"]
            peers = [r for r in timed if _same(r) == _same(ours) and r["way"] != "koff"]
            peers = [r for r in peers if r["way"] in ("transformers", "peft")]
            if not (dense and peers):
                continue
            if ours["memories"] == 0:
                add(f"memory=None over transformers: {what}", ratio(ours, peers[0]), 1.02, True)
            if ours["memories"] == 8 and ours["phase"] == "decode":
                add(
                    f"eight memories, times as fast as PEFT: {what}",
                    ratio(peers[0], ours),
                    2,
                    False,
                )
    return _table(("what", "bound", "measured", ""), lines)


def readme_table(folder: Path) -> str:
    """README's table."""
    head = ("", "koff", "against", "ratio", "command")
    lines = [
        (*line[:4], f"`{line[4]}`" if line[4] else "")
        for line in (*_steps(folder), *_forwards(folder))
    ]
    return f"{FIRST}\n{_table(head, lines)}\n{LAST}"


def with_table(readme: str, folder: Path) -> str:
    """README's text with its table as the result files say."""
    before, _, rest = readme.partition(FIRST)
    _, found, after = rest.partition(LAST)
    if not found:
        raise ValueError(f"README must have a line {FIRST} and a line {LAST}, got none; add them")
    return before + readme_table(folder) + after


def document(folder: Path) -> str:
    """The text of docs/bench.md."""
    parts = [INTRODUCTION]
    for name, record in end_to_end(folder).items():
        rows = record["rows"]
        errors = [row for row in rows if "error" in row]
        missing = [row["name"] for row in record.get("not_run", ())]
        parts += [
            f"## Whole models: {name}",
            f"{_model(record)}. {record.get('dtype', 'bf16')}. {_machine(record)}. "
            f"`{record['command']}`",
            "### Where koff wins and where it does not",
            verdicts(rows),
        ]
        if not _is_drawn(record):
            continue
        parts += [
            f"![Latency against batch](bench-{name}-latency.png)",
            "### What pruning gains",
            pruning(rows),
            f"![Speed-up against what is possible](bench-{name}-speedup.png)",
            "### Bytes",
            memory(rows),
            f"![Memory](bench-{name}-memory.png)",
        ]
        parts += [f"Not timed: {row['name']}: {row['error'][:200]}" for row in errors]
        if missing:
            reason = "Not timed, or not side by side with what it is compared with"
            parts.append(f"{reason}: {', '.join(missing)}.")
    lines = [(*line[:4], f"`{line[4]}`" if line[4] else "") for line in _steps(folder)]
    lines += [(*line[:4], f"`{line[4]}`") for line in _forwards(folder)]
    parts += [
        "## Targets",
        targets(folder),
        WHY,
        "## Training steps and forwards",
        _table(("", "koff", "against", "ratio", "command"), lines),
    ]
    if load(folder, "*-micro.json"):
        parts += [
            "## Operations",
            "Times as fast as each peer (under 1: koff is slower), the median over the shapes of\n"
            "Llama-3.2-3B, Llama-3.1-8B and Qwen2.5-7B, scaled to the machine.",
            operations(folder),
        ]
    return "\n\n".join(parts) + "\n"


def _quantile(values: list[float], share: float) -> float:
    """By linear interpolation, as torch.quantile."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _csv_rows(folder: Path) -> Iterator[tuple]:
    for record in end_to_end(folder).values():
        facts = record["environment"]
        place, when = _machine(record).partition(";")[0], record.get("timestamp", "")
        for row in _timed(record["rows"]):
            extra = {k: row[k] for k in ("backbone", "memories", "keys", "widths", "removed")}
            mode = "full" if row["phase"] == "train" else "forward"
            head = (f"e2e_{row['phase']}", row["way"], mode)
            tail = (json.dumps(extra), place, when, facts.get("liger-kernel") or "")
            ms = [1e3 * _quantile(row["readings"], share) for share in (0.5, 0.2, 0.8)]
            yield *head, "speed", "B", "batch size", row["rows"], *ms, *tail
            size = sum(row[n] for n in ("weight_bytes", "memory_bytes", "kv_bytes")) / 2**20
            yield *head, "memory", "B", "batch size", row["rows"], size, size, size, *tail
    for record in load(folder, "*-micro.json").values():
        facts = record["machine_info"]["koff"]
        for found in record["benchmarks"]:
            operation, phase, memories, model = found["group"].split()
            extra = json.dumps({"memories": memories} | found["extra_info"])
            head = (operation, found["params"]["peer"], phase)
            stats, info = found["stats"], found["extra_info"]
            ms = [1e3 * s for s in (stats["median"], info["seconds_20"], info["seconds_80"])]
            tail = (extra, facts["gpu"] or facts["processor"], record["datetime"], "")
            yield *head, "speed", "model", "model", model, *ms, *tail
            peak = [info["peak_bytes"] / 2**20] * 3
            yield *head, "memory", "model", "model", model, *peak, *tail


def table_of_times(folder: Path) -> str:
    """All times with Liger-Kernel's columns: milliseconds, and MiB."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in _csv_rows(folder):
        writer.writerow([f"{v:.5g}" if isinstance(v, float) else v for v in row])
    return text.getvalue()


def draw(record: dict, name: str, docs: Path) -> None:
    """The three figures of one result file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = _timed(record["rows"])

    def save(figure, kind: str) -> None:
        figure.tight_layout()
        # Without the version and date that matplotlib would write into the file.
        figure.savefig(docs / f"bench-{name}-{kind}.png", dpi=110, metadata={"Software": None})
        pyplot.close(figure)

    settings = sorted({(r["phase"], r["rows"]) for r in rows})
    figure, axes = pyplot.subplots(1, len(settings), figsize=(3 * len(settings), 3.2), sharey=True)
    for (phase, batch), ax in zip(settings, [axes] if len(settings) == 1 else axes, strict=True):
        memories = 1 if phase == "train" else 0
        mine = [
            r for r in rows if (r["phase"], r["rows"], r["memories"]) == (phase, batch, memories)
        ]
        for way, mark in (("koff", "o"), ("transformers", "x"), ("peft", "+")):
            of = {r["backbone"]: r for r in mine if r["way"] == way and not r["keys"]}
            for widths, line in (("equal", "-"), ("different", ":")):
                names = [b for b in ("dense", f"12-{widths}", f"25-{widths}") if b in of]
                if len(names) > 1 and "dense" in of:
                    x = [100 * of[b]["removed"] for b in names]
                    y = [ratio(of["dense"], of[b]) for b in names]
                    ax.plot(x, y, mark + line, label=f"{WAYS[way]}, {widths}")
                    if way == "koff" and widths == "equal":
                        best = [
                            of["dense"]["least_seconds"] / of[b]["least_seconds"] for b in names
                        ]
                        ax.plot(x, best, "k--", label="possible")
        ax.set(title=_what({"phase": phase, "rows": batch}), xlabel="weights removed, %")
    (axes if len(settings) == 1 else axes[0]).set(ylabel="times as fast as dense")
    (axes if len(settings) == 1 else axes[-1]).legend(fontsize=6)
    save(figure, "speedup")

    figure, ax = pyplot.subplots(figsize=(7, 3.4))
    lines: dict[str, dict[int, float]] = {}
    for r in rows:
        if r["phase"] == "decode" and r["backbone"] in ("dense", "25-equal") and not r["keys"]:
            label = f"{WAYS[r['way']]}, {r['backbone']}, {_memories(r)}"
            lines.setdefault(label, {})[r["rows"]] = r["us"] / 1e3
    for label, points in lines.items():
        ax.plot(list(sorted(points)), [points[b] for b in sorted(points)], "o-", label=label)
    ax.set(xscale="log", yscale="log", xlabel="batch", ylabel="ms a token")
    ax.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, "latency")

    figure, ax = pyplot.subplots(figsize=(5, 3.4))
    chosen = {}
    for r in rows:
        if r["phase"] == "decode" and r["way"] == "koff" and r["rows"] == 64:
            chosen.setdefault(f"{r['backbone']}, {_memories(r)}", r)
    bottom = [0.0] * len(chosen)
    for part in ("weight_bytes", "memory_bytes", "kv_bytes"):
        height = [r[part] / 2**20 for r in chosen.values()]
        ax.barh(list(chosen), height, left=bottom, label=part.replace("_bytes", ""))
        bottom = [a + b for a, b in zip(bottom, height, strict=True)]
    ax.set(xlabel="MiB, 64 rows")
    ax.tick_params(axis="y", labelsize=7)
    ax.invert_yaxis()
    ax.legend(fontsize=6)
    save(figure, "memory")


def write(results: Path, docs: Path, readme: Path | None) -> None:
    """Write everything."""
    docs.mkdir(parents=True, exist_ok=True)
    for name, record in end_to_end(results).items():
        if _is_drawn(record):
            draw(record, name, docs)
    (docs / "bench.csv").write_text(table_of_times(results))
    (docs / "bench.md").write_text(document(results))
    if readme is not None:
        readme.write_text(with_table(readme.read_text(), results))
