"""What a grid is doing, and how long it will take: live on a terminal, elsewhere in lines."""

from __future__ import annotations

import contextlib
import datetime
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from .plan import Plan, Run

# A line of TrainProgress where the output is no terminal: "training 20/600  loss 3.123".
_STEPS = re.compile(rb"(\d+)/(\d+)\s+loss ")
_LOG_END = 4096  # bytes; a line has a hundred
# A share below this says little of the whole: the first step compiles, allocates, warms up.
_TOLD = 0.02


@dataclass
class Doing:
    """A command that runs.

    Args:
        run: of the plan.
        what: "train", "eval", ...
        log: where its output goes.
        began: by ``time.monotonic``.
        skip: bytes of the log that are older.
    """

    run: Run
    what: str
    log: Path
    began: float
    skip: int

    def seconds(self) -> float:
        """Return how long it has been running."""
        return time.monotonic() - self.began

    def share(self) -> float:
        """Return how much of its steps is done, 0 where it says nothing of steps."""
        try:
            with self.log.open("rb") as file:
                end = file.seek(0, 2)
                file.seek(max(self.skip, end - _LOG_END))
                found = _STEPS.findall(file.read())
        except OSError:
            return 0.0
        if not found:
            return 0.0
        step, steps = map(int, found[-1])
        return min(1.0, step / steps) if steps else 0.0


class Display:
    """Shows the progress of a plan; a context manager.

    The time left is an estimate: what is still to be run, each command as long as others of its
    kind took or, by their steps so far, will take, divided by the jobs side by side.

    Args:
        plan: what is run.
        jobs: commands side by side.
        console: where to write.
    """

    def __init__(self, plan: Plan, jobs: int, console: Console):
        self.plan, self.jobs, self.console = plan, jobs, console
        self._lock = threading.Lock()
        self._doing: list[Doing] = []
        self._took: dict[tuple[str, str], list[float]] = {}  # (what, kind of run): seconds
        self._left: dict[Run, list[str]] = {}
        self._live: Live | None = None

    def __enter__(self) -> Display:
        self._left = {run: [_what(c) for c in self.plan.left(run)] for run in self.plan.runs}
        whole = sum(not left for left in self._left.values())
        self.say(f"{len(self._left)} runs, {whole} finished before")
        if self.console.is_terminal:
            self._live = Live(self, console=self.console, refresh_per_second=1, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def expect(self, run: Run, commands: list[list[str]]) -> None:
        """Note what is left of a run, if another process has made some of it."""
        with self._lock:
            self._left[run] = [_what(command) for command in commands]

    @contextlib.contextmanager
    def running(self, run: Run, command: list[str], log: Path) -> Iterator[Doing]:
        """Count a command among those that run, inside the ``with`` block."""
        skip = log.stat().st_size if log.is_file() else 0
        doing = Doing(run, _what(command), log, time.monotonic(), skip)
        with self._lock:
            self._doing.append(doing)
        try:
            yield doing
        finally:
            with self._lock:
                self._doing.remove(doing)

    def done(self, run: Run, doing: Doing) -> None:
        """Count a command as done, and say so."""
        with self._lock:
            self._took.setdefault((doing.what, run.kind), []).append(doing.seconds())
            self._left[run].remove(doing.what)
        self.say(f"{run.name}: {doing.what} done in {doing.seconds():.0f} s; {self._summary()}")

    def say(self, text: str, *, quiet: bool = False) -> None:
        """Write a line.

        Args:
            text: of it.
            quiet: leave it out on a terminal, where the display shows as much.
        """
        if not (quiet and self.console.is_terminal):
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __rich__(self) -> Table:
        with self._lock:
            doing = list(self._doing)
        table = Table.grid(padding=(0, 2))
        for one in doing:
            share = one.share()
            bar = ProgressBar(total=1.0, completed=share, width=20, pulse=share == 0.0)
            table.add_row(one.run.name, one.what, bar, _span(one.seconds()))
        table.add_row(self._summary())
        return table

    def _summary(self) -> str:
        whole = sum(not left for left in self._left.values())
        left = self.seconds_left()
        told = "" if left is None else f", about {_span(left)} left"
        return f"{whole} of {len(self._left)} runs{told}"

    def seconds_left(self) -> float | None:
        """Return for how many seconds more the plan will run, None while nothing tells."""
        with self._lock:
            doing, took = list(self._doing), {key: list(v) for key, v in self._took.items()}
            left = [(what, run) for run, names in self._left.items() for what in names]
        shares = {id(one): one.share() for one in doing}
        for one in doing:
            if shares[id(one)] > _TOLD:
                whole = one.seconds() / shares[id(one)]
                took.setdefault((one.what, one.run.kind), []).append(whole)
        if not took:
            return None

        def usual(what: str, kind: str) -> float:
            alike = took.get((what, kind)) or [
                s for (w, _), v in took.items() if w == what for s in v
            ]
            return sum(alike) / len(alike) if alike else 0.0

        total = sum(usual(what, run.kind) for what, run in left)
        # What runs is among what is left, and partly done.
        total -= sum(min(one.seconds(), usual(one.what, one.run.kind)) for one in doing)
        return max(0.0, total) / self.jobs


def _what(command: list[str]) -> str:
    return "swaps" if "--swaps" in command else command[0]


def _span(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
