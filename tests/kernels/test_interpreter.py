"""Runs tests/kernels/interpreter, where Triton interprets the kernels, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def passed(which: str, *options: str) -> int:
    """How many tests passed; the child's own report is printed where one fails."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", which, *options, "tests/kernels/interpreter"],
        cwd=ROOT,
        env=os.environ | {"KOFF_BACKEND": "interpret"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout
    return int(re.search(r"(\d+) passed", result.stdout)[1])


def test_kernels_in_the_interpreter():
    """A shrinking number of tests fails too."""
    assert passed("not slow") >= 100


@pytest.mark.slow
def test_kernels_in_the_interpreter_that_take_long_or_memory():
    assert passed("slow", "-n", "auto") >= 10
