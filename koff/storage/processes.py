"""Several processes, as torchrun starts them, and one that writes."""

from __future__ import annotations

import collections
import contextlib
import datetime
import sys
from collections.abc import Iterator
from typing import Any

from ..errors import asker
from .space import DiskFull

# How often each thing was begun: the same number on every process that does it.
_times: collections.Counter[str] = collections.Counter()

# As long as torch's own collectives wait for a process that does not come.
_TO_BEGIN = datetime.timedelta(minutes=30)
# The process that writes may take as long as its disk does. If it dies, the others hear of it: its
# launcher ends them, or the store that they ask is gone with it.
_TO_END = datetime.timedelta(days=30)

_DONE, _FAILED, _FULL = "done", "failed: ", "full: "


def is_first() -> bool:
    """Return whether this process is the first of a distributed run, or alone."""
    dist = sys.modules.get("torch.distributed")  # who has not imported it is alone
    return not (dist and dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _store() -> Any:
    """Return the store through which the processes of a distributed run have found each other, None
    in a process that is alone."""
    dist = sys.modules.get("torch.distributed")
    if not (dist and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    return dist.distributed_c10d._get_default_store()


@contextlib.contextmanager
def one_writes(what: str) -> Iterator[bool]:
    """Let the first process of a distributed run do what is inside; the others wait for its end.

    No collective operation is used: a script may as well come here on its first process alone, as
    many do (``if rank == 0: koff.save(...)``). That waits for nobody.

    Args:
        what: is done, and where: a name for it, the same on every process.

    Yields:
        Whether this process is the one. The others are to do nothing, and wait behind the block.

    Raises:
        ValueError, DiskFull: on the others, with the first one's words, if it raised an error; or
            if it never came.
    """
    store = _store()
    if store is None:
        yield True
        return
    _times[what] += 1
    key = f"koff/{what}/{_times[what]}"
    if is_first():
        store.set(f"{key}/begun", "")
        outcome = _DONE
        try:
            yield True
        except BaseException as error:
            # A KeyError as a text would be one in quotation marks.
            words = error.args[0] if isinstance(error, KeyError) else error
            outcome = f"{_FULL if isinstance(error, DiskFull) else _FAILED}{words}"
            raise
        finally:
            store.set(key, outcome)
        return
    yield False
    try:
        store.wait([f"{key}/begun"], _TO_BEGIN)
    except RuntimeError:
        raise ValueError(
            f"{asker()}: the first process must come here too ({what}), got nobody for half an "
            "hour; give the same folder on every process"
        ) from None
    store.wait([key], _TO_END)
    outcome = store.get(key).decode()
    if outcome.startswith(_FULL):
        raise DiskFull(outcome.removeprefix(_FULL))
    if outcome.startswith(_FAILED):
        raise ValueError(outcome.removeprefix(_FAILED))


def said_by_first(what: str, text: str = "") -> str:
    """Return what the first process of a distributed run says, on all of them.

    Args:
        what: was done by ``one_writes`` just before, under the same name.
        text: what to say; that of the first process counts.
    """
    store, key = _store(), f"koff/{what}/{_times[what]}/said"
    if store is None:
        return text
    if is_first():
        store.set(key, text)
        return text
    return store.get(key).decode()
