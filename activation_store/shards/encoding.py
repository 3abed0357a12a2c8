"""Parquet shards as they are written: columns, encodings, checksum, and the way to the disk.

A shard is hashed while it is written beside its final name, then synced and renamed: a file under
a shard's name is whole. The encodings were chosen by measurement: sorted columns shrink by delta
and dictionary encoding, and activations hold too little redundancy for general compression to be
worth its time.
"""

import hashlib
import os
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from activation_store.errors import writing
from activation_store.hooks import Dtype
from activation_store.shards.names import (
    ACTS,
    ACTS_ROW_GROUP,
    TOKENS,
    TOKENS_ROW_GROUP,
    Kind,
    Shard,
)
from activation_store.shards.parquet import ActsWriter, RowGroup
from activation_store.write.kernel import Entries, gather

_DELTA = "DELTA_BINARY_PACKED"
_VECTORS_ROW_GROUP_BYTES = 2**23
_SYNC_BYTES = 2**24
"""Bytes of a file after which they are brought to the disk, so that a commit finds little to do."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a shard goes and what it is."""

    folder: Path
    file: str
    kind: Kind
    hook: str | None


class Part(NamedTuple):
    """Entries of a range of a hook's units."""

    units: np.ndarray
    entries: Entries


class _HashedFile:
    """A file that is written front to back and knows the sha256 of what went in.

    Once closed it takes what comes and drops it: a Parquet writer that is let go writes its footer.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self.hash = hashlib.sha256()
        self.n_bytes = self._n_synced = 0

    @property
    def closed(self) -> bool:
        """False for the Parquet writer, which asks before it writes."""
        return False

    def write(self, data: bytes | memoryview | pa.Buffer) -> int:
        view = memoryview(data)
        if self._file.closed:
            return len(view)
        done = 0
        while done < len(view):
            done += self._file.write(view[done:]) or 0
        self.hash.update(view)
        self.n_bytes += done
        if self.n_bytes - self._n_synced >= _SYNC_BYTES:
            self._let_go()
        return done

    def _let_go(self) -> None:
        """Bring to the disk what was written, and give the memory that holds it to the next bytes.

        Fresh memory costs more than the copy into it, and a long capture would push everything else
        out of the system's cache.
        """
        self.sync()
        if sys.platform == "linux":
            os.posix_fadvise(self._file.fileno(), 0, self.n_bytes, os.POSIX_FADV_DONTNEED)
        self._n_synced = self.n_bytes

    def tell(self) -> int:
        return self.n_bytes

    def flush(self) -> None:
        """Nothing is buffered here."""

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class ShardFile:
    """One shard while it is written; `close` puts it in place and returns its row."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.n_rows = 0
        self._units: list[int] = []
        self._seqs: list[int] = []
        with writing(self._path):
            self.file = _HashedFile(self._part)

    @property
    def _path(self) -> Path:
        return self.target.folder / self.target.file

    @property
    def _part(self) -> Path:
        return self.target.folder / f"{self.target.file}.part"

    @contextmanager
    def writing(self) -> Generator[None]:
        """Name what the machine refuses; after that nothing more is written."""
        done = False
        try:
            with writing(self._path):
                yield
            done = True
        finally:
            if not done:
                self.abandon()

    def cover(self, n_rows: int, seqs: np.ndarray, units: np.ndarray | None = None) -> None:
        """Note rows, which sequences they are about, and for acts which units."""
        self.n_rows += n_rows
        self._seqs += [int(seqs.min()), int(seqs.max())] if len(seqs) else []
        if units is not None and len(units):
            self._units += [int(units[0]), int(units[-1])]

    def close(self) -> Shard:
        """Bring the shard to the disk under its final name.

        Raises:
            WriteError: the disk is full or the folder cannot be written.
        """
        with self.writing():
            self.file.sync()
            self.file.close()
            os.replace(self._part, self._path)
        units, seqs = (
            (min(held), max(held)) if held else (None, None) for held in (self._units, self._seqs)
        )
        return Shard(
            self.target.file,
            self.target.kind,
            self.target.hook,
            self.n_rows,
            self.file.n_bytes,
            self.file.hash.hexdigest(),
            *units,
            *seqs,
        )

    def abandon(self) -> None:
        """Let go of an unfinished file; what is left under `.part` does not count."""
        self.file.close()


