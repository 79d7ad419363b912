"""What perplexities say together: shares won back, the gain of offloading, spreads over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import asker

Cells = Mapping[tuple[str, str | None], float]


# What a share won back above 1 means; its text beside the number.
BETTER_THAN_DENSE = (
    "above 100 %: with its own memory the pruned model is better than the dense one, so memories "
    "also adapt to the text; what is more than that, the gain of offloading says"
)


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
    if not values:
        raise ValueError("spread: values must not be empty, got none; run a seed")
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), sd, len(values))


# Student's t at 97.5 %, by degrees of freedom; for more than the last it is a little too wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def confidence(found: Spread) -> tuple[float, float]:
    """Return the 95 % confidence interval of a mean, by Student's t.

    Args:
        found: of at least two values.

    Raises:
        ValueError: of a single one, which tells nothing of its spread.
    """
    if found.sd is None:
        raise ValueError("confidence: there must be at least two values, got one; run more seeds")
    half = _T[min(found.count - 1, len(_T)) - 1] * found.sd / math.sqrt(found.count)
    return found.mean - half, found.mean + half


def finite(value: float | None, what: str) -> float:
    """The value, if it is a finite number.

    Raises:
        ValueError: NaN, infinity or nothing; the message says of what.
    """
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(
            f"{asker()}: {what} must be a finite number, got {value}; look at that run's log"
        )
    return float(value)


def cells(rows: Iterable[Mapping], variant: str) -> Cells:
    """{(domain, memory or None): perplexity} of one evaluation.

    Args:
        rows: as ``koff eval --json`` writes them.
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
    if (domain, memory) not in found:
        raise ValueError(
            f"{asker()}: {what} must have been measured, got no such row; measure it again: "
            "remove the run's eval file"
        )
    value = finite(found[domain, memory], what)
    if not value >= 1:  # exp of a mean negative log-likelihood, which is never negative
        raise ValueError(
            f"{asker()}: {what} must be at least 1, got {value}; measure it again: remove the "
            "run's eval file"
        )
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
    if not gates > dense:
        raise Undefined(
            f"share won back: gates only must be above the dense {dense:.6g}, got {gates:.6g}; "
            "prune more"
        )
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
