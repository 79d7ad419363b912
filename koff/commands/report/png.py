"""Charts as PNG files, by matplotlib."""

from __future__ import annotations

import textwrap
from pathlib import Path

from ...errors import asker
from .content import Intervals, Lines
from .html import LIGHT

_COLOURS = [LIGHT[f"s{i}"] for i in range(6)]
_DASHES = ("-", "--", ":", "-.", (0, (1, 4)), (0, (8, 3)))


def check_matplotlib() -> None:
    """Refuse to go on without matplotlib.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(
            f"{asker()}: the pictures of a Markdown page must be drawn by matplotlib, got none "
            "installed; pip install 'koff[report]' (koff report writes HTML without it)"
        ) from None


def draw(chart: Lines | Intervals, path: Path) -> None:
    """Draw a chart to a file.

    Args:
        chart: what to draw.
        path: of the file, ending in .png.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    # Long names in several lines: beside one line there would be no room for the chart.
    rows = chart.rows if isinstance(chart, Intervals) else []
    names = [textwrap.fill(_text(row.name), 40) for row in rows]
    lines = sum(name.count("\n") + 1 for name in names)
    height = 0.6 + 0.2 * len(names) + 0.15 * lines if names else 3.2
    figure = Figure(figsize=(5.5, height), layout="constrained")
    axes = figure.subplots()
    if isinstance(chart, Lines):
        for index, series in enumerate(chart.series):
            colour = _COLOURS[index % len(_COLOURS)]
            xs, ys = zip(*series.points, strict=True)
            marker = "o" if len(xs) == 1 else None
            dashes = _DASHES[index % len(_DASHES)]
            axes.plot(
                xs, ys, color=colour, linestyle=dashes, marker=marker, label=_text(series.name)
            )
            if series.low:
                axes.fill_between(
                    xs, series.low, series.high, color=colour, alpha=0.18, linewidth=0
                )
        axes.set_ylabel(_text(chart.y))
        axes.legend(fontsize="x-small")
    else:
        for index, row in enumerate(chart.rows):
            axes.plot([row.low, row.high], [-index, -index], color=_COLOURS[0])
            axes.plot([row.value], [-index], color=_COLOURS[0], marker="o")
        axes.set_yticks(range(0, -len(names), -1), names)
        axes.tick_params(axis="y", labelsize="x-small")
        if chart.mark is not None:
            axes.axvline(chart.mark, color=LIGHT["dim"], linestyle=":")
    axes.set_xlabel(textwrap.fill(_text(chart.x), 50), fontsize="small")
    if chart.percent:
        axis = axes.yaxis if isinstance(chart, Lines) else axes.xaxis
        axis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(color=LIGHT["rule"], linewidth=0.6)
    # Without the version that matplotlib would write, the same data give the same file.
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _text(text: str) -> str:
    r"""Return text that matplotlib shows as it is: between two $ it would read formulas. A name
    that begins with _ it would leave out of the legend."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text
