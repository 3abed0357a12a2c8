"""Fewer and larger shards for a lake that took in many small ones.

Shards of one hook that are smaller than a block are merged, in the order of their sequences, until
they make a block, and sorted by unit: one unit then lies in one row group of each block, as in a
store that one process wrote. What was replaced stays for a while for those who still read it.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from activation_store.lake.lake_files import LakeFiles
from activation_store.lake.lake_place import LAKE
from activation_store.shards.encoding import ShardFile, Target, encode_tokens
from activation_store.shards.names import (
    ACTS_ROW_GROUP,
    BLOCK_ACTS,
    Shard,
    listed,
    next_number,
    register,
    shard_name,
)
from activation_store.shards.parquet import ActsWriter, RowGroup


@dataclass(frozen=True, slots=True)
class Compaction:
    """What a compaction did."""

    n_before: int
    """Shards that the lake listed before."""
    n_after: int
    """Shards that it lists now."""
    n_removed: int
    """Files that were removed because nobody should read them any more."""

    def __str__(self) -> str:
        return f"{self.n_before} shards became {self.n_after}; {self.n_removed} files removed"


def compact(con: duckdb.DuckDBPyConnection, files: LakeFiles) -> tuple[int, int]:
    """Merge small shards in the transaction of `con`; return how many were listed and are now."""
    shards = listed(con)
    row = con.execute("SELECT value FROM meta WHERE key = 'store_id'").fetchone()
    assert row is not None
    number = next_number(con)
    groups = list(_groups(shards))
    for group in groups:
        with tempfile.TemporaryDirectory() as folder:
            kind = group[0].kind
            target = Target(Path(folder), shard_name(kind, row[0], number), kind, group[0].hook)
            merged = _merged(files, target, group)
            files.upload(Path(folder) / merged.file, merged)
        _swap(con, group, merged)
        number += 1
    return len(shards), len(shards) - sum(len(group) - 1 for group in groups)


def _groups(shards: Sequence[Shard]) -> Iterator[list[Shard]]:
    """Yield the sets of shards, two or more each, that become one."""
    small = [shard for shard in shards if shard.kind != "vectors" and 0 < shard.n_rows < BLOCK_ACTS]
    small.sort(key=lambda s: (s.kind, s.hook or "", s.seq_min or 0, s.file))
    group: list[Shard] = []
    for shard in small:
        full = sum(held.n_rows for held in group) >= BLOCK_ACTS
        if group and (full or (shard.kind, shard.hook) != (group[0].kind, group[0].hook)):
            yield from [group] if len(group) > 1 else []
            group = []
        group.append(shard)
    if len(group) > 1:
        yield group


def _merged(files: LakeFiles, target: Target, group: Sequence[Shard]) -> Shard:
    root = files.path("")
    parts = [
        pq.read_table(f"{root}{shard.file}", filesystem=files.fs, read_dictionary=["split"])
        for shard in group
    ]
    order = ["seq_id", "pos"] if target.kind == "tokens" else ["unit", "seq_id", "pos"]
    rows = pa.concat_tables(parts).unify_dictionaries()
    rows = rows.sort_by([(name, "ascending") for name in order])
    return _tokens(target, rows) if target.kind == "tokens" else _acts(target, rows)


def _tokens(target: Target, rows: pa.Table) -> Shard:
    split = rows.column("split").combine_chunks()
    columns = {name: rows.column(name).to_numpy() for name in rows.column_names if name != "split"}
    codes = split.indices.to_numpy()
    return encode_tokens(target, columns | {"split": codes}, split.dictionary.to_pylist())


def _acts(target: Target, rows: pa.Table) -> Shard:
    assert target.hook is not None
    half = rows.schema.field("act").type == pa.float16()
    shard = ShardFile(target)
    unit, seq, pos, act = (rows.column(n).to_numpy() for n in ("unit", "seq_id", "pos", "act"))
    with shard.writing():
        writer = ActsWriter(target.hook, "float16" if half else "float32", shard.file.write)
        first = 0
        while first < len(unit):
            last = min(first + ACTS_ROW_GROUP, len(unit)) - 1
            # a row group ends with a unit
            stop = int(np.searchsorted(unit, unit[last], "right"))
            part = slice(first, stop)
            units, counts = np.unique(unit[part], return_counts=True)
            writer.append(
                RowGroup(units, counts, seq[part], pos[part], act[part].astype(np.float32))
            )
            first = stop
        writer.close()
    shard.cover(len(unit), seq, unit)
    return shard.close()


def _swap(con: duckdb.DuckDBPyConnection, group: Sequence[Shard], merged: Shard) -> None:
    names = [shard.file for shard in group]
    con.execute("DELETE FROM shards WHERE file IN (SELECT unnest($1::VARCHAR[]))", [names])
    register(con, [merged])
    now = datetime.now(UTC).replace(tzinfo=None)
    con.executemany("INSERT INTO retired VALUES ($1, $2)", [[name, now] for name in names])


def clean(con: duckdb.DuckDBPyConnection, files: LakeFiles, keep_seconds: float) -> int:
    """Remove what was replaced longer ago than `keep_seconds`; return how many shards."""
    before = datetime.now(UTC).replace(tzinfo=None) - timedelta(seconds=keep_seconds)
    query = "SELECT file FROM retired WHERE retired_at <= $1"
    gone = [file for (file,) in con.execute(query, [before]).fetchall()]
    for file in gone:
        files.remove(file)
    con.execute("DELETE FROM retired WHERE retired_at <= $1", [before])
    return len(gone)


def merge_tables(con: duckdb.DuckDBPyConnection, keep_seconds: float) -> None:
    """Let DuckLake merge the files of its tables and drop those of old snapshots."""
    age = f"now() - INTERVAL {int(keep_seconds)} SECOND"
    con.execute(f"CALL ducklake_flush_inlined_data('{LAKE}')")
    con.execute(f"CALL ducklake_merge_adjacent_files('{LAKE}')")
    con.execute(f"CALL ducklake_expire_snapshots('{LAKE}', older_than => {age})")
    con.execute(f"CALL ducklake_cleanup_old_files('{LAKE}', older_than => {age})")
