"""Runs what is left of a plan in child processes, several side by side, each with its log."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from .plan import Plan, Run, child, shown

TAIL = 15  # lines of a log that say what went wrong: a traceback's end, and what led to it


def cores() -> int:
    """CPU cores that this process may use."""
    there = getattr(os, "sched_getaffinity", None)
    return len(there(0)) if there else os.cpu_count() or 1


class Runner:
    """Executes a plan.

    Args:
        plan: checked.
        jobs: child processes side by side.
        seconds: after which what still runs is ended, and nothing more is started; None: never.
    """

    def __init__(self, plan: Plan, jobs: int, seconds: float | None = None):
        self.plan, self.jobs = plan, jobs
        self.threads = max(1, cores() // jobs)
        self._children: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._stopped = False
        # Counted from here, so that the checks of what is there belong to it.
        self._clock = None if seconds is None else threading.Timer(seconds, self._stop)

    def execute(self) -> dict[str, str]:
        """Train and measure what is not there yet.

        Returns:
            name -> end of the log, of the runs that failed; the others went on.
        """
        self.plan.output.mkdir(parents=True, exist_ok=True)
        waiting = [run for run in self.plan.runs if self.plan.left(run)]
        finished = len(self.plan.runs) - len(waiting)
        print(f"{len(self.plan.runs)} runs, {finished} finished before", flush=True)
        failures = {}
        pool = ThreadPoolExecutor(max_workers=self.jobs)
        if self._clock:
            self._clock.start()
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
            self._stop()  # nothing is left but after an interruption
            pool.shutdown(cancel_futures=True)
        return {run.name: failures[run.name] for run in waiting if run.name in failures}

    def _make(self, run: Run, parent: Future | None) -> str | None:
        """Run the commands that are left of one run, once its parent is there; return the end of
        its log if one fails."""
        log = self.plan.log(run)
        if parent is not None and (error := parent.result()) is not None:
            return error
        for command in self.plan.left(run):
            if self._stopped:
                return "the time was up"
            started = time.monotonic()
            print(f"{run.name}: {shown(command, self.threads)}", flush=True)
            code = self._run(command, log)
            took = f"{time.monotonic() - started:.0f} s"
            if self._stopped and code != 0:
                print(f"{run.name}: {command[0]} ended after {took}: the time was up", flush=True)
                return "the time was up"
            if code != 0:
                print(f"{run.name}: {command[0]} FAILED after {took}, exit {code}", flush=True)
                return tail(log)
            print(f"{run.name}: {command[0]} done in {took}", flush=True)
        left = self.plan.left(run)
        return f"finished, but not there: koff {left[0][0]}\n{tail(log)}" if left else None

    def _run(self, command: list[str], log: Path) -> int:
        threads = str(self.threads)
        env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        with log.open("ab") as file:
            file.write(f"$ {shown(command, self.threads)}\n".encode())
            file.flush()
            # Under the lock: a child is known to _stop as soon as there is one.
            with self._lock:
                if self._stopped:
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

    def _stop(self) -> None:
        """End the children and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._children:
                process.terminate()


def tail(log: Path, lines: int = TAIL) -> str:
    """The last lines of a log, what progress bars overwrote left out."""
    text = log.read_text("utf-8", errors="replace")
    written = [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    return "\n".join(written[-lines:])
