"""Files that survive: written whole or not at all, by one process at a time.

What the disk refuses is told as a `RunError`, since space and permissions are the user's to give.
"""

import errno
import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from lmmono.errors import RunError


@contextmanager
def locked(folder: Path) -> Generator[None, None, None]:
    """Hold the folder for this process; the lock goes with the process, however it ends."""
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
def disk_faults(path: Path) -> Generator[None, None, None]:
    """Tell what the disk refuses as the user's error that it is."""
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers say it in the message only, tokenizers as a bare Exception
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        number = getattr(error, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT) or "(os error 28)" in str(error)
        way_out = "free some space" if full else "check the folder and its permissions"
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{path}: cannot be written: {reason}; {way_out}") from error


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part."""
    fresh = path.with_name(path.name + ".tmp")
    with disk_faults(path):
        with fresh.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        flush(path.parent)


def flush(path: Path) -> None:
    """Make a file's bytes, or a folder's names, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
