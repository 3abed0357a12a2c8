"""Atomic writes: a file or a folder is there whole, or not at all.

Everything is written next to its place, synced, and renamed: a crash leaves the old state or the
new one. What the disk refuses becomes a `RunError`, since space and permissions are the user's.
"""

import errno
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from lmmono.errors import RunError


@contextmanager
def disk_faults(path: Path) -> Generator[None, None, None]:
    """Raise what the disk refuses inside the block as a `RunError` that names `path`."""
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers say it in the message only, tokenizers as a bare Exception
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        number = getattr(error, "errno", None)
        is_full = number in (errno.ENOSPC, errno.EDQUOT) or "(os error 28)" in str(error)
        way_out = "free some space" if is_full else "check the folder and its permissions"
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{path}: cannot be written: {reason}; {way_out}") from error


@contextmanager
def atomic_file(path: Path) -> Generator[Path, None, None]:
    """Give a temporary path next to `path`; it takes the place of `path` when the block succeeds.

    When the block fails the temporary file is removed and `path` is as before. One writer at a
    time: callers hold a lock on the folder, or write under a name of their own.

    Raises:
        RunError: The disk refuses.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        with disk_faults(path):
            yield partial
            sync(partial)
            partial.replace(path)
            sync(path.parent)
    except BaseException:
        with suppress(OSError):  # the fault that brought us here is the one to tell
            partial.unlink()
        raise


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file in place of `path`; text is UTF-8.

    Raises:
        RunError: The disk refuses.
    """
    with atomic_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(path: Path) -> Generator[Path, None, None]:
    """Give an empty folder next to `path`; it takes the place of `path` when the block succeeds.

    When the block fails the new folder is removed and `path` is as before. A folder cannot be
    replaced in one step, so between the two renames the old one is `<name>.old`:
    `recover_folder` puts it back after a crash there.

    Raises:
        RunError: The disk refuses.
    """
    partial, old = _partial(path), _old(path)
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    try:
        with disk_faults(path):
            partial.mkdir(parents=True)
            yield partial
            for file in partial.rglob("*"):
                sync(file)
            sync(partial)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.rename(old)
            partial.rename(path)
            sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Put back the old folder if a crash came between the two renames of `atomic_folder`."""
    if not path.exists() and _old(path).exists():
        _old(path).rename(path)


def remove_folder(path: Path) -> None:
    """Remove a folder of `atomic_folder` with what a crash may have left next to it."""
    for folder in (path, _old(path), _partial(path)):
        shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _old(path: Path) -> Path:
    return path.with_name(path.name + ".old")
