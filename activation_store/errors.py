"""The errors that a user, a file or a machine can cause in a store, and the words for them.

    StoreError
    ├── NotAStoreError   nothing there, or no store
    ├── SchemaError      another version of the schema
    ├── ShardError       a Parquet file is missing, shortened or changed
    ├── LockedError      another process writes
    ├── WriteError       the machine refused a write
    ├── ContentError     rows, settings or a model that do not fit
    └── QueryError       SQL that is refused, fails, or takes too long

A message says what is wrong, where, what was found, what was wanted, and the way out. It quotes
stores that others made, so control characters in it are shown and never sent. Our own mistakes are
asserts.
"""

import errno
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from activation_store.printable import printable


class StoreError(Exception):
    """Root of every error of this package."""

    def __str__(self) -> str:
        return printable(super().__str__())


class NotAStoreError(StoreError):
    """There is nothing here, or something that is no store."""


class SchemaError(StoreError):
    """The store was written under another version of the schema."""


class ShardError(StoreError):
    """A Parquet file that the catalogue lists is missing, shortened or changed."""


class LockedError(StoreError):
    """Another process holds the store for writing."""


class WriteError(StoreError):
    """The machine refused a write: disk full, read-only folder, I/O error; the store is intact."""


class ContentError(StoreError):
    """Rows, settings or a model that do not fit the store they are written to."""


class QueryError(StoreError):
    """SQL that the store refuses to run, or that DuckDB could not run."""


class DroppedWarning(UserWarning):
    """Activations that a capture leaves out: not finite, beyond their type's range, of one sign."""

    def __str__(self) -> str:
        return printable(super().__str__())


def damaged_shard(fault: duckdb.Error, file: Path) -> ShardError:
    """Return the error to tell when DuckDB could not read a shard of the store at `file`."""
    return ShardError(
        f"{file.with_suffix('')}: {str(fault).splitlines()[0]} Bring the file back, or run "
        f"`lmmono store verify --repair {file}`, which drops only what is lost and says what."
    )


def _reason(fault: BaseException) -> str:
    number = getattr(fault, "errno", None)
    text = str(fault)
    if number == errno.ENOSPC or "No space left" in text:
        return "the disk is full; free some space and run again"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) or "Permission denied" in text:
        return "no permission to write there; check the owner and mode of the folder"
    return text.splitlines()[0] if text else type(fault).__name__


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Turn the machine's refusals while writing `path` into a `WriteError`.

    Raises:
        WriteError: the block raised an operating system, Arrow or DuckDB input/output error.
    """
    try:
        yield
    except (OSError, pa.ArrowIOError, duckdb.IOException, duckdb.FatalException) as fault:
        raise _refused(path, fault) from fault
    except duckdb.TransactionException as fault:  # how DuckDB tells a disk full at COMMIT
        if "No space left" not in str(fault):
            raise
        raise _refused(path, fault) from fault


@contextmanager
def interruptible() -> Generator[None]:
    """Let Ctrl-C within DuckDB be what it is elsewhere: DuckDB raises a RuntimeError for it.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    try:
        yield
    except RuntimeError as fault:
        if "query interrupted" not in str(fault).lower():
            raise
        raise KeyboardInterrupt from fault


def _refused(path: Path, fault: BaseException) -> WriteError:
    return WriteError(
        f"{path}: cannot write: {_reason(fault)}. What was committed before is intact."
    )
