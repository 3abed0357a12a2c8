"""The catalogue file of a store: where it lies, who reads and writes it, how a change is committed.

A commit changes a copy and puts it in place of the old file in one atomic step. A process that
reads the store keeps the file it opened; a process that is killed leaves the last commit as it was.
"""

import atexit
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path, PurePath

import duckdb

from activation_store.catalog import door
from activation_store.catalog.tables import (
    SCHEMA_VERSION,
    actual_checks,
    column_faults,
    count_rows,
    expected_checks,
    expected_tables,
    schema_sql,
)
from activation_store.catalog.views import (
    MACROS,
    VIEWS,
    create_views,
    identifier,
    listed_files,
    quoted,
)
from activation_store.errors import (
    LockedError,
    NotAStoreError,
    SchemaError,
    StoreError,
    damaged_shard,
    interruptible,
    writing,
)

COMMIT_WAIT_SECONDS = 60.0
"""How long a commit waits for another process to finish its own."""

_PATTERN = re.compile(r"[,*?\[\]{}\\]")
"""What DuckDB reads as a pattern, or as the end of a path in a list."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one store lies: the catalogue `file`, and the folder of its shards next to it."""

    file: Path

    @property
    def folder(self) -> Path:
        """Folder that holds the shards: `store/` next to `store.duckdb`."""
        return self.file.with_suffix("")

    @property
    def writer_lock(self) -> Path:
        """File that a writer locks from its first batch to its last commit."""
        return self.folder / ".writer"

    @property
    def commit_lock(self) -> Path:
        """File that is locked while a commit is made."""
        return self.folder / ".commit"

    @property
    def shards(self) -> Path:
        """The folder of the shards under a name that DuckDB takes literally."""
        return plain(self.file.parent) / self.folder.name

    def files(self) -> list[Path]:
        """Return what a connection that reads the store may open: catalogue and Parquet files."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        shards = [self.shards / name for name in names if name.endswith(".parquet")]
        return [*door.database_files(self.file), *shards]


def place(path: str | os.PathLike[str]) -> Place:
    """Return the place of a store, given its folder or its catalogue file; touches no disk state.

    Raises:
        StoreError: DuckDB cannot work under such a path.

    >>> place("runs/a/store.duckdb").folder.name
    'store'
    """
    file = Path(path)
    file = (file if file.suffix == ".duckdb" else file / "store.duckdb").absolute()
    if "?" in str(file) or _PATTERN.search(file.stem):
        # DuckDB cuts file names at `?`; the stem names the folder of shards in the catalogue's
        # views
        raise StoreError(
            f"{file}: DuckDB cannot keep a store under this name; use a path without '?', and a "
            "file name without , * [ ] { }."
        )
    return Place(file)


@cache
def plain(folder: Path) -> Path:
    """Return the folder under a name without pattern characters: itself, or a link to it.

    DuckDB reads `run[1]` as a pattern for `run1` and splits search paths at commas.
    """
    if not _PATTERN.search(str(folder)):
        return folder
    home, pid = Path(tempfile.mkdtemp(prefix="activation_store-")), os.getpid()
    # a forked child must not remove what its parent still uses
    atexit.register(lambda: os.getpid() == pid and shutil.rmtree(home, ignore_errors=True))
    link = home / "folder"
    link.symlink_to(folder)
    return link


# --- locks --------------------------------------------------------------------------------------


@contextmanager
def locked(file: Path, wait_seconds: float = 0.0) -> Generator[None]:
    """Hold an exclusive lock on `file`; the operating system frees it when the process ends.

    Raises:
        LockedError: another process holds it for longer than `wait_seconds`; names its id.
        WriteError: the lock file cannot be made.
    """
    with writing(file):
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + wait_seconds
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() >= deadline:
                holder = os.pread(handle, 20, 0).decode() or "unknown"
                raise LockedError(
                    f"{file.parent}: process {holder} is writing this store; wait for it to end, "
                    "or end it: its last commit stays."
                )
            time.sleep(0.01)  # polled: flock itself waits for ever or not at all
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}".encode(), 0)
        yield
    finally:
        os.close(handle)


class Presence:
    """A shared lock on folders that are being read, until it is collected or the process ends.

    It also works where nothing can be written. A shard that a compaction has replaced may be
    removed once no reader that knows of it is left.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        """Take a shared lock on each folder that exists; waits for a sweep to end."""
        handles: list[int] = []
        weakref.finalize(self, lambda: [os.close(handle) for handle in handles])
        for folder in folders:
            with suppress(FileNotFoundError):
                handles.append(os.open(folder, os.O_RDONLY))
                fcntl.flock(handles[-1], fcntl.LOCK_SH)


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


