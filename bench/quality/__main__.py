"""Trains and measures what the table of memories against pruning needs, and writes it.

    python -m bench.quality --recipe koff/recipes/docs-llama.yaml --output DIR [--dry-run]

Per sparsity and seed: koff, gates alone (the same recipe without memories), and koff with other
settings (--variant); per seed: memories trained alike on the dense model; for a domain that comes
later (--later) a memory added to the finished models of koff and to the dense ones. Every run is
one `koff train` or `koff add-memory` and one `koff eval` of its own process. The same command goes
on where it was stopped, and leaves alone what is finished.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from koff.commands.recipe import SHIPPED

from .. import timing
from .collect import collect
from .plan import Plan, shown
from .runner import Runner
from .text import page

ROOT = Path(__file__).parents[2]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--recipe", type=Path, default=SHIPPED / "docs-llama.yaml", help="recipe file")
    add("--name", help="of the table and its files (the recipe's)")
    add("--output", type=Path, required=True, help="folder of the runs and their logs")
    add("--sparsity", type=float, nargs="+", default=[0.2, 0.4], help="targets (0.2 0.4)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (0 1 2)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="for every run")
    add("--split", choices=("validation", "test"), default="test", help="measured split (test)")
    add("--max-tokens", type=int, metavar="N", help="measured of each domain: its first N tokens")
    add("--batch-size", type=int, metavar="N", help="blocks per forward of the measurements")
    add(
        "--variant",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "KEY=VALUE"),
        help="koff once more, with these settings; its rows stand below the table",
    )
    add(
        "--later",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="domain whose memory comes later: FOLDER/NAME.train.jsonl and so on",
    )
    add("--device", help="for every run: cpu, or what koff finds")
    add("--jobs", type=int, default=1, help="runs side by side, each with cores / jobs threads")
    add("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the table")
    add(
        "--minutes",
        type=float,
        help="end what then still runs; the table is of the seeds that are whole",
    )
    add("--dry-run", action="store_true", help="print the commands, run nothing")
    return parser


def _plan(args: argparse.Namespace) -> Plan:
    """The checked plan of the options."""
    recipe = args.recipe
    if recipe.is_absolute() and recipe.is_relative_to(Path.cwd()):
        recipe = recipe.relative_to(Path.cwd())
    plan = Plan(
        recipe=recipe,
        output=args.output.resolve(),
        sparsities=tuple(dict.fromkeys(args.sparsity)),
        seeds=tuple(dict.fromkeys(args.seeds)),
        overrides=tuple(args.set),
        split=args.split,
        device=args.device,
        name=args.name,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        variants={name: tuple(texts) for name, *texts in args.variant},
        later={name: Path(folder) for name, _, folder in (t.partition("=") for t in args.later)},
    )
    plan.check()
    return plan


def _dry(plan: Plan, threads: int) -> None:
    for run in plan.runs:
        left = plan.left(run)
        for command in plan.commands(run):
            done = "" if command in left else "  # done"
            print(shown(command, threads) + done)


def _execute(runner: Runner) -> dict[str, str]:
    """Run the plan so that whoever ends this process, also by SIGTERM, ends the children too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return runner.execute()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


def _table(plan: Plan, threads: int, results: Path) -> None:
    """Write and print the table."""
    record, table = collect(plan, threads)
    text = page(record, table)
    path = results / f"quality-{plan.title}-{plan.split}.json"
    timing.write(path, record)
    path.with_suffix(".md").write_text(text, "utf-8")
    print(f"\n{text}\nwritten: {path} and {path.with_suffix('.md').name}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run; 1 if a run failed or left a hole in the table, 2 if the plan cannot be run."""
    args = _parser().parse_args(arguments)
    try:
        if args.jobs < 1:
            raise ValueError(f"bench.quality: --jobs must be at least 1, got {args.jobs}; raise it")
        if args.minutes is not None and not args.minutes > 0:
            raise ValueError(f"bench.quality: --minutes must be above 0, got {args.minutes}")
        plan = _plan(args)
    except (ValueError, KeyError, TypeError, OSError) as error:
        print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    runner = Runner(plan, args.jobs, None if args.minutes is None else 60 * args.minutes)
    if args.dry_run:
        _dry(plan, runner.threads)
        return 0
    failures = _execute(runner)
    for name, end in failures.items():
        print(f"\n{name} FAILED, the end of {name}.log:\n{end}", file=sys.stderr, flush=True)
    if failures and args.minutes is not None:
        plan = plan.whole()
    if failures and (args.minutes is None or not plan.seeds):
        print(f"\nno table: {len(failures)} of {len(plan.runs)} runs failed", file=sys.stderr)
        return 1
    try:
        _table(plan, runner.threads, args.results)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
