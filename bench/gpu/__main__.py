"""Tests, route tables, target rows and decode on a GPU, as JSON files that grow row by row.

    python -m bench.gpu [--part PART] [--minutes 9] [--output DIR] [--resume] [--dry-run]

Without --part the parts tests, tables, targets and decode run in that order, each in a process of
its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from . import device

PARTS = ("tests", "tables", "targets", "decode")  # what the tables choose is then measured
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
CONFIGS = ROOT / "koffkernels" / "configs"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=PARTS, help="run this part alone")
    parser.add_argument("--minutes", type=float, default=9.0, help="time of each part")
    parser.add_argument("--output", type=Path, help="folder of the results (bench/results)")
    parser.add_argument(
        "--configs",
        type=Path,
        help="folder of the route tables (koffkernels/configs; of a dry run configs in --output)",
    )
    parser.add_argument("--only", action="append", default=[], help="cases that contain this")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is not reached")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on the CPU; the numbers mean nothing"
    )
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

    from . import checks, context, decode, tables, targets
    from .results import Deadline, Results

    if args.dry_run:
        torch.set_num_threads(1)
    results = Results(output, args.part, args.dry_run, args.resume)
    deadline, only = Deadline(args.minutes), tuple(args.only)
    results.deadline = deadline
    command = f"python -m bench.gpu --part {args.part} --minutes {args.minutes:g}"
    results.note(command=command, condition=device.condition())
    with context.bench(args.dry_run) as bench:
        if args.part == "tables":
            # Where the routes are read, and beside the results.
            folders = {configs, configs if output == RESULTS else output / "configs"}
            tables.run(bench, results, deadline, only, folders)
        else:
            parts = {"tests": checks, "targets": targets, "decode": decode}
            parts[args.part].run(bench, results, deadline, only)
    print(f"{results.path.name}: {_summary(results.record)}", flush=True)
    return results.record


def _summary(record: dict) -> str:
    rows = record["rows"]
    missed = [row["name"] for row in rows if row.get("passed") is False]
    text = f"{len(rows)} rows, {sum('error' in row for row in rows)} errors"
    text += f", {len(missed)} targets missed, {len(record['not_run'])} not run"
    return text + f", {record['seconds']:.0f} s"


def _verdict(record: dict, check: bool) -> int:
    """1 if a test failed, or with ``check`` if a target was not reached or a row broke."""
    from .checks import failed

    rows = record["rows"]
    if record["part"] == "tests":
        return int(failed(rows, record["dry"]))
    reached = all(row.get("target") is None or row["passed"] for row in rows)
    return int(check and (not reached or any("error" in row for row in rows)))


def _all_parts(args: argparse.Namespace, output: Path, configs: Path) -> int:
    """Every part in a process of its own: what one does to the GPU must not reach the next."""
    worst = 0
    for part in PARTS:
        command = [sys.executable, "-m", "bench.gpu", "--part", part, f"--minutes={args.minutes}"]
        command += [f"--output={output}", f"--configs={configs}"]
        command += [f"--only={name}" for name in args.only]
        flags = {"--resume": args.resume, "--check": args.check, "--dry-run": args.dry_run}
        command += [flag for flag, given in flags.items() if given]
        print(f"== {part}", flush=True)
        worst = max(worst, abs(subprocess.run(command, cwd=ROOT).returncode))
    return worst


def main(arguments: list[str] | None = None) -> int:
    """Run; 2 if something needed is missing."""
    args = _parser().parse_args(arguments)
    absent = device.missing(args.dry_run)
    if absent:
        print(absent, file=sys.stderr)
        return 2
    output, configs = _folders(args)
    if args.part is None:
        code = _all_parts(args, output, configs)
    else:
        code = _verdict(run_part(args, output, configs), args.check)
    print(f"results: {output}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
