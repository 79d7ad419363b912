"""How much memory something takes: by torch's allocator, or by the system's word on the process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

_SAMPLED = 0.02  # seconds between two looks


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most that a call holds at once of memory that it has allocated on the CPU; by the
    allocator's own word, so that what an operator makes inside of itself counts too."""
    import torch

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = call()
    del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def resident() -> dict[str, int]:
    """Return the bytes of this process that are resident ("VmRSS"), and those of them that no file
    stands behind ("RssAnon"), as Linux tells them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {name: int(found[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon")}


@contextlib.contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Yield the most that ``resident`` says while the block runs; complete when it has ended."""
    peaks, ended = resident(), threading.Event()

    def look() -> None:
        for name, now in resident().items():
            peaks[name] = max(peaks[name], now)

    def watch() -> None:
        while not ended.wait(_SAMPLED):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()
        look()
