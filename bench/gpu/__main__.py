"""What a GPU says of koff, in one command of a few minutes: is it right, where does the time go,
what does a user get. Most telling first; an answer whenever it is cut.

    python -m bench.gpu [--part PART] [--minutes 7] [--output DIR] [--resume] [--dry-run]

Each part has a time limit of its own and runs in processes of its own, which are watched: one that
hangs in a case, dies or loses its GPU is replaced by one that goes on with the next case. While the
first part checks results, further processes compile what the later ones will time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import device

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
CONFIGS = ROOT / "koffkernels" / "configs"


class Part(NamedTuple):
    """How a part is run.

    Args:
        seconds: that it may take of ``MINUTES``, beside what those before it have left; scaled with
            --minutes.
        case: seconds after which a single case counts as hanging.
        processes: that share its cases; more than one only where nothing is timed.
        warm: processes that compile it ahead, while results are checked.
        alone: only run when asked for by --part.
    """

    seconds: float
    case: float
    processes: int = 1
    warm: int = 0
    alone: bool = False


MINUTES = 7.0
# In the order in which they run. What one does not use is left to those after it; the last takes
# all that is left.
PARTS = {
    "smoke": Part(85, 60, processes=6),
    "kernels": Part(75, 60, warm=2),
    "targets": Part(45, 40, warm=3),
    "host": Part(35, 40, warm=1),
    "e2e": Part(80, 75, warm=1),  # what is left brings it to some 160
    "tables": Part(45, 60),  # of which the start takes ten
    "decode": Part(75, 40, alone=True),
    "tests": Part(55, 400),
}
STARTING = 45.0  # seconds more for the first case: imports, and CUDA's own start
RESTARTS = 6  # of one process: something is wrong with the machine, not with a case


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=tuple(PARTS), action="append", help="run only this")
    parser.add_argument(
        "--minutes", type=float, help="time of the whole command (7; of named parts what they need)"
    )
    parser.add_argument("--output", type=Path, help="folder of the results (bench/results)")
    parser.add_argument(
        "--configs",
        type=Path,
        help="folder of the route tables (koffkernels/configs; of a dry run configs in --output)",
    )
    parser.add_argument("--only", action="append", default=[], help="cases that contain this")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--no-warm", action="store_true", help="compile nothing ahead")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is not reached")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on the CPU; the numbers mean nothing"
    )
    inner = parser.add_argument_group("of the processes that this command starts")
    inner.add_argument("--child", action="store_true", help="run one part in this process")
    inner.add_argument("--until", type=float, help="time.time() at which its time is over")
    inner.add_argument("--keep", choices=("none", "good", "all"), default="none")
    inner.add_argument("--share", type=int, nargs=2, metavar=("I", "N"))
    inner.add_argument("--warm", action="store_true", help="compile, and time nothing")
    return parser


def _folders(args: argparse.Namespace) -> tuple[Path, Path]:
    """Where results and route tables go; a dry run never writes into the repository by itself."""
    output = args.output
    if output is None:
        output = Path(tempfile.mkdtemp(prefix="koff-dry-")) if args.dry_run else RESULTS
    configs = args.configs
    if configs is None:
        configs = output / "configs" if args.dry_run else CONFIGS
    return output.resolve(), configs.resolve()


def run_part(args: argparse.Namespace, output: Path, configs: Path) -> dict:
    """Run one part in this process; its record."""
    import torch

    from . import context
    from .results import Deadline, Results

    (part,) = args.part
    if args.dry_run:
        torch.set_num_threads(1)
    keep = "good" if args.resume and args.keep == "none" else args.keep
    results = Results(output, part, args.dry_run, keep, args.share and tuple(args.share))
    if args.until is not None:  # imports have taken some of the time
        args.minutes = max(0.0, args.until - time.time()) / 60
    deadline, only = Deadline(args.minutes), tuple(args.only)
    results.deadline = deadline
    command = f"python -m bench.gpu --part {part} --minutes {args.minutes:g}"
    results.note(command=command, condition=device.condition(), running="the start")
    with context.bench(args.dry_run, args.warm) as bench:
        results.record["running"] = None
        # Each alone: transformers and PEFT take seconds to import, which not every part needs.
        module = importlib.import_module(f".{'checks' if part == 'tests' else part}", __package__)
        if part == "tables":
            # Where the routes are read, and beside the results.
            folders = {configs, configs if output == RESULTS else output / "configs"}
            module.run(bench, results, deadline, only, folders)
        else:
            module.run(bench, results, deadline, only)
    return results.record


def _verdict(record: dict, check: bool) -> int:
    """1 if a result was wrong or a test failed, or with ``check`` if a target was not reached or a
    row broke."""
    from .checks import failed

    rows = record["rows"]
    if record["part"] == "tests":
        return int(failed(rows, record["dry"]))
    broken = any("error" in row for row in rows)
    if record["part"] == "smoke":
        return int(broken)
    reached = all(row.get("target") is None or row["passed"] for row in rows)
    return int(check and (not reached or broken))


class Child:
    """A process that runs a part, or its share of one, and is replaced when it must be.

    Args:
        command: without ``--until`` and ``--keep``.
        part: its limits.
        output: where its result file appears.
        pattern: name of that file.
        keep: of its first process.
        quiet: what it prints is of no interest.
    """

    def __init__(
        self, command: list[str], part: Part, output: Path, pattern: str, keep: str, quiet: bool
    ):
        self.command, self.part, self.output, self.pattern = command, part, output, pattern
        self.keep, self.quiet = keep, quiet
        self.process: subprocess.Popen | None = None
        self.errors = tempfile.TemporaryFile()
        self.starts, self.code, self.done = 0, 0, False
        self.said = ""

    def start(self, left: float) -> None:
        """Start, or start again behind the case that ended the last process."""
        keep = self.keep if self.starts == 0 else "all"
        command = [*self.command, f"--until={time.time() + left:.1f}", f"--keep={keep}"]
        where = subprocess.DEVNULL if self.quiet else None
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=where, stderr=self.errors, start_new_session=True
        )
        self.starts, self.began = self.starts + 1, time.time()

    def idle(self) -> float:
        """Seconds beyond those that its present case may take; negative while it may go on."""
        times = [p.stat().st_mtime for p in self.output.glob(self.pattern) if p.is_file()]
        last = max(times, default=0.0)
        if last <= self.began:
            return time.time() - self.began - self.part.case - STARTING
        # The first case of a process also measures the limits and starts CUDA.
        return time.time() - last - self.part.case - (STARTING if last < self.began + 5 else 0.0)

    def poll(self, end: float) -> None:
        """Look after it; ``done`` when it is over or out of time."""
        left, code = end - time.monotonic(), self.process.poll()
        if code is None:
            if left > -GRACE and self.idle() < 0:
                return
            why = "out of time" if left <= -GRACE else "hangs"
            self.stop()
            code = None
            self._say(f"stopped: {why}")
        if code in (0, 1):
            self.code, self.done = code, True
            return
        from .results import LOST

        self.code = 1
        if code is not None and code != LOST:
            self._say(f"ended with exit code {code}: {self._last_words()}")
        if left < 8 or self.starts > RESTARTS:
            self.done = True
        else:
            self.start(left)

    def _say(self, what: str) -> None:
        name = self.command[self.command.index("--part") + 1]
        self.said = what
        if not self.quiet:
            print(f"-- {name}: a process {what}", flush=True)

    def _last_words(self) -> str:
        self.errors.seek(0)
        text = self.errors.read()[-3000:].decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()] or [""]
        return device.without_paths(lines[-1], 160)

    def stop(self) -> None:
        """Kill it and all that it started: a worker left on the GPU would disturb the next part."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


