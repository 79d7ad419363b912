"""Several processes, as torchrun starts them, and one that writes."""

from __future__ import annotations

import collections
import contextlib
import datetime
from collections.abc import Iterator

import torch.distributed as dist

# How often each thing was done: the same number on every process that does it.
_times: collections.Counter[str] = collections.Counter()

# The process that writes needs as long as its disk takes. If it dies the others hear of it: its
# launcher ends them, or the store that they ask is gone with it.
_A_WHILE = datetime.timedelta(days=7)


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
        ValueError: on the others, with the first one's words, if it raised an error.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield True
        return
    # The store through which the processes have found each other.
    store = dist.distributed_c10d._get_default_store()
    _times[what] += 1
    key = f"koff/{what}/{_times[what]}"
    if dist.get_rank() == 0:
        outcome = "ended without an error"
        try:
            yield True
        except BaseException as error:
            outcome = f"failed: {error}"
            raise
        finally:
            store.set(key, outcome)
    else:
        yield False
        store.wait([key], _A_WHILE)
        outcome = store.get(key).decode()
        if outcome.startswith("failed: "):
            raise ValueError(outcome.removeprefix("failed: "))
