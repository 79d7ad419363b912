"""A page as one HTML file: no script, no other file, no network; readable on a phone."""

from __future__ import annotations

import re
from html import escape

from . import svg
from .content import Intervals, Lines, Page, Part, Section, Table, Text

# Of text against the page at least 4.5 to 1, of lines at least 3 to 1 (WCAG 2.2, AA). Hues that
# people with any kind of colour vision can tell apart (Okabe and Ito), made darker or lighter.
LIGHT = {
    "page": "#ffffff", "ink": "#1b1b1b", "dim": "#5c5c5c", "rule": "#d9d9d9",
    "s0": "#0072b2", "s1": "#c04d00", "s2": "#00795a",
    "s3": "#b04a85", "s4": "#8a6100", "s5": "#3d3d3d",
}  # fmt: skip
DARK = {
    "page": "#14171a", "ink": "#e8e8e8", "dim": "#a8a8a8", "rule": "#3a3f44",
    "s0": "#56b4e9", "s1": "#f28e4b", "s2": "#35c79b",
    "s3": "#e29ac4", "s4": "#e6b940", "s5": "#c4c4c4",
}  # fmt: skip
HEATS = 10  # steps of a marked cell; the strongest lets 54 % of the colour through

_STYLE = """
:root { %s }
@media (prefers-color-scheme: dark) { :root { %s } }
* { box-sizing: border-box }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%% }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 46rem; margin: 0 auto; padding: 1rem 1rem 3rem }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; border-bottom: 1px solid var(--rule) }
h3, figcaption { font-size: 1rem; font-weight: 600; margin: .6rem 0 .2rem }
p, li { overflow-wrap: anywhere }
.wide { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--rule); text-align: right }
th { font-weight: 600; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; min-width: 6rem }
.note, .legend { color: var(--dim); font-size: .85rem }
.charts { display: flex; flex-wrap: wrap; gap: 0 1.5rem }
figure { margin: .6rem 0; flex: 1 1 20rem; max-width: 22rem; min-width: 0 }
.chart { width: 100%%; height: auto; display: block }
.chart text { font: 11px system-ui, sans-serif; fill: var(--dim) }
.grid { stroke: var(--rule); fill: none }
.mark { stroke: var(--dim); stroke-dasharray: 3 3; fill: none }
.line { fill: none; stroke-width: 2 }
.band { opacity: .18; stroke: none }
.legend { list-style: none; margin: .2rem 0; padding: 0 }
details > summary { cursor: pointer; font-weight: 600; margin-top: 2rem }
%s
"""


def style() -> str:
    """Return the style sheet, which is all that a page needs beside its text."""
    colours = (
        "; ".join(f"--{name}: {value}" for name, value in theme.items()) for theme in (LIGHT, DARK)
    )
    rules = [f".line.s{i} {{ stroke: var(--s{i}) }}" for i in range(6)]
    rules += [f".dot.s{i}, .band.s{i} {{ fill: var(--s{i}) }}" for i in range(6)]
    rules += [
        f".h{i} {{ background: rgba(213, 94, 0, {0.54 * i / HEATS:.2f}) }}"
        for i in range(1, HEATS + 1)
    ]
    return _STYLE % (*colours, "\n".join(rules))


def html(page: Page) -> str:
    """Return the whole file.

    Args:
        page: what it says.
    """
    title = escape(page.title)
    body = "".join(map(_section, page.sections))
    if page.missing:
        lines = "".join(f"<li>{escape(line)}</li>" for line in page.missing)
        body += f"<section><h2>Not in this page</h2><ul>{lines}</ul></section>"
    # Whatever got into a page, a browser loads nothing for it and runs nothing in it.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style()}</style></head>\n"
        f"<body><main><h1>{title}</h1>{body}</main></body></html>\n"
    )


def _section(section: Section) -> str:
    parts, charts = [], []
    for part in section.parts:
        if isinstance(part, Lines | Intervals):
            charts.append(_part(part))
            continue
        parts += _side_by_side(charts)
        charts = []
        parts.append(_part(part))
    inner = "".join([*parts, *_side_by_side(charts)])
    title = escape(section.title)
    if section.folded:
        return f"<details><summary>{title}</summary>{inner}</details>\n"
    return f"<section><h2>{title}</h2>{inner}</section>\n"


def _side_by_side(charts: list[str]) -> list[str]:
    return [f'<div class="charts">{"".join(charts)}</div>'] if charts else []


def _part(part: Part) -> str:
    if isinstance(part, Text):
        return f"<p>{escape(part.text)}</p>"
    if isinstance(part, Table):
        return _table(part)
    drawn = svg.lines(part) if isinstance(part, Lines) else svg.intervals(part)
    return f"<figure><figcaption>{escape(part.title)}</figcaption>{drawn}</figure>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    rows = []
    for index, line in enumerate(table.lines):
        marks = table.heat[index] if table.heat else [0.0] * len(line)
        steps = (round(HEATS * mark) for mark in marks)
        classes = (f' class="h{step}"' if step else "" for step in steps)
        # "31.12 ± 0.05" and "20 %" stay in one line.
        texts = (escape(re.sub(r" (?=[±%])|(?<=±) ", "\u00a0", cell)) for cell in line)
        cells = (f"<td{c}>{text}</td>" for c, text in zip(classes, texts, strict=True))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    # On a narrow screen a wide table moves by itself, and the page stays where it is.
    return f'<div class="wide" tabindex="0"><table>{body}</table></div>{note}'
