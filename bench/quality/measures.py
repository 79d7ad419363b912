"""What the table says, as functions of perplexities alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from koff.errors import require

Cells = Mapping[tuple[str, str | None], float]


class Undefined(ValueError):
    """A measure that has no value here, and why."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of a value over seeds.

    Args:
        mean: of the values.
        sd: with n - 1 in the denominator; None of a single value.
        count: number of values.
    """

    mean: float
    sd: float | None
    count: int

    def text(self, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
        """ "31.12 ± 0.05", of a single value without the second part."""
        sd = "" if self.sd is None else f" ± {scale * self.sd:.{digits}f}"
        return f"{scale * self.mean:.{digits}f}{sd}{unit}"


def spread(values: Iterable[float]) -> Spread:
    """Mean and sample standard deviation.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    values = [finite(value, "a value over seeds") for value in values]
    require(bool(values), "spread", "values", "not be empty", "none", "run a seed")
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), sd, len(values))


def finite(value: float | None, what: str) -> float:
    """The value, if it is a finite number.

    Raises:
        ValueError: NaN, infinity or nothing; the message says of what.
    """
    good = isinstance(value, (int, float)) and math.isfinite(value)
    require(good, "bench.quality", what, "be a finite number", value, "look at that run's log")
    return float(value)


def cells(rows: Iterable[Mapping], variant: str) -> Cells:
    """{(domain, memory or None): perplexity} of one evaluation.

    Args:
        rows: as `koff eval --json` writes them.
        variant: "koff", or "base" for the dense model.
    """
    return {
        (row["domain"], row["memory"]): row["perplexity"]
        for row in rows
        if row["variant"] == variant
    }


def perplexity(found: Cells, domain: str, memory: str | None, run: str) -> float:
    """One cell.

    Args:
        found: of one run.
        domain: whose text.
        memory: active memory, or None.
        run: name of the run, for errors.

    Raises:
        ValueError: a cell that is missing, not finite or below 1; the message names it.
    """
    what = f"{run}: the perplexity of {domain} with {f'memory {memory}' if memory else 'no memory'}"
    there, step = (domain, memory) in found, "measure it again: remove the run's eval file"
    require(there, "bench.quality", what, "have been measured", "no such row", step)
    value = finite(found[domain, memory], what)
    require(value >= 1, "bench.quality", what, "be at least 1", value, step)
    return value


def share_won_back(dense: float, gates: float, own: float) -> float:
    """(gates - own) / (gates - dense): of what gates alone lose, the share that the memory wins
    back; 1 is the dense model, 0 no gain, below 0 a loss.

    Args:
        dense: perplexity or its logarithm of the dense model.
        gates: of the model pruned with gates alone.
        own: of the model pruned with memories, with its own memory.

    Raises:
        Undefined: gates alone lost nothing, so there are no shares of it.
    """
    for name, value in (("dense", dense), ("gates only", gates), ("own memory", own)):
        finite(value, name)
    rule, step = f"be above the dense {dense:.6g}", "prune more"
    good = gates > dense
    require(good, "share won back", "gates only", rule, f"{gates:.6g}", step, Undefined)
    return (gates - own) / (gates - dense)


def offloading_gain(dense: float, dense_own: float, gates: float, own: float) -> float:
    """(ln gates - ln own) - (ln dense - ln dense_own), in nats: what a memory gains on the pruned
    model beyond what the same training gains on the dense one.

    Args:
        dense, dense_own: perplexity of the dense model, without and with its own memory.
        gates, own: of the model pruned with gates alone, and of that pruned with memories, with its
            own memory.
    """
    return (math.log(gates) - math.log(own)) - (math.log(dense) - math.log(dense_own))
