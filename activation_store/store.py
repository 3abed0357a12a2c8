"""An open store: SQL over it, its units, and how rows and activations are added."""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast

import duckdb

from activation_store.catalog import catalogue, guard, migrations, reader, tables
from activation_store.catalog.presence import Presence
from activation_store.catalog.verification import Report, verify
from activation_store.errors import ContentError, QueryError, StoreError, damaged_shard
from activation_store.unit import Exemplar, ExemplarKind, Unit, read_exemplars, read_unit

if TYPE_CHECKING:
    from activation_store.hooks import Rows, Skip, Vectors
    from activation_store.read.stream import VectorStream
    from activation_store.write.writer import Writer

Mode = Literal["r", "w", "a"]


def open(  # noqa: A001
    path: str | os.PathLike[str],
    mode: Mode = "r",
    *,
    trusted: bool = False,
    overwrite: bool = False,
) -> "Store":
    """Open the store at `path`, its folder or its `store.duckdb`.

    Args:
        path: where the store is.
        mode: "r" reads; "a" adds to an existing store, and brings it to today's schema; "w"
            creates one.
        trusted: let SQL do whatever DuckDB can, such as read other files. Without it SQL can only
            read this store.
        overwrite: with "w", replace a store that exists.

    Raises:
        NotAStoreError: nothing there, or no store.
        SchemaError: the store was written by a newer version of this package.
        ShardError: a file of the store is missing or has another size than it should.
        StoreError: with "w", there is a store already.
        WriteError: the machine refused a write.
    """
    where = catalogue.place(path)
    if mode == "w":
        catalogue.create(where, overwrite)
    elif mode == "a":
        migrations.migrate(where)
    elif mode != "r":
        raise StoreError(f"mode: want 'r', 'w' or 'a', got {mode!r}.")
    return Store(where, mode, trusted)


@dataclass(frozen=True, slots=True)
class Info:
    """What a store holds, in numbers."""

    path: Path
    """The catalogue file."""
    store_id: str
    """Random name that all shards of the store carry."""
    schema_version: int
    n_bytes: int
    """Size of catalogue and shards together."""
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


# version 2 warns of a copy that it makes there, and has none to make from `sql`
_ARROW_FROM_CURSOR = duckdb.__version__.startswith("1.")

_INFO = """
SELECT
    (SELECT count(*) FROM shards), (SELECT count(*) FROM documents),
    coalesce((SELECT sum(n_rows) FROM shards WHERE kind = 'tokens'), 0)::BIGINT,
    coalesce((SELECT sum(n_rows) FROM shards WHERE kind = 'acts'), 0)::BIGINT,
    coalesce((SELECT sum(n_rows) FROM shards WHERE kind = 'vectors'), 0)::BIGINT,
    coalesce((SELECT sum(n_bytes) FROM shards), 0)::BIGINT,
    (SELECT coalesce(list(DISTINCT hook ORDER BY hook), []) FROM hooks)
"""


