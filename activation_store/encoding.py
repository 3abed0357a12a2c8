"""Parquet shards as they are written: columns, encodings, checksum, and the way to the disk.

A shard is hashed while it is written beside its final name, then synced and renamed: a file under
a shard's name is whole. The encodings were chosen by measurement (see `benchmarks/capture.py`):
sorted columns shrink by delta and dictionary encoding for free, and activations hold too little
redundancy for general compression to be worth its time.
"""

import hashlib
import os
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
from activation_store.kernel import Entries, gather
from activation_store.shards import ACTS, ACTS_ROW_GROUP, TOKENS, TOKENS_ROW_GROUP, Kind, Shard

_DELTA = "DELTA_BINARY_PACKED"
_VECTORS_ROW_GROUP_BYTES = 2**23


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
        self.n_bytes = 0

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
        return done

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

    def __init__(self, target: Target, schema: pa.Schema, **settings: Any) -> None:
        self.target = target
        self.schema = schema
        self.n_rows = 0
        self._units: list[int] = []
        self._seqs: list[int] = []
        with writing(self._path):
            self._file = _HashedFile(self._part)
        with self._writing():
            self._writer = pq.ParquetWriter(
                self._file, schema, store_schema=False, version="2.6", **settings
            )

    @property
    def _path(self) -> Path:
        return self.target.folder / self.target.file

    @property
    def _part(self) -> Path:
        return self.target.folder / f"{self.target.file}.part"

    def append(self, arrays: Sequence[pa.Array], row_group: int) -> None:
        """Write rows, the columns in the order of the schema.

        Raises:
            WriteError: the disk is full or the folder cannot be written.
        """
        table = pa.Table.from_arrays(list(arrays), schema=self.schema)
        with self._writing():
            self._writer.write_table(table, row_group_size=row_group)
        self.n_rows += len(table)

    def cover(self, seqs: np.ndarray, units: np.ndarray | None = None) -> None:
        """Note which sequences, and for acts which units, lie in the shard."""
        self._seqs += [int(seqs.min()), int(seqs.max())] if len(seqs) else []
        if units is not None and len(units):
            self._units += [int(units[0]), int(units[-1])]

    def close(self) -> Shard:
        """Bring the shard to the disk under its final name.

        Raises:
            WriteError: the disk is full or the folder cannot be written.
        """
        with self._writing():
            self._writer.close()
            self._file.sync()
            self._file.close()
            os.replace(self._part, self._path)
        bounds = [
            (min(held), max(held)) if held else (None, None) for held in (self._units, self._seqs)
        ]
        return Shard(
            self.target.file,
            self.target.kind,
            self.target.hook,
            self.n_rows,
            self._file.n_bytes,
            self._file.hash.hexdigest(),
            *bounds[0],
            *bounds[1],
        )

    @contextmanager
    def _writing(self) -> Generator[None]:
        """Name what the machine refuses; after that nothing more is written."""
        done = False
        try:
            with writing(self._path):
                yield
            done = True
        finally:
            if not done:
                self.abandon()

    def abandon(self) -> None:
        """Let go of an unfinished file; what is left under `.part` does not count."""
        self._file.close()
        if hasattr(self, "_writer"):
            self._writer.close()


def _required(schema: pa.Schema) -> pa.Schema:
    # columns without nulls spare a level per value
    return pa.schema([field.with_nullable(False) for field in schema])


def _constant(text: str, n: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([text]))


def acts_file(target: Target, dtype: Dtype) -> ShardFile:
    """Start a shard of one hook's activations."""
    kind = pa.float16() if dtype == "float16" else pa.float32()
    schema = _required(ACTS.set(ACTS.get_field_index("act"), pa.field("act", kind)))
    return ShardFile(
        target,
        schema,
        compression="none",
        use_dictionary=["hook", "unit"],
        column_encoding={"seq_id": _DELTA, "pos": _DELTA, "act": "PLAIN"},
    )


def append_acts(shard: ShardFile, parts: Sequence[Part]) -> None:
    """Write one block: the entries of all units, sorted by (unit, seq_id, pos)."""
    hook, kind = shard.target.hook, shard.schema.field("act").type.to_pandas_dtype()
    assert hook is not None
    for part in parts:
        shard.cover(part.entries.seq[: part.entries.used[1]])
        for unit, seq, pos, act in _row_groups(part):
            columns = [unit, seq, pos, act.astype(kind, copy=False)]
            arrays = [_constant(hook, len(unit)), *(pa.array(column) for column in columns)]
            shard.append(arrays, len(unit))
            shard.cover(seq[:0], unit)


def _row_groups(part: Part) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the columns unit, seq_id, pos, act of one row group after the other.

    A row group ends with a unit, so a block holds each unit in one row group.
    """
    entries = part.entries
    n_tiles = int(entries.used[1])
    per_unit = entries.per_unit[:n_tiles].sum(axis=0, dtype=np.int64)
    cursor = np.zeros(n_tiles, np.int64)
    order = np.argsort(entries.seq[:n_tiles], kind="stable")
    first = 0
    while first < len(per_unit):
        reached = np.cumsum(per_unit[first:])
        last = first + min(int(np.searchsorted(reached, ACTS_ROW_GROUP)) + 1, len(reached))
        n = int(reached[last - first - 1])
        unit, seq, pos = (np.empty(n, np.int32) for _ in range(3))
        act = np.empty(n, np.float32)
        gather(entries, order, cursor, first, last, part.units, unit, seq, pos, act)
        if n:
            yield unit, seq, pos, act
        first = last


def encode_tokens(target: Target, columns: dict[str, np.ndarray], splits: Sequence[str]) -> Shard:
    """Write tokens as one shard; column `split` holds places in `splits`."""
    shard = ShardFile(
        target,
        _required(TOKENS),
        compression="none",
        use_dictionary=["split", "token_id"],
        column_encoding={"seq_id": _DELTA, "pos": _DELTA, "doc_id": _DELTA},
    )
    split = pa.DictionaryArray.from_arrays(pa.array(columns["split"]), pa.array(list(splits)))
    shard.append(
        [split if name == "split" else pa.array(columns[name]) for name in TOKENS.names],
        TOKENS_ROW_GROUP,
    )
    shard.cover(columns["seq_id"])
    return shard.close()


def encode_vectors(target: Target, seq: np.ndarray, pos: np.ndarray, x: np.ndarray) -> Shard:
    """Write vectors x [n, d] of float16 or float32 as one shard, in the order given."""
    hook, d = target.hook, x.shape[1]
    assert hook is not None
    kind = pa.list_(pa.field("element", pa.from_numpy_dtype(x.dtype), nullable=False), d)
    whole = {"hook": ACTS.field("hook").type, "seq_id": pa.int32(), "pos": pa.int32()}
    shard = ShardFile(
        target,
        _required(pa.schema({**whole, "vector": kind})),
        compression="none",
        use_dictionary=["hook"],
        column_encoding={"seq_id": _DELTA, "pos": _DELTA, "vector.list.element": "PLAIN"},
    )
    flat = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), type=kind)
    shard.append(
        [_constant(hook, len(seq)), pa.array(seq), pa.array(pos), flat],
        max(1, _VECTORS_ROW_GROUP_BYTES // x[0].nbytes),
    )
    shard.cover(seq)
    return shard.close()
