"""A lake: one store that many processes and machines share, on DuckLake.

Its catalogue is a SQLite file, a PostgreSQL database or a DuckDB file; its shards lie in a folder
or a bucket. Whoever captures writes a store in a folder, as always, and publishes it to the lake.
Tables and SQL are those of a store.
"""

import os
import random
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from activation_store.catalog import catalogue, door
from activation_store.catalog.backend import (
    Connection,
    LostState,
    Mode,
    Outcome,
    Version,
    attach_stores,
)
from activation_store.catalog.catalogue import Place
from activation_store.catalog.tables import expected_tables, schema_sql
from activation_store.catalog.views import bulk_queries, further_views, score_views
from activation_store.errors import (
    LockedError,
    NotAStoreError,
    ShardError,
    StoreError,
    WriteError,
    interruptible,
)
from activation_store.lake.lake_files import LakeFiles
from activation_store.lake.lake_place import (
    LAKE,
    LakePlace,
    attach_lake,
    check_paths,
    redacted,
    turn,
)
from activation_store.shards.names import Shard, listed, next_number, shard_name
from activation_store.shards.shard_folder import ShardFolder

if TYPE_CHECKING:
    from activation_store.catalog.compaction import Compaction, Merge, Sizes
    from activation_store.lake.publishing import Publication
    from activation_store.shards.encoding import Target
else:  # for annotations only: these take numba to import
    Compaction = Merge = Sizes = Publication = Target = object

ATTEMPTS = 8
"""How often a commit is tried where another program wrote at the same moment. Ours take turns, so
only programs that write to the DuckLake without us can; each waits twice as long as the one
before."""

COPIED_ROWS = 1_000_000
"""Rows up to which a table is copied into memory: about 50 MB of exemplars."""

_COPIED = {
    "meta": "key",
    "hooks": "hook, kind",
    "shards": "kind, hook, file",
    "vocabulary": "token_id",
    "unit_stats": "hook, unit",
    "exemplars": "hook, unit, kind, rank",
}
"""Tables that readers hold a copy of, with its order."""

_PASSING = ("database is locked", "conflict", "could not serialize", "deadlock detected")
_METADATA = f"__ducklake_metadata_{LAKE}"
"""The database of the catalogue itself, as DuckLake attaches it."""


