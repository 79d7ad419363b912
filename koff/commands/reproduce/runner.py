"""Runs what is left of a plan in child processes, several side by side, each with its log."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console

from ...storage.lock import check_unlocked
from .display import Display
from .plan import Plan, Run, child, shown

TAIL = 15  # lines of a log that say what went wrong: a traceback's end, and what led to it


def cores() -> int:
    """Return how many CPU cores this process may use."""
    there = getattr(os, "sched_getaffinity", None)
    return len(there(0)) if there else os.cpu_count() or 1


class Runner:
    """Executes a plan.

    Args:
        plan: checked.
        jobs: child processes side by side.
        seconds: after which what still runs is ended, and nothing more is started; None: never.
        console: where progress is shown; None: the standard output.
    """

    def __init__(
        self, plan: Plan, jobs: int, seconds: float | None = None, console: Console | None = None
    ):
        self.plan, self.jobs = plan, jobs
        self.threads = max(1, cores() // jobs)
        self.display = Display(plan, jobs, console or Console())
        self._children: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._why = ""
        # Counted from here, so that the checks of what is there belong to it.
        self._clock = None
        if seconds is not None:
            self._clock = threading.Timer(seconds, self._stop, ["the time was up"])

    def execute(self) -> dict[str, str]:
        """Train and measure what is not there yet.

        Returns:
            name -> end of the log, of the runs that failed; the others went on.
        """
        self.plan.output.mkdir(parents=True, exist_ok=True)
        waiting = [run for run in self.plan.runs if self.plan.left(run)]
        failures = {}
        pool = ThreadPoolExecutor(max_workers=self.jobs)
        if self._clock:
            self._clock.start()
        with self.display:
            try:
                started: dict[Run, Future] = {}
                for run in waiting:
                    # In order: what a run waits for is under way before it is.
                    parent = started.get(self.plan.parent(run))
                    started[run] = pool.submit(self._make, run, parent)
                futures = {future: run for run, future in started.items()}
                for future in as_completed(futures):
                    error = future.result()
                    if error is not None:
                        failures[futures[future].name] = error
            finally:
                if self._clock:
                    self._clock.cancel()
                self._stop("interrupted")  # nothing is left but after an interruption
                pool.shutdown(cancel_futures=True)
        return {run.name: failures[run.name] for run in waiting if run.name in failures}

    def _make(self, run: Run, parent: Future | None) -> str | None:
        """Run the commands that are left of one run, once its parent is there; return the end of
        its log if one fails."""
        log = self.plan.log(run)
        if parent is not None and (error := parent.result()) is not None:
            return error
        self._wait_for_others(run)
        commands = self.plan.left(run)
        self.display.expect(run, commands)
        for command in commands:
            if self._stopped.is_set():
                return self._why
            with self.display.running(run, command, log) as doing:
                self.display.say(f"{run.name}: {shown(command, self.threads)}", quiet=True)
                code = self._run(command, log)
                took = f"{doing.seconds():.0f} s"
            if self._stopped.is_set() and code != 0:
                self.display.say(f"{run.name}: {doing.what} ended after {took}: {self._why}")
                return self._why
            if code != 0:
                self._wait_for_others(run)  # one that began just before this one keeps it out
                if command not in self.plan.left(run):
                    self.display.done(run, doing)
                    continue
                self.display.say(f"{run.name}: {doing.what} FAILED after {took}, exit {code}")
                return tail(log)
            self.display.done(run, doing)
        left = self.plan.left(run)
        return f"finished, but not there: koff {left[0][0]}\n{tail(log)}" if left else None

    def _wait_for_others(self, run: Run) -> None:
        """Wait while another process makes the same run: one that was started beside this one, or
        that outlived a command that was killed."""
        said = False
        while not self._stopped.is_set():
            with contextlib.suppress(ValueError):
                check_unlocked(self.plan.folder(run))
                return
            if not said:
                self.display.say(f"{run.name}: another process makes it; waiting for its end")
                said = True
            self._stopped.wait(1.0)

    def _run(self, command: list[str], log: Path) -> int:
        threads = str(self.threads)
        env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        with log.open("ab") as file:
            file.write(f"$ {shown(command, self.threads)}\n".encode())
            file.flush()
            # Under the lock: a child is known to _stop as soon as there is one.
            with self._lock:
                if self._stopped.is_set():
                    return -1
                process = subprocess.Popen(
                    child(command),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=env,
                )
                self._children.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._children.discard(process)

    def _stop(self, why: str) -> None:
        """End the children and start no more."""
        with self._lock:
            self._why = self._why or why
            self._stopped.set()
            for process in self._children:
                process.terminate()


def tail(log: Path, lines: int = TAIL) -> str:
    """Return the last lines of a log, what progress bars overwrote left out."""
    text = log.read_text("utf-8", errors="replace")
    written = [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    return "\n".join(written[-lines:])
