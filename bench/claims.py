"""The plots of docs/reproduction.md, from the answers in bench/results.

python -m bench.claims          # the FILES there; writes docs/reproduction-*.png
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

from koff.commands.report.content import Interval, Intervals
from koff.commands.report.png import check_matplotlib, draw
from koff.commands.reproduce.page import interval

ROOT = Path(__file__).parents[1]
# quality-NAME-test.json. Not smollm2-more, whose main runs are seed 0 of smollm2 once more.
FILES = ("docs-llama", "docs-llama-40", "smollm2", "smollm2-40")
Seed = dict[tuple[str, float, str, str | None], float]  # (kind, sparsity, domain, memory)


class Answers:
    """One file of answers, as `koff reproduce` writes them.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        record = json.loads(path.read_text("utf-8"))
        self.name = path.stem.removeprefix("quality-").removesuffix(f"-{record['split']}")
        self.languages = list(record["recipe"]["data"])
        self.sparsities = [part["target_sparsity"] for part in record["sparsities"]]
        self.seeds: dict[int, Seed] = {}
        self.base: dict[str, float] = {}
        for run in record["runs"]:
            cells = self.seeds.setdefault(run["seed"], {})
            for row in run["rows"]:
                if row["variant"] == "base":
                    self.base[row["domain"]] = row["perplexity"]
                elif run.get("added") is None:  # the oldest have no such key
                    key = run["kind"], run["target_sparsity"], row["domain"], row["memory"]
                    cells[key] = row["perplexity"]

    def per_seed(self, measure: Callable[[Seed, str], float]) -> list[float]:
        """The mean over languages of a measure, seed by seed."""
        return [
            fmean(measure(cells, name) for name in self.languages) for cells in self.seeds.values()
        ]

    def above(self, kind: str, at: float, *, own: bool) -> list[float]:
        """How far a kind of run is above the dense base, in nats per token, seed by seed.

        Args:
            kind: "gates", "koff" or "dense".
            at: sparsity of the runs.
            own: with each language's own memory; otherwise without any.
        """
        return self.per_seed(
            lambda cells, name: math.log(
                cells[kind, at, name, name if own else None] / self.base[name]
            )
        )


def won_back(found: Answers) -> Iterator[Interval]:
    """The share of the gates' loss that each language's own memory wins back."""
    for at in found.sparsities:
        # Memories that gain more on the dense model than the gates lose: such a share, of 200 to
        # 900 %, would be adaptation to the text.
        if -fmean(found.above("dense", 0.0, own=True)) > fmean(found.above("gates", at, own=False)):
            continue
        for name in found.languages:
            dense, values = found.base[name], []
            for cells in found.seeds.values():
                gates, own = cells["gates", at, name, None], cells["koff", at, name, name]
                values.append((gates - own) / (gates - dense))
            yield interval(f"{found.name}, {at:g}: {name}", values)


def costs(found: Answers) -> Iterator[Interval]:
    """What pruning costs with and without memories, and how much of the difference is offloading,
    in nats per token."""
    for at in found.sparsities:
        gates, own = found.above("gates", at, own=False), found.above("koff", at, own=True)
        dense = found.above("dense", 0.0, own=True)
        gain = [g - o + d for g, o, d in zip(gates, own, dense, strict=True)]
        yield interval(f"{found.name}, {at:g}: gates only above dense", gates)
        yield interval(f"{found.name}, {at:g}: own memory above dense", own)
        yield interval(f"{found.name}, {at:g}: gain of offloading", gain)


def swaps(found: Answers) -> Iterator[Interval]:
    """What another memory costs on a domain, above its own, in nats per token."""
    for at in found.sparsities:
        for name in found.languages:
            for other in found.languages:
                if other != name:
                    values = [
                        math.log(cells["koff", at, name, other] / cells["koff", at, name, name])
                        for cells in found.seeds.values()
                    ]
                    yield interval(f"{found.name}, {at:g}: {name} with {other}", values)


def charts(found: list[Answers]) -> dict[str, Intervals]:
    """{file name: chart}.

    Args:
        found: all answers.
    """
    nats = "nats per token, with 95 % interval over seeds"
    share = "of what gates alone lose; dotted: the dense model"
    return {
        "reproduction-won-back.png": Intervals(
            "Won back", share, [r for f in found for r in won_back(f)], percent=True, mark=1.0
        ),
        "reproduction-costs.png": Intervals(
            "Costs", nats, [r for f in found for r in costs(f)], mark=0.0
        ),
        "reproduction-swaps.png": Intervals(
            "A wrong memory", f"above the own memory, {nats}",
            [r for f in found for r in swaps(f)], mark=0.0,
        ),
    }  # fmt: skip


def main() -> None:
    """Draw them."""
    check_matplotlib()
    files = [ROOT / "bench" / "results" / f"quality-{name}-test.json" for name in FILES]
    for name, chart in charts([Answers(path) for path in files]).items():
        draw(chart, ROOT / "docs" / name)
        print(f"written: docs/{name}")


if __name__ == "__main__":
    main()
