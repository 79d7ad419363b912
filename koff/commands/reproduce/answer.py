"""From a plan to the files with the answers."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

from rich.console import Console

from ...errors import asked_by
from ..report.png import check_matplotlib
from ..report.write import write_page
from ..tables import write_json
from .plan import WHERE, Plan, shown
from .runner import Runner

Number = TypeVar("Number", int, float)


@asked_by(WHERE)
def answer(
    plan: Plan,
    console: Console,
    *,
    jobs: int = 1,
    minutes: float | None = None,
    collect_only: bool = False,
    dry_run: bool = False,
) -> bool:
    """Run what is left of a grid and write the answers: NAME.json, NAME.md with its pictures, and
    NAME.html, in its folder.

    Args:
        plan: the grid.
        console: where to say what is done.
        jobs: runs side by side.
        minutes: after which what still runs is ended; the answers are then of what is whole.
        collect_only: run nothing; likewise.
        dry_run: print the commands, and do nothing.

    Returns:
        Whether nothing failed or was missing.

    Raises:
        FileNotFoundError, ImportError, KeyError, ValueError: a grid that cannot be run as asked;
            nothing was started.
    """
    if jobs < 1:
        raise ValueError(f"{WHERE}: --jobs must be at least 1, got {jobs}; raise it")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"{WHERE}: --minutes must be above 0, got {minutes}; raise it")
    check_matplotlib()  # hours before the pictures are drawn
    plan.check()
    runner = Runner(plan, jobs, None if minutes is None else 60 * minutes, console)
    if dry_run:
        for run in plan.runs:
            left = plan.left(run)
            for command in plan.commands(run):
                done = "" if command in left else "  # done"
                _say(console, shown(command, runner.threads) + done)
        return True
    failures: dict[str, str] = {}
    if not collect_only:
        with _terminable():
            failures = runner.execute()
        for name, end in failures.items():
            _say(console, f"\n{name} FAILED, the end of {name}.log:\n{end}")
    partly = collect_only or minutes is not None
    answered = plan.whole() if partly else plan
    if (failures and not partly) or not answered.seeds:
        left = sum(bool(plan.left(run)) for run in plan.runs)
        _say(console, f"\nno answers: {left} of {len(plan.runs)} runs are not there")
        return False

    from .collect import collect  # torch, which takes seconds
    from .page import page

    record, table = collect(answered, runner.threads)
    file = plan.output / f"{plan.name}.json"
    write_json(file, record)
    for suffix in (".md", ".html"):
        write_page(page(record, table), file.with_suffix(suffix))
    for claim in record["claims"]:
        _say(console, f"{claim['verdict']}: {claim['sentence']}, pruned to {claim['sparsity']:g}")
    _say(console, f"written: {file}, {plan.name}.md and {plan.name}.html")
    return not failures


def numbers(option: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """Return the numbers of an option such as "0.2,0.4", each once.

    Args:
        option: its name, for errors.
        text: what was given.
        kind: int or float.

    Raises:
        ValueError: something else.
    """
    try:
        return tuple(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(
            f"{WHERE}: {option} must be numbers with commas between, got {text!r}; correct it"
        ) from None


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let whoever ends this process, also by SIGTERM, end what it has started."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)