GRACE = 3.0  # seconds that a case in progress gets beyond its part's limit


class Run:
    """All parts of one command, within its time."""

    def __init__(self, args: argparse.Namespace, output: Path, configs: Path):
        self.args, self.output, self.configs = args, output, configs
        self.start = time.monotonic()
        self.end = self.start + 60.0 * args.minutes
        self.children: list[Child] = []
        self.summary: list[str] = []
        self.worst = 0
        asked = args.part or [name for name, part in PARTS.items() if not part.alone]
        self.names = [name for name in PARTS if name in asked]
        self.scale = min(1.0, 60.0 * args.minutes / sum(PARTS[name].seconds for name in self.names))

    def child(self, name: str, share: tuple[int, int] | None, warm: Path | None) -> Child:
        """A process of a part; warm ones write where nobody looks."""
        args, output = self.args, warm or self.output
        command = [sys.executable, "-m", "bench.gpu", "--child", "--part", name]
        command += [f"--output={output}", f"--configs={warm or self.configs}"]
        command += [f"--only={text}" for text in args.only]
        command += ["--dry-run"] * args.dry_run + ["--check"] * args.check
        command += ["--warm"] * (warm is not None)
        if share is not None:
            command += ["--share", str(share[0]), str(share[1])]
        pattern = f"*-{name}.json" if share is None else f"*-{name}.{share[0]}.json"
        keep = "good" if args.resume and warm is None else "none"
        return Child(command, PARTS[name], output, pattern, keep, warm is not None)

    def run(self) -> int:
        """Every part in its order; the worst exit code."""
        print(f"{self._left():.0f} s in all for {', '.join(self.names)}", flush=True)
        print(device.words_of(self.args.dry_run), flush=True)
        with tempfile.TemporaryDirectory(prefix="koff-warm-") as folder:
            try:
                for name in self.names:
                    self._part(name, Path(folder))
            finally:
                for child in self.children:
                    child.stop()
                self._finish()
        return self.worst

    def _left(self) -> float:
        return self.end - time.monotonic()

    def _part(self, name: str, warm: Path) -> None:
        """One part; with the first one all warm processes."""
        part, left = PARTS[name], self._left()
        if left < 5:
            self.summary.append(f"{name}: not run, out of time")
            return
        # Those after it keep their time.
        after = self.names[self.names.index(name) + 1 :]
        limit = left - self.scale * sum(PARTS[later].seconds for later in after)
        end = time.monotonic() + limit - GRACE
        print(f"== {name}: {limit:.0f} s, from {time.monotonic() - self.start:.0f} s", flush=True)
        shares = min(part.processes, 2) if self.args.dry_run else part.processes
        many = [(i, shares) for i in range(shares)] if shares > 1 else [None]
        if many[0]:
            for path in self.output.glob(f"*-{name}.[0-9]*.json"):
                path.unlink()  # of a command that was cut
            if self.args.resume:
                self._split(name, shares)
        self.children = [self.child(name, share, None) for share in many]
        mine = list(self.children)
        if name == self.names[0] == "smoke" and not self.args.no_warm:
            for later in self.names[1:]:
                count = min(PARTS[later].warm, 1) if self.args.dry_run else PARTS[later].warm
                for i in range(count):
                    self.children.append(self.child(later, (i, count), warm))
        for child in self.children:
            child.start(limit - GRACE)
        while not all(child.done for child in self.children):
            for child in self.children:
                if not child.done:
                    child.poll(end)
            time.sleep(0.1)
        for child in self.children:
            if child.quiet and child.said:
                print(f"-- compiling ahead: a process {child.said}", flush=True)
        self.worst = max(self.worst, *(child.code for child in mine))
        if many[0]:
            self._merge(name)

    def _merge(self, name: str) -> None:
        """One file of the shares' files."""
        from .. import timing

        paths = sorted(self.output.glob(f"*-{name}.[0-9]*.json"))
        records = [record for path in paths if (record := _read(path))]
        if not records:
            return
        whole = dict(records[0])
        whole["rows"] = [row for record in records for row in record["rows"]]
        whole["not_run"] = [row for record in records for row in record["not_run"]]
        whole["complete"] = all(record["complete"] for record in records)
        whole["running"] = [r["running"] for r in records if r.get("running")] or None
        whole["seconds"] = max(record.get("seconds", 0.0) for record in records)
        timing.write(paths[0].with_name(f"{paths[0].name.split('.')[0]}.json"), whole)
        for path in paths:
            path.unlink()

    def _split(self, name: str, shares: int) -> None:
        """The shares' files of one whole file, for ``--resume``: each holds all rows that are
        there."""
        from .. import timing

        for path in self.output.glob(f"*-{name}.json"):
            record = _read(path)
            for i in range(shares if record else 0):
                rows = record["rows"] if i == 0 else []
                kept = [row["case"] for row in record["rows"] if "error" not in row]
                part = record | {"rows": rows, "elsewhere": kept if i else []}
                timing.write(path.with_name(f"{path.stem}.{i}.json"), part)

    def _finish(self) -> None:
        """The summary: what went wrong, and what was not reached."""
        for name in self.names:
            for path in self.output.glob(f"*-{name}.[0-9]*.json"):
                if path.exists():  # the command was cut in the middle of a shared part
                    self._merge(name)
            records = [r for path in self.output.glob(f"*-{name}.json") if (r := _read(path))]
            for record in records:
                self.summary += summary(record)
        print("== summary", flush=True)
        print("\n".join(self.summary)[:5000], flush=True)
        print(f"{time.monotonic() - self.start:.0f} s; results: {self.output}", flush=True)


