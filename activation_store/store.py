"""An open store, in a folder or a lake: SQL over it, its units, and adding rows to it."""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import duckdb
import numpy as np
import pyarrow as pa

from activation_store.catalog import catalogue, door, tables, verification
from activation_store.catalog.backend import (
    Backend,
    ConnectionOutdated,
    FolderBackend,
    Mode,
    create_macros,
)
from activation_store.catalog.catalogue import Place, Presence
from activation_store.catalog.door import QueryLimits
from activation_store.catalog.verification import Report
from activation_store.errors import ContentError, LockedError, QueryError, StoreError
from activation_store.lake.lake_backend import LakeBackend
from activation_store.lake.lake_place import PREFIX, lake_place
from activation_store.read.queried import unit_stats
from activation_store.shards.names import Shard, listed
from activation_store.unit import ExemplarKind, Exemplars, Unit, read_exemplars

if TYPE_CHECKING:
    from activation_store.catalog.compaction import Compaction, Sizes
    from activation_store.hooks import Rows, Skip, Vectors
    from activation_store.lake.publishing import Publication
    from activation_store.read.stream import VectorStream
    from activation_store.write.writer import Writer
else:  # for annotations only: these take numba to import
    Compaction = Publication = Sizes = object

DataPath: TypeAlias = str | os.PathLike[str] | None
"""Folder or s3://bucket/prefix of a lake's data; a store in a folder has none."""

KEEP_SECONDS = 3600.0
"""How long a compaction of a lake leaves what it replaced to those who still read it: longer than a
query may take by default."""


def open(  # noqa: A001
    path: str | os.PathLike[str],
    mode: Mode = "r",
    *,
    trusted: bool = False,
    overwrite: bool = False,
    data_path: DataPath = None,
    limits: QueryLimits | None = None,
) -> "Store":
    """Open the store at `path`, its folder or its `store.duckdb`; or a lake.

    Args:
        path: where the store is; a lake is "ducklake:sqlite:FILE", "ducklake:postgres:CONNECTION",
            "ducklake:postgresql://..." or "ducklake:FILE".
        mode: "r" reads; "a" adds to an existing store; "w" creates one.
        trusted: let SQL do whatever DuckDB can, such as read other files. Without it SQL can only
            read this store.
        overwrite: with "w", replace a store that exists; not for a lake.
        data_path: folder or s3://bucket/prefix of a lake's data; a lake needs it, a store has none.
        limits: what a query may take; see `QueryLimits` for the defaults.

    Raises:
        NotAStoreError: nothing there, no store, or one that holds views and macros of others.
        SchemaError: the store was written under another version of the schema.
        ShardError: a file of the store is missing or has another size than it should.
        StoreError: with "w", there is a store already; a lake cannot be reached, or lies elsewhere.
        WriteError: the machine refused a write.
    """
    backend = backend_at(path, data_path)
    if mode == "w":
        backend.create(overwrite)
    elif mode not in ("r", "a"):
        raise StoreError(f"mode: want 'r', 'w' or 'a', got {mode!r}.")
    return Store(backend, mode, trusted, limits or QueryLimits())


def verify(
    path: str | os.PathLike[str], *, repair: bool = False, data_path: DataPath = None
) -> Report:
    """Check every byte of a store or a lake, also of one too damaged to be opened.

    See `verification.verify`; `path` and `data_path` are as for `open`.
    """
    return verification.verify(backend_at(path, data_path), repair=repair)


def compact(path: str | os.PathLike[str], *, data_path: DataPath = None) -> Compaction:
    """Merge the small shards of a store or a lake; the rows stay the same.

    Args:
        path: as for `open`.
        data_path: as for `open`.

    Raises:
        StoreError: as `open` does, a shard is damaged, or the machine refused; nothing is changed.
    """
    with open(path, "a", data_path=data_path) as store:
        return store.compact()


