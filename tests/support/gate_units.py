"""Fewer units of the compile gate than its own subset has."""

from __future__ import annotations

from collections.abc import Iterable

from bench.gate.compile import Unit


def one_of_each(units: Iterable[Unit]) -> list[Unit]:
    """Return one unit of each kernel, chip and configuration with memory ids, and one without."""
    found: dict[tuple, Unit] = {}
    for unit in units:
        key = unit.kernel, unit.arch, unit.labels["config"]["name"], "mixed" in unit.shapes[0]
        found.setdefault(key, unit)
    return list(found.values())