class ActsFile:
    """A shard of one hook's activations while blocks are appended to it."""

    def __init__(self, target: Target, dtype: Dtype) -> None:
        assert target.hook is not None
        self._shard = ShardFile(target)
        self._room: tuple[np.ndarray, ...] = (np.empty(0, np.int32),) * 3
        with self._shard.writing():
            self._parquet = ActsWriter(target.hook, dtype, self._shard.file.write)

    def append(self, parts: Sequence[Part]) -> None:
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

    def _row_groups(self, part: Part) -> Iterator[RowGroup]:
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
        """Let go of an unfinished file."""
        self._shard.abandon()


def _cuts(per_unit: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield ranges of units with `ACTS_ROW_GROUP` rows, the last unit's excess included."""
    first = 0
    while first < len(per_unit):
        reached = np.cumsum(per_unit[first:])
        last = first + min(int(np.searchsorted(reached, ACTS_ROW_GROUP)) + 1, len(reached))
        yield first, last
        first = last


def _required(schema: pa.Schema) -> pa.Schema:
    # columns without nulls spare a level per value
    return pa.schema([field.with_nullable(False) for field in schema])


def _write_table(
    target: Target, table: pa.Table, row_group: int, dictionary: Sequence[str], **encoding: str
) -> Shard:
    """Write a table as one shard; it has a column seq_id."""
    shard = ShardFile(target)
    settings: dict[str, Any] = {"use_dictionary": list(dictionary), "column_encoding": encoding}
    # those of a vector's numbers take nearly as long as writing them
    settings["write_statistics"] = [name for name in table.column_names if name != "vector"]
    # a page per row group: who reads vectors from the file looks at the head of every page
    settings["data_page_size"] = _VECTORS_ROW_GROUP_BYTES
    with shard.writing():
        pq.write_table(
            table,
            shard.file,
            row_group_size=row_group,
            compression="none",
            store_schema=False,
            version="2.6",
            **settings,
        )
    shard.cover(len(table), table["seq_id"].to_numpy())
    return shard.close()


def encode_tokens(target: Target, columns: dict[str, np.ndarray], splits: Sequence[str]) -> Shard:
    """Write tokens as one shard; column `split` holds places in `splits`."""
    split = pa.DictionaryArray.from_arrays(pa.array(columns["split"]), pa.array(list(splits)))
    arrays = [split if name == "split" else pa.array(columns[name]) for name in TOKENS.names]
    table = pa.Table.from_arrays(arrays, schema=_required(TOKENS))
    deltas = dict.fromkeys(("seq_id", "pos", "doc_id"), _DELTA)
    return _write_table(target, table, TOKENS_ROW_GROUP, ["split", "token_id"], **deltas)


def encode_vectors(target: Target, seq: np.ndarray, pos: np.ndarray, x: np.ndarray) -> Shard:
    """Write vectors x [n, d] of float16 or float32 as one shard, in the order given."""
    n, d = x.shape
    kind = pa.list_(pa.field("element", pa.from_numpy_dtype(x.dtype), nullable=False), d)
    whole = {"hook": ACTS.field("hook").type, "seq_id": pa.int32(), "pos": pa.int32()}
    arrays = [
        pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([target.hook])),
        pa.array(seq),
        pa.array(pos),
        pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), type=kind),
    ]
    table = pa.Table.from_arrays(arrays, schema=_required(pa.schema({**whole, "vector": kind})))
    row_group = max(1, _VECTORS_ROW_GROUP_BYTES // x[0].nbytes)
    encodings = {"seq_id": _DELTA, "pos": _DELTA, "vector.list.element": "PLAIN"}
    return _write_table(target, table, row_group, ["hook"], **encodings)