def backend_at(path: str | os.PathLike[str], data_path: DataPath) -> Backend:
    """Return the backend of a path or a lake's address; touches neither catalogue nor data.

    Raises:
        StoreError: the address is none, or `data_path` is missing or out of place.
    """
    address = os.fspath(path)
    if address.startswith(PREFIX):
        return LakeBackend(lake_place(address, data_path))
    if data_path is not None:
        raise StoreError(f"{address}: data_path is for a lake, whose address begins {PREFIX}")
    return FolderBackend(catalogue.place(path))


@dataclass(frozen=True, slots=True)
class Info:
    """What a store holds, in numbers."""

    path: Path
    """The catalogue file, or the address of a lake."""
    store_id: str
    """Random name that all shards of the store carry."""
    schema_version: int
    n_bytes: int
    """Size of catalogue and shards together; of a lake the shards alone."""
    n_shards: int
    n_documents: int
    n_tokens: int
    n_acts: int
    """Stored sparse activations."""
    n_vectors: int
    """Stored dense vectors."""
    hooks: tuple[str, ...]
    """Hooks captured, as rows or as vectors."""

    def __str__(self) -> str:
        return (
            f"{self.path}\n"
            f"  id {self.store_id}, schema {self.schema_version}, {self.n_bytes / 1e6:,.1f} MB in "
            f"{self.n_shards} shards\n"
            f"  {self.n_tokens:,} tokens of {self.n_documents:,} documents\n"
            f"  {self.n_acts:,} acts, {self.n_vectors:,} vectors\n"
            f"  hooks: {', '.join(self.hooks) or 'none'}"
        )


_INFO = """
SELECT
    count(*), (SELECT count(*) FROM documents),
    coalesce(sum(n_rows) FILTER (kind = 'tokens'), 0)::BIGINT,
    coalesce(sum(n_rows) FILTER (kind = 'acts'), 0)::BIGINT,
    coalesce(sum(n_rows) FILTER (kind = 'vectors'), 0)::BIGINT,
    coalesce(sum(n_bytes), 0)::BIGINT,
    (SELECT coalesce(list(DISTINCT hook ORDER BY hook), []) FROM hooks)
FROM shards
"""

_RESERVED = {
    *("main", "memory", "temp", "system", "pg_catalog", "information_schema"),
    *("lake_catalogue", "copied"),
}
"""Names of databases and schemas that a connection has."""

_CONNECT_ATTEMPTS = 10  # each fails only if another process commits between two calls

_ARROW_FROM_CURSOR = duckdb.__version__.startswith("1.")
"""Version 2 warns of a copy that it makes there, and has none to make from `sql`."""