class LakeBackend:
    """A store in a lake; every query shows the last commit."""

    is_lake = True

    def __init__(self, address: LakePlace) -> None:
        self.address = address
        self.lake_files = LakeFiles(address)
        self._con: Connection | None = None

    @property
    def path(self) -> Path:
        return Path(self.address.name)

    @property
    def files(self) -> ShardFolder:
        return self.lake_files.folder

    def folder_place(self) -> Place:
        raise StoreError(
            f"{self.address.name}: a lake takes no captures; capture into a store in a folder, and "
            "lake.publish(...) that."
        )

    def create(self, overwrite: bool) -> None:
        if overwrite:
            raise StoreError(
                "a lake is not overwritten, for others use it; remove its catalogue and data "
                "yourself."
            )
        check_paths(self.address)
        self.lake_files.check(create=True)

        def work(con: Connection) -> None:
            if _tables(con, self.address):
                raise StoreError(
                    f"{self.address.name}: there is a lake already; open it with mode='a'."
                )
            own = files("activation_store").joinpath("lake/lake.sql").read_text("utf-8")
            con.execute(schema_sql(has_checks=False) + own)
            catalogue.write_meta(con)

        with attach_lake(self.address, read_only=False) as con, turn(self.address):
            self._transaction(con, work, lists_shards=True)

    def read_folders(self) -> Sequence[Path]:
        return ()

    def connect(
        self,
        mode: Mode,
        attached: Mapping[str, Place],
        trusted: bool,
        limits: door.QueryLimits,
    ) -> Connection:
        self._con = None  # two connections of one process must not write one DuckDB file
        self.lake_files.check(create=False)
        con = attach_lake(
            self.address,
            read_only=mode == "r",
            files=[file for place in attached.values() for file in place.files()],
            limits=limits,
            is_shut=not trusted,
            must_exist=True,
        )
        try:
            self._check(con)
            con.execute("CREATE SCHEMA copied")
            tables = (*expected_tables(), "publications")
            con.execute(";".join(f"CREATE VIEW {t} AS SELECT * FROM {LAKE}.{t}" for t in tables))
            self.update(con)
            con.execute("\n".join(further_views()))
            attach_stores(con, attached)
        except BaseException:
            con.close()
            raise
        self._con = con
        return con

    def _check(self, con: Connection) -> None:
        """Look whether the lake is one of ours, before any query reads from it.

        Raises:
            NotAStoreError: it is empty, has other tables, or a view in place of one.
            SchemaError: it was written under another version of the schema.
        """
        if not _tables(con, self.address):
            raise NotAStoreError(
                f"{self.address.name}: an empty DuckLake; create it with mode='w'."
            )
        query = "SELECT view_name FROM duckdb_views() WHERE database_name = $1"
        views = {name for (name,) in con.execute(query, [LAKE]).fetchall()}
        if odd := sorted(expected_tables().keys() & views):
            raise NotAStoreError(
                f"{self.address.name}: holds a view {odd[0]!r}, which a lake has as a table, and "
                "which may run anything; nothing of it was run."
            )
        rows = con.execute(f"SELECT key, value FROM {LAKE}.meta").fetchall()
        catalogue.check_meta(self.address.name, dict(rows))

    def version(self, con: Connection) -> Version:
        """Return DuckLake's number of schema changes: a commit that lists shards replaces views."""
        query = (
            f"SELECT schema_version FROM {_METADATA}.ducklake_snapshot"
            " ORDER BY snapshot_id DESC LIMIT 1"
        )
        ((number,),) = con.cursor().execute(query).fetchall()
        return (int(number),)

    def update(self, con: Connection) -> bool:
        """Take the list of shards, and the tables that publications write, into memory.

        So a query sees them as of one commit. And asking DuckLake costs some trips to the catalogue
        per table and query: 10 to 40 ms where the rest of a query of one unit takes 15 ms.
        """
        con = con.cursor()
        con.execute("BEGIN")
        try:
            for view, query in bulk_queries(con, self.lake_files.url, f"{LAKE}.").items():
                con.execute(f"CREATE OR REPLACE VIEW {view} AS {query}")
            for table, order in _COPIED.items():
                source = LAKE
                ((n_rows,),) = con.execute(f"SELECT count(*) FROM {LAKE}.{table}").fetchall()
                if n_rows <= COPIED_ROWS:
                    source = "copied"
                    rows = f"FROM {LAKE}.{table} ORDER BY {order}"
                    con.execute(f"CREATE OR REPLACE TABLE copied.{table} AS {rows}")
                con.execute(f"CREATE OR REPLACE VIEW {table} AS SELECT * FROM {source}.{table}")
            con.execute("COMMIT")
        except BaseException:
            con.execute("ROLLBACK")
            raise
        return True

    def disconnect(self) -> None:
        self._con = None

    def commit(self, work: Callable[[Connection], Outcome], *, tables: Iterable[str]) -> Outcome:
        """Run `work` in one transaction, in turn, again where another program came between.

        Raises:
            LockedError: others came between `ATTEMPTS` times.
            WriteError: the machine or the server refused.
            StoreError: what `work` raises; nothing is changed.
        """
        assert self._con is not None, "a lake that is committed to is open"
        with turn(self.address):
            lists_shards = not _COPIED.keys().isdisjoint(tables)
            return self._transaction(self._con.cursor(), work, lists_shards=lists_shards)

    def _transaction(
        self, con: Connection, work: Callable[[Connection], Outcome], *, lists_shards: bool
    ) -> Outcome:
        con.execute(f"USE {LAKE}")
        for attempt in range(ATTEMPTS):
            con.execute("BEGIN")
            try:
                with interruptible():
                    outcome = work(con)
                    if lists_shards:
                        write_views(con, self.lake_files)
                    con.execute("COMMIT")
            except duckdb.Error as fault:
                _roll_back(con)
                text = redacted(self.address, fault)
                if not any(sign in text.lower() for sign in _PASSING):
                    raise WriteError(
                        f"{self.address.name}: cannot write: {text}. What was committed before is "
                        "intact."
                    ) from fault
                if attempt == ATTEMPTS - 1:
                    raise LockedError(
                        f"{self.address.name}: other programs changed the lake in each of "
                        f"{ATTEMPTS} attempts: {text}. Nothing was written; run again later."
                    ) from fault
                # longer each time, and at random: who collided once would do so again in step
                time.sleep(min(5.0, 0.05 * 2**attempt) * random.uniform(0.5, 1.0))
            except BaseException:
                _roll_back(con)
                raise
            else:
                return outcome
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def checking(self) -> Generator[Connection]:
        is_open = self._con is not None
        if not is_open:
            self.lake_files.check(create=False)
            self._con = attach_lake(self.address, read_only=False, must_exist=True)
        assert self._con is not None
        try:
            self._check(self._con)
            con = self._con.cursor()
            con.execute(f"USE {LAKE}")
            yield con
        finally:
            if not is_open:
                self._con.close()
                self._con = None

    def state_faults(self, con: Connection) -> dict[LostState, str]:
        return {}  # a lake holds the states of writers as bytes of its catalogue

    def left_over(self, con: Connection) -> tuple[str, ...]:
        return ()  # a writer may be copying at this moment

    def after_drop(self, con: Connection, shard: Shard) -> str:
        """Make room for a whole shard, forget that this one was published, and say the way back."""
        self.lake_files.set_aside(shard.file)
        rows = con.execute(
            "SELECT store_id FROM publications WHERE file = $1", [shard.file]
        ).fetchall()
        con.execute("DELETE FROM publications WHERE file = $1", [shard.file])
        if not rows:
            return "; made by the lake from several shards: publish all stores to a new lake"
        return f"; publish store {rows[0][0]} again to have it back"

    def local_folder(self, hooks: Sequence[str], copy_to: str | os.PathLike[str] | None) -> Path:
        if not self.address.is_remote:
            return Path(self.address.data_path) / "shards"
        with self.checking() as con:
            shards = [s for s in listed(con) if s.kind == "vectors" and s.hook in hooks]
        if copy_to is None:
            n_bytes = sum(shard.n_bytes for shard in shards)
            raise StoreError(
                f"{self.address.name}: its vectors lie in {self.address.data_path}, and batches "
                f"are read from files: name a folder with room for {n_bytes / 1e6:,.1f} MB, as "
                'vectors(..., copy_to="/scratch/acts"); what is there already is not copied again.'
            )
        for shard in shards:
            self.lake_files.download(shard, Path(copy_to))
        return Path(copy_to)

    def publish(self, source: Place) -> Publication:
        from activation_store.lake.publishing import read_source, take_in

        store = read_source(source)
        with self.checking() as con:
            published = {
                file for (file,) in con.execute("SELECT file FROM publications").fetchall()
            }
        n_bytes = sum(
            self.lake_files.upload(store.where.folder / shard.file, shard)
            for shard in store.shards
            if shard.file not in published
        )
        publication = self.commit(
            lambda con: take_in(con, store, self.lake_files.upload), tables=_COPIED
        )
        return replace(publication, n_bytes=n_bytes)

    def compact(self, keep_seconds: float, sizes: Sizes | None) -> Compaction:
        """Merge small shards, and the small files of DuckLake's own tables."""
        from activation_store.catalog import compaction

        sizes = sizes or compaction.Sizes()

        def work(con: Connection) -> tuple[list[Shard], int]:
            old: list[Shard] = []
            new: list[Shard] = []
            shards, number = listed(con), next_number(con)
            ((store_id,),) = con.execute("SELECT value FROM meta WHERE key = 'store_id'").fetchall()
            ((n_hooks,),) = con.execute("SELECT count(*) FROM hooks WHERE kind = 'rows'").fetchall()
            with tempfile.TemporaryDirectory() as folder:

                def next_target(job: Merge) -> Target:
                    nonlocal number
                    number += 1
                    name = shard_name(job.kind, store_id, number - 1)
                    return compaction.Target(Path(folder), name, job.kind, job.hook)

                for job in compaction.plan(shards, ["acts", "tokens"], sizes, by_rank=False):
                    merged = compaction.merge(self.files, job, next_target, n_hooks, sizes)
                    for shard in merged:
                        self.lake_files.upload(Path(folder) / shard.file, shard)
                        (Path(folder) / shard.file).unlink()
                        new.append(shard)
                    old += job.shards
            if old:
                compaction.exchange(con, old, new)
                now = datetime.now(UTC).replace(tzinfo=None)
                rows = [[shard.file, now] for shard in old]
                con.executemany("INSERT INTO retired VALUES ($1, $2)", rows)
            return old, len(new)

        old, n_new = self.commit(work, tables=_COPIED)
        removed = self.commit(lambda con: self._clean(con, keep_seconds), tables=["retired"])
        assert self._con is not None
        with turn(self.address):
            _merge_tables(self._con.cursor(), keep_seconds)
        kept = tuple(shard.file for shard in old if shard.file not in removed)
        n_rows = sum(shard.n_rows for shard in old)
        return compaction.Compaction(self.path, len(old), n_new, n_rows, removed, kept)

    def _clean(self, con: Connection, keep_seconds: float) -> tuple[str, ...]:
        """Remove what was replaced longer ago than `keep_seconds`, and return the files."""
        before = datetime.now(UTC).replace(tzinfo=None) - timedelta(seconds=keep_seconds)
        query = "SELECT file FROM retired WHERE retired_at <= $1 ORDER BY file"
        names = tuple(file for (file,) in con.execute(query, [before]).fetchall())
        for file in names:
            self.lake_files.remove(file)
        con.execute("DELETE FROM retired WHERE retired_at <= $1", [before])
        return names

    def explain(self, fault: duckdb.Error) -> StoreError | None:
        text = self.redact(str(fault))
        if isinstance(fault, duckdb.IOException) and f"{self.address.data_path}/shards" in text:
            return ShardError(
                f"{text}. Bring the file back, or publish the store that it came from again."
            )
        return None

    def redact(self, text: str) -> str:
        return redacted(self.address, text)