def sync(path: Path) -> None:
    """Wait until the file or folder has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def size_fault(path: Path, n_bytes: int) -> str | None:
    """Return what a look at the size of a file finds wrong, or None."""
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        return f"{path.name} is missing"
    return None if actual == n_bytes else f"{path.name} has {actual} bytes, want {n_bytes}"


# --- reading ------------------------------------------------------------------------------------


@contextmanager
def opened(where: Place) -> Generator[duckdb.DuckDBPyConnection]:
    """Give a connection that is in the catalogue and reads; raises as `attach` does."""
    with duckdb.connect(":memory:", config=door.SETTINGS) as con, interruptible():
        door.shut(con, where.files())
        attach(con, where, "store")
        con.execute("USE store")
        yield con


def read_meta(where: Place) -> dict[str, str]:
    """Return table `meta` of the store; raises as `attach` does."""
    with opened(where) as con:
        return dict(con.execute("SELECT key::VARCHAR, value::VARCHAR FROM meta").fetchall())


def attach(con: duckdb.DuckDBPyConnection, where: Place, name: str) -> dict[str, str]:
    """Attach the catalogue as `name` for reading, and return its table `meta`.

    Raises:
        NotAStoreError: there is no file, it is not a DuckDB file, or not one of ours.
        SchemaError: it was written under another version of the schema, or by a newer DuckDB.
        LockedError: another program has the file open for writing.
    """
    if not where.file.is_file():
        raise NotAStoreError(
            f"{where.file}: no store there; a capture makes one, or open(..., mode='w')."
        )
    try:
        con.execute(f"ATTACH {quoted(str(where.file))} AS {identifier(name)} (READ_ONLY)")
        check_contents(con, where, name)
        # as text, whatever a stranger has put there
        query = f"SELECT key::VARCHAR, value::VARCHAR FROM {identifier(name)}.meta"
        rows = con.execute(query).fetchall()
    except duckdb.Error as fault:
        raise unreadable(where, fault) from fault
    return check_meta(str(where.file), dict(rows))


def unreadable(where: Place, fault: duckdb.Error) -> StoreError:
    """Return the error to raise where DuckDB cannot open a catalogue file."""
    text = str(fault)
    if "set lock on file" in text:
        return LockedError(f"{where.file}: another program has it open for writing: {fault}")
    if "version number" in text:  # "Trying to read a database file with version number 999, ..."
        return SchemaError(
            f"{where.file}: written by a newer DuckDB, in a layout that the {duckdb.__version__} "
            f"installed here cannot read: {text.splitlines()[0]} Upgrade: pip install -U duckdb."
        )
    return NotAStoreError(f"{where.file}: not a DuckDB file, or damaged: {text.splitlines()[0]}")


def check_contents(con: duckdb.DuckDBPyConnection, where: Place, name: str) -> None:
    """Look whether the database `name` holds what a store holds, before any query reads from it.

    A view or macro runs whatever its maker wrote, so a table that is one, or another one of them,
    is refused; so are columns and checks that are computed. Reads DuckDB's own lists, which run
    nothing.

    A file is looked at once: DuckDB takes 60 ms of processor time to list its functions.

    Raises:
        NotAStoreError: a table is missing or is no base table, or there are other views, macros or
            expressions.
    """
    if (signature := _signature(where.file)) in _looked_at | _made_here:
        return
    names: dict[str, set[str]] = {}
    for kind, column, condition in (
        ("table", "table_name", "true"),
        ("view", "view_name", "NOT internal"),
        ("function", "function_name", "NOT internal"),
    ):
        rows = con.execute(
            # no parameter: at the first one DuckDB imports pandas, as long as the rest of an open
            f"SELECT {column} FROM duckdb_{kind}s() "
            f"WHERE database_name = {quoted(name)} AND {condition}"
        ).fetchall()
        names[kind] = {row[0] for row in rows}
    if "meta" not in names["table"] | names["view"]:
        raise NotAStoreError(
            f"{where.file}: a DuckDB file without the table `meta`, so not an activation store; "
            "give the path of a store.duckdb, or choose another name to create one."
        )
    odd = sorted(expected_tables().keys() & names["view"])
    odd += sorted((names["view"] - VIEWS - expected_tables().keys()) | (names["function"] - MACROS))
    if odd:
        raise NotAStoreError(
            f"{where.file}: holds a view or macro {odd[0]!r}, which a store has as a table or not "
            "at all, and which may run anything; nothing of it was run. Drop it with the program "
            "that made it, or ask for the store from somebody you trust."
        )
    rows = con.execute(
        # columns that are generated or have a default; `schema.sql` has none
        "SELECT 'column ' || table_name || '.' || column_name FROM duckdb_columns() "
        f"WHERE database_name = {quoted(name)} AND column_default IS NOT NULL"
    ).fetchall()
    computed = [column for (column,) in rows]
    computed += sorted(actual_checks(con, name) - expected_checks())
    if computed:
        raise NotAStoreError(
            f"{where.file}: {computed[0]} is computed by an expression, of which a store has "
            "none, and which may run for ever; nothing of it was run. Ask for the store from "
            "somebody you trust."
        )
    _looked_at.add(signature)


def check_columns(con: duckdb.DuckDBPyConnection, where: Place, name: str) -> None:
    """Look whether the tables of the database `name` have the columns that a store's have.

    `verify` does without, to say all that is wrong.

    Raises:
        NotAStoreError: a column is missing, of another type, or may be NULL where none is.
    """
    if (signature := _signature(where.file)) in _typed | _made_here:
        return
    if fault := next(column_faults(con, name), None):
        raise NotAStoreError(
            f"{where.file}: damaged: {fault}; `lmmono store verify` says what else is wrong."
        )
    _typed.add(signature)


_typed: set[tuple[int, ...]] = set()
"""Files whose columns were found to be a store's."""
_looked_at: set[tuple[int, ...]] = set()
"""Files that were found to hold what a store holds; a change of a file changes its signature."""
_made_here: set[tuple[int, ...]] = set()
"""Files that this process committed: their contents were looked at, their views are of now."""


