"""Fewer, larger shards: what many small commits leave behind, brought to the form of one large one.

Small shards of acts that follow each other are merged, block by block, so that a unit's rows lie in
fewer places. New files are written beside the old ones, one commit lists them in their stead, and
the old ones are removed when nobody reads the store. A run that is killed changes nothing.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from activation_store.catalog import catalogue, migrations
from activation_store.catalog.catalogue import Place
from activation_store.catalog.presence import unread
from activation_store.errors import ShardError, StoreError
from activation_store.hooks import Dtype
from activation_store.shards.encoding import ShardFile, Target
from activation_store.shards.names import (
    ACTS_ROW_GROUP,
    BLOCK_ACTS,
    NUMBERS_PER_RANK,
    SHARD_ROWS,
    Shard,
    file_number,
    listed,
    listed_names,
    register,
    shard_name,
    unlisted,
)
from activation_store.shards.parquet import ActsWriter, RowGroup
from activation_store.write.state import Rank

_COLUMNS = ["unit", "seq_id", "pos", "act"]


@dataclass(frozen=True, slots=True)
class Compaction:
    """What a compaction did."""

    path: Path
    """The catalogue file."""
    merged: int
    """Shards that were replaced."""
    written: int
    """Shards that replaced them."""
    n_rows: int
    """Rows in them."""
    removed: tuple[str, ...] = field(default=())
    """Files taken off the disk."""
    kept: tuple[str, ...] = field(default=())
    """Replaced files that stay for now, because a process reads the store; a later run, or the
    next writer, removes them."""

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.merged} shards became {self.written}, {self.n_rows:,} rows; "
            f"{len(self.removed)} files removed"
        ]
        if self.kept:
            lines.append(f"  {len(self.kept)} files stay until nobody reads the store")
        return "\n".join(lines)


class _Merge(NamedTuple):
    """Shards of one hook that become one or few."""

    rank: int
    hook: str
    dtype: Dtype
    shards: tuple[Shard, ...]


class _Block(NamedTuple):
    """Row groups of one shard that go through its units once."""

    shard: Shard
    groups: range
    n_rows: int


def compact(
    path: str | os.PathLike[str], *, block_acts: int = BLOCK_ACTS, shard_acts: int = SHARD_ROWS
) -> Compaction:
    """Merge small shards of acts; the rows stay the same to the bit.

    Needs room on the disk for the merged shards beside the old ones. In memory it holds one block.

    Args:
        path: the store, its folder or its catalogue file.
        block_acts: acts of all hooks that lie together by unit; a query for one token reads that
            many.
        shard_acts: acts of a shard, about; shards of half as many stay as they are.

    Raises:
        NotAStoreError: there is no store.
        LockedError: a process is writing the store.
        ShardError: a shard is damaged.
        WriteError: the machine refused; nothing is changed.
    """
    where = catalogue.place(path)
    migrations.migrate(where)
    with ExitStack() as held:
        ranks = sorted({0, *(_rank(shard) for shard in _read(where)[0])})
        for rank in ranks:
            held.enter_context(catalogue.locked(Rank(rank, rank + 1).lock(where)))
        shards, dtypes, numbers = _read(where)
        merges = list(_plan(shards, dtypes, shard_acts))
        written: list[Shard] = []
        for merge in merges:
            written += _merge(where, merge, numbers, max(1, block_acts // len(dtypes)), shard_acts)
        old = [shard for merge in merges for shard in merge.shards]
        if old:
            _exchange(where, old, written)
        removed, kept = _sweep(where, ranks)
    return Compaction(
        where.file, len(old), len(written), sum(shard.n_rows for shard in old), removed, kept
    )


class _File:
    """A shard of acts that merged blocks are appended to."""

    def __init__(self, target: Target, dtype: Dtype) -> None:
        assert target.hook is not None
        self.shard = ShardFile(target)
        with self.shard.writing():
            self._parquet = ActsWriter(target.hook, dtype, self.shard.file.write)

    def append(self, where: Place, blocks: Sequence[_Block]) -> None:
        """Append the rows of the blocks as one block, sorted by unit, seq_id, pos."""
        for block in blocks:
            bounds = [b for b in (block.shard.seq_min, block.shard.seq_max) if b is not None]
            self.shard.cover(0, np.array(bounds, np.int64))
        unit, seq, pos, act = _rows(where, blocks)
        order = np.lexsort((pos, seq, unit))
        unit, seq, pos, act = (column[order] for column in (unit, seq, pos, act))
        start = 0
        while start < len(unit):
            last = min(start + ACTS_ROW_GROUP, len(unit)) - 1
            stop = int(np.searchsorted(unit, unit[last], "right"))  # a row group ends with a unit
            part = slice(start, stop)
            units, runs = np.unique(unit[part], return_counts=True)
            with self.shard.writing():
                self._parquet.append(RowGroup(units, runs, seq[part], pos[part], act[part]))
            self.shard.cover(stop - start, seq[:0], units)
            start = stop

    def close(self) -> Shard:
        """End the file and bring it to the disk."""
        with self.shard.writing():
            self._parquet.close()
        return self.shard.close()


def _rank(shard: Shard) -> int:
    return file_number(shard.file) // NUMBERS_PER_RANK


def _read(where: Place) -> tuple[list[Shard], dict[str, Dtype], dict[int, int]]:
    """Return the shards, the types of acts by hook, and the next free number by rank."""
    with duckdb.connect(where.file, read_only=True) as con:
        shards = listed(con)
        rows = con.execute("SELECT hook, dtype FROM hooks WHERE kind = 'rows'").fetchall()
    numbers: dict[int, int] = {}
    for shard in shards:
        numbers[_rank(shard)] = max(numbers.get(_rank(shard), 0), file_number(shard.file) + 1)
    return shards, dict(rows), numbers


def _plan(shards: Sequence[Shard], dtypes: dict[str, Dtype], shard_acts: int) -> Iterator[_Merge]:
    """Yield runs of two or more small shards that follow each other by sequence."""
    acts = [shard for shard in shards if shard.kind == "acts" and shard.hook is not None]
    order = sorted(
        acts, key=lambda s: (_rank(s), s.hook or "", s.seq_min or 0, file_number(s.file))
    )
    for (rank, hook, is_small), run in groupby(
        order, key=lambda s: (_rank(s), s.hook or "", s.n_rows < shard_acts // 2)
    ):
        found = tuple(run)
        if is_small and len(found) > 1:
            yield _Merge(rank, hook, dtypes[hook], found)


def _merge(
    where: Place, merge: _Merge, numbers: dict[int, int], block_rows: int, shard_acts: int
) -> list[Shard]:
    """Write the rows of the shards as few new ones and return these."""
    store_id = catalogue.read_meta(where)["store_id"]
    written: list[Shard] = []
    file: _File | None = None
    try:
        for blocks in _gathered(where, merge.shards, block_rows):
            if file is None:
                name = shard_name("acts", store_id, numbers[merge.rank])
                numbers[merge.rank] += 1
                file = _File(Target(where.folder, name, "acts", merge.hook), merge.dtype)
            file.append(where, blocks)
            if file.shard.n_rows >= shard_acts:
                written.append(file.close())
                file = None
    except BaseException:
        if file is not None:
            file.shard.abandon()
        raise
    return written if file is None else [*written, file.close()]


def _gathered(where: Place, shards: Sequence[Shard], block_rows: int) -> Iterator[list[_Block]]:
    """Yield blocks of the shards, as many together as make one block of the size wanted."""
    together: list[_Block] = []
    for shard in shards:
        for block in _blocks(where, shard):
            together.append(block)
            if sum(part.n_rows for part in together) >= block_rows:
                yield together
                together = []
    if together:
        yield together


def _blocks(where: Place, shard: Shard) -> Iterator[_Block]:
    """Yield the blocks of a shard: a new one begins where the units begin anew."""
    path = where.folder / shard.file
    try:
        metadata = pq.read_metadata(path)
    except (OSError, pa.ArrowException) as fault:
        raise _damaged(path, fault) from fault
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    units = [group.column(1).statistics for group in groups]
    first = 0
    for i in range(1, len(groups) + 1):
        if i == len(groups) or units[i].min <= units[i - 1].max:
            yield _Block(shard, range(first, i), sum(g.num_rows for g in groups[first:i]))
            first = i
    if not groups:
        yield _Block(shard, range(0), 0)


def _damaged(path: Path, fault: Exception) -> ShardError:
    return ShardError(
        f"{path}: cannot be read: {fault}. Run `lmmono store verify --repair` on the store, which "
        "drops only what is lost and says what; nothing was changed."
    )


def _rows(where: Place, blocks: Sequence[_Block]) -> list[np.ndarray]:
    """Return the columns unit, seq_id, pos and act of the blocks, one after the other."""
    tables: list[pa.Table] = []
    for block in blocks:
        path = where.folder / block.shard.file
        try:
            with pq.ParquetFile(path) as file:
                tables.append(file.read_row_groups(list(block.groups), columns=_COLUMNS))
        except (OSError, pa.ArrowException) as fault:
            raise _damaged(path, fault) from fault
    table = pa.concat_tables(tables)
    return [table.column(name).to_numpy() for name in _COLUMNS]


def _exchange(where: Place, old: Sequence[Shard], new: Sequence[Shard]) -> None:
    """List the new shards in place of the old ones, in one commit."""
    if sum(shard.n_rows for shard in old) != sum(shard.n_rows for shard in new):
        raise ShardError(
            f"{where.folder}: the shards hold other rows than the catalogue lists; run `lmmono "
            "store verify` on the store. Nothing was changed."
        )
    catalogue.sync(where.folder)
    with catalogue.commit(where) as con:
        gone = con.execute(
            "DELETE FROM shards WHERE file IN (SELECT unnest($1::VARCHAR[])) RETURNING file",
            [[shard.file for shard in old]],
        ).fetchall()
        if len(gone) != len(old):
            raise StoreError(
                f"{where.file}: changed by another process meanwhile; run the compaction again."
            )
        register(con, new)


def _sweep(where: Place, ranks: Sequence[int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Remove the files of these ranks that no commit lists, unless a process reads the store."""
    with duckdb.connect(where.file, read_only=True) as con:
        names = listed_names(con)
    old = [
        path
        for path in unlisted(where, names)
        if file_number(path.name) // NUMBERS_PER_RANK in ranks
    ]
    files = tuple(path.name for path in old)
    with unread(where.folder) as alone:
        if not alone:
            return (), files
        for path in old:
            path.unlink()
    return files, ()
