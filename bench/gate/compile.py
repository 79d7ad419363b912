"""The compile gate: every kernel, configuration and chip, compiled and checked without a GPU.

    python -m bench.gate --arch sm_80 sm_90 sm_100 [--json FILE] [--subset]
                                  [--kernel NAME ...] [--jobs N]

The launchers run on tensors without data, what they would launch is compiled by triton for each
chip, and each result is checked: no spills, shared memory within the chip's limit, the tensor-core
instruction that the kernel's file declares, prefill tiles of the declared size. Launches that need
the same machine code are compiled once. Exit status: 0 all good, 1 findings, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from koffkernels.checks import refuse

FIELDS = (
    "kernel",
    "arch",
    "dtype",
    "config",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "shared_limit",
    "mma",
)
_WHERE = "bench.gate"
_REPORT_EVERY = 20.0  # seconds between two progress lines, and writes of the unfinished file


class Unit(NamedTuple):
    """One thing to compile: a launch (``shared.launch.Launch``), a chip, and its row's labels."""

    launch: Any
    arch: str
    labels: dict[str, Any]

    @property
    def kernel(self) -> str:
        """Name of the kernel's function."""
        return self.launch.kernel.fn.__name__

    @property
    def shapes(self) -> list[str]:
        """The calls that need this machine code."""
        return list(self.labels["programs"])


def plan(archs: list[str], subset: bool = False, kernels: list[str] | None = None) -> list[Unit]:
    """Return what to compile, each different machine code once per chip.

    Args:
        archs: of "sm_80", "sm_90", "sm_100", "gfx942".
        subset: one model's shapes and each chip's default configurations; at least one unit of
            every kernel.
        kernels: names of kernels; None for all.

    Raises:
        ValueError: an unknown kernel, or one in ``_triton`` that no case launches.
    """
    from koffkernels._triton.shared.config import default_name

    from . import cases, compiling, settings

    present = cases.all_kernels()
    _check_names({name for _, name in present}, kernels)
    few, units, chosen = set(settings.subset()), {}, set()
    for at, file, case in _all_cases():
        tables = tables_of(file) if at in few else None
        for key, launch, labels in _launches(at, file, case):
            for arch in [arch for arch in archs if arch in _chips(case)]:
                own = Unit(launch, arch, labels | {"programs": {}})
                unit = units.setdefault((key, arch), own)
                unit.labels["programs"] |= labels["programs"]
                if unit.labels["config"]["name"] == "default":  # the name, once a case gives it
                    unit.labels["config"] = labels["config"]
                if tables is not None:
                    usual = [default_name(table, int(arch[3:])) for table in tables]
                    if case.config in ("default", *usual):
                        chosen.add((key, arch))
    _check_coverage(present, {(compiling.module_of(u.launch), u.kernel) for u in units.values()})
    if subset:
        seen = {(units[key].kernel, units[key].arch) for key in chosen}
        for key, unit in units.items():
            if (unit.kernel, unit.arch) not in seen:
                seen.add((unit.kernel, unit.arch))
                chosen.add(key)
        units = {key: unit for key, unit in units.items() if key in chosen}
    order = sorted(units.values(), key=_sort_key)
    return [unit for unit in order if kernels is None or unit.kernel in kernels]


def _chips(case: Any) -> tuple[str, ...]:
    """Return the chips that a case is for: AMD's take what is for all of NVIDIA's."""
    from . import settings

    return (*case.archs, "gfx942") if case.archs == settings.ARCHS else case.archs


def _all_cases() -> Iterator[tuple[Any, str, Any]]:
    from . import cases, settings

    for at in settings.settings():
        for file, case in cases.cases(at):
            yield at, file, case


def _launches(at: Any, file: str, case: Any) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """Yield (key of the machine code, launch, labels) of what one case launches."""
    from koffkernels._triton.shared import launch as common

    from . import compiling, settings

    dtypes = {dtype: name for name, dtype in settings.DTYPES.items()}
    with common.recording() as launches:
        case.run()
    for launch, key in zip(launches, compiling.signatures(launches), strict=True):
        own = compiling.module_of(launch) == file and case.of in compiling.name_of(launch)
        config = compiling.config_of(launch, case.config if own else "default")
        programs = {f"{at.name} {file} {case.where}": math.prod(launch.grid)}
        yield key, launch, {"dtype": dtypes[at.dtype], "config": config, "programs": programs}


def tables_of(file: str) -> list[dict[str, Any]]:
    """Return the tables of a kernel file's configurations: CONFIGS, or several of that ending."""
    from . import cases

    tables = vars(cases.module_named(file)).items()
    return [table for name, table in tables if name.endswith("CONFIGS")]


def _sort_key(unit: Unit) -> tuple:
    config = json.dumps(unit.labels["config"], sort_keys=True, default=str)
    return unit.kernel, int(unit.arch[3:]), unit.labels["dtype"], config


def _check_names(names: set[str], asked: list[str] | None) -> None:
    for name in asked or ():
        if name not in names:
            known = f"be one of {', '.join(sorted(names))}"
            refuse(_WHERE, "--kernel", known, name, "check the spelling")


def _check_coverage(present: set[tuple[str, str]], launched: set[tuple[str, str]]) -> None:
    missing = sorted(f"{file}.{name}" for file, name in present - launched)
    if missing:
        rule, step = "be launched by a case", "add it to FILES in bench/gate/cases.py"
        refuse(_WHERE, "every kernel", rule, f"none for {', '.join(missing)}", step)


