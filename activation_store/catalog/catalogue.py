"""The catalogue file of a store: where it lies, who may write it, and how a change is committed.

A commit changes a copy and puts it in place of the old file in one step. A process that reads the
store keeps the file it opened; a process that is killed leaves the last commit as it was.
"""

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path, PurePath

import duckdb

from activation_store.catalog.views import create_views, quoted
from activation_store.errors import (
    LockedError,
    NotAStoreError,
    StoreError,
    damaged_shard,
    writing,
)

SCHEMA_VERSION = 2
"""Version of `schema.sql`; a change of it needs a step in `migrations.py`."""

COMMIT_WAIT_SECONDS = 60.0
"""How long a commit waits for another process to finish its own."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one store lies: the catalogue `file`, and the folder of its shards beside it."""

    file: Path

    @property
    def folder(self) -> Path:
        """Folder that holds the shards: `store/` beside `store.duckdb`."""
        return self.file.with_suffix("")

    @property
    def writer_lock(self) -> Path:
        """File that a writer locks from its first batch to its last commit."""
        return self.folder / ".writer"

    @property
    def commit_lock(self) -> Path:
        """File that is locked while a commit is made."""
        return self.folder / ".commit"


def place(path: str | os.PathLike[str]) -> Place:
    """Return the place of a store, given its folder or its catalogue file; touches no disk state.

    >>> place("runs/a/store.duckdb").folder.name
    'store'
    """
    given = Path(path)
    file = given if given.suffix == ".duckdb" else given / "store.duckdb"
    return Place(file.absolute())


def schema_sql() -> str:
    """Return the text of `schema.sql`."""
    return files("activation_store").joinpath("catalog/schema.sql").read_text()


@contextmanager
def locked(file: Path, wait_seconds: float = 0.0) -> Generator[None]:
    """Hold an exclusive lock on `file`; the system frees it when the process ends in any way.

    Raises:
        LockedError: another process holds it for longer than `wait_seconds`; names its id.
        WriteError: the lock file cannot be made.
    """
    with writing(file):
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _acquire(handle, file, time.monotonic() + wait_seconds)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}".encode(), 0)
        yield
    finally:
        os.close(handle)


def _acquire(handle: int, file: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = os.pread(handle, 20, 0).decode() or "unknown"
                raise LockedError(
                    f"{file.parent}: process {holder} is writing this store; wait for it to end, "
                    "or end it: its last commit stays."
                ) from None
            time.sleep(0.01)
        else:
            return


def create(where: Place, overwrite: bool = False) -> str:
    """Create an empty store and return its id.

    With `overwrite` an existing store is replaced in one step; its shards are removed after that.

    Raises:
        StoreError: there is a store already and `overwrite` is false.
        NotAStoreError: `overwrite` is set, but the file there is not a store.
    """
    if where.file.exists() and not overwrite:
        raise StoreError(
            f"{where.file}: there is a store already; open it with mode='a' to add to it, or with "
            "mode='w', overwrite=True to lose it."
        )
    if where.file.exists():
        read_meta(where)
    with writing(where.file):
        where.folder.mkdir(parents=True, exist_ok=True)
    store_id = secrets.token_hex(6)
    with _replacing(where) as draft, _connected(draft, where) as con:
        con.execute(schema_sql())
        facts = {
            "schema_version": str(SCHEMA_VERSION),
            "store_id": store_id,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "created_by": f"duckdb {duckdb.__version__}",
        }
        con.executemany("INSERT INTO meta VALUES ($1, $2)", [list(f) for f in facts.items()])
    return store_id


@contextmanager
def commit(where: Place) -> Generator[duckdb.DuckDBPyConnection]:
    """Give a connection to a private copy of the catalogue; put the copy in place at the end.

    Nothing changes for anyone before the block ends without an error; then everything does at once.
    The views are rebuilt from the table `shards`. Commits of several processes take turns.

    Raises:
        NotAStoreError: there is no store at this place.
        LockedError: another process has been committing for `COMMIT_WAIT_SECONDS`.
        ShardError: a shard that is listed at the end cannot be read.
        WriteError: the machine refused a write.
    """
    if not where.file.is_file():
        raise NotAStoreError(f"{where.file}: no store there; create it with mode='w'.")
    with _replacing(where) as draft:
        shutil.copyfile(where.file, draft)
        with _connected(draft, where) as con:
            yield con


@contextmanager
def _replacing(where: Place) -> Generator[Path]:
    """Give the path of a draft that replaces the catalogue file when the block succeeds."""
    with locked(where.commit_lock, COMMIT_WAIT_SECONDS), writing(where.file):
        for left_over in where.file.parent.glob(f"{where.file.name}.draft*"):
            left_over.unlink()
        if (wal := where.file.with_name(where.file.name + ".wal")).exists():
            raise LockedError(
                f"{wal}: another program has this catalogue open for writing, or was killed while "
                f"it had; close it, or run `duckdb {where.file}` once to let DuckDB recover."
            )
        draft = where.file.with_name(f"{where.file.name}.draft")
        try:
            yield draft
            sync(draft)
            os.replace(draft, where.file)
            sync(where.file.parent)
        finally:
            with suppress(FileNotFoundError):
                draft.unlink()


@contextmanager
def _connected(draft: Path, where: Place) -> Generator[duckdb.DuckDBPyConnection]:
    """Open the draft in one transaction that ends with new views and a checkpoint."""
    con = duckdb.connect(draft)
    try:
        con.execute("SET file_search_path = $1", [str(where.file.parent)])
        con.execute("BEGIN")
        yield con
        try:
            create_views(con, PurePath(where.folder.name))
        except duckdb.Error as fault:
            raise damaged_shard(fault, where.file) from fault
        con.execute("COMMIT")
        con.execute("CHECKPOINT")
    finally:
        con.close()


def sync(path: Path) -> None:
    """Wait until the file or folder has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_meta(where: Place) -> dict[str, str]:
    """Return table `meta` of the store; raises as `attach` does."""
    with duckdb.connect(":memory:") as con:
        return attach(con, where, "opened")


def attach(con: duckdb.DuckDBPyConnection, where: Place, name: str) -> dict[str, str]:
    """Attach the catalogue as `name`, an SQL identifier, and return its table `meta`.

    Raises:
        NotAStoreError: there is no file, it is not a DuckDB file, or not one of ours.
        LockedError: another program has the file open for writing.
    """
    if not where.file.is_file():
        raise NotAStoreError(
            f"{where.file}: no store there; a capture makes one, or open(..., mode='w')."
        )
    try:
        con.execute(f"ATTACH {quoted(str(where.file))} AS {name} (READ_ONLY)")
        return dict(con.execute(f"SELECT key, value FROM {name}.meta").fetchall())
    except duckdb.CatalogException as fault:
        raise NotAStoreError(
            f"{where.file}: a DuckDB file without the table `meta`, so not an activation store; "
            "give the path of a store.duckdb, or choose another name to create one."
        ) from fault
    except duckdb.Error as fault:
        if "set lock on file" in str(fault):
            raise LockedError(
                f"{where.file}: another program has it open for writing: {fault}"
            ) from fault
        raise NotAStoreError(
            f"{where.file}: not a DuckDB file, or damaged: {str(fault).splitlines()[0]}"
        ) from fault