def _tables(con: Connection, address: LakePlace) -> set[str]:
    """Return the names of the lake's base tables; none for an empty DuckLake.

    Raises:
        NotAStoreError: a DuckLake with tables of others.
    """
    query = "SELECT table_name FROM duckdb_tables() WHERE database_name = $1"
    names = {name for (name,) in con.execute(query, [LAKE]).fetchall()}
    if names and not names >= {"meta", "hooks", "shards", "publications"}:
        raise NotAStoreError(
            f"{address.name}: a DuckLake with other tables ({', '.join(sorted(names)[:5])}), not "
            "one of activations; give the lake a catalogue of its own."
        )
    return names


def write_views(con: Connection, shards: LakeFiles) -> None:
    """Replace the views over the shards that the lake lists and over scores, for any client.

    This also tells those who hold a copy that it is out of date: see `LakeBackend.version`.
    """
    for view, query in bulk_queries(con, shards.url, "").items():
        con.execute(f"CREATE OR REPLACE VIEW {view} AS {query}")
    for statement in score_views():
        con.execute(statement)


def _roll_back(con: Connection) -> None:
    # a commit that failed has ended its transaction already
    with suppress(duckdb.TransactionException):
        con.execute("ROLLBACK")


def _merge_tables(con: Connection, keep_seconds: float) -> None:
    """Let DuckLake merge the files of its tables and drop those of old snapshots."""
    age = f"now() - INTERVAL {int(keep_seconds)} SECOND"
    con.execute(f"CALL ducklake_flush_inlined_data('{LAKE}')")
    con.execute(f"CALL ducklake_merge_adjacent_files('{LAKE}')")
    con.execute(f"CALL ducklake_expire_snapshots('{LAKE}', older_than => {age})")
    con.execute(f"CALL ducklake_cleanup_old_files('{LAKE}', older_than => {age})")
