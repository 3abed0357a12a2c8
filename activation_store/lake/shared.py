"""A lake: one store that many processes and machines share, on DuckLake.

Its catalogue is a SQLite file, a PostgreSQL database or a DuckDB file; its shards lie in a folder
or a bucket. Whoever captures writes a store of its own, as always, and publishes it to the lake.
Tables and SQL are those of a store.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import duckdb

from activation_store.catalog import catalogue, guard, reader, tables
from activation_store.catalog.presence import Presence
from activation_store.catalog.verification import Report
from activation_store.errors import (
    ContentError,
    NotAStoreError,
    QueryError,
    SchemaError,
    ShardError,
    StoreError,
)
from activation_store.lake import lake_commit, lake_schema
from activation_store.lake.lake_files import LakeFiles
from activation_store.lake.lake_place import LakePlace, connect, said, turn
from activation_store.store import Info, Mode
from activation_store.unit import Exemplar, ExemplarKind, Unit, read_exemplars, read_unit

if TYPE_CHECKING:
    from activation_store.lake.lake_compaction import Compaction
    from activation_store.lake.publishing import Publication
    from activation_store.read.stream import VectorStream

Answer = TypeVar("Answer")

KEEP_SECONDS = 3600.0
"""How long a compaction leaves what it replaced to those who still read it."""

_INFO = """
SELECT
    count(*), coalesce(sum(n_bytes), 0)::BIGINT,
    coalesce(sum(n_rows) FILTER (kind = 'tokens'), 0)::BIGINT,
    coalesce(sum(n_rows) FILTER (kind = 'acts'), 0)::BIGINT,
    coalesce(sum(n_rows) FILTER (kind = 'vectors'), 0)::BIGINT,
    (SELECT count(*) FROM documents),
    (SELECT coalesce(list(DISTINCT hook ORDER BY hook), []) FROM hooks)