def _work(units: list[Unit], pipe: Any) -> None:
    """Compile, in a process of its own, the units whose numbers come through the pipe, until None
    comes."""
    from . import compiling

    with contextlib.suppress(EOFError):  # the gate itself was stopped
        while (number := pipe.recv()) is not None:
            unit = units[number]
            pipe.send(compiling.row_of(unit.launch, unit.arch, **unit.labels))


class _Worker:
    """A process and the number of the unit it is at; a crash of the compiler ends only it."""

    def __init__(self, units: list[Unit]):
        # Launches hold jitted functions, which cannot be sent, so workers inherit them.
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(units, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.number: int | None = None

    def take(self, number: int | None) -> None:
        self.number = number
        self.pipe.send(number)

    def stop(self) -> None:
        if self.process.is_alive():
            self.take(None)
        self.process.join()
        self.pipe.close()


def compile_all(units: list[Unit], jobs: int) -> Iterator[dict[str, Any]]:
    """Compile every unit in ``jobs`` processes, and yield the rows as they are done.

    A process that dies in the compiler gives a row that says so.
    """
    from . import compiling

    todo = collections.deque(range(len(units)))
    busy: list[_Worker] = []
    try:
        while todo or busy:
            while todo and len(busy) < jobs:
                busy.append(_Worker(units))
                busy[-1].take(todo.popleft())
            ready = wait([worker.pipe for worker in busy])
            for worker in [w for w in busy if w.pipe in ready]:
                try:
                    row = worker.pipe.recv()
                except EOFError:
                    worker.process.join()
                    unit = units[worker.number]
                    row = compiling.blank_row(unit.launch, unit.arch, **unit.labels)
                    status = worker.process.exitcode
                    row["problems"] = [f"the compiler died with exit status {status}"]
                    busy.remove(worker)
                    worker.stop()
                else:
                    if todo:
                        worker.take(todo.popleft())
                    else:
                        busy.remove(worker)
                        worker.stop()
                yield row
    finally:
        for worker in busy:
            worker.process.terminate()
            worker.process.join()


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows so that a reader sees either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
    ) as file:
        file.write("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def summary(rows: list[dict[str, Any]]) -> str:
    """Return one line per kernel and chip: variants, most registers, spills, least warps on a
    multiprocessor, shared memory, mma."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["arch"]), []).append(row)
    width = max((len(kernel) for kernel, _ in groups), default=6)
    head = "variants registers spills warps  shared / limit   tensor cores"
    lines = [f"{'kernel':{width}s} arch   {head}"]
    for (kernel, arch), group in groups.items():
        done = [row for row in group if row["registers"] is not None]
        warps = [row["warps_per_sm"] for row in done if row["warps_per_sm"] is not None]
        kinds = sorted({kind for row in done for kind, count in row["mma"].items() if count})
        lines.append(
            f"{kernel:{width}s} {arch:6s} {len(group):8d} {_most(done, 'registers'):9d} "
            f"{_most(done, 'spill_bytes'):6d} {min(warps, default=0):5d} "
            f"{_most(done, 'shared_bytes'):7d} / "
            f"{group[0]['shared_limit']:6d}  {' '.join(kinds) or '-'}"
        )
    return "\n".join(lines)


def _most(rows: list[dict[str, Any]], field: str) -> int:
    return max((row[field] for row in rows), default=0)


def offenders(rows: list[dict[str, Any]]) -> list[str]:
    """Return one line per problem, with the kernel, chip, dtype and configuration that has it."""
    lines = []
    for row in rows:
        config = " ".join(f"{key}={value}" for key, value in row["config"].items())
        for problem in row["problems"]:
            lines.append(f"{row['kernel']} {row['arch']} {row['dtype']} [{config}]: {problem}")
    return lines


def run(units: list[Unit], jobs: int, path: Path | None = None) -> list[dict[str, Any]]:
    """Compile the units, writing the JSON file as rows come, and return the sorted rows."""
    rows: list[dict[str, Any]] = []
    reported = time.monotonic()
    with (
        # A folder of our own: the gate needs no writable HOME, and every result is fresh.
        tempfile.TemporaryDirectory(prefix="koffkernels-") as cache,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache),
    ):
        for row in compile_all(units, jobs):
            rows.append(row)
            if time.monotonic() - reported > _REPORT_EVERY:
                print(f"{len(rows)}/{len(units)}, {len(offenders(rows))} problems", flush=True)
                if path is not None:
                    write_json(path, rows)
                reported = time.monotonic()
    rows.sort(key=lambda row: (row["kernel"], int(row["arch"][3:]), row["dtype"]))
    if path is not None:
        write_json(path, rows)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gate",
        description="Compile and check every kernel for chips that need not be here.",
    )
    known = ("sm_80", "sm_90", "sm_100")
    parser.add_argument("--arch", nargs="+", default=list(known), choices=(*known, "gfx942"))
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--subset", action="store_true", help="one model, default configurations")
    parser.add_argument("--kernel", nargs="+", help="only these kernels")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    try:
        from koffkernels._triton.shared import launch as common
    except ModuleNotFoundError as error:
        parser.error(f"triton must be installed, got {error}; it exists for Linux only")
    if common.INTERPRETED or os.environ.get("KOFF_BACKEND") == "interpret":
        parser.error(
            "TRITON_INTERPRET and KOFF_BACKEND=interpret must not be set, got the interpreter, "
            "which replaces the compiler; unset them"
        )
    start = time.monotonic()
    try:
        units = plan(list(dict.fromkeys(options.arch)), options.subset, options.kernel)
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(units)} variants to compile", flush=True)
    rows = run(units, options.jobs, options.json)
    found = offenders(rows)
    print(summary(rows))
    seconds = time.monotonic() - start
    print(f"{len(rows)} variants compiled in {seconds:.0f} s, {len(found)} problems")
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
