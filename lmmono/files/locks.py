"""Locks on folders; the operating system drops a lock with its process, however that ends."""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from lmmono.errors import RunError
from lmmono.files.atomic import disk_faults


@contextmanager
def lock_folder(folder: Path) -> Generator[None, None, None]:
    """Hold a run folder for this process.

    Raises:
        RunError: Another process holds it, or the disk refuses.
    """
    path = folder / ".lock"
    with disk_faults(path):
        lock = path.open("a+")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise RunError(
                f"{folder}: another process (id {owner}) works in this run; wait for it, or choose "
                "another folder (name=... or out=...)"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextmanager
def wait_for_lock(path: Path) -> Generator[None, None, None]:
    """Hold a lock file, waiting for the process that has it: what it makes is then there."""
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