FROM shards
"""


class Lake:
    """One open lake; every query shows the last commit. Threads may share it."""

    def __init__(self, place: LakePlace, mode: Mode, trusted: bool) -> None:
        self.place = place
        self.mode = mode
        self.files = LakeFiles(place)
        self._trusted = trusted
        self._turn = threading.Lock()
        self._con: duckdb.DuckDBPyConnection | None = None
        self._version = -1
        self._attached: dict[str, catalogue.Place] = {}
        self._presence: Presence | None = None
        self.refresh()

    @property
    def path(self) -> Path:
        """The address of the catalogue, without a password."""
        return Path(self.place.name)

    def __enter__(self) -> "Lake":
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
            return f"Lake({self.place.name}, closed)"
        info = self.info()
        return (
            f"Lake({self.place.name}, data={self.place.data_path}, mode={self.mode!r}: "
            f"{info.n_tokens:,} tokens, {info.n_acts:,} acts, {info.n_vectors:,} vectors, "
            f"{len(info.hooks)} hooks, {info.n_bytes / 1e6:,.1f} MB)"
        )

    def close(self) -> None:
        """Let go of the catalogue; results that were handed out stay usable."""
        self._con = self._presence = None

    def refresh(self) -> None:
        """Connect anew, such as after the server of the catalogue was restarted.

        Raises:
            StoreError: as `activation_store.open` does.
        """
        self._con = None
        self._presence = Presence(place.folder for place in self._attached.values())
        con = connect(self.place, read_only=self.mode == "r")
        try:
            self._check_schema(con)
            self._version = lake_schema.mirror(con, self.files)
            shards = [
                p for name, at in self._attached.items() for p in reader.attach(con, name, at)
            ]
            if not self._trusted:
                reader.lock(con, shards, [f"{self.place.data_path}/"])
        except BaseException:
            con.close()
            raise
        self._con = con

    def _check_schema(self, con: duckdb.DuckDBPyConnection) -> None:
        meta = lake_schema.read_meta(con, self.place)
        if meta is None:
            raise NotAStoreError(f"{self.place.name}: an empty DuckLake; create it with mode='w'.")
        had = lake_schema.check_version(self.place, meta)
        if had == catalogue.SCHEMA_VERSION:
            return
        if self.mode == "r":
            raise SchemaError(
                f"{self.place.name}: written under the older schema version {had}; open it once "
                "with mode='a', which brings it to today's."
            )
        with turn(self.place):
            lake_commit.run(con, self.place, lambda inside: lake_schema.upgrade(inside, had))

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """Return a connection to the lake that may do all that the lake's own may."""
        if self._con is None:
            raise StoreError(f"{self.place.name}: the lake is closed; open it again.")
        return self._con.cursor()

    def _current(self) -> duckdb.DuckDBPyConnection:
        """Return a cursor that knows of every shard that is listed now."""
        cursor = self.cursor()
        with self._turn:
            if lake_schema.version_of_shards(cursor) != self._version:
                self._version = lake_schema.copy(cursor, self.files)
        return cursor

    def sql(self, query: str, /, **params: Any) -> duckdb.DuckDBPyRelation:
        """Run one query; `$name` in it stands for the keyword argument of that name.

        Returns:
            A DuckDB relation: `.df()`, `.pl()`, `.arrow()`, `.fetchall()`.

        Raises:
            QueryError: the query does not parse, names something unknown, fails, or, unless the
                lake is trusted, could do more than read the lake.
            ShardError: a shard is missing or damaged.
        """
        try:
            cursor = self._current()
            statement = query if self._trusted else self._read_only(cursor, query)
            # DuckDB's own types do not say that a statement without rows gives None
            rows = cast(
                duckdb.DuckDBPyRelation | None,
                cursor.sql(statement, params=params) if params else cursor.sql(statement),
            )
        except duckdb.Error as fault:
            raise self._told(fault) from fault
        return cursor.sql("SELECT 1 AS done WHERE false") if rows is None else rows

    def _read_only(self, cursor: duckdb.DuckDBPyConnection, query: str) -> duckdb.Statement:
        if lake_schema.METADATA in query.lower():
            raise QueryError(
                f"{lake_schema.METADATA}... is the catalogue's own database, which may hold more "
                "than the lake; open with trusted=True to read it."
            )
        return guard.read_only(cursor, query)

    def _told(self, fault: duckdb.Error) -> StoreError:
        text = said(self.place, fault)
        if isinstance(fault, duckdb.IOException) and f"{self.place.data_path}/shards" in text:
            return ShardError(
                f"{text}. Bring the file back, or publish the store that it came from again."
            )
        return QueryError(text)

    def unit(self, hook: str, unit: int) -> Unit:
        """Return a unit with its statistics and exemplars.

        Raises:
            ContentError: the lake has no such unit.
        """
        return read_unit(self, hook, unit)

    def exemplars(
        self,
        hook: str,
        unit: int,
        k: int = 8,
        kind: ExemplarKind = "top",
        *,
        before: int = 16,
        after: int = 8,
    ) -> list[Exemplar]:
        """Return up to k exemplars of a unit, best first, with their tokens and activations."""
        return read_exemplars(self, hook, unit, k, kind, before, after)

    def attach(self, path: str | os.PathLike[str], name: str) -> None:
        """Make a store readable in SQL as `name.activations`, as it is now, until `refresh`.

        Raises:
            StoreError: another lake, a name that is taken, or as `activation_store.open` does.
        """
        reader.check_name(path, name, self._attached)
        before = self._attached
        self._attached = {**before, name: catalogue.place(path)}
        try:
            self.refresh()
        except StoreError:
            self._attached = before
            self.refresh()
            raise

    def vectors(
        self,
        hook: str | Sequence[str],
        *,
        copy_to: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> "VectorStream":
        """Return shuffled batches of the vectors that are published now; see `Store.vectors`.

        Args:
            hook: one hook, or a list of hooks.
            copy_to: folder that vectors in a bucket are copied to first; there they stay.
            settings: of `stream.VectorStream`. A cursor fits as long as no further vectors of the
                hooks are published.

        Raises:
            StoreError: the vectors lie in a bucket and `copy_to` is not given, or as
                `Store.vectors` does.
        """
        from activation_store.lake.lake_vectors import vectors_folder
        from activation_store.read.stream import VectorStream

        return VectorStream(self, vectors_folder(self, hook, copy_to), hook, **settings)

    def hooks(self) -> duckdb.DuckDBPyRelation:
        """Return table `hooks`: what was captured, with which settings."""
        return self.sql("FROM hooks ORDER BY hook, kind")

    def info(self) -> Info:
        """Return what the lake holds, in numbers; the bytes are those of its shards."""
        (row,) = self.sql(_INFO).fetchall()
        meta = dict(self.sql("SELECT key, value FROM meta").fetchall())
        n_shards, n_bytes, n_tokens, n_acts, n_vectors, n_documents, hooks = row
        return Info(
            path=self.path,
            store_id=meta["store_id"],
            schema_version=int(meta["schema_version"]),
            n_bytes=n_bytes,
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
            StoreError: the lake is open for reading.
            WriteError: the machine refused; nothing is changed.
        """
        self._check_writable()
        if table not in tables.APPENDABLE:
            raise ContentError(
                f"table {table!r} takes no rows from here; these do: "
                f"{', '.join(tables.APPENDABLE)}."
            )
        incoming = tables.arrow_rows(table, rows)

        def work(con: duckdb.DuckDBPyConnection) -> int:
            n = tables.replace(con, table, incoming)
            if table == "vocabulary":
                lake_schema.write_views(con, self.files)  # readers hold a copy of it
            return n

        return self._commit(work)

    def add_documents(self, rows: Any) -> int:
        """Add rows of table `documents`."""
        return self.append("documents", rows)

    def add_vocabulary(self, tokens: Sequence[str]) -> int:
        """Add the string of every token id, in the order of the ids."""
        rows = [{"token_id": i, "token": token} for i, token in enumerate(tokens)]
        return self.append("vocabulary", rows)

    def add_run(self, run: Mapping[str, Any]) -> int:
        """Add a row of table `runs`; `recipe` and `versions` may be Python values."""
        return self.append("runs", [run])

    def publish(self, path: str | os.PathLike[str]) -> "Publication":
        """Bring the lake to what the store at `path` has committed, in one commit.

        What is copied before a process dies is found again by the next attempt, and no shard is
        listed twice, so it is safe to repeat. A store that has grown is published again.

        Raises:
            ContentError: the store is of another model, corpus or settings, or holds sequences
                that another store has published for the same hook.
            ShardError: a shard of the store is missing or damaged.
            StoreError: there is no store, the lake is open for reading, or as `append`.
        """
        from activation_store.lake.publishing import read_source, take_in

        self._check_writable()
        source = read_source(catalogue.place(path))
        known = {file for (file,) in self.sql("SELECT file FROM publications").fetchall()}
        copied = sum(
            self.files.upload(source.where.folder / shard.file, shard)
            for shard in source.shards
            if shard.file not in known
        )

        def work(con: duckdb.DuckDBPyConnection) -> "Publication":
            taken = take_in(con, source, self.files.upload)
            lake_schema.write_views(con, self.files)
            return taken

        return replace(self._commit(work), n_bytes=copied)

    def compact(self, *, keep_seconds: float = KEEP_SECONDS) -> "Compaction":
        """Merge small shards and small files of the tables; the rows stay the same.

        Args:
            keep_seconds: how long files that were replaced stay for queries that still read them.

        Raises:
            StoreError: the lake is open for reading, or as `append`.
        """
        from activation_store.lake import lake_compaction
        from activation_store.lake.lake_compaction import Compaction

        self._check_writable()

        def work(con: duckdb.DuckDBPyConnection) -> tuple[int, int]:
            counts = lake_compaction.compact(con, self.files)
            lake_schema.write_views(con, self.files)
            return counts

        before, after = self._commit(work)
        removed = self._commit(lambda con: lake_compaction.clean(con, self.files, keep_seconds))
        with turn(self.place):
            lake_compaction.merge_tables(self.cursor(), keep_seconds)
        return Compaction(before, after, removed)

    def verify(self, repair: bool = False) -> Report:
        """Check the catalogue and every shard; see `lake_repair.verify`."""
        from activation_store.lake.lake_repair import verify

        if repair:
            self._check_writable()
        return verify(self.cursor(), self.files, repair=repair)

    def _check_writable(self) -> None:
        if self.mode == "r":
            raise StoreError(
                f"{self.place.name}: open for reading; open it with mode='a' to add to it."
            )

    def _commit(self, work: Callable[[duckdb.DuckDBPyConnection], Answer]) -> Answer:
        """Run `work` in one transaction that comes about whole or not at all, in its turn."""
        with turn(self.place):
            return lake_commit.run(self.cursor(), self.place, work)
