"""Who reads a store: a shared lock on its folder, which also works where nothing can be written.

A shard that a compaction has replaced may be removed once no reader that knows of it is left.
"""

import fcntl
import os
import weakref
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path


class Presence:
    """Marks the folders as being read until it is collected, or the process ends in any way."""

    def __init__(self, folders: Iterable[Path]) -> None:
        """Take a shared lock on each folder that there is; waits for a sweep to end."""
        handles: list[int] = []
        weakref.finalize(self, _close, handles)
        for folder in folders:
            with suppress(FileNotFoundError):
                handles.append(os.open(folder, os.O_RDONLY))
                fcntl.flock(handles[-1], fcntl.LOCK_SH)


def _close(handles: list[int]) -> None:
    for handle in handles:
        os.close(handle)


@contextmanager
def unread(folder: Path) -> Generator[bool]:
    """Tell whether nobody reads the folder; if so, none begins to within the block."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)
