"""What differs between the two places a store can be in: a folder of its own, or a shared lake.

`Store` is the same for both. A backend connects DuckDB to the tables and shards, commits a change,
and knows how to reach a shard's file.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import duckdb

from activation_store.catalog import catalogue, door
from activation_store.catalog.catalogue import Place, size_fault
from activation_store.catalog.tables import expected_tables
from activation_store.catalog.views import create_views, further_views, identifier
from activation_store.errors import NotAStoreError, ShardError, StoreError, damaged_shard
from activation_store.shards.names import (
    Shard,
    listed_names,
    listed_states,
    load_state,
    state_file,
    unlisted,
)
from activation_store.shards.shard_folder import ShardFolder

if TYPE_CHECKING:
    from activation_store.catalog.compaction import Compaction, Sizes
    from activation_store.lake.publishing import Publication
else:  # for annotations only: these take numba to import
    Compaction = Publication = Sizes = object

Mode = Literal["r", "w", "a"]
Outcome = TypeVar("Outcome")
Connection = duckdb.DuckDBPyConnection
Version = tuple[int, ...]

_SHARD_SUFFIX = ".parquet"


class LostState(NamedTuple):
    """The state of a writer whose file is damaged or gone."""

    key: str
    """Key in table `writer_state`."""
    file: str


class ConnectionOutdated(Exception):  # noqa: N818 - internal, never seen by a caller
    """A commit listed shards after the connection was shut; connect again."""


@runtime_checkable
class Backend(Protocol):
    """One place of a store."""

    is_lake: bool

    @property
    def path(self) -> Path:
        """What messages call the store: a file, or the address of a lake without its password."""
        ...

    @property
    def files(self) -> ShardFolder:
        """Where the shards lie."""
        ...

    def folder_place(self) -> Place:
        """Return the place that captures are written to.

        Raises:
            StoreError: it is a lake.
        """
        ...

    def create(self, overwrite: bool) -> None:
        """Make an empty store; raises as `activation_store.open` does."""
        ...

    def read_folders(self) -> Sequence[Path]:
        """Return the folders whose files an open reader keeps from removal."""
        ...

    def connect(
        self,
        mode: Mode,
        attached: Mapping[str, Place],
        trusted: bool,
        limits: door.QueryLimits,
    ) -> Connection:
        """Return a shut connection with every table, view and macro; raises as `open` does."""
        ...

    def version(self, con: Connection) -> Version:
        """Return what changes with every commit that lists other shards."""
        ...

    def update(self, con: Connection) -> bool:
        """Show `con` the last commit; False where it has to be connected anew."""
        ...

    def disconnect(self) -> None:
        """Let go of the last connection."""
        ...

    def commit(self, work: Callable[[Connection], Outcome], *, tables: Iterable[str]) -> Outcome:
        """Run `work` in one transaction, atomic, in turn with others.

        Args:
            work: changes `tables` by the connection that it is given.
            tables: those that `work` may change.
        """
        ...

    def checking(self) -> AbstractContextManager[Connection]:
        """Give a connection that is in the catalogue, also of a store too damaged to be opened."""
        ...

    def state_faults(self, con: Connection) -> dict[LostState, str]:
        """Return what is wrong with the states of writers."""
        ...

    def left_over(self, con: Connection) -> tuple[str, ...]:
        """Return files that no commit lists."""
        ...

    def after_drop(self, con: Connection, shard: Shard) -> str:
        """Do what a lost shard asks for besides its row, and return what to add to the report."""
        ...

    def local_folder(self, hooks: Sequence[str], copy_to: str | os.PathLike[str] | None) -> Path:
        """Return a folder of this machine with the vectors of these hooks."""
        ...

    def publish(self, source: Place) -> Publication:
        """Take in what a store has committed."""
        ...

    def compact(self, keep_seconds: float, sizes: Sizes | None) -> Compaction:
        """Merge small shards."""
        ...

    def explain(self, fault: duckdb.Error) -> StoreError | None:
        """Return the error to raise where a query could not read a shard; None for other faults."""
        ...

    def redact(self, text: str) -> str:
        """Return a message of DuckDB with the names that people know, and without passwords."""
        ...


class FolderBackend:
    """A store in a folder: `store.duckdb`, and its shards in `store/` next to it."""

    is_lake = False

    def __init__(self, place: Place) -> None:
        self._place = place
        self._files = ShardFolder.local(place.folder)

    @property
    def path(self) -> Path:
        return self._place.file

    @property
    def files(self) -> ShardFolder:
        return self._files

    def folder_place(self) -> Place:
        return self._place

    def create(self, overwrite: bool) -> None:
        catalogue.create(self._place, overwrite)

    def read_folders(self) -> Sequence[Path]:
        return [self._place.folder]

    def connect(
        self,
        mode: Mode,
        attached: Mapping[str, Place],
        trusted: bool,
        limits: door.QueryLimits,
    ) -> Connection:
        places = {"": self._place, **attached}
        con = duckdb.connect(":memory:", config=door.THREADS if trusted else door.SETTINGS)
        try:
            if not trusted:
                door.shut(
                    con,
                    [file for place in places.values() for file in place.files()],
                    limits=limits,
                )
            else:
                con.execute("SET GLOBAL parquet_metadata_cache = true")
            attach_stores(con, places)
        except BaseException:
            con.close()
            raise
        return con

    def version(self, con: Connection) -> Version:
        try:
            state = self.path.stat()
        except FileNotFoundError:
            return (0, 0)
        return state.st_ino, state.st_mtime_ns

    def update(self, con: Connection) -> bool:
        return False

    def disconnect(self) -> None:
        pass

    def commit(self, work: Callable[[Connection], Outcome], *, tables: Iterable[str]) -> Outcome:
        with catalogue.commit(self._place) as con:
            return work(con)

    def checking(self) -> AbstractContextManager[Connection]:
        return catalogue.opened(self._place)

    def state_faults(self, con: Connection) -> dict[LostState, str]:
        from activation_store.write import state

        faults: dict[LostState, str] = {}
        rows = con.execute("SELECT key, value FROM writer_state ORDER BY key").fetchall()
        for key, value in rows:
            file, data = state_file(bytes(value)), bytes(value)
            fault = None if file is None else file.fault(self._place.folder)
            if fault is not None and file is not None:
                # a writer removes its last state when it commits the next
                with catalogue.opened(self._place) as now:
                    if file in listed_states(now).values():
                        faults[LostState(key, file.file)] = fault
                continue
            try:
                state.from_bytes(data if file is None else load_state(data, self._place.folder))
            except StoreError as garbage:
                name = "table writer_state" if file is None else file.file
                faults[LostState(key, name)] = f"the state of {key} cannot be read: {garbage}"
        return faults

    def left_over(self, con: Connection) -> tuple[str, ...]:
        return tuple(path.name for path in unlisted(self._place, listed_names(con)))

    def after_drop(self, con: Connection, shard: Shard) -> str:
        return ""

    def local_folder(self, hooks: Sequence[str], copy_to: str | os.PathLike[str] | None) -> Path:
        if copy_to is not None:
            raise StoreError(f"{self.path}: copy_to is for a lake in a bucket; this is a folder.")
        return self._place.folder

    def publish(self, source: Place) -> Publication:
        raise StoreError(
            f"{self.path}: a store in a folder takes in no other; publish both to a lake."
        )

    def compact(self, keep_seconds: float, sizes: Sizes | None) -> Compaction:
        from activation_store.catalog.compaction import compact_folder

        return compact_folder(self._place, sizes)

    def explain(self, fault: duckdb.Error) -> StoreError | None:
        is_unreadable = isinstance(fault, duckdb.IOException | duckdb.InvalidInputException)
        if is_unreadable and str(self._place.shards) in str(fault):
            return damaged_shard(fault, self.path)
        if "Corrupt database file" in str(fault):
            return NotAStoreError(f"{self.path}: damaged: {str(fault).splitlines()[0]}")
        return None

    def redact(self, text: str) -> str:
        return text.replace(str(self._place.shards), str(self._place.folder))


def attach_stores(con: Connection, places: Mapping[str, Place]) -> None:
    """Make stores readable on `con`, each behind a catalogue in memory of its name.

    A store's file is attached under a name of its own; the catalogue in memory has the same tables
    and views, with absolute paths of shards, so queries work from any folder and any thread. Macros
    are made by `create_macros`, for those who ask.

    Args:
        con: a connection that may read the `Place.files` of all stores.
        places: name to store; the store named "" is found without a name.

    Raises:
        ConnectionOutdated: a shard was listed since the connection was shut.
        NotAStoreError: a catalogue cannot be read.
        ShardError: a shard is missing or has another size than the catalogue says.
        SchemaError: a store was written under another schema.
    """
    for name, place in places.items():
        source = (
            f"catalogue of {name}".rstrip()
        )  # no name of an attached store: those have no space
        at = f"{identifier(name)}." if name else ""
        if name:
            con.execute(f"ATTACH ':memory:' AS {identifier(name)}")
        catalogue.attach(con, place, source)
        catalogue.check_columns(con, place, source)
        con.execute("BEGIN")  # a transaction per view takes twice the time
        try:
            con.execute(
                ";".join(
                    f"CREATE VIEW {at}{table} AS SELECT * FROM {identifier(source)}.{table}"
                    for table in expected_tables()
                )
            )
            _check_sizes(con, place, source)
        except duckdb.Error as fault:
            raise NotAStoreError(f"{place.file}: damaged: {str(fault).splitlines()[0]}") from fault
        try:
            create_views(con, place.shards, at, f"{identifier(source)}.", has_macros=False)
            con.execute("COMMIT")
        except duckdb.PermissionException as fault:
            raise ConnectionOutdated from fault
        except duckdb.Error as fault:
            raise damaged_shard(fault, place.file) from fault


def create_macros(con: Connection, names: Iterable[str]) -> None:
    """Make the macros of attached stores; the store named "" is found without a name."""
    for name in names:
        con.execute(further_views(f"{identifier(name)}." if name else "")[1])


def _check_sizes(con: Connection, place: Place, source: str) -> None:
    """Look at the size of every listed shard.

    Raises:
        ShardError: one is missing, shorter or longer than listed; names up to three.
        NotAStoreError: the catalogue lists something that cannot be a shard's name.
    """
    rows = con.execute(
        f"SELECT file, n_bytes FROM {identifier(source)}.shards ORDER BY file"
    ).fetchall()
    faults: list[str] = []
    for file, n_bytes in rows:
        is_plain = file.endswith(_SHARD_SUFFIX) and all(c.isalnum() or c in "_.-" for c in file)
        if not is_plain:
            raise NotAStoreError(f"{place.file}: lists {file!r}, which is no name of a shard.")
        if (fault := size_fault(place.folder / file, n_bytes)) is not None:
            faults.append(fault)
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ShardError(
            f"{place.folder}: {'; '.join(faults[:3])}{more}. Bring the files back, or run "
            f"`lmmono store verify --repair {place.file}`, which drops only what is lost and says "
            "what."
        )
