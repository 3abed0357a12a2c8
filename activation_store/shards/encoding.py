"""Parquet shards as they are written: columns, encodings, checksum, and the way to the disk.

The write is atomic: a shard is hashed while it is written next to its final name, then synced and
renamed, so a file under a shard's name is whole. The encodings were chosen by measurement: sorted
columns shrink by delta and dictionary encoding, and activations hold too little redundancy for
general compression to be worth its time.
"""

import hashlib
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from activation_store.errors import writing
from activation_store.shards.names import ACTS, TOKENS, TOKENS_ROW_GROUP, Kind, Shard

_DELTA = "DELTA_BINARY_PACKED"
_VECTORS_ROW_GROUP_BYTES = 2**23
# Bytes after which a file is synced while it still grows, so that a commit finds little to do.
_SYNC_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class Target:
    """Where a shard goes and what it is."""

    folder: Path
    file: str
    kind: Kind
    hook: str | None


class _HashedFile:
    """A file that is written front to back and knows the sha256 of what went in.

    Once closed it drops what comes: a Parquet writer that is garbage-collected writes its footer.
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
            self.sync()
            # Give the pages to the next bytes: fresh ones cost more than the copy into them, and a
            # long capture would push everything else out of the operating system's cache.
            if sys.platform == "linux":
                os.posix_fadvise(self._file.fileno(), 0, self.n_bytes, os.POSIX_FADV_DONTNEED)
            self._n_synced = self.n_bytes
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
            (min(some), max(some)) if some else (None, None) for some in (self._units, self._seqs)
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
        """Close an unfinished file; what is left under `.part` does not count."""
        self.file.close()


def _required(schema: pa.Schema) -> pa.Schema:
    # columns without nulls spare a level per value
    return pa.schema([field.with_nullable(False) for field in schema])


def _write_table(
    target: Target, table: pa.Table, row_group: int, dictionary: Sequence[str], **encoding: str
) -> Shard:
    """Write a table as one shard; it has a column seq_id."""
    shard = ShardFile(target)
    settings: dict[str, Any] = {"use_dictionary": list(dictionary), "column_encoding": encoding}
    # statistics of a vector's numbers take nearly as long as writing them
    settings["write_statistics"] = [name for name in table.column_names if name != "vector"]
    # one page per row group: a reader of vectors parses the header of every page
    settings["data_page_size"] = _VECTORS_ROW_GROUP_BYTES
    with shard.writing():
        pq.write_table(
            table,
            shard.file,
            row_group_size=row_group,
            compression="none",
            store_schema=False,
            version="2.6",
            write_page_checksum=True,
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
