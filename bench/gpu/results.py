"""One JSON file per part, written again before and after every case, and the time a part may take.

What is on disk always says which case is running: a process that is killed, or dies with its GPU,
costs that one case, and the next process goes on behind it.
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from koff.commands.machine import PACKAGES
from koffkernels.routes import table_path

from .. import timing
from . import device

# Parts whose numbers depend on the route table.
ROUTED = ("smoke", "kernels", "targets", "e2e", "decode")
LOST = 75  # exit code of a process that lost its GPU: what is left needs a new process
Case = tuple[str, Callable[[], list[dict]]]


class Deadline:
    """Time that a part has.

    Args:
        minutes: from now.
    """

    def __init__(self, minutes: float):
        self.start = time.monotonic()
        self.seconds = 60.0 * minutes

    def left(self) -> float:
        """Seconds left, 0 when over."""
        return max(0.0, self.start + self.seconds - time.monotonic())

    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start


class Results:
    """The rows of one part, on disk after every one of them.

    Args:
        folder: where the file goes, as ``<gpu>-<part>.json``.
        part: name of the part.
        dry: the numbers mean nothing.
        keep: "none"; "good": keep the rows of a file that is there but for errors, if it is from
            the same GPU and versions, and was measured with the same route table; "all": keep the
            errors too, and do not run again what they are from.
        share: (i, n): this process runs each n-th case from the i-th on, into a file of its own.
    """

    def __init__(
        self,
        folder: Path,
        part: str,
        dry: bool,
        keep: str = "none",
        share: tuple[int, int] | None = None,
    ):
        environment = device.environment(dry)
        name = device.slug(environment["gpu"]["name"])
        if part in ROUTED:
            environment["table"] = _digest(table_path(environment["gpu"]["name"]))
        self.share = share
        self.path = folder / f"{name}-{part}{'' if share is None else f'.{share[0]}'}.json"
        self.record: dict = {"part": part, "dry": dry, "complete": False, "running": None}
        self.record |= {"environment": environment, "rows": [], "not_run": []}
        self.deadline: Deadline | None = None
        self.lost: str | None = None
        self.condition, self.asked = None, None
        # What is printed of the rows of a case; None: a line for each.
        self.brief: Callable[[list[dict]], str] | None = None
        if keep != "none" and self.path.exists():
            self._keep(json.loads(self.path.read_text()), keep)

    def _keep(self, before: dict, keep: str) -> None:
        """Take over the rows of an earlier process."""
        if not _same(before.get("environment", {}), self.record["environment"]):
            print(f"{self.path.name}: other GPU, version or table, measured anew", flush=True)
            return
        rows = before["rows"]
        if keep == "all":
            if before.get("running"):
                name = before["running"]
                rows.append({"case": name, "name": name, "error": "the process ended in this case"})
                print(line(rows[-1]), flush=True)
            fields = {k: v for k, v in before.items() if k not in ("running", "not_run", "lost")}
            self.record |= fields | {"complete": False}
        else:
            bad = {row["case"] for row in rows if "error" in row}
            self.record["elsewhere"] = before.get("elsewhere", [])
            self.record["rows"] = [row for row in rows if row["case"] not in bad]
            print(f"{self.path.name}: {len(self.record['rows'])} rows kept", flush=True)

    def note(self, **facts: object) -> None:
        """Set fields of the file beside its rows."""
        self.record.update(facts)
        self.save()

    def add(self, rows: list[dict]) -> None:
        """Append rows and write the file."""
        for row in rows:
            if self.record["dry"] and "passed" in row and "target" in row:
                row["passed"] = None  # the times of a dry run mean nothing
            self.record["rows"].append(row)
            if self.brief is None:
                print(line(row), flush=True)
        if self.brief is not None:
            print(self.brief(rows), flush=True)
        self.save()

    def done(self, name: str) -> bool:
        """Is there a row of this case from an earlier run?"""
        if name in self.record.get("elsewhere", ()):  # another process of this part holds it
            return True
        return any(row.get("case") == name for row in self.record["rows"])

    def _condition(self) -> dict[str, str] | None:
        """The GPU's, asked at most every five seconds: the tool takes a while to answer."""
        if self.asked is None or time.monotonic() - self.asked > 5.0:
            self.condition, self.asked = device.condition(), time.monotonic()
        return self.condition

    def save(self) -> None:
        """Write the file."""
        if self.deadline is not None:
            self.record["seconds"] = round(self.deadline.spent(), 1)
        timing.write(self.path, self.record)

    def run(self, cases: Iterable[Case], deadline: Deadline, only: Iterable[str] = ()) -> None:
        """Run cases in their order until the time is over; an error becomes a row of its own.

        Args:
            cases: (name, function that measures and returns rows).
            deadline: no case starts after it.
            only: parts of names; a case runs if it contains one of them, all run if there are none.
        """
        self.deadline, only = deadline, tuple(only)
        for index, (name, measure) in enumerate(cases):
            if self.share is not None and index % self.share[1] != self.share[0]:
                continue
            if (only and not any(part in name for part in only)) or self.done(name):
                continue
            if self.lost or not deadline.left():
                reason = self.lost or "out of time"
                self.record["not_run"].append({"name": name, "reason": reason})
                continue
            self.note(running=name)
            start = time.monotonic()
            rows, self.lost = _guarded(name, measure)
            self.record |= {"running": None, "lost": self.lost}
            took = round(time.monotonic() - start, 2)
            shared = {"condition": self._condition(), "case_seconds": took}
            if "dtype" in self.record:
                shared["dtype"] = self.record["dtype"]
            self.add([{"case": name, **shared, **row} for row in rows])
        self.record["complete"] = not self.record["not_run"]
        self.save()