def _read(path: Path) -> dict | None:
    """A result file; None if it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def summary(record: dict) -> list[str]:
    """A part in a few lines: counts, errors, targets that were missed, and what did not run."""
    from .results import line

    rows, part = record["rows"], record["part"]
    bad = [row for row in rows if "error" in row]
    missed = [row for row in rows if row.get("passed") is False]
    text = f"{part}: {len(rows)} rows, {len(bad)} errors, {len(missed)} targets missed, "
    text += f"{len(record['not_run'])} not run, {record.get('seconds', 0):.0f} s"
    if record.get("running"):
        text += f", cut in {record['running']}"
    return [text, *(f"  {line(row)[:150]}" for row in (bad + missed)[:8])]


@contextlib.contextmanager
def _cut() -> Iterator[None]:
    """Turn the signals that end a command into an exit that stops children and sums up."""

    def leave(number, frame):
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: list[str] | None = None) -> int:
    """Run; 2 if something needed is missing."""
    args = _parser().parse_args(arguments)
    if args.minutes is None:
        named = sum(PARTS[name].seconds for name in args.part or ())
        args.minutes = named / 60 or MINUTES
    absent = device.missing(args.dry_run)
    if absent:
        print(absent, file=sys.stderr)
        return 2
    output, configs = _folders(args)
    if args.child:
        from .results import LOST

        record = run_part(args, output, configs)
        return LOST if record.get("lost") else _verdict(record, args.check)
    # All processes find what any of them compiled.
    folder = Path(tempfile.gettempdir()) / f"koff-triton-{os.getuid()}"
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder))
    with _cut():
        return Run(args, output, configs).run()


if __name__ == "__main__":
    sys.exit(main())
