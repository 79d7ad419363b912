"""What koff.json holds as "metadata": any JSON values, but for the few names that the model card
and the commands read."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from ..errors import asker

# Up to here a float holds every whole number; the card formats numbers as floats, and one that is
# far longer cannot be.
_MOST = 2**53
_TEXTS = ("variant", "domain", "split")
_NUMBERS = ("perplexity", "bits_per_byte")


def plain_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a copy of what a caller wants to store, as JSON has it and as it can be read again.

    Args:
        metadata: JSON values; also paths (their text), dataclasses and what has ``to_dict``.

    Raises:
        ValueError: no mapping, values that JSON lacks, or a reserved name with another shape.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise ValueError(
            f"{asker()}: metadata must be a mapping of names to JSON values, "
            f"got {type(metadata).__name__}; write {{'base': ...}}"
        )
    values = dict(metadata)
    try:
        for kind in ("results", "tasks"):
            if isinstance(values.get(kind), (list, tuple)):
                values[kind] = plain_rows(values[kind])
        text = json.dumps(values, default=_plain, allow_nan=False, ensure_ascii=False)
        # To UTF-8, as the card is written: a lone surrogate, which JSON could escape, fails here.
        values = json.loads(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{asker()}: metadata must hold JSON values, without NaN and infinity, got {error}; "
            "convert or leave them out"
        ) from error
    for name in ("base", "revision"):
        value = values.get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"{asker()}: {name!r} in metadata must be a text or None, "
                f"got {repr(value)[:80]}; give the id as a text"
            )
    check_shapes(values, "metadata", "correct it, or choose another name")
    return values


def plain_rows(rows: Iterable[Any]) -> list[Any]:
    """Return rows of ``koff.evaluate`` as JSON has them: null for a number that is not finite,
    which a model that diverged gives."""
    rows = map(_converted, rows)
    return [{k: _finite(v) for k, v in r.items()} if isinstance(r, Mapping) else r for r in rows]


def check_shapes(metadata: dict[str, Any], place: str, step: str) -> None:
    """Refuse a reserved name that does not hold what the card and the commands read there.

    Args:
        metadata: JSON values.
        place: where they stand, for the error.
        step: what to do about it, for the error.

    Raises:
        ValueError: another shape.
    """
    for name, (rule, holds) in _SHAPES.items():
        value = metadata.get(name)
        if value is not None and not holds(value):
            raise ValueError(
                f"{asker()}: {name!r} in {place} must {rule}, got {repr(value)[:80]}; {step}"
            )


def _plain(value: Any) -> Any:
    """What stands in JSON for a value that it lacks, as ``json.dumps`` asks for it."""
    found = _converted(value)
    if found is value:
        raise TypeError(f"a {type(value).__name__}")
    return found


def _converted(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, type):  # the class of a row, say: its to_dict lacks the row
        return value
    if callable(getattr(value, "to_dict", None)):
        return value.to_dict()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_measure(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MOST
    return value is None or whole or isinstance(value, float)


def _is_named_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _is_results(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_row, value))


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or "memory" not in row:
        return False
    texts = [row.get(name) for name in _TEXTS] + [row["memory"] or ""]
    numbers = all(name in row and _is_measure(row[name]) for name in _NUMBERS)
    return numbers and all(isinstance(text, str) for text in texts)


def _is_task_results(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_task_row, value))


def _is_task_row(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("memory", 0), str | None):
        return False
    texts = all(isinstance(row.get(name), str) for name in ("variant", "task", "metric", "filter"))
    return texts and all(name in row and _is_measure(row[name]) for name in ("value", "stderr"))


def _is_added(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_record, value.values()))


def _is_record(value: Any) -> bool:
    texts = isinstance(value, dict) and all(isinstance(value.get(n), str) for n in _RECORD)
    return texts and isinstance(value.get("data"), dict)


_RECORD = ("source", "root")  # texts in what `koff add-memory` keeps of a run, beside its "data"
_SHAPES = {
    "data": ("be an object of names and texts", _is_named_texts),
    "general": ("be an object of names and texts", _is_named_texts),
    "added": ("be an object of names and what they were trained on", _is_added),
    "results": ("be rows of koff.evaluate", _is_results),
    "tasks": ("be rows of koff eval --tasks", _is_task_results),
}
