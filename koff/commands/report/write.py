"""Write a page about finished runs to disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...errors import asked_by
from ..tables import check_writable, write_text
from .content import Page
from .html import html
from .markdown import markdown
from .png import check_matplotlib, draw
from .runs import read_finished
from .sections import make_page

REPORT_FILE = "report.html"


@asked_by("koff report")
def write_report(
    directories: Sequence[str | Path], output: str | Path | None = None, *, split: str = "test"
) -> Path:
    """Write a page about finished runs of one base model, from what their folders hold.

    Args:
        directories: output folders of `koff train`; runs that differ in their seed alone are shown
            together, with their spread.
        output: an .html file, which stands alone, or an .md file, whose pictures come into a folder
            beside it. None: report.html in the folder if it is one, else in the current folder.
        split: whose measurements are shown.

    Returns:
        The file.

    Raises:
        FileNotFoundError, KeyError, ValueError: no saved model in a folder, something damaged, or
            runs of different models. ImportError: Markdown without matplotlib.
    """
    if not directories:
        raise ValueError("koff report: there must be at least one folder, got none; name one")
    names = [Path(directory).resolve() for directory in directories]
    if len(set(names)) < len(names):
        raise ValueError(
            "koff report: the folders must differ, got one of them twice; name it once"
        )
    if output is None:
        output = Path(directories[0], REPORT_FILE) if len(names) == 1 else Path(REPORT_FILE)
    output = Path(output)
    if output.suffix not in (".html", ".md"):
        raise ValueError(
            f"koff report: --output must end in .html or .md, got {output.name!r}; choose one"
        )
    check_writable(output)
    if output.suffix == ".md":
        check_matplotlib()
    page = make_page([read_finished(directory, split) for directory in directories], split)
    write_page(page, output)
    return output


def write_page(page: Page, output: Path) -> None:
    """Write a page: HTML that stands alone, or Markdown with its pictures in a folder beside it.

    Args:
        page: what it says.
        output: an .html or .md file.
    """
    if output.suffix == ".html":
        write_text(output, html(page))
        return
    figures = Path(f"{output.stem}-figures")
    text, pictures = markdown(page, figures)
    place = output.parent / figures
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{figures}.") as temporary:
        for name, chart in pictures.items():
            draw(chart, Path(temporary, name))
        place.mkdir(exist_ok=True)
        for name in pictures:
            shutil.move(Path(temporary, name), place / name)
    write_text(output, text)
