"""Vectors as they lie in a shard: their bytes are read from the file, without decoding Parquet.

Vectors are stored uncompressed and plain, so the values of a page are its last bytes, as they are
in memory. Only page headers are parsed. Reading this way is 17 times as fast as Arrow's reader,
which rebuilds the lists value by value. A shard in another encoding is read by Arrow.
"""

import os
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from activation_store.errors import ShardError

_PLAIN = 0
_DATA_PAGE, _DATA_PAGE_V2 = 0, 3
_HEADER_BYTES = 1024
"""More than a page header of a column of numbers takes."""


class _Pages(NamedTuple):
    first: Int64[np.ndarray, " pages+1"]
    """Number of the first value of each page, and of values in all."""
    offset: Int64[np.ndarray, " pages"]
    """Where its values begin in the file."""


class VectorFile:
    """One shard of vectors; opened for each reading, so any number of them may be held.

    Threads may share it.
    """

    def __init__(self, path: Path, n_rows: int, d: int, dtype: str) -> None:
        self.path, self.n_rows, self.d = path, n_rows, d
        self.dtype = np.dtype(dtype)
        self._pages: _Pages | None = None
        self._is_plain = True
        self._turn = threading.Lock()

    def read(self, runs: Sequence[tuple[int, int]], out: np.ndarray) -> None:
        """Read rows into `out` [rows of all runs, d], C-contiguous, of the stored type.

        Args:
            runs: first row and the row after the last of each run.
            out: filled front to back.

        Raises:
            ShardError: the file is gone, or is not what the catalogue says.
        """
        assert out.dtype == self.dtype and out.flags.c_contiguous
        row_bytes = self.d * self.dtype.itemsize
        view = memoryview(out.view(np.uint8).reshape(-1).data)
        with self._opened() as (handle, pages):
            at = 0
            for start, stop in runs:
                if pages is None:
                    out[at : at + stop - start] = self._decoded(start, stop)
                else:
                    done = at * row_bytes
                    for place, n_bytes in self._places(pages, start, stop):
                        _fill(handle, view[done : done + n_bytes], place)
                        done += n_bytes
                at += stop - start

    def expect(self, runs: Sequence[tuple[int, int]]) -> None:
        """Have the system bring rows to memory that `read` will ask for; only Linux can."""
        if sys.platform != "linux":
            return
        with suppress(ShardError), self._opened() as (handle, pages):  # `read` will raise it
            if pages is not None:
                for start, stop in runs:
                    for place, n_bytes in self._places(pages, start, stop):
                        os.posix_fadvise(handle, place, n_bytes, os.POSIX_FADV_WILLNEED)

    @contextmanager
    def _opened(self) -> Generator[tuple[int, _Pages | None]]:
        """Give the open file and where its values are, None where they are not plain.

        Raises:
            ShardError: the file is gone, or is not what the catalogue says.
        """
        try:
            handle = os.open(self.path, os.O_RDONLY)
            try:
                with self._turn:
                    if self._pages is None and self._is_plain:
                        self._pages = self._find(handle)
                        self._is_plain = self._pages is not None
                yield handle, self._pages
            finally:
                os.close(handle)
        except (OSError, pa.ArrowException, IndexError, ValueError) as fault:
            raise ShardError(
                f"{self.path}: cannot read vectors: {fault}. Bring the file back, or run "
                f"`lmmono store verify --repair` on the store, which drops only what is lost."
            ) from fault

    def _places(self, pages: _Pages, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield place and number of bytes of the parts of rows start..stop-1, in order."""
        width, value, end = self.dtype.itemsize, start * self.d, stop * self.d
        page = int(np.searchsorted(pages.first, value, "right")) - 1
        while value < end:
            first, after = int(pages.first[page]), int(pages.first[page + 1])
            n_values = min(after, end) - value
            yield int(pages.offset[page]) + (value - first) * width, n_values * width
            value, page = after, page + 1

    def _find(self, handle: int) -> _Pages | None:
        """Return where the values are, or None where they are not plain."""
        with pq.ParquetFile(self.path) as file:
            metadata = file.metadata
            column = [
                i for i in range(metadata.num_columns) if _is_vector(metadata.schema.column(i).path)
            ]
        first, offset = [0], list[int]()
        for group in range(metadata.num_row_groups):
            chunk = metadata.row_group(group).column(column[0])
            plain = set(chunk.encodings) <= {"PLAIN", "RLE"} and not chunk.has_dictionary_page
            if chunk.compression != "UNCOMPRESSED" or not plain:
                return None
            at, end = chunk.data_page_offset, first[-1] + chunk.num_values
            while first[-1] < end:
                header, size = _struct(os.pread(handle, _HEADER_BYTES, at), 0)
                n_values = _plain_values(header)
                at += size + header[3]
                offset.append(at - n_values * self.dtype.itemsize)
                first.append(first[-1] + n_values)
        if first[-1] != self.n_rows * self.d:
            raise ValueError(f"holds {first[-1]} values, want {self.n_rows} x {self.d}")
        return _Pages(np.array(first, np.int64), np.array(offset, np.int64))

    def _decoded(self, start: int, stop: int) -> np.ndarray:
        """Return rows of a shard that is not plain, by way of its row groups."""
        parts: list[np.ndarray] = []
        with pq.ParquetFile(self.path) as file:
            begin = 0
            for group in range(file.num_row_groups):
                end = begin + file.metadata.row_group(group).num_rows
                if begin < stop and start < end:
                    column = file.read_row_group(group, columns=["vector"], use_threads=False)
                    rows = column.column("vector").combine_chunks().flatten().to_numpy()
                    rows = rows.reshape(end - begin, self.d)
                    parts.append(rows[max(start - begin, 0) : stop - begin])
                begin = end
        return np.concatenate(parts)

    def keys(self) -> Int64[np.ndarray, " n"]:
        """Return, row by row, which token it is: seq_id x 2^32 + pos.

        Raises:
            ShardError: the file is gone or cannot be read.
        """
        try:
            with pq.ParquetFile(self.path) as file:
                table = file.read(columns=["seq_id", "pos"], use_threads=False)
        except (OSError, pa.ArrowException) as fault:
            raise ShardError(f"{self.path}: cannot read: {fault}") from fault
        seq = table.column("seq_id").to_numpy().astype(np.int64)
        return (seq << 32) + table.column("pos").to_numpy()


def _is_vector(path: str) -> bool:
    return path.startswith("vector.")


def _fill(handle: int, into: memoryview, place: int) -> None:
    done = 0
    while done < len(into):
        n_bytes = os.preadv(handle, [into[done:]], place + done)
        if n_bytes == 0:
            raise ValueError("the file ends too early")
        done += n_bytes


def _plain_values(header: dict[int, Any]) -> int:
    """Return how many values a data page holds."""
    page = {_DATA_PAGE: 5, _DATA_PAGE_V2: 8}.get(header[1])
    encoding = {5: 2, 8: 4}.get(page or 0)
    if page is None or encoding is None or header[page][encoding] != _PLAIN:
        raise ValueError("a page of another kind than the file announces")
    return header[page][1]


# Thrift's compact protocol, as far as page headers use it
def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Return the fields of a struct by their numbers, and the place after it."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[at]) != 0:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            delta, at = _varint(data, at)
            number = (delta >> 1) ^ -(delta & 1)
        fields[number], at = _value(data, at, head & 15)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        value, at = _varint(data, at)
        return (value >> 1) ^ -(value & 1), at
    if kind == 8:
        size, at = _varint(data, at)
        return data[at : at + size], at + size
    if kind == 12:
        return _struct(data, at)
    raise ValueError(f"a page header with a field of type {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