class Store:
    """One open store; made by `activation_store.open`, closed by `close` or a `with` block.

    A store opened with "r" shows the state of the moment it was opened until `refresh`; one opened
    with "a" or "w" always shows the last commit. Threads may share a store.
    """

    def __init__(self, where: catalogue.Place, mode: Mode, trusted: bool) -> None:
        self.where = where
        self.mode = mode
        self._trusted = trusted
        self._attached: dict[str, catalogue.Place] = {}
        self._turn = threading.Lock()
        self._con: duckdb.DuckDBPyConnection | None = None
        self._presence: Presence | None = None
        self._seen = (0, 0)
        self.refresh()

    @property
    def path(self) -> Path:
        """The catalogue file."""
        return self.where.file

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
        self._con = self._presence = None

    def refresh(self) -> None:
        """Show the last commit from now on.

        Raises:
            StoreError: as `open` does.
        """
        with self._turn:
            seen = self._signature()
            places = {"": self.where, **self._attached}
            if self.mode == "r":  # the other modes look at the last commit before every query
                self._presence = Presence(place.folder for place in places.values())
            self._con, self._seen = reader.connect(places, self._trusted), seen

    def _signature(self) -> tuple[int, int]:
        try:
            state = self.path.stat()
        except FileNotFoundError:
            return (0, 0)
        return state.st_ino, state.st_mtime_ns

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        if self._con is None:
            raise StoreError(f"{self.path}: the store is closed; open it again.")
        if self.mode != "r" and self._signature() != self._seen:
            self.refresh()
        return self._con.cursor()

    def sql(self, query: str, /, **params: Any) -> duckdb.DuckDBPyRelation:
        """Run one query; `$name` in it stands for the keyword argument of that name.

        Without parameters the query runs when the result is asked for; with them, at once.

        Returns:
            A DuckDB relation: `.df()`, `.pl()`, `.arrow()`, `.fetchall()`.

        Raises:
            QueryError: the query does not parse, names something unknown, fails, or, unless the
                store is trusted, could do more than read the store.
            ShardError: a shard was damaged after the store was opened.
        """
        cursor = self._cursor()
        try:
            statement = query if self._trusted else guard.read_only(cursor, query)
            answer = _bound(cursor, statement, params) if params else cursor.sql(statement)
        except duckdb.Error as fault:
            raise self._told(fault, query, params) from fault
        # DuckDB's own types do not say that a statement without rows gives None
        rows = cast(duckdb.DuckDBPyRelation | None, answer)
        return cursor.sql("SELECT 1 AS done WHERE false") if rows is None else rows

    def attach(self, path: str | os.PathLike[str], name: str) -> None:
        """Make another store readable in SQL as `name.activations`, `name.unit_stats`, ...

        Raises:
            StoreError: the name is taken or reserved, or as `open` does.
        """
        reader.check_name(path, name, self._attached)
        before = self._attached
        self._attached = {**before, name: catalogue.place(path)}
        try:
            self.refresh()
        except StoreError:
            self._attached = before
            raise

    def unit(self, hook: str, unit: int) -> Unit:
        """Return a unit with its statistics and exemplars; a notebook shows its excerpts.

        Raises:
            ContentError: the store has no such unit.
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

    def vectors(self, hook: str | Sequence[str], **settings: Any) -> "VectorStream":
        """Return shuffled batches of a hook's vectors, or row-aligned ones of several hooks.

        Args:
            hook: one hook, or a list of hooks.
            settings: of `stream.VectorStream`: batch_tokens, seed, cursor, split, where, epochs,
                prefetch, dtype, framework, shuffle, buffer_tokens.

        Raises:
            ContentError: a hook without vectors, or a setting or cursor that does not fit.
        """
        from activation_store.read.stream import VectorStream

        hooks = [hook] if isinstance(hook, str) else hook
        return VectorStream(self, self.shard_folder(hooks), hook, **settings)

    def shard_folder(self, hooks: Sequence[str]) -> Path:  # noqa: ARG002
        """Return the folder that holds the shards of these hooks."""
        return self.where.folder

    def hooks(self) -> duckdb.DuckDBPyRelation:
        """Return table `hooks`: what was captured, with which settings."""
        return self.sql("FROM hooks ORDER BY hook, kind")

    def info(self) -> Info:
        """Return what the store holds, in numbers."""
        (row,) = self.sql(_INFO).fetchall()
        meta = dict(self.sql("SELECT key, value FROM meta").fetchall())
        shards, documents, n_tokens, n_acts, n_vectors, n_bytes, hooks = row
        return Info(
            path=self.path,
            store_id=meta["store_id"],
            schema_version=int(meta["schema_version"]),
            n_bytes=n_bytes + self.path.stat().st_size,
            n_shards=shards,
            n_documents=documents,
            n_tokens=n_tokens,
            n_acts=n_acts,
            n_vectors=n_vectors,
            hooks=tuple(hooks),
        )

    def append(self, table: str, rows: Any) -> int:
        """Add rows in one commit; a row whose key is there already is replaced.

        Args:
            table: one of `tables.APPENDABLE`; `tables.KEYS` names the keys.
            rows: Arrow data, whatever gives an Arrow stream (polars, DuckDB), or a list of dicts.

        Returns:
            The number of rows put in.

        Raises:
            ContentError: unknown table or column, wrong type, missing value, two rows of one key.
            StoreError: the store is open for reading.
            WriteError: the machine refused; nothing is changed.
        """
        self._check_writable()
        if table not in tables.APPENDABLE:
            raise ContentError(
                f"table {table!r} takes no rows from here; these do: "
                f"{', '.join(tables.APPENDABLE)}."
            )
        incoming = tables.arrow_rows(table, rows)
        with catalogue.commit(self.where) as con:
            return tables.replace(con, table, incoming)

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
            StoreError: the store is open for reading.
        """
        from activation_store.write.writer import Writer

        self._check_writable()
        return Writer(
            self.where,
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

    def verify(self, repair: bool = False) -> Report:
        """Check every byte of the store; see `verification.verify`."""
        if repair:
            self._check_writable()
        return verify(self.path, repair=repair)

    def _check_writable(self) -> None:
        if self.mode == "r":
            raise StoreError(f"{self.path}: open for reading; open it with mode='a' to add to it.")

    def _told(self, fault: duckdb.Error, query: str, params: Mapping[str, Any]) -> StoreError:
        """Return what DuckDB says, with the way out that belongs to it."""
        text = str(fault).strip()
        unreadable = isinstance(fault, duckdb.IOException | duckdb.InvalidInputException)
        if unreadable and str(self.where.folder) in text:
            return damaged_shard(fault, self.path)
        if "parameter" in text.lower():
            given = ", ".join(f"${name}" for name in params) or "none"
            return QueryError(f"{text}\nParameters given: {given}. Query: {query.strip()}")
        return QueryError(text)


def _bound(
    cursor: duckdb.DuckDBPyConnection, statement: str | duckdb.Statement, params: Mapping[str, Any]
) -> duckdb.DuckDBPyRelation:
    """Return the relation of a query with parameters.

    DuckDB 1 keeps the rows of `sql(..., params=...)` as single values, which take 2 microseconds
    each to read back; through Arrow the same rows take a fiftieth of that. Arrow's relations
    refuse two columns of one name, so the second becomes `name_1`.
    """
    if _ARROW_FROM_CURSOR:
        table = cursor.execute(statement, dict(params)).to_arrow_table()
    else:
        table = cursor.sql(statement, params=dict(params)).to_arrow_table()
    names: list[str] = table.column_names
    unique = [
        f"{name}_{names[:i].count(name)}" if name in names[:i] else name
        for i, name in enumerate(names)
    ]
    return cursor.from_arrow(table.rename_columns(unique))
