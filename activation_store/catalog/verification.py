"""Whether a store is whole: every listed byte is checked, and what is lost can be dropped."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from activation_store.catalog.backend import Backend, LostState
from activation_store.catalog.tables import COUNTED, KEYS, column_faults
from activation_store.errors import NotAStoreError
from activation_store.shards.names import ACTS, TOKENS, Kind, Shard, listed

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
_TOKENS_LOST = "tokens_lost"
"""Key in table `meta` where a repair has dropped tokens: exemplars may point nowhere."""

Broken = dict[Shard | LostState, str]


@dataclass(frozen=True, slots=True)
class Report:
    """What a check of a store found."""

    path: Path
    """The catalogue file."""
    n_shards: int
    """Shards listed when the check began."""
    n_bytes: int
    """Bytes of the shards that are whole; states of writers are checked and not counted."""
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


def verify(backend: Backend, *, repair: bool = False) -> Report:
    """Check the tables of the catalogue, and the bytes, rows and order of every shard.

    Args:
        backend: the store, which need not be open.
        repair: take shards that are missing or damaged out of the catalogue, in one commit. Files
        of
            a folder stay where they are; a lake renames what is left of them to `<file>.damaged`,
            and a shard that is as its store wrote it comes back when that store is published again.
            Statistics and exemplars stay: they were taken from all tokens, those of lost shards
            included.

    Raises:
        NotAStoreError: there is no catalogue, or it is damaged itself.
        SchemaError: the store was written under another version of the schema.
        LockedError: others were writing all the time; nothing is changed.
        WriteError: the machine refused the repair; nothing is changed.
    """
    with backend.checking() as con:
        report, broken = _check(backend, con)
        if not (repair and broken):
            return report

        def work(inside: duckdb.DuckDBPyConnection) -> tuple[str, ...]:
            return tuple(_drop(backend, inside, lost, fault) for lost, fault in broken.items())

        tables = ("shards", "hooks", "writer_state", "meta")
        dropped = backend.commit(work, tables=tables)
    with backend.checking() as con:
        again, _ = _check(backend, con)
    return replace(again, n_shards=report.n_shards, dropped=dropped)


def _check(backend: Backend, con: duckdb.DuckDBPyConnection) -> tuple[Report, Broken]:
    try:
        ((database,),) = con.execute("SELECT current_database()").fetchall()
        faults = list(column_faults(con, database))
        if faults:  # the queries below want every column, of its type
            return Report(backend.path, 0, 0, tuple(faults)), {}
        faults += _table_faults(con, has_counts=not backend.is_lake)
        shards = listed(con)
        states = backend.state_faults(con)
        broken: Broken = {
            shard: fault for shard in shards if (fault := _shard_fault(backend, shard)) is not None
        }
        faults += _exemplar_faults(backend, con, [s for s in shards if s not in broken])
        left_over = backend.left_over(con)
    except duckdb.Error as fault:
        text = backend.redact(str(fault).splitlines()[0])
        raise NotAStoreError(f"{backend.path}: damaged: {text}") from fault
    n_bytes = sum(shard.n_bytes for shard in shards if shard not in broken)
    broken |= states
    faults += [f"{lost.file}: {fault}" for lost, fault in broken.items()]
    return Report(backend.path, len(shards), n_bytes, tuple(faults), (), left_over), broken


_LIES = {
    "{hook} ({kind}) has {a} rows, its shards list {b}": """
        SELECT h.hook, h.kind, h.n_acts AS a, coalesce(sum(s.n_rows), 0)::BIGINT AS b
        FROM hooks h
        LEFT JOIN shards s ON s.hook = h.hook
            AND s.kind = CASE h.kind WHEN 'rows' THEN 'acts' ELSE 'vectors' END
        GROUP BY ALL HAVING a <> b
    """,
    "no row for {hook} ({kind}), of which {a} shards are listed": """
        WITH listed AS (
            SELECT s.hook, CASE s.kind WHEN 'acts' THEN 'rows' ELSE 'vectors' END AS kind
            FROM shards s WHERE s.kind <> 'tokens'
        )
        SELECT hook, kind, count(*) AS a, 0 AS b
        FROM listed ANTI JOIN hooks USING (hook, kind) GROUP BY ALL
    """,
    "{hook} ({kind}) counts {a} tokens, the store holds {b}": """
        WITH held AS (
            SELECT coalesce(sum(n_rows), 0)::BIGINT AS n FROM shards WHERE kind = 'tokens'
        )
        SELECT hook, kind, n_tokens AS a, held.n AS b FROM hooks, held
        WHERE n_tokens > held.n AND NOT EXISTS (SELECT 1 FROM meta WHERE key = 'tokens_lost')
    """,
    "{hook} ({kind}) has {a} units whose density is not in 0 to 1": """
        SELECT hook, 'rows' AS kind, count(*) AS a, 0 AS b FROM unit_stats
        WHERE NOT density BETWEEN 0 AND 1 GROUP BY hook
    """,
    "{hook} ({kind}) has {a} exemplars whose act is not finite": """
        SELECT hook, 'rows' AS kind, count(*) AS a, 0 AS b FROM exemplars
        WHERE NOT isfinite(act) GROUP BY hook
    """,
    "{hook} ({kind}) has a width d of {a}, want >= 1": (
        "SELECT hook, kind, d AS a, 0 AS b FROM hooks WHERE d < 1 OR d IS NULL"
    ),
    "{hook} ({kind}) has units 0 to {a}, its shards hold unit {b}": """
        SELECT h.hook, h.kind, h.d - 1 AS a, max(s.unit_max) AS b
        FROM hooks h JOIN shards s ON s.hook = h.hook AND s.kind = 'acts' AND h.kind = 'rows'
        GROUP BY ALL HAVING b > a
    """,
    "{hook} ({kind}) has units 0 to {a}, unit_stats or exemplars name unit {b}": """
        SELECT x.hook, 'rows' AS kind, any_value(h.d) - 1 AS a, max(x.unit) AS b
        FROM (SELECT hook, unit FROM unit_stats UNION ALL SELECT hook, unit FROM exemplars) x
        LEFT JOIN hooks h ON h.hook = x.hook AND h.kind = 'rows'
        GROUP BY x.hook HAVING bool_or(h.d IS NULL OR x.unit >= h.d OR x.unit < 0)
    """,
}
"""What table `hooks` may say against the others: the words, and the query that finds it."""


def _table_faults(con: duckdb.DuckDBPyConnection, *, has_counts: bool) -> Iterator[str]:
    """Yield what is wrong with the tables of the catalogue that `con` is in.

    Every commit of a folder counts its tables in `meta`, those of a lake do not.
    """
    for table, key in KEYS.items():
        columns = ", ".join(key)
        # DuckDB checks the sums of the blocks that it reads, so read every column
        twins = con.execute(
            f"SELECT {columns}, count(*), bit_xor(hash(t)) FROM {table} t"
            f" GROUP BY {columns} HAVING count(*) > 1 LIMIT 1"
        ).fetchall()
        for twin in twins:
            yield f"table {table}: more than one row with the key {columns} = {twin[:-2]}"
    for words, query in _LIES.items():
        for hook, kind, a, b in con.execute(query).fetchall():
            yield "table hooks: " + words.format(hook=hook, kind=kind, a=a, b=b)
    counts = con.execute(
        "SELECT substr(key, 8), value FROM meta WHERE starts_with(key, 'n_rows ') ORDER BY key"
    ).fetchall()
    for table in sorted(set(COUNTED) - {name for name, _ in counts}) if has_counts else ():
        yield f"table meta: does not say how many rows table {table} has"
    for table, count in counts:
        if table not in COUNTED:
            continue
        ((n_rows,),) = con.execute(f"SELECT count(*) FROM {table}").fetchall()
        if str(n_rows) != count:
            yield f"table {table}: has {n_rows} rows, the last commit left {count}"


def _exemplar_faults(
    backend: Backend, con: duckdb.DuckDBPyConnection, whole: list[Shard]
) -> Iterator[str]:
    """Yield whether exemplars point at tokens that no shard holds.

    Memory: 24 bytes per exemplar, and one shard of tokens.
    """
    if con.execute("SELECT 1 FROM meta WHERE key = $1", [_TOKENS_LOST]).fetchall():
        return
    tokens = [shard for shard in whole if shard.kind == "tokens"]
    ((n_listed,),) = con.execute("SELECT count(*) FROM shards WHERE kind = 'tokens'").fetchall()
    if n_listed > len(tokens):  # those that are damaged are told apart
        return
    columns = con.execute("SELECT DISTINCT seq_id, pos, doc_id FROM exemplars").fetchnumpy()
    seq, pos, doc = (np.asarray(columns[name], np.int64) for name in ("seq_id", "pos", "doc_id"))
    is_known = np.zeros(len(seq), bool)
    for shard in tokens:
        with backend.files.open(shard.file) as file:
            table = pq.read_table(file, columns=["seq_id", "pos", "doc_id"])
        seqs, places, docs = (table.column(i).to_numpy().astype(np.int64) for i in range(3))
        if not len(seqs):
            continue
        keys = (seqs << 31) + places  # ascending, for the shard is sorted; both are below 2^31
        row = np.searchsorted(keys, (seq << 31) + pos).clip(max=len(keys) - 1)
        is_known |= (keys[row] == (seq << 31) + pos) & (docs[row] == doc)
    if not is_known.all():
        first = int(np.flatnonzero(~is_known)[0])
        yield (
            f"table exemplars: {int((~is_known).sum())} tokens that no shard holds, such as seq_id "
            f"{seq[first]}, pos {pos[first]}, doc_id {doc[first]}"
        )


def _shard_fault(backend: Backend, shard: Shard) -> str | None:
    """Return what is wrong with a shard's file, or None."""
    if (fault := backend.files.bytes_fault(shard)) is not None:
        return fault
    try:
        return _content_fault(backend, shard)
    except pa.ArrowException as fault:
        return f"not readable as Parquet: {str(fault).splitlines()[0]}"


