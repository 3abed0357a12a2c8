"""Fewer, larger shards: what many small commits leave behind, brought to the form of one large one.

Small shards that follow each other are merged, of acts block by block, so that a unit's rows lie in
fewer places. New files are written next to the old ones, one commit lists them in their stead, and
the old ones are removed when nobody reads the store. A run that is killed changes nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from activation_store.catalog import catalogue
from activation_store.catalog.catalogue import Place, unread
from activation_store.errors import ShardError, StoreError
from activation_store.hooks import Dtype
from activation_store.shards.encoding import ShardFile, Target, encode_tokens
from activation_store.shards.names import (
    ACTS_ROW_GROUP,
    BLOCK_ACTS,
    NUMBERS_PER_RANK,
    SHARD_ROWS,
    Kind,
    Shard,
    file_number,
    listed,
    listed_names,
    register,
    shard_name,
    unlisted,
)
from activation_store.shards.parquet import ActsWriter, RowGroup
from activation_store.shards.shard_folder import ShardFolder
from activation_store.write.state import Rank

_COLUMNS = ["unit", "seq_id", "pos", "act"]


@dataclass(frozen=True, slots=True)
class Compaction:
    """What a compaction did."""

    path: Path
    """The catalogue file, or the address of a lake."""
    merged: int
    """Shards that were replaced."""
    written: int
    """Shards that replaced them."""
    n_rows: int
    """Rows in them."""
    removed: tuple[str, ...] = field(default=())
    """Files taken off the disk or the bucket."""
    kept: tuple[str, ...] = field(default=())
    """Replaced files that stay for now, because somebody may still read them; a later run, or the
    next writer, removes them."""

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.merged} shards became {self.written}, {self.n_rows:,} rows; "
            f"{len(self.removed)} files removed"
        ]
        if self.kept:
            lines.append(f"  {len(self.kept)} files stay until nobody reads the store")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large blocks and shards become."""

    block_acts: int = BLOCK_ACTS
    """Acts of all hooks that lie together by unit; a query for one token reads that many."""
    shard_acts: int = SHARD_ROWS
    """Acts of a shard, about; shards of half as many stay as they are."""
    shard_tokens: int = BLOCK_ACTS
    """Tokens of a shard, about; they are merged in memory."""


class Merge(NamedTuple):
    """Shards of one hook and one rank that become one or few."""

    rank: int
    kind: Kind
    hook: str | None
    shards: tuple[Shard, ...]


class _Block(NamedTuple):
    """Rows of one shard that go through its units once."""

    shard: Shard
    rows: pa.Table


NextTarget = Callable[[Merge], Target]
"""Gives the place and name of the next shard that a merge writes."""


