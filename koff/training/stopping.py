"""A run that is asked to stop: by SIGTERM, as schedulers send it, or by Ctrl-C.

transformers' own ``JITCheckpointCallback`` is not used. It knows SIGTERM alone; each process looks
at its own signal only, so that two ranks would stop at two steps and wait for each other for ever;
and what it writes before an optimiser's step has the random state of after the forward, so that the
next run draws other gates for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from ..storage.processes import is_first

# In the order in which they count, if both came.
SIGNALS = (signal.SIGINT, signal.SIGTERM)

_HEARD = {
    signal.SIGINT: (
        b"\nCtrl-C: the run stops after this step, with a checkpoint; once more: at once, without\n"
    ),
    signal.SIGTERM: b"\nSIGTERM: the run stops after this step, with a checkpoint\n",
}


class StopSignals:
    """Hears SIGINT and SIGTERM while a run trains, and leaves it to the run when to stop."""

    def __init__(self) -> None:
        self._heard: set[signal.Signals] = set()

    def heard(self) -> list[bool]:
        """Return of each of ``SIGNALS`` whether it came."""
        return [number in self._heard for number in SIGNALS]

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear the signals until the block ends.

        Raises:
            ValueError: Python hears signals in the main thread alone.
        """
        self._heard.clear()
        self._says = is_first()
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def pass_on(self) -> None:
        """Let a signal that came too late for the last step do what it does otherwise."""
        for number in SIGNALS:
            if number in self._heard:
                signal.raise_signal(number)

    def _hear(self, number: int, frame: object) -> None:
        if number in self._heard:
            # A scheduler tells every process, and torchrun tells its own again: the same SIGTERM.
            return
        self._heard.add(signal.Signals(number))
        if number == signal.SIGINT:
            # The operating system's own action: a second Ctrl-C ends the process even while it
            # waits in a collective for one that does not come.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._says:
            # Not print: a handler may run amid one, on the same buffer.
            os.write(2, _HEARD[signal.Signals(number)])
