"""Start a script of this folder, or a module, in one process or under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def torchrun(ranks: int, *options: str) -> list[str]:
    """The beginning of a command that starts ``ranks`` processes on this machine; on one machine
    alone, unless the options say how it finds the others."""
    where = () if any("--nnodes" in option for option in options) else ("--standalone",)
    start = (sys.executable, "-m", "torch.distributed.run")
    return [*start, *where, f"--nproc_per_node={ranks}", *options]


def environment() -> dict[str, str]:
    """The variables of a process that finds koff and the tests, and takes one thread."""
    there = os.environ.get("PYTHONPATH")  # of make test-few-bits
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), *([there] if there else [])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def run(command: list[str], cwd: Path | None = None) -> str:
    """Run a command that must work, with one thread a process, and return what it wrote."""
    env, pipe = environment(), subprocess.PIPE
    done = subprocess.run(
        command, env=env, cwd=cwd, stdout=pipe, stderr=subprocess.STDOUT, timeout=240
    )
    text = done.stdout.decode(errors="replace")
    assert done.returncode == 0, text[-8000:]
    return text


def launch(ranks: int, script: str, *arguments: object) -> str:
    """Run a script of tests/support with some arguments on ``ranks`` processes."""
    start = torchrun(ranks) if ranks > 1 else [sys.executable]
    return run([*start, str(TESTS / "support" / script), *map(str, arguments)])
