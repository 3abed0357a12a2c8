"""Shards on their way to the disk: encoded and written by threads while the next batch is computed.

Shards get their numbers in the order in which they are begun, by the thread that captures, so names
and bytes do not depend on how fast the disk is.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

from activation_store.hooks import Dtype, Rows
from activation_store.shards.encoding import ShardFile, Target, encode_tokens, encode_vectors
from activation_store.shards.names import ACTS_ROW_GROUP, SHARD_ROWS, Kind, Shard, shard_name
from activation_store.shards.parquet import ActsWriter, RowGroup
from activation_store.write.accumulator import UnitEntries, VectorBlock
from activation_store.write.kernel import gather

_THREADS = 2  # one encodes while the other waits for the disk


class ActsFile:
    """A shard of one hook's activations while blocks are appended to it."""

    def __init__(self, target: Target, dtype: Dtype) -> None:
        assert target.hook is not None
        self._shard = ShardFile(target)
        self._room: tuple[np.ndarray, ...] = (np.empty(0, np.int32),) * 3
        with self._shard.writing():
            self._parquet = ActsWriter(target.hook, dtype, self._shard.file.write)

    def append(self, parts: Sequence[UnitEntries]) -> None:
        """Write one block: the entries of all units, sorted by (unit, seq_id, pos).

        Raises:
            WriteError: the disk is full or the folder cannot be written.
        """
        for part in parts:
            self._shard.cover(0, part.entries.seq[: part.entries.used[1]])
            for rows in self._row_groups(part):
                with self._shard.writing():
                    self._parquet.append(rows)
                self._shard.cover(len(rows.act), rows.seq_id[:0], rows.units)

    def _row_groups(self, part: UnitEntries) -> Iterator[RowGroup]:
        """Yield the entries as one row group after the other, each in the same buffers.

        A row group ends with a unit, so a block holds each unit in one row group.
        """
        entries = part.entries
        n_tiles = int(entries.used[1])
        per_unit = entries.per_unit[:n_tiles].sum(axis=0, dtype=np.int64)
        cursor = np.zeros(n_tiles, np.int64)
        order = np.argsort(entries.seq[:n_tiles], kind="stable")
        for first, last in _cuts(per_unit):
            n = int(per_unit[first:last].sum())
            seq, pos, act = self._buffers(n)
            gather(entries, order, cursor, first, last, seq, pos, act)
            fired = first + np.flatnonzero(per_unit[first:last])
            if n:
                yield RowGroup(part.units[fired].astype(np.int32), per_unit[fired], seq, pos, act)

    def _buffers(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return room for n rows; fresh memory for each row group costs more than filling it."""
        if len(self._room[0]) < n:
            self._room = tuple(np.empty(n, kind) for kind in (np.int32, np.int32, np.float32))
        seq, pos, act = self._room
        return seq[:n], pos[:n], act[:n]

    def close(self) -> Shard:
        """End the file and bring it to the disk.

        Raises:
            WriteError: the disk is full or the folder cannot be written.
        """
        with self._shard.writing():
            self._parquet.close()
        return self._shard.close()

    def abandon(self) -> None:
        """Close an unfinished file; what is left under `.part` does not count."""
        self._shard.abandon()


def _cuts(per_unit: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield ranges of units with `ACTS_ROW_GROUP` rows, the last unit's excess included."""
    first = 0
    while first < len(per_unit):
        reached = np.cumsum(per_unit[first:])
        last = first + min(int(np.searchsorted(reached, ACTS_ROW_GROUP)) + 1, len(reached))
        yield first, last
        first = last


class _GrowingShard:
    """A shard of acts that blocks are still appended to, one job after the other."""

    def __init__(self, target: Target, rows: Rows) -> None:
        self.target = target
        self.rows = rows
        self.n_rows = 0
        self.last: Future[None] | None = None
        self.file: ActsFile | None = None

    def append(self, parts: Sequence[UnitEntries], before: "Future[None] | None") -> None:
        """Write one block after the one before; runs in a thread."""
        if before is not None:
            before.result()
        if self.file is None:
            self.file = ActsFile(self.target, self.rows.dtype)
        self.file.append(parts)

    def close(self, before: "Future[None] | None") -> Shard:
        """Finish the shard after its last block; runs in a thread."""
        if before is not None:
            before.result()
        assert self.file is not None
        return self.file.close()


class Spool:
    """Writes shards in the background; `finish` waits for them and returns their rows."""

    def __init__(self, folder: Path, store_id: str, first_number: int) -> None:
        self._folder, self._store_id = folder, store_id
        self._number = first_number
        self._threads = ThreadPoolExecutor(_THREADS)
        self._growing: dict[str, _GrowingShard] = {}
        self._closing: list[Future[Shard]] = []
        self._waiting_vectors: list[Future[Shard]] = []

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _target(self, kind: Kind, hook: str | None) -> Target:
        name = shard_name(kind, self._store_id, self._number)
        self._number += 1
        return Target(self._folder, name, kind, hook)

    def acts(self, rows: Rows, parts: Sequence[UnitEntries]) -> "Future[None]":
        """Append a block to the hook's shard; the parts must not change until the job is done."""
        shard = self._growing.get(rows.hook)
        if shard is None:
            shard = _GrowingShard(self._target("acts", rows.hook), rows)
            self._growing[rows.hook] = shard
        shard.last = self._threads.submit(shard.append, parts, shard.last)
        shard.n_rows += sum(int(part.entries.used[0]) for part in parts)
        if shard.n_rows >= SHARD_ROWS:
            self._close(self._growing.pop(rows.hook))
        return shard.last

    def _close(self, shard: _GrowingShard) -> None:
        self._closing.append(self._threads.submit(shard.close, shard.last))

    def vectors(self, block: VectorBlock | None) -> None:
        """Write one shard per hook; waits while as many are on their way already."""
        if block is None:
            return
        for job in self._waiting_vectors:
            job.result()
        self._waiting_vectors = [
            self._submit(encode_vectors, self._target("vectors", hook), block.seq, block.pos, x)
            for hook, x in block.vectors.items()
        ]

    def tokens(self, columns: tuple[dict[str, np.ndarray], Sequence[str]] | None) -> None:
        """Write one shard of tokens."""
        if columns is not None:
            self._submit(encode_tokens, self._target("tokens", None), *columns)

    def _submit(self, job: Callable[..., Shard], *args: object) -> "Future[Shard]":
        future = self._threads.submit(job, *args)
        self._closing.append(future)
        return future

    def finish(self) -> list[Shard]:
        """End every shard, wait until all are on the disk, and return their rows.

        Raises:
            WriteError: the disk is full or the folder cannot be written.
        """
        for shard in self._growing.values():
            self._close(shard)
        self._growing = {}
        shards = [job.result() for job in self._closing]
        self._closing, self._waiting_vectors = [], []
        return shards

    def abandon(self) -> None:
        """Forget what is on its way; files without a row in the catalogue do not count."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for shard in self._growing.values():
            if shard.file is not None:
                shard.file.abandon()
        self._growing = {}