def _guarded(name: str, measure: Callable[[], list[dict]]) -> tuple[list[dict], str | None]:
    """(rows, why nothing more can run on this GPU or None)."""
    try:
        rows = measure()
    except Exception as error:  # whatever one row's kernels do must not cost the others
        rows = [{"name": name, "error": device.words(error), "trace": device.trace(error)}]
    return rows, _free()


def _free() -> str | None:
    """Give back memory; why the GPU cannot be used any more, None if it can."""
    if not torch.cuda.is_available():
        return None
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:  # torch.AcceleratorError among them
        return f"the GPU was lost: {device.without_paths(str(error), 200)}"
    return None


def _digest(path: Path) -> str | None:
    """sha256 of a file; None if it is not there."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _same(before: dict, now: dict) -> bool:
    """Are two environments of the same GPU, versions and route table?"""
    gpus = [record.get("gpu", {}).get("name") for record in (before, now)]
    names = (*PACKAGES, "table")
    return gpus[0] == gpus[1] and all(before.get(name) == now.get(name) for name in names)


def judged(
    name: str, share: float | None, target: float | None, *, at_most: bool = False, **facts: object
) -> dict:
    """A row with its verdict.

    Args:
        name: of the row.
        share: what was reached, None if it could not be measured.
        target: what must be reached, None for a row that is only information.
        at_most: the share must not pass the target, instead of reaching it.
        facts: further fields.
    """
    passed = None
    if share is not None and target is not None:
        passed = share <= target if at_most else share >= target
    return {
        "name": name,
        "share": share,
        "target": target,
        "bound": "at most" if at_most else "at least",
        "passed": passed,
        **facts,
    }


def line(row: dict) -> str:
    """A row for people: short, since little more than the end of what is printed may be seen."""
    name = row.get("name", "")
    if "error" in row:
        return f"{name:38s} ERROR {row['error'][:110]}"
    if row.get("target") is not None:
        verdict = {True: "passed", False: "MISSED", None: row.get("status", "")}[row["passed"]]
        share = "-" if row["share"] is None else f"{row['share']:.3f}"
        sign = "<=" if row["bound"] == "at most" else ">="
        us = f" {row['us']:.0f} us" if row.get("us") else ""
        return f"{name:38s} {share:>6s} {sign} {row['target']:.3f} {verdict}{us}"
    if "text" in row:
        return f"{name:38s} {row['text']}"
    shown = ("share", "us", "vendor_us", "tokens_per_second", "passed", "failed", "status")
    facts = [
        f"{k}={row[k]:.4g}" if isinstance(row[k], float) else f"{k}={row[k]}"
        for k in shown
        if row.get(k) is not None
    ]
    return f"{name:38s} {' '.join(facts)}"