class Store:
    """One open store; made by `activation_store.open`, closed by `close` or a `with` block.

    A store in a folder that was opened with "r" shows the state of the moment it was opened until
    `refresh`; one opened with "a" or "w", and a lake, always show the last commit. Threads may
    share a store.
    """

    def __init__(self, backend: Backend, mode: Mode, trusted: bool, limits: QueryLimits) -> None:
        self.backend = backend
        self.mode: Mode = mode
        self.limits = limits
        self._trusted = trusted
        self._attached: dict[str, Place] = {}
        self._turn = threading.Lock()
        self._con: duckdb.DuckDBPyConnection | None = None
        self._macros_on: duckdb.DuckDBPyConnection | None = None
        self._presence: Presence | None = None
        self._version: tuple[int, ...] = ()
        self.refresh()

    @property
    def path(self) -> Path:
        """The catalogue file, or the address of a lake without its password."""
        return self.backend.path

    @property
    def is_lake(self) -> bool:
        """Whether many processes and machines share it, on DuckLake."""
        return self.backend.is_lake

    @property
    def place(self) -> Place:
        """Where a store in a folder lies.

        Raises:
            StoreError: it is a lake.
        """
        return self.backend.folder_place()

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._con is None:
            return f"Store({self.path}, closed)"
        info = self.info()
        return (
            f"Store({self.path}, mode={self.mode!r}: {info.n_tokens:,} tokens, {info.n_acts:,} "
            f"acts, {info.n_vectors:,} vectors, {len(info.hooks)} hooks, "
            f"{info.n_bytes / 1e6:,.1f} MB)"
        )

    def close(self) -> None:
        """Let go of the files; results that were handed out stay usable."""
        self._con = self._macros_on = self._presence = None
        self.backend.disconnect()

    def refresh(self) -> None:
        """Show the last commit from now on, also after the server of a lake was restarted.

        Raises:
            StoreError: as `open` does.
        """
        with self._turn:
            self._connect()

    def _connect(self) -> None:
        self._macros_on = None
        own = self.backend.read_folders() if self.mode == "r" else ()
        presence = Presence([*own, *(place.folder for place in self._attached.values())])
        for _ in range(_CONNECT_ATTEMPTS):
            with suppress(ConnectionOutdated):
                con = self.backend.connect(self.mode, self._attached, self._trusted, self.limits)
                self._con, self._presence = con, presence
                self._version = self.backend.version(con)
                return
        raise LockedError(f"{self.path}: others commit all the time; open it again later.")

    def _cursor(self, *, with_macros: bool = False) -> duckdb.DuckDBPyConnection:
        """Return a cursor that shows what this store is to show now."""
        if self._con is None:
            raise StoreError(f"{self.path}: the store is closed; open it again.")
        if self.mode != "r" or self.is_lake:
            with self._turn:
                if self.backend.version(self._con) != self._version:
                    version = self.backend.version(self._con)
                    if self.backend.update(self._con):
                        self._version = version
                    else:
                        self._connect()
        if not with_macros:
            return self._con.cursor()
        with self._turn:
            con = self._con
            assert con is not None, "a store is not closed while it is asked"
            if self._macros_on is not con:
                create_macros(con.cursor(), [*([] if self.is_lake else [""]), *self._attached])
                self._macros_on = con
            return con.cursor()

    def sql(self, query: str, /, **params: Any) -> "QueryResult":
        """Run one query; `$name` in it stands for the keyword argument of that name.

        Without parameters the query runs when the result is asked for; with them, at once.

        Returns:
            What a DuckDB relation is: `.df()`, `.pl()`, `.to_arrow_table()`, `.fetchall()`.

        Raises:
            QueryError: the query does not parse, names something unknown, fails, takes longer than
                `limits`, or, unless the store is trusted, could do more than read the store.
            ShardError: a shard was damaged after the store was opened.
        """
        fault_of = partial(self._fault, query=query, params=params)
        lists_macros = "duckdb_functions" in query.casefold()
        try:
            cursor = self._cursor(with_macros=lists_macros or self._trusted)
            try:
                rows = self._run(cursor, query, params)
            except duckdb.CatalogException:
                # most queries call no macro, and making them costs as much as the rest of an open
                cursor = self._cursor(with_macros=True)
                rows = self._run(cursor, query, params)
        except duckdb.Error as fault:
            raise fault_of(fault) from fault
        if rows is None:  # as of a statement without rows
            rows = cursor.sql("SELECT 1 AS done WHERE false")
        return QueryResult(rows, cursor, self.limits, fault_of)

    def _run(
        self, cursor: duckdb.DuckDBPyConnection, query: str, params: Mapping[str, Any]
    ) -> duckdb.DuckDBPyRelation | pa.Table | None:
        with door.watched(cursor, self.limits.seconds):
            statement = query if self._trusted else door.read_only(cursor, query)
            if params:
                written = None if self._trusted else door.with_literals(query, params)
                return (
                    _table(cursor, statement, params)
                    if written is None
                    else _table(cursor, written)
                )
            return cast(duckdb.DuckDBPyRelation | None, cursor.sql(statement))  # types lack None

    def _fault(self, fault: duckdb.Error, query: str, params: Mapping[str, Any]) -> StoreError:
        """Return what DuckDB says, with the way out that belongs to it."""
        if (explained := self.backend.explain(fault)) is not None:
            return explained
        text = self.backend.redact(str(fault).strip())
        if "parameter" in text.lower():
            names = ", ".join(f"${name}" for name in params) or "none"
            return QueryError(f"{text}\nParameters given: {names}. Query: {query.strip()}")
        if 'column "control" not found' in text and "scores" in query:
            return QueryError(f"{text}\nscores holds no controls: those are rows of all_scores.")
        return QueryError(text)

    def attach(self, path: str | os.PathLike[str], name: str) -> None:
        """Make another store readable in SQL as `name.activations`, `name.unit_stats`, ...

        It is shown as it is now, until `refresh`.

        Raises:
            StoreError: another lake, a name that is taken or reserved, or as `open` does.
        """
        if os.fspath(path).startswith(PREFIX):
            raise StoreError(
                f"cannot attach the lake {name}: only stores can be attached. Open the lake itself "
                "and attach the stores to it; two lakes join where all stores are published to one."
            )
        # DuckDB compares names without case
        refused = _RESERVED | {taken.casefold() for taken in self._attached}
        if not name.isidentifier() or name.casefold() in refused:
            raise StoreError(
                f"cannot attach {path} as {name!r}: want a new name of letters, digits and _, and "
                f"none of {', '.join(sorted(refused))}."
            )
        before = self._attached
        self._attached = {**before, name: catalogue.place(path)}
        try:
            self.refresh()
        except StoreError:
            self._attached = before
            if self.is_lake:  # its connection was given up for the new one
                self.refresh()
            raise

    def unit(self, hook: str, unit: int) -> Unit:
        """Return a unit with its statistics and exemplars; a notebook shows its whole page.

        Raises:
            ContentError: the store has no such unit.
        """
        return Unit(self, unit_stats(self, hook, unit))

    def exemplars(
        self,
        hook: str,
        unit: int,
        k: int = 8,
        kind: ExemplarKind = "top",
        *,
        before: int = 16,
        after: int = 8,
    ) -> Exemplars:
        """Return up to k exemplars of a unit, best first, with their tokens and activations."""
        return read_exemplars(self, hook, unit, k, kind, before, after)

    def vectors(
        self,
        hook: str | Sequence[str],
        *,
        copy_to: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> "VectorStream":
        """Return shuffled batches of a hook's vectors, or row-aligned ones of several hooks.

        Args:
            hook: one hook, or a list of hooks.
            copy_to: folder that the vectors of a lake in a bucket are copied to first; they stay
            there.
            settings: of `stream.VectorStream`: batch_tokens, seed, cursor, split, where, epochs,
                prefetch, dtype, framework, shuffle, buffer_tokens. A cursor fits as long as no
                further vectors of the hooks are stored.

        Raises:
            ContentError: a hook without vectors, or a setting or cursor that does not fit.
            StoreError: the vectors lie in a bucket and `copy_to` is not given.
        """
        from activation_store.read.stream import VectorStream

        return VectorStream(self, self.shard_folder(hook, copy_to), hook, **settings)

    def shard_folder(
        self, hook: str | Sequence[str], copy_to: str | os.PathLike[str] | None = None
    ) -> Path:
        """Return a folder of this machine that holds the vectors of some hooks.

        Raises:
            StoreError: the vectors lie in a bucket and `copy_to` is not given.
        """
        return self.backend.local_folder([hook] if isinstance(hook, str) else hook, copy_to)

    def hooks(self) -> "QueryResult":
        """Return table `hooks`: what was captured, with which settings."""
        return self.sql("FROM hooks ORDER BY hook, kind")

    def shards(self) -> list[Shard]:
        """Return the Parquet files that hold the store, with their size and sha256."""
        return listed(self._cursor())

    def info(self) -> Info:
        """Return what the store holds, in numbers."""
        (row,) = self.sql(_INFO).fetchall()
        meta = dict(self.sql("SELECT key, value FROM meta").fetchall())
        n_shards, n_documents, n_tokens, n_acts, n_vectors, n_bytes, hooks = row
        return Info(
            path=self.path,
            store_id=meta["store_id"],
            schema_version=int(meta["schema_version"]),
            n_bytes=n_bytes + (0 if self.is_lake else self.path.stat().st_size),
            n_shards=n_shards,
            n_documents=n_documents,
            n_tokens=n_tokens,
            n_acts=n_acts,
            n_vectors=n_vectors,
            hooks=tuple(hooks),
        )

    def append(self, table: str, rows: Any) -> int:
        """Add rows in one commit; a row whose key is there already is replaced.

        Several processes may append at once: they take turns.

        Args:
            table: one of `tables.APPENDABLE`; `tables.KEYS` names the keys.
            rows: Arrow data, whatever gives an Arrow stream (polars, DuckDB), or a list of dicts.

        Returns:
            The number of rows put in.

        Raises:
            ContentError: unknown table or column, wrong type, missing value, two rows of one key.
            LockedError: others were writing all the time; nothing is changed.
            StoreError: the store is open for reading.
            WriteError: the machine refused; nothing is changed.
        """
        return self.append_all({table: rows})[table]

    def append_all(self, rows: Mapping[str, Any]) -> dict[str, int]:
        """Add rows to several tables in one commit, each as `append` does: all of them, or none.

        A commit takes about a tenth of a second, whatever it holds; without a row none is made.
        """
        self._check_writable()
        for table in rows:
            if table not in tables.APPENDABLE:
                is_view = table in ("scores", "hook_scores")
                hint = f"; {table} is a view of all_scores" if is_view else ""
                raise ContentError(
                    f"table {table!r} takes no rows from here; these do: "
                    f"{', '.join(tables.APPENDABLE)}{hint}."
                )
        incoming = {table: tables.arrow_rows(table, values) for table, values in rows.items()}
        if any(part.num_rows for part in incoming.values()):
            self.backend.commit(
                lambda con: [tables.replace(con, table, part) for table, part in incoming.items()],
                tables=incoming,
            )
        return {table: part.num_rows for table, part in incoming.items()}

    def add_documents(self, rows: Any) -> int:
        """Add rows of table `documents`: doc_id, split, name, text_sha256, n_tokens."""
        return self.append("documents", rows)

    def add_vocabulary(self, tokens: Sequence[str]) -> int:
        """Add the string of every token id, in the order of the ids."""
        rows = [{"token_id": i, "token": token} for i, token in enumerate(tokens)]
        return self.append("vocabulary", rows)

    def add_run(self, run: Mapping[str, Any]) -> int:
        """Add a row of table `runs`; `recipe` and `versions` may be Python values."""
        return self.append("runs", [run])

    def writer(
        self,
        *,
        rows: "Sequence[Rows]" = (),
        vectors: "Sequence[Vectors]" = (),
        n_ctx: int,
        seed: int = 0,
        commit_tokens: int = 1_000_000,
        model_digest: str | None = None,
        rank: int = 0,
        world_size: int = 1,
        skip: "Skip | None" = None,
    ) -> "Writer":
        """Return a writer of activations; use it as a context manager.

        Several processes capture together where each makes a writer of its own `rank`, below
        `world_size`, and gives it sequences of its own.

        Raises:
            StoreError: the store is open for reading, or it is a lake.
        """
        from activation_store.write.writer import Writer

        self._check_writable()
        return Writer(
            self.place,
            rows=rows,
            vectors=vectors,
            n_ctx=n_ctx,
            seed=seed,
            commit_tokens=commit_tokens,
            model_digest=model_digest,
            rank=rank,
            world_size=world_size,
            skip=skip,
        )

    def publish(self, path: str | os.PathLike[str]) -> Publication:
        """Bring this lake to what the store at `path` has committed, in one commit.

        What is copied before a process dies is found again by the next attempt, and no shard is
        listed twice, so it is safe to repeat. A store that has grown is published again.

        Raises:
            ContentError: the store is of another model, corpus or settings, or holds sequences
                that another store has published for the same hook.
            ShardError: a shard of the store is missing or damaged.
            StoreError: there is no store, this is no lake or open for reading, or as `append`.
        """
        self._check_writable()
        return self.backend.publish(catalogue.place(path))

    def compact(
        self, *, keep_seconds: float = KEEP_SECONDS, sizes: Sizes | None = None
    ) -> Compaction:
        """Merge small shards; the rows stay the same.

        Args:
            keep_seconds: how long the files that a lake replaced stay for queries that still read
                them; in a folder they stay as long as a process has the store open.
            sizes: how large blocks and shards become; by default those of a capture.

        Raises:
            ShardError: a shard is damaged.
            StoreError: the store is open for reading, or as `append`.
        """
        self._check_writable()
        return self.backend.compact(keep_seconds, sizes)

    def verify(self, repair: bool = False) -> Report:
        """Check every byte of the store; see `verification.verify`."""
        if repair:
            self._check_writable()
        return verification.verify(self.backend, repair=repair)

    def _check_writable(self) -> None:
        if self.mode == "r":
            raise StoreError(f"{self.path}: open for reading; open it with mode='a' to add to it.")


class QueryResult:
    """The rows of a query: everything that a DuckDB relation is, within the limits of its store.

    A relation runs when its rows are asked for. Then Ctrl-C and the limit of time stop it, and its
    errors are those of this package. Rows that are here already, as of a query with parameters, are
    read without DuckDB where they are plain: a relation over them takes 3 ms of processor time.
    """

    def __init__(
        self,
        rows: duckdb.DuckDBPyRelation | pa.Table,
        cursor: duckdb.DuckDBPyConnection,
        limits: QueryLimits,
        fault_of: Callable[[duckdb.Error], StoreError],
    ) -> None:
        self._rows, self._cursor = rows, cursor
        self._limits, self._fault_of = limits, fault_of
        self._is_capped = False

    @property
    def _table(self) -> pa.Table | None:
        """The rows, where they are here already and no limit is left to be looked at."""
        if isinstance(self._rows, duckdb.DuckDBPyRelation):
            return None
        n_most = self._limits.rows
        return self._rows if n_most is None or len(self._rows) <= n_most else None

    @cached_property
    def _relation(self) -> duckdb.DuckDBPyRelation:
        if isinstance(self._rows, duckdb.DuckDBPyRelation):
            return self._rows
        return self._cursor.from_arrow(self._rows)

    def _run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        try:
            with door.watched(self._cursor, self._limits.seconds):
                result = getattr(self._capped(), name)(*args, **kwargs)
        except duckdb.Error as fault:
            raise self._fault_of(fault) from fault
        if isinstance(result, duckdb.DuckDBPyRelation):
            return QueryResult(result, self._cursor, self._limits, self._fault_of)
        return result

    def _capped(self) -> duckdb.DuckDBPyRelation:
        """Return the relation after a look at the number of its rows, where that has a limit.

        Raises:
            QueryError: it has more rows.
        """
        n_most = self._limits.rows
        if n_most is None or self._is_capped:
            return self._relation
        capped = self._cursor.from_arrow(self._relation.limit(n_most + 1).to_arrow_table())
        if len(capped) > n_most:
            raise QueryError(
                f"the result has more than {n_most} rows; add a LIMIT, or open the store with "
                "limits=QueryLimits(rows=...)."
            )
        self._relation, self._is_capped = capped, True
        return capped

    def interrupt(self) -> None:
        """Stop what runs of this query in another thread, which gets a `QueryError`."""
        self._cursor.interrupt()

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return self._relation.columns if self._table is None else self._table.column_names

    @property
    def types(self) -> list[Any]:
        """Types of the columns."""
        return self._relation.types

    def fetchall(self) -> list[Any]:
        """Return all rows as tuples."""
        table = self._table
        # DuckDB reads many values faster than PyArrow, and knows more types
        if table is None or table.num_columns * len(table) > 20_000 or not _is_plain(table):
            return self._run("fetchall")
        return list(zip(*(column.to_pylist() for column in table.columns), strict=True))

    def fetchone(self) -> Any:
        """Return the next row, or None."""
        return self._run("fetchone")

    def fetchnumpy(self) -> dict[str, Any]:
        """Return the columns as numpy arrays."""
        table = self._table
        if table is None or not all(map(_is_array, table.columns)):
            return self._run("fetchnumpy")
        return {name: _array(table[name]) for name in table.column_names}

    def to_arrow_table(self) -> Any:
        """Return the rows as a pyarrow table."""
        return self._run("to_arrow_table") if self._table is None else self._table

    def df(self) -> Any:
        """Return the rows as a pandas frame."""
        return self._run("df")

    def pl(self) -> Any:
        """Return the rows as a polars frame."""
        return self._run("pl")

    def __getattr__(self, name: str) -> Any:
        """Return a method or attribute of the DuckDB relation."""
        if name.startswith("_") and name != "__arrow_c_stream__":
            raise AttributeError(name)
        value = getattr(self._relation, name)
        return partial(self._run, name) if callable(value) else value

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        """Return the rows as an Arrow stream, for every library that takes one."""
        return self.to_arrow_table().__arrow_c_stream__(requested_schema)

    def __len__(self) -> int:
        return self._run("__len__")

    def __repr__(self) -> str:
        return self._run("__repr__")


def _table(
    cursor: duckdb.DuckDBPyConnection,
    statement: str | duckdb.Statement,
    params: Mapping[str, Any] | None = None,
) -> pa.Table:
    """Return the rows of a query that has parameters, or had.

    DuckDB 1 keeps the rows of `sql(..., params=...)` as single values, which take 2 microseconds
    each to read back; through Arrow the same rows take a fiftieth of that. Arrow's relations
    refuse two columns of one name, so the second becomes `name_1`.
    """
    values: Any = dict(params) if params else None
    if _ARROW_FROM_CURSOR:
        table = cursor.execute(statement, values).to_arrow_table()
    else:
        table = cursor.sql(statement, params=values).to_arrow_table()
    unique: list[str] = []
    for name in table.column_names:
        number, candidate = 0, name
        while candidate in unique or (number and candidate in table.column_names):
            number += 1
            candidate = f"{name}_{number}"
        unique.append(candidate)
    return table.rename_columns(unique)


def _is_array(column: pa.ChunkedArray) -> bool:
    """Whether a column is numbers, with few gaps, or few texts: what `_array` is quick with."""
    is_number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    is_whole = is_number and not column.null_count and column.num_chunks > 0
    return is_whole or (len(column) <= 5_000 and (is_number or pa.types.is_string(column.type)))


def _array(column: pa.ChunkedArray) -> Any:
    """Return a column as DuckDB's `fetchnumpy` does, without pandas, which `to_numpy` imports."""
    if pa.types.is_string(column.type) or column.num_chunks == 0 or column.null_count:
        values = column.to_pylist()
        mask = [value is None for value in values]
        kind: Any = object if pa.types.is_string(column.type) else _numpy_type(column.type)
        data = np.array([0 if value is None else value for value in values], kind)
        return np.ma.masked_array(data, mask) if column.null_count else data
    return np.concatenate([np.from_dlpack(chunk) for chunk in column.chunks])


def _numpy_type(kind: pa.DataType) -> str:
    """Return the name of a numeric type in NumPy.

    >>> _numpy_type(pa.float32()), _numpy_type(pa.int64())
    ('float32', 'int64')
    """
    return {"halffloat": "float16", "float": "float32", "double": "float64"}.get(
        str(kind), str(kind)
    )


def _is_plain(table: pa.Table) -> bool:
    """Whether PyArrow gives the same Python values as DuckDB: numbers, texts, and lists of them."""
    plain = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string)
    return all(
        pa.types.is_list(kind)
        and any(is_of(kind.value_type) for is_of in plain)
        or any(is_of(kind) for is_of in plain)
        for kind in table.schema.types
    )
