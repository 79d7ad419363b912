"""Charts as SVG inside a page: its colours are the page's, so they follow light and dark.

Sizes are those of a phone, 360 wide: there a unit is a pixel, and text is as large as the page's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .content import Intervals, Lines, Series

WIDTH, _HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 8, 34
_ROW = 34  # of a value with its name above it
# Lines differ in their dashes too, for those who see no colours.
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 5", "10 4")


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers from low to high, at most so many.

    Args:
        low, high: ends of the axis, low < high.
        most: at least 2.
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def span(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis that holds all values, with some room."""
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def number(value: float, percent: bool) -> str:
    """Return a value as it stands at an axis."""
    return f"{100 * value:.3g} %" if percent else f"{value:.4g}"


def lines(chart: Lines) -> str:
    """Draw a chart of lines, with its legend below."""
    xs = [x for series in chart.series for x, _ in series.points]
    ys = [y for s in chart.series for y in (*(y for _, y in s.points), *s.low, *s.high)]
    left, right = (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 1, max(xs) + 1)
    bottom, top = span(ys)

    def at(x: float, y: float) -> str:
        across = _LEFT + (x - left) / (right - left) * (WIDTH - _LEFT - _RIGHT)
        down = _TOP + (top - y) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = []
    for tick in ticks(bottom, top):
        (x, y), (end, _) = (at(side, tick).split(",") for side in (left, right))
        parts.append(f'<path class="grid" d="M{x},{y}H{end}"/>')
        shown = number(tick, chart.percent)
        parts.append(f'<text x="{_LEFT - 5}" y="{y}" dy=".35em" text-anchor="end">{shown}</text>')
    # Layers and steps: there is nothing between two of them.
    for tick in (tick for tick in ticks(left, right) if tick == round(tick)):
        x = at(tick, bottom).split(",")[0]
        y = _HEIGHT - _BOTTOM + 14
        parts.append(f'<text x="{x}" y="{y}" text-anchor="middle">{number(tick, False)}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(chart.x)}</text>'
    )
    for index, series in enumerate(chart.series):
        parts.append(_line(series, index, at))
    legend = "".join(
        f'<li><svg width="26" height="8" aria-hidden="true"><path class="line s{index}" '
        f'stroke-dasharray="{_dash(index)}" d="M1,4H25"/></svg> {escape(series.name)}</li>'
        for index, series in enumerate(chart.series)
    )
    label = f"{chart.title}: {chart.y} by {chart.x}, from {number(min(ys), chart.percent)} to "
    label += number(max(ys), chart.percent)
    return f'{_drawing(_HEIGHT, label, parts)}<ul class="legend">{legend}</ul>'


def _line(series: Series, index: int, at) -> str:
    band = ""
    if series.low:
        xs = [x for x, _ in series.points]
        there = [at(x, y) for x, y in zip(xs, series.high, strict=True)]
        back = [at(x, y) for x, y in zip(xs, series.low, strict=True)][::-1]
        band = f'<path class="band s{index}" d="M{"L".join([*there, *back])}Z"/>'
    points = [at(x, y) for x, y in series.points]
    drawn = f'stroke-dasharray="{_dash(index)}" d="M{"L".join(points)}"'
    path = f'<path class="line s{index}" {drawn}/>'
    if len(points) == 1:  # a line of one point is nothing
        x, y = points[0].split(",")
        path = f'<circle class="dot s{index}" cx="{x}" cy="{y}" r="4"/>'
    return band + path


def intervals(chart: Intervals) -> str:
    """Draw values with their intervals, one below the other."""
    ends = [end for row in chart.rows for end in (row.low, row.high)]
    low, high = span([*ends, *([] if chart.mark is None else [chart.mark])])
    height = _ROW * len(chart.rows) + _BOTTOM

    def across(value: float) -> str:
        return f"{10 + (value - low) / (high - low) * (WIDTH - 20):.1f}"

    bottom = height - _BOTTOM + 4
    parts = []
    for tick in ticks(low, high):
        x = across(tick)
        parts.append(f'<path class="grid" d="M{x},0V{bottom}"/>')
        shown = number(tick, chart.percent)
        parts.append(f'<text x="{x}" y="{bottom + 13}" text-anchor="middle">{shown}</text>')
    if chart.mark is not None:
        parts.append(f'<path class="mark" d="M{across(chart.mark)},0V{bottom}"/>')
    parts.append(
        f'<text x="{WIDTH / 2}" y="{height - 3}" text-anchor="middle">{escape(chart.x)}</text>'
    )
    for index, row in enumerate(chart.rows):
        y = _ROW * index + 24
        parts.append(f'<text x="10" y="{y - 10}">{escape(row.name)}</text>')
        parts.append(f'<path class="line s0" d="M{across(row.low)},{y}H{across(row.high)}"/>')
        parts.append(f'<circle class="dot s0" cx="{across(row.value)}" cy="{y}" r="4"/>')
    values = "; ".join(f"{row.name}: {number(row.value, chart.percent)}" for row in chart.rows)
    return _drawing(height, f"{chart.title}: {values}", parts)


def _dash(index: int) -> str:
    return _DASHES[index % len(_DASHES)]


def _drawing(height: float, label: str, parts: list[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
