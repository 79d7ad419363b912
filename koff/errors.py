"""Who asked: the first words of an error, said once around a public function.

Every error of koff is one sentence: ``<who asked>: <what> must <rule>, got <value>; <next step>``.
A function deep inside, which serves several callers, cannot know who asked, and need not be told:

    with asked_by("koff.load"):  # or @asked_by("koff.load")
        ...
            raise ValueError(f"{asker()}: koff.json must be JSON, got ...; copy the folder again")
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from contextvars import ContextVar

_ASKER: ContextVar[str] = ContextVar("koff_asker", default="koff")


@contextlib.contextmanager
def asked_by(name: str) -> Iterator[None]:
    """Let errors raised inside begin with ``name``; a context manager, and a decorator.

    Args:
        name: what a user would recognise: "koff.load", "memory 'fr'".
    """
    token = _ASKER.set(name)
    try:
        yield
    finally:
        _ASKER.reset(token)


def asker() -> str:
    """Return who asked, for the beginning of an error."""
    return _ASKER.get()


class Stopped(Exception):
    """The run has ended early, as a signal asked it to, with a checkpoint.

    Args:
        text: what happened and how to go on.
        by: the signal.
    """

    def __init__(self, text: str, by: signal.Signals):
        super().__init__(text)
        self.by = by
