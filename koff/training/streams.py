"""Where a run stands in its streamed data: written into a checkpoint, and found again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.stream import StreamedBlocks
from ..errors import asked_by
from ..storage.files import File
from .checkpoint import EARLIER
from .schedule import Source

STREAMS = "koff_streams.json"


def write_streams(
    directory: str | Path, sources: Sequence[Source], bookmarks: dict[str, str], rows_per_step: int
) -> None:
    """Write where a run stands in its streams; nothing if it has none.

    Args:
        directory: an existing folder.
        sources: of the run.
        bookmarks: {source: bookmark of a row, none after which is behind the run}.
        rows_per_step: of all processes.
    """
    streams = {
        source.name: {
            "fingerprint": source.blocks.fingerprint(),
            "bookmark": json.loads(bookmarks.get(source.name, "null")),
        }
        for source in sources
        if isinstance(source.blocks, StreamedBlocks)
    }
    if streams:
        text = json.dumps({"rows_per_step": rows_per_step, "streams": streams}, indent=1)
        Path(directory, STREAMS).write_text(text, encoding="utf-8")


@asked_by("resume")
def resume_streams(
    directory: str | Path, sources: Sequence[Source], rows_per_step: int
) -> dict[str, str]:
    """Let the streams of a run go on where a checkpoint was written.

    The rows of a step are the same however many processes share them, so a run may go on with
    another number of them if a step has as many rows as before. Otherwise nobody could say which
    rows the steps until now have had.

    Args:
        directory: a complete checkpoint.
        sources: of the run.
        rows_per_step: of all processes.

    Returns:
        The bookmarks, as ``write_streams`` takes them.

    Raises:
        ValueError: streams or steps other than the checkpoint's.
    """
    blocks = {s.name: s.blocks for s in sources if isinstance(s.blocks, StreamedBlocks)}
    path = Path(directory, STREAMS)
    saved: dict[str, Any] = File(path).json() if path.is_file() else {"streams": {}}
    streams = saved.get("streams")
    if not isinstance(streams, dict) or set(streams) != set(blocks):
        got = sorted(streams) if isinstance(streams, dict) else repr(streams)[:80]
        raise ValueError(
            f"resume: the streamed sources must be {got}, as the checkpoint says, got "
            f"{sorted(blocks)}; change `streaming` back, or start anew"
        )
    if not blocks:
        return {}
    if saved.get("rows_per_step") != rows_per_step:
        raise ValueError(
            "resume: a step over streamed data must have as many rows as before, "
            f"{saved.get('rows_per_step')}, got {rows_per_step}; change batch_size or "
            "gradient_accumulation so that their product with the processes is the same"
        )
    bookmarks = {}
    for name, stream in blocks.items():
        try:
            if streams[name]["fingerprint"] != stream.fingerprint():
                raise ValueError("other files or settings")
            bookmark = streams[name]["bookmark"]
            if bookmark is not None:  # else no row of it was used yet
                stream.resume(bookmark)
                bookmarks[name] = json.dumps(bookmark)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"resume: the place in {name!r} must be one in the same data, got {error}; bring "
                f"the data back, or {EARLIER}"
            ) from None
    return bookmarks
