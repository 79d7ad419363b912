"""A page as Markdown with its charts as PNG files beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ..tables import markdown as markdown_table
from .content import Intervals, Lines, Page, Part, Table, Text

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&$])")


def plain(text: str) -> str:
    """Return text that Markdown shows as it is, whatever it holds."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def markdown(page: Page, figures: Path) -> tuple[str, dict[str, Lines | Intervals]]:
    """Return the text of a page, and {file name: chart} of the pictures that it shows.

    Args:
        page: what it says.
        figures: folder of the pictures, relative to that of the text.
    """
    pictures: dict[str, Lines | Intervals] = {}
    blocks = [f"# {plain(page.title)}"]
    for section in page.sections:
        blocks.append(f"## {plain(section.title)}")
        for part in section.parts:
            blocks += _blocks(part, pictures, figures)
    if page.missing:
        blocks.append("## Not in this page")
        blocks.append("\n".join(f"- {plain(line)}" for line in page.missing))
    return "\n\n".join(blocks) + "\n", pictures


def _blocks(part: Part, pictures: dict[str, Lines | Intervals], figures: Path) -> Iterator[str]:
    if isinstance(part, Text):
        yield plain(part.text)
    elif isinstance(part, Table):
        lines = [[plain(cell) for cell in line] for line in part.lines]
        yield markdown_table([plain(name) for name in part.header], lines).rstrip("\n")
        if part.note:
            yield plain(part.note)
    else:
        words = re.sub(r"[^a-z0-9]+", "-", part.title.lower()).strip("-")[:60]
        name = f"{len(pictures) + 1:02d}-{words or 'chart'}.png"
        pictures[name] = part
        yield f"![{plain(part.title)}]({(figures / name).as_posix()})"
