"""Whether a store is whole: every listed byte is checked, and what is lost can be dropped."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from activation_store.catalog import catalogue, migrations
from activation_store.catalog.catalogue import Place
from activation_store.catalog.reader import size_fault
from activation_store.catalog.tables import KEYS
from activation_store.errors import NotAStoreError
from activation_store.shards.names import (
    ACTS,
    TOKENS,
    Kind,
    Shard,
    StateFile,
    checksum,
    listed,
    listed_names,
    listed_states,
    unlisted,
)

_ORDER = {
    "acts": ("unit", "seq_id", "pos"),
    "tokens": ("seq_id", "pos"),
    "vectors": ("seq_id", "pos"),
}
_COLUMNS = {
    "acts": ACTS.names,
    "tokens": TOKENS.names,
    "vectors": ["hook", "seq_id", "pos", "vector"],
}


class LostState(NamedTuple):
    """The state of a writer whose file is damaged or gone."""

    key: str
    """Key in table `writer_state`."""
    file: str


Broken = dict[Shard | LostState, str]


@dataclass(frozen=True, slots=True)
class Report:
    """What a check of a store found."""

    path: Path
    """The catalogue file."""
    n_shards: int
    """Shards listed when the check began."""
    n_bytes: int
    """Bytes of the shards that were read and found right."""
    faults: tuple[str, ...]
    """What is wrong, one line each."""
    dropped: tuple[str, ...] = ()
    """What a repair took out of the catalogue, one line each."""
    left_over: tuple[str, ...] = field(default=())
    """Files that no commit lists: what a killed writer left; the next writer removes them."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, or nothing any more after a repair."""
        return not self.faults

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.n_shards} shards, {self.n_bytes / 1e6:,.1f} MB read"]
        lines += [f"  fault: {fault}" for fault in self.faults]
        lines += [f"  dropped: {what}" for what in self.dropped]
        lines += [f"  left over, not part of the store: {name}" for name in self.left_over]
        return "\n".join([*lines, "  ok" if self.ok else "  NOT ok"])


def verify(path: str | os.PathLike[str], *, repair: bool = False) -> Report:
    """Check the catalogue, and the bytes, rows and order of every shard.

    Args:
        path: the store, its folder or its catalogue file.
        repair: take shards that are missing or damaged out of the catalogue, in one commit. The
            files stay where they are. Statistics and exemplars stay: they were taken from all
            tokens, those of lost shards included.

    Raises:
        NotAStoreError: there is no catalogue, or it is damaged itself.
        SchemaError: the store was written by a newer version of this package.
        WriteError: the machine refused the repair; nothing is changed.
    """
    where = catalogue.place(path)
    report, broken = _check(where)
    if not (repair and broken):
        return report
    with catalogue.commit(where) as con:
        dropped = tuple(
            drop(con, lost, fault) if isinstance(lost, Shard) else _forget(con, lost, fault)
            for lost, fault in broken.items()
        )
    again, _ = _check(where)
    return Report(
        again.path, report.n_shards, again.n_bytes, again.faults, dropped, again.left_over
    )


def _check(where: Place) -> tuple[Report, Broken]:
    with duckdb.connect(":memory:") as con:
        migrations.attach(con, where, "checked")
        try:
            con.execute("USE checked")
            shards = listed(con)
            faults = list(catalogue_faults(con))
            names, states = listed_names(con), listed_states(con)
        except duckdb.Error as fault:
            raise NotAStoreError(f"{where.file}: damaged: {str(fault).splitlines()[0]}") from fault
    broken: Broken = {s: fault for s in shards if (fault := _shard_fault(where, s)) is not None}
    broken |= {
        LostState(key, file.file): fault
        for key, file in states.items()
        if (fault := file.fault(where.folder)) is not None and _still_listed(where, file)
    }
    left_over = tuple(path.name for path in unlisted(where, names))
    n_bytes = sum(shard.n_bytes for shard in shards if shard not in broken)
    n_bytes += sum(
        state.n_bytes for key, state in states.items() if LostState(key, state.file) not in broken
    )
    faults += [f"{lost.file}: {fault}" for lost, fault in broken.items()]
    return Report(where.file, len(shards), n_bytes, tuple(faults), (), left_over), broken


