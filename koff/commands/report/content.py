"""What a page consists of, whatever it is written as. Text is plain: who writes it escapes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        header: names of the columns.
        lines: cells, as many per line as there are columns.
        heat: for each cell 0 (plain) to 1 (marked strongly), or None for a plain table. A mark only
            repeats what the numbers say.
        note: what stands below it.
    """

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    heat: Sequence[Sequence[float]] | None = None
    note: str = ""


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Args:
        name: in the legend.
        points: (x, y), x rising.
        low, high: y of the band around it, one for each point; empty for none.
    """

    name: str
    points: Sequence[tuple[float, float]]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Lines:
    """A chart of lines.

    Args:
        title: what it shows; also the name of its picture's file.
        x, y: what stands at the axes.
        series: at least one, of at least one point.
        percent: y is a share.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    percent: bool = False


@dataclass(frozen=True)
class Interval:
    """A value and how sure it is: low and high equal it where that is not known."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Intervals:
    """A chart with a line of text, a dot and a bar around it for each value.

    Args:
        title: what it shows.
        x: what stands at the axis.
        rows: at least one.
        percent: values are shares.
        mark: where a vertical line stands: what a value is to be compared with.
    """

    title: str
    x: str
    rows: Sequence[Interval]
    percent: bool = False
    mark: float | None = None


Part = Text | Table | Lines | Intervals


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    title: str
    parts: Sequence[Part]
    folded: bool = False  # long, and not for everyone


@dataclass(frozen=True)
class Page:
    """A whole page.

    Args:
        title: of the page.
        sections: in order.
        missing: what the folders do not hold, each with how to get it.
    """

    title: str
    sections: Sequence[Section] = field(default_factory=list)
    missing: Sequence[str] = field(default_factory=list)
