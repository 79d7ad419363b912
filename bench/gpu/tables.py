"""Route tables: every route and configuration of an operation at every shape, and the winners.

``koffkernels.tune`` measures, here for all users of a GPU: every time goes to
bench/results/<gpu>-tables.json, and the fastest route of each shape to
``koffkernels.routes.table_path``, a file to commit if one of them is not the usual route.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from koffkernels import routes, tune
from koffkernels.tune import Key

from .. import timing
from .context import Bench
from .results import Case, Deadline, Results


def keys(bench: Bench) -> list[Key]:
    """All shapes, in order of value."""
    if bench.dry:
        found = (("gated_mlp", "forward"), ("lora_linear", "backward"))
        return [Key(op, direction, 4, 64, 128, bench.rank) for op, direction in found]
    return tune.keys_of(tune.MODELS, bench.rank)


def run(
    bench: Bench, results: Results, deadline: Deadline, only: tuple[str, ...], folders: set[Path]
) -> None:
    """Measure every shape, and rewrite the table in every folder after each."""
    gpu = results.record["environment"]["gpu"]["name"]
    name = routes.table_path(gpu).name
    machine = tune.Machine(bench.device, bench.dtype, bench.clock, bench.l2)

    def case(key: Key) -> list[dict]:
        rows = tune.measure_key(machine, key)
        for folder in folders:
            tune.write(folder / name, gpu, tune.winners(results.record["rows"] + rows))
        return [
            row | {"times": timing.spread(row["times"])} if "us" in row else row for row in rows
        ]

    asked = [key for key in keys(bench) if not only or any(text in key.name for text in only)]
    if bench.device.type == "cuda" and not bench.warm:
        todo = [key for key in asked if not results.done(key.name)]
        # Less than a case may take, or this would count as hanging. A shape takes about a second
        # once it is compiled.
        seconds = min(25.0, 0.4 * deadline.left())
        tune.compile_ahead(todo[: int(deadline.left())], bench.dtype_name, seconds)
    cases: Iterator[Case] = ((key.name, lambda k=key: case(k)) for key in asked)
    results.brief = tune.said
    results.note(margin=tune.MARGIN, weight_sets_bytes=4 * bench.l2)
    results.run(cases, deadline, only)