def plan(
    shards: Iterable[Shard], kinds: Sequence[Kind], sizes: Sizes, *, by_rank: bool = True
) -> Iterator[Merge]:
    """Yield runs of two or more small shards that follow each other by sequence.

    Args:
        shards: all that are listed.
        kinds: those to merge.
        sizes: what is small.
        by_rank: merge only shards of one rank, whose numbers are its own.
    """

    def rank_of(shard: Shard) -> int:
        return _rank(shard) if by_rank else 0

    order = sorted(
        (shard for shard in shards if shard.kind in kinds),
        key=lambda s: (
            rank_of(s),
            s.kind,
            s.hook or "",
            s.seq_min or 0,
            file_number(s.file),
            s.file,
        ),
    )
    limits = {"acts": sizes.shard_acts // 2, "tokens": sizes.shard_tokens // 2}
    for (rank, kind, hook, is_small), run in groupby(
        order, key=lambda s: (rank_of(s), s.kind, s.hook, s.n_rows < limits[s.kind])
    ):
        group = tuple(run)
        if is_small and len(group) > 1:
            yield Merge(rank, kind, hook, group)


def merge(
    files: ShardFolder, job: Merge, next_target: NextTarget, n_hooks: int, sizes: Sizes
) -> Iterator[Shard]:
    """Write the rows of some shards as few new ones and yield these, one by one.

    Every shard is read whole and checked before its rows get a new checksum. In memory it holds one
    block, or one shard of tokens.

    Raises:
        ShardError: a shard is missing or damaged.
        WriteError: the machine refused.
    """
    if job.kind == "tokens":
        yield from _merged_tokens(files, job, next_target, sizes.shard_tokens)
        return
    block_rows = max(1, sizes.block_acts // n_hooks)
    file: _ActsShard | None = None
    try:
        for blocks in _gathered(files, job.shards, block_rows):
            if file is None:
                file = _ActsShard(next_target(job), _dtype(blocks[0].rows.schema))
            file.append(blocks)
            if file.shard.n_rows >= sizes.shard_acts:
                yield file.close()
                file = None
        if file is not None:
            yield file.close()
            file = None
    finally:
        if file is not None:
            file.shard.abandon()


def _dtype(schema: pa.Schema) -> Dtype:
    return "float16" if schema.field("act").type == pa.float16() else "float32"


def _merged_tokens(
    files: ShardFolder, job: Merge, next_target: NextTarget, shard_tokens: int
) -> Iterator[Shard]:
    tables: list[pa.Table] = []
    for i, shard in enumerate(job.shards):
        with files.checked(shard) as stream:
            tables.append(pq.read_table(stream, read_dictionary=["split"]))
        is_last = i == len(job.shards) - 1
        if is_last or sum(table.num_rows for table in tables) >= shard_tokens:
            rows = pa.concat_tables(tables).unify_dictionaries()
            yield write_tokens(
                next_target(job), rows.sort_by([("seq_id", "ascending"), ("pos", "ascending")])
            )
            tables = []


def write_tokens(target: Target, rows: pa.Table) -> Shard:
    """Write a table of tokens, whose column split is a dictionary, as one shard."""
    split = rows.column("split").combine_chunks()
    columns = {name: rows.column(name).to_numpy() for name in rows.column_names if name != "split"}
    codes = split.indices.to_numpy()
    return encode_tokens(target, columns | {"split": codes}, split.dictionary.to_pylist())


class _ActsShard:
    """A shard of acts that merged blocks are appended to."""

    def __init__(self, target: Target, dtype: Dtype) -> None:
        assert target.hook is not None
        self.shard = ShardFile(target)
        with self.shard.writing():
            self._parquet = ActsWriter(target.hook, dtype, self.shard.file.write)

    def append(self, blocks: Sequence[_Block]) -> None:
        """Append the rows of the blocks as one block, sorted by unit, seq_id, pos."""
        for block in blocks:
            bounds = [b for b in (block.shard.seq_min, block.shard.seq_max) if b is not None]
            self.shard.cover(0, np.array(bounds, np.int64))
        table = pa.concat_tables([block.rows for block in blocks])
        unit, seq, pos, act = (table.column(name).to_numpy() for name in _COLUMNS)
        order = np.lexsort((pos, seq, unit))
        unit, seq, pos, act = unit[order], seq[order], pos[order], act[order]
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


def _gathered(
    files: ShardFolder, shards: Sequence[Shard], block_rows: int
) -> Iterator[list[_Block]]:
    """Yield blocks of the shards, as many together as make one block of the size wanted."""
    together: list[_Block] = []
    for shard in shards:
        with files.checked(shard) as stream:
            for block in _blocks(stream, shard):
                together.append(block)
                if sum(part.rows.num_rows for part in together) >= block_rows:
                    yield together
                    together = []
    if together:
        yield together


def _blocks(stream: pa.NativeFile, shard: Shard) -> Iterator[_Block]:
    """Yield the blocks of a shard: a new one begins where the units begin anew."""
    with pq.ParquetFile(stream) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        units = [group.column(1).statistics for group in groups]
        first = 0
        for i in range(1, len(groups) + 1):
            if i == len(groups) or units[i].min <= units[i - 1].max:
                yield _Block(shard, file.read_row_groups(list(range(first, i)), columns=_COLUMNS))
                first = i
        if not groups:
            yield _Block(shard, file.read(columns=_COLUMNS))


def _rank(shard: Shard) -> int:
    return file_number(shard.file) // NUMBERS_PER_RANK


def exchange(con: duckdb.DuckDBPyConnection, old: Sequence[Shard], new: Sequence[Shard]) -> None:
    """List new shards in place of old ones, in the transaction of `con`.

    Raises:
        ShardError: they do not hold as many rows as those.
        StoreError: one of the old ones is no longer listed.
    """
    if sum(shard.n_rows for shard in old) != sum(shard.n_rows for shard in new):
        raise ShardError(
            "the shards hold other rows than the catalogue lists; run `lmmono store verify` on the "
            "store. Nothing was changed."
        )
    n_gone = len(
        con.execute(
            "SELECT file FROM shards WHERE file IN (SELECT unnest($1::VARCHAR[]))",
            [[shard.file for shard in old]],
        ).fetchall()
    )
    if n_gone != len(old):
        raise StoreError("changed by another process meanwhile; run the compaction again.")
    con.execute(
        "DELETE FROM shards WHERE file IN (SELECT unnest($1::VARCHAR[]))",
        [[shard.file for shard in old]],
    )
    register(con, new)


def compact_folder(where: Place, sizes: Sizes | None = None) -> Compaction:
    """Merge small shards of acts of a store in a folder; the rows stay the same to the bit.

    Needs room on the disk for the merged shards next to the old ones.

    Raises:
        NotAStoreError: there is no store.
        LockedError: a process is writing the store.
        ShardError: a shard is damaged.
        WriteError: the machine refused; nothing is changed.
    """
    sizes = sizes or Sizes()
    files = ShardFolder.local(where.folder)
    with ExitStack() as locks:
        ranks = sorted({0, *(_rank(shard) for shard in _read(where)[0])})
        for rank in ranks:
            locks.enter_context(catalogue.locked(Rank(rank, rank + 1).lock(where)))
        shards, n_hooks, store_id = _read(where)
        numbers: dict[int, int] = {}  # next free number by rank
        for shard in shards:
            numbers[_rank(shard)] = max(numbers.get(_rank(shard), 0), file_number(shard.file) + 1)

        def next_target(job: Merge) -> Target:
            name = shard_name(job.kind, store_id, numbers[job.rank])
            numbers[job.rank] += 1
            return Target(where.folder, name, job.kind, job.hook)

        jobs = list(plan(shards, ["acts"], sizes))
        written = [
            shard for job in jobs for shard in merge(files, job, next_target, n_hooks, sizes)
        ]
        old = [shard for job in jobs for shard in job.shards]
        if old:
            catalogue.sync(where.folder)
            with catalogue.commit(where) as con:
                exchange(con, old, written)
        removed, kept = _sweep(where, ranks)
    return Compaction(
        where.file, len(old), len(written), sum(shard.n_rows for shard in old), removed, kept
    )


def drop_acts(where: Place) -> int:
    """Drop the stored activations of a store in a folder; return how many rows there were.

    Statistics, exemplars, tokens, explanations and scores stay; `hooks.units` becomes an empty
    list. No capture can add to the store any more.

    Raises:
        NotAStoreError: there is no store.
        LockedError: a process is writing the store.
        WriteError: the machine refused; nothing is changed.
    """
    with ExitStack() as locks:
        ranks = sorted({0, *(_rank(shard) for shard in _read(where)[0])})
        for rank in ranks:
            locks.enter_context(catalogue.locked(Rank(rank, rank + 1).lock(where)))
        with catalogue.commit(where) as con:
            ((n_rows,),) = con.execute(
                "SELECT coalesce(sum(n_rows), 0)::BIGINT FROM shards WHERE kind = 'acts'"
            ).fetchall()
            con.execute("DELETE FROM shards WHERE kind = 'acts'")
            con.execute("UPDATE hooks SET units = [], n_acts = 0 WHERE kind = 'rows'")
            con.execute("DELETE FROM writer_state")
        _sweep(where, ranks)
    return n_rows


def _read(where: Place) -> tuple[list[Shard], int, str]:
    """Return the shards, how many hooks have acts, and the store's id."""
    with catalogue.opened(where) as con:
        ((n_hooks,),) = con.execute("SELECT count(*) FROM hooks WHERE kind = 'rows'").fetchall()
        ((store_id,),) = con.execute("SELECT value FROM meta WHERE key = 'store_id'").fetchall()
        return listed(con), max(1, n_hooks), store_id


def _sweep(where: Place, ranks: Sequence[int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Remove the files of these ranks that no commit lists, unless a process reads the store."""
    with catalogue.opened(where) as con:
        names = listed_names(con)
    old = [
        path
        for path in unlisted(where, names)
        if file_number(path.name) // NUMBERS_PER_RANK in ranks
    ]
    files = tuple(path.name for path in old)
    with unread(where.folder) as is_unread:
        if not is_unread:
            return (), files
        for path in old:
            path.unlink()
    return files, ()
