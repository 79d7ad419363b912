"""One JSON file per part, written again after every row, and the time a part may take."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from koffkernels.routes import table_path

from .. import timing
from . import device

ROUTED = ("targets", "decode")  # parts whose numbers depend on the route table
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
        resume: keep the rows of a file that is there, if it is from the same GPU and versions, and
            was measured with the same route table.
    """

    def __init__(self, folder: Path, part: str, dry: bool, resume: bool = False):
        environment = device.environment(dry)
        name = device.slug(environment["gpu"]["name"])
        if part in ROUTED:
            environment["table"] = _digest(table_path(environment["gpu"]["name"]))
        self.path = folder / f"{name}-{part}.json"
        self.record: dict = {"part": part, "dry": dry, "complete": False}
        self.record |= {"environment": environment, "rows": [], "not_run": []}
        self.deadline: Deadline | None = None
        if resume and self.path.exists():
            before = json.loads(self.path.read_text())
            if _same(before.get("environment", {}), environment):
                good = {row["case"] for row in before["rows"] if "error" not in row}
                kept = [row for row in before["rows"] if row["case"] in good]
                self.record["rows"] = kept
                print(f"{self.path.name}: {len(kept)} rows kept", flush=True)
            else:
                print(f"{self.path.name}: other GPU, version or table, measured anew", flush=True)

    def note(self, **facts: object) -> None:
        """Set fields of the file beside its rows."""
        self.record.update(facts)
        self.save()

    def add(self, rows: Iterable[dict]) -> None:
        """Append rows and write the file."""
        for row in rows:
            if self.record["dry"] and "passed" in row and "target" in row:
                row["passed"] = None  # the times of a dry run mean nothing
            self.record["rows"].append(row)
            print(line(row), flush=True)
        self.save()

    def done(self, name: str) -> bool:
        """Is there a row of this case from an earlier run?"""
        return any(row.get("case") == name for row in self.record["rows"])

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
        self.deadline, only, lost = deadline, tuple(only), None
        for name, measure in cases:
            if (only and not any(part in name for part in only)) or self.done(name):
                continue
            if lost or not deadline.left():
                self.record["not_run"].append({"name": name, "reason": lost or "out of time"})
                continue
            rows, lost = _guarded(name, measure)
            shared = {"condition": device.condition()}
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
        text = f"{type(error).__name__}: {device.without_paths(str(error), 600)}"
        rows = [{"name": name, "error": text}]
    return rows, _free()


def _free() -> str | None:
    """Give back memory; why the GPU cannot be used any more, None if it can."""
    if not torch.cuda.is_available():
        return None
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return f"the GPU was lost: {device.without_paths(str(error), 200)}"
    return None


def _digest(path: Path) -> str | None:
    """sha256 of a file; None if it is not there."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _same(before: dict, now: dict) -> bool:
    """Are two environments of the same GPU, versions and route table?"""
    gpus = [record.get("gpu", {}).get("name") for record in (before, now)]
    names = (*timing.PACKAGES, "table")
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
    """A row for people."""
    name = row.get("name", "")
    if "error" in row:
        return f"{name:44s} ERROR {row['error'][:160]}"
    if row.get("target") is not None:
        verdict = {True: "passed", False: "MISSED", None: row.get("status", "")}[row["passed"]]
        share = "-" if row["share"] is None else f"{row['share']:.3f}"
        return f"{name:44s} {share:>8s}  {row['bound']} {row['target']:.3f}  {verdict}"
    shown = ("share", "us", "tokens_per_second", "passed", "failed", "status")
    facts = [
        f"{k}={row[k]:.4g}" if isinstance(row[k], float) else f"{k}={row[k]}"
        for k in shown
        if row.get(k) is not None
    ]
    return f"{name:44s} {'  '.join(facts)}"