def _content_fault(backend: Backend, shard: Shard) -> str | None:
    with backend.files.open(shard.file) as stream, pq.ParquetFile(stream) as file:
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


def _drop(
    backend: Backend, con: duckdb.DuckDBPyConnection, lost: Shard | LostState, fault: str
) -> str:
    """Take a shard or a writer's state out of the catalogue and return what that loses."""
    if isinstance(lost, LostState):
        con.execute("DELETE FROM writer_state WHERE key = $1", [lost.key])
        return (
            f"the state of {lost.key}: what it captured stays, but it cannot be resumed, nor be "
            f"published to a lake ({lost.file}: {fault})"
        )
    con.execute("DELETE FROM shards WHERE file = $1", [lost.file])
    if lost.kind == "tokens":
        con.execute("DELETE FROM meta WHERE key = $1", [_TOKENS_LOST])
        con.execute("INSERT INTO meta VALUES ($1, 'true')", [_TOKENS_LOST])
    else:
        kind = "rows" if lost.kind == "acts" else "vectors"
        con.execute(
            "UPDATE hooks SET n_acts = n_acts - $1 WHERE hook = $2 AND kind = $3",
            [lost.n_rows, lost.hook, kind],
        )
    of_hook = f" of {lost.hook}" if lost.hook is not None else ""
    return (
        f"{lost.n_rows} rows of {lost.kind}{of_hook}, sequences {lost.seq_min} to {lost.seq_max} "
        f"({lost.file}: {fault}){backend.after_drop(con, lost)}"
    )