def _signature(file: Path) -> tuple[int, ...]:
    state = file.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def check_meta(name: str, meta: dict[str, str]) -> dict[str, str]:
    """Return table `meta` of the store called `name` after a look at its version.

    Raises:
        NotAStoreError: it names no version or no id.
        SchemaError: it was written under another version of the schema.
    """
    version, store_id = meta.get("schema_version") or "", meta.get("store_id") or ""
    if not re.fullmatch(r"[0-9]{1,9}", version) or not re.fullmatch(r"[0-9a-zA-Z_-]+", store_id):
        raise NotAStoreError(f"{name}: table meta names no schema_version and store_id.")
    if int(version) != SCHEMA_VERSION:
        way_out = (
            "upgrade this package: pip install -U lmmono"
            if int(version) > SCHEMA_VERSION
            else "capture it again, or read it with the release of lmmono that wrote it"
        )
        raise SchemaError(
            f"{name}: written under schema version {version}, this package reads {SCHEMA_VERSION}; "
            f"{way_out}."
        )
    return meta


# --- writing ------------------------------------------------------------------------------------


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
        with suppress(SchemaError):  # a store of another version is one that may be replaced
            read_meta(where)
    with writing(where.file):
        where.folder.mkdir(parents=True, exist_ok=True)
    with _replacing(where) as draft, _connected(draft, where, schema_sql()) as con:
        return write_meta(con)


def write_meta(con: duckdb.DuckDBPyConnection) -> str:
    """Fill table `meta` of a new store and return its id."""
    facts = {
        "schema_version": str(SCHEMA_VERSION),
        # 48 random bits: names of shards of two stores do not meet
        "store_id": secrets.token_hex(6),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "created_by": f"duckdb {duckdb.__version__}",
    }
    con.executemany("INSERT INTO meta VALUES ($1, $2)", [list(fact) for fact in facts.items()])
    return facts["store_id"]


@contextmanager
def commit(where: Place) -> Generator[duckdb.DuckDBPyConnection]:
    """Give a connection to a private copy of the catalogue; put the copy in place at the end.

    Nothing changes for anyone before the block ends without an error; then everything does at once.
    The views follow the table `shards`. Commits of several processes take turns.

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
        for left_over in where.file.parent.iterdir():
            if left_over.name.startswith(f"{where.file.name}.draft"):
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
            _made_here.add(_signature(where.file))
            sync(where.file.parent)
        finally:
            with suppress(FileNotFoundError):
                draft.unlink()


@contextmanager
def _connected(draft: Path, where: Place, schema: str = "") -> Generator[duckdb.DuckDBPyConnection]:
    """Open the draft in one transaction that ends with new views and a checkpoint."""
    try:
        con = duckdb.connect(
            draft, config={**door.SETTINGS, "storage_compatibility_version": door.STORAGE_VERSION}
        )
    except duckdb.Error as fault:
        raise unreadable(where, fault) from fault
    try:
        with interruptible():
            # the views name the shards relative to the catalogue file
            con.execute(f"SET file_search_path = {quoted(str(plain(where.file.parent)))}")
            # half a million rows are inserted in a third of the time by one thread as by two
            con.execute("SET threads = 1")
            door.shut(con, door.database_files(draft), [where.shards, where.folder.name])
            if not schema:
                ((name,),) = con.execute("SELECT current_database()").fetchall()
                check_contents(con, where, name)
            con.execute("BEGIN")
            if schema:
                con.execute(schema)
            # the views cost as much as the rest of a small commit, and few commits list a shard
            has_views = not schema and _signature(where.file) in _made_here
            before = listed_files(con) if has_views else None
            yield con
            count_rows(con)
            try:
                if before is None or listed_files(con) != before:
                    ((store_id,),) = con.execute(
                        "SELECT value FROM meta WHERE key = 'store_id'"
                    ).fetchall()
                    create_views(con, PurePath(where.folder.name), store_id=store_id)
            except duckdb.Error as fault:
                raise damaged_shard(fault, where.file) from fault
            con.execute("COMMIT")
            con.execute("CHECKPOINT")
    finally:
        con.close()
