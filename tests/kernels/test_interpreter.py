"""Runs tests/kernels/interpreter, where Triton interprets the kernels, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_kernels_in_the_interpreter():
    """The child's own report is printed where it fails; a shrinking number of tests fails too."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/kernels/interpreter"],
        cwd=ROOT,
        env=os.environ | {"KOFF_BACKEND": "interpret"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= 100 and "skipped" not in result.stdout