def catalogue_faults(con: duckdb.DuckDBPyConnection) -> Iterator[str]:
    """Yield what is wrong with the tables of the catalogue that `con` is in."""
    for table, key in KEYS.items():
        columns = ", ".join(key)
        # DuckDB checks the sums of the blocks that it reads, so read every column
        twin = con.execute(
            f"SELECT {columns}, count(*), bit_xor(hash(t)) FROM {table} t"
            f" GROUP BY {columns} HAVING count(*) > 1 LIMIT 1"
        ).fetchone()
        if twin is not None:
            yield f"table {table}: more than one row with the key {columns} = {twin[:-2]}"
    counts = con.execute(
        "SELECT h.hook, h.kind, h.n_acts, coalesce(sum(s.n_rows), 0)::BIGINT FROM hooks h"
        " LEFT JOIN shards s ON s.hook = h.hook"
        " AND s.kind = CASE h.kind WHEN 'rows' THEN 'acts' ELSE 'vectors' END"
        " GROUP BY ALL"
    ).fetchall()
    for hook, kind, n_acts, n_rows in counts:
        if n_acts != n_rows:
            yield f"table hooks: {hook} ({kind}) has {n_acts} rows, its shards list {n_rows}"


def _shard_fault(where: Place, shard: Shard) -> str | None:
    """Return what is wrong with a shard's file, or None."""
    path = where.folder / shard.file
    if (fault := size_fault(path, shard.n_bytes)) is not None:
        return fault.removeprefix(f"{shard.file} ")
    if (found := checksum(path)) != shard.checksum:
        return f"its sha256 is {found[:12]}..., want {shard.checksum[:12]}...; bytes were changed"
    try:
        return _content_fault(path, shard)
    except pa.ArrowException as fault:
        return f"not readable as Parquet: {str(fault).splitlines()[0]}"


def _content_fault(path: Path, shard: Shard) -> str | None:
    with pq.ParquetFile(path) as file:
        if file.metadata.num_rows != shard.n_rows:
            return f"has {file.metadata.num_rows} rows, want {shard.n_rows}"
        if (fault := _column_fault(file.schema_arrow, shard.kind)) is not None:
            return fault
        order = _ORDER[shard.kind]
        for number in range(file.num_row_groups):
            group = file.read_row_group(number, columns=list(order))
            keys = [group.column(name).to_numpy().astype(np.int64) for name in order]
            if not _ascends(keys):
                return f"row group {number} is not sorted by {', '.join(order)}"
            if shard.seq_min is not None and shard.seq_max is not None and len(keys[0]):
                seqs = keys[order.index("seq_id")]
                if seqs.min() < shard.seq_min or seqs.max() > shard.seq_max:
                    return f"row group {number} has sequences beyond those listed"
    return None


def _column_fault(schema: pa.Schema, kind: Kind) -> str | None:
    if schema.names != _COLUMNS[kind]:
        return f"has columns {', '.join(schema.names)}, want {', '.join(_COLUMNS[kind])}"
    for name in _ORDER[kind]:
        if schema.field(name).type != pa.int32():
            return f"column {name} is {schema.field(name).type}, want int32"
    return None


def _ascends(keys: list[np.ndarray]) -> bool:
    """Return whether the rows strictly ascend by the columns `keys`, the first one weighs most."""
    decided = np.zeros(max(len(keys[0]) - 1, 0), bool)
    for column in keys:
        step = np.diff(column)
        if np.any(~decided & (step < 0)):
            return False
        decided |= step > 0
    return bool(decided.all())


def _still_listed(where: Place, file: StateFile) -> bool:
    """Say whether a state is listed now: a writer removes its last one when it commits the next."""
    with duckdb.connect(":memory:") as con:
        catalogue.attach(con, where, "now")
        con.execute("USE now")
        return file in listed_states(con).values()


def _forget(con: duckdb.DuckDBPyConnection, lost: LostState, fault: str) -> str:
    """Take a writer's state out of the catalogue and return what that loses."""
    con.execute("DELETE FROM writer_state WHERE key = $1", [lost.key])
    return (
        f"the state of {lost.key}: what it captured stays, but it cannot be gone on with, nor be "
        f"published to a lake ({lost.file}: {fault})"
    )


def drop(con: duckdb.DuckDBPyConnection, shard: Shard, fault: str) -> str:
    """Take a shard out of the catalogue and return what that loses."""
    con.execute("DELETE FROM shards WHERE file = $1", [shard.file])
    if shard.kind != "tokens":
        kind = "rows" if shard.kind == "acts" else "vectors"
        con.execute(
            "UPDATE hooks SET n_acts = n_acts - $1 WHERE hook = $2 AND kind = $3",
            [shard.n_rows, shard.hook, kind],
        )
    of_hook = f" of {shard.hook}" if shard.hook is not None else ""
    return (
        f"{shard.n_rows} rows of {shard.kind}{of_hook}, sequences {shard.seq_min} to "
        f"{shard.seq_max} ({shard.file}: {fault})"
    )
