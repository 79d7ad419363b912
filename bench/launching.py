"""The ways in which a kernel's launch can go, for what times one against the other."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from koffkernels import dispatch, replay

# What each leaves to Triton, or to the operation as it is written: as KOFF_REPLAY=0
# KOFF_DIRECT_LAUNCH=0, as KOFF_REPLAY=0, as nothing set, and as KOFF_PDL=1.
WAYS = ("triton", "direct", "replayed", "overlapped")


@contextlib.contextmanager
def launching(way: str, device: str) -> Iterator[None]:
    """Let launches go one of ``WAYS``; ``device`` is where replays are to be, "cuda" or "cpu"."""
    direct = importlib.import_module("koffkernels._triton.shared.direct")
    before = direct.ENABLED, replay.DEVICES
    direct.ENABLED = way != "triton"
    replay.DEVICES = [device] if way in ("replayed", "overlapped") else []
    try:
        with dispatch.programmatic(way == "overlapped"):
            yield
    finally:
        direct.ENABLED, replay.DEVICES = before


@contextlib.contextmanager
def plays() -> Iterator[list[int]]:
    """Count, as the only entry of what it gives, the calls that are replayed in the ``with``
    block."""
    tapes = importlib.import_module("koffkernels._triton.shared.tape")
    count, play = [0], tapes.Tape.play

    def counted(tape: Any, tensors: list[Tensor]) -> Any:
        count[0] += 1
        return play(tape, tensors)

    tapes.Tape.play = counted
    try:
        yield count
    finally:
        tapes.Tape.play = play
