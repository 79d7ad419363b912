"""Tests on the GPU, one process per dtype, and compute-sanitizer's memcheck over small shapes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from koffkernels.routes import ROUTES

from . import device
from .context import Bench
from .results import Case, Deadline, Results

ROOT = Path(__file__).parents[2]
KERNEL_TESTS = "tests/kernels/test_gpu_kernels.py"
MARK = "mark." + "gpu"
DTYPES = ("bf16", "fp16", "fp32")
STOPPING = 6.0  # seconds that a process gets to end by itself
MEMCHECK_SECONDS = 90.0
SANITIZER = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
REFUSALS = ("device not supported", "unable to", "failed to initialize")


def other_tests() -> list[str]:
    """Files with tests marked ``gpu``, other than the one of the kernels."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [p.relative_to(ROOT).as_posix() for p in files if MARK in p.read_text("utf-8")]
    return [name for name in marked if name != KERNEL_TESTS]


def pytest_row(name: str, arguments: list[str], seconds: float) -> dict:
    """Run pytest in a process of its own and count what it says.

    Args:
        name: of the row.
        arguments: files and options.
        seconds: after which it is stopped.
    """
    start, workers = time.monotonic(), []
    if importlib.util.find_spec("xdist") is not None:  # most of the time goes into compiling
        workers = ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider"]
        command += ["--durations=5", f"--junitxml={report}", *workers, *arguments]
        code, output = _process(command, seconds)
        found = _counts(report) if report.exists() else _counted(output)
        row = {"name": name, "exit_code": code, **found}
    row["seconds"] = round(time.monotonic() - start, 1)
    row["text"] = f"{row['passed']} passed, {row['failed']} failed, {row['seconds']:.0f} s"
    if code is None:
        row["text"] += ", stopped by the clock"
    if row["failures"]:
        first = row["failures"][0]
        row["text"] += f"; first: {first['test']}: {first['why'][:80]}"
    if code != 0:
        row["output"] = device.without_paths(output, 3000)
    return row


def _counted(output: str) -> dict[str, object]:
    """What ``_counts`` gives, from pytest's lines: a process that was killed leaves no report."""
    done = re.findall(r"^(?:\[gw\d+\] \[ *\d+%\] )?(PASSED|FAILED|ERROR) (\S+)", output, re.M)
    done += [(b, a) for a, b in re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR)", output, re.M)]
    bad = list(dict.fromkeys(test.split("::")[-1] for word, test in done if word != "PASSED"))
    return {
        "passed": sum(word == "PASSED" for word, _ in done),
        "failed": len(bad),
        "skipped": 0,
        "failures": [{"test": test, "why": ""} for test in bad],
    }


def _process(
    command: list[str], seconds: float, extra: dict[str, str] | None = None
) -> tuple[int | None, str]:
    """(exit code, None if stopped; what it printed)."""
    env = os.environ | {"PYTHONUNBUFFERED": "1"} | (extra or {})
    env.pop("KOFF_BACKEND", None)
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipe) as process:
        try:
            output, code = process.communicate(timeout=max(seconds, 1.0))[0], process.returncode
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then reports on what it has done
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=STOPPING)
            # All that it started too: a worker left on the GPU would disturb the next part.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            output, code = process.communicate()[0], None
    return code, output.decode(errors="replace")


def _counts(report: Path) -> dict[str, object]:
    """passed, failed, skipped and the failures of a JUnit report; zeros where there is none."""
    cases = []
    if report.exists():
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failures, skipped = [], 0
    for case in cases:
        bad = [child for child in case if child.tag in ("failure", "error")]
        skipped += any(child.tag == "skipped" for child in case)
        if bad:
            why = device.without_paths((bad[0].get("message") or "")[:300], 300)
            failures.append({"test": case.get("name"), "why": why})
    return {
        "passed": len(cases) - len(failures) - skipped,
        "failed": len(failures),
        "skipped": skipped,
        "failures": failures,
    }


def memcheck_row(bench: Bench, route: str, seconds: float) -> dict:
    """compute-sanitizer over ``bench.gpu.smallest`` on one route, or why that could not be done.

    torch's caching allocator is switched off, because inside one of its large blocks a read past
    the end of a tensor is not out of bounds.
    """
    program = [sys.executable, "-m", "bench.gpu.smallest", "--route", route]
    tool = next((found for name in SANITIZER if (found := shutil.which(name))), None)
    row = {"name": f"memcheck-{route}", "tool": None if tool is None else "compute-sanitizer"}
    if bench.dry:
        tool, program = None, [*program, "--dry-run"]
    if tool is None:
        code, output = _process(program, seconds)
        status = "no compute-sanitizer; run without it"
        return row | {"status": status, "exit_code": code, "output": _tail(output)}
    options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "99"]
    extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code, output = _process([tool, *options, *program], seconds, extra)
    return row | {"status": _status(code, output), "exit_code": code, "output": _tail(output)}


def _tail(output: str) -> str:
    return device.without_paths(output, 2000)


def _status(code: int | None, output: str) -> str:
    """clean, errors, out of time, refused by the machine, or the program failed by itself."""
    if code is None:
        return "out of time"
    summary = re.search(r"ERROR SUMMARY: (\d+) error", output)
    finished = re.search(r"\b[1-9]\d* cases ran", output)
    if code == 0 and summary and summary[1] == "0" and finished:
        return "clean"
    if summary and summary[1] != "0":
        return f"{summary[1]} errors"
    if any(words in output.lower() for words in REFUSALS):
        return "refused"
    return "failed"


def cases(bench: Bench, deadline: Deadline) -> Iterator[Case]:
    """Tests of the kernels by dtype, then the rest of them, memcheck, other tests."""

    def tests(name: str, *arguments: str) -> Case:
        return name, lambda: [pytest_row(name, list(arguments), deadline.left() - STOPPING)]

    def memcheck(route: str) -> Case:
        seconds = MEMCHECK_SECONDS
        name = f"memcheck-{route}"
        return name, lambda: [memcheck_row(bench, route, min(seconds, deadline.left() - STOPPING))]

    # The dtype of real models first; fp32's kernels take longest to compile.
    bf16, *others = DTYPES
    yield tests(f"tests-{bf16}", KERNEL_TESTS, "-k", bf16)
    yield tests("tests-any-dtype", KERNEL_TESTS, "-k", " and ".join(f"not {d}" for d in DTYPES))
    yield memcheck(ROUTES[0])
    for dtype in others:
        yield tests(f"tests-{dtype}", KERNEL_TESTS, "-k", dtype)
    for route in ROUTES[1:]:
        yield memcheck(route)
    for path in other_tests():
        yield tests(path.removeprefix("tests/").removesuffix(".py"), path)


def run(bench: Bench, results: Results, deadline: Deadline, only: tuple[str, ...]) -> None:
    """Run everything; nothing is measured."""
    results.run(cases(bench, deadline), deadline, only)


def failed(rows: list[dict], dry: bool) -> bool:
    """Did a test fail, did pytest not finish, or did memcheck find an error?

    In a dry run all tests are deselected, for which pytest's exit code is 5.
    """
    for row in rows:
        status = row.get("status")
        if status is None:
            if row.get("exit_code") not in ((0, 5) if dry else (0,)):
                return True
        elif status == "failed" or status.endswith("errors"):
            return True
    return False
