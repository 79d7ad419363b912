"""A command that runs beside the test, and what one does to it meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

from support.distributed import environment

PATIENCE = 120  # seconds; a start on two busy cores takes up to ten


class Started:
    """A command that has been started; its output is read line by line."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(
            command,
            env=environment() | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._grown = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            with self._grown:
                self.lines.append(line.rstrip())
                self._grown.notify_all()
        with self._grown:
            self.lines.append("(its output ends)")
            self._grown.notify_all()

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def await_line(self, part: str) -> None:
        """Wait until it has written a line with ``part``."""

        def is_over() -> bool:
            return any(part in line or line == "(its output ends)" for line in self.lines)

        with self._grown:
            self._grown.wait_for(is_over, PATIENCE)
        assert any(part in line for line in self.lines), self.text[-8000:]

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to it, or to one of the ranks that it has started."""
        os.kill(self.process.pid if rank is None else self._rank(rank), number)

    def _rank(self, rank: int) -> int:
        """The process that has this rank among those that torchrun has started."""
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for child in map(int, task.read_text().split()):
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in variables:
                return child
        raise AssertionError(f"no rank {rank} below {self.process.pid}")

    def end(self) -> int:
        """Wait for its end, and return its exit code."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code
