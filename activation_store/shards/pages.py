"""Vectors as they lie in a shard: the file is mapped to memory and its rows are used from there.

Vectors are stored uncompressed and plain, so the values of a page are its last bytes, as they are
in memory. Only page headers are parsed. Arrow's reader, which rebuilds the lists value by value,
takes several times as long (`benchmarks/stream.py`). A shard in another encoding is read by Arrow.
"""

import ctypes
import errno
import mmap
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt8

from activation_store.errors import ShardError
from activation_store.read.spans import Spans, cut

_PLAIN = 0
_DATA_PAGE, _DATA_PAGE_V2 = 0, 3
_HEADER_BYTES = 1024
"""More than a page header of a column of numbers takes."""
_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14."""
_C = ctypes.CDLL(None, use_errno=True)


class Placed(NamedTuple):
    """Rows in memory."""

    address: Int64[np.ndarray, " n"]
    """Where the bytes of each begin."""
    memory: tuple[np.ndarray, ...]
    """What they lie in; holding it keeps them there."""


class _Mapped(NamedTuple):
    memory: UInt8[np.ndarray, " bytes"]
    """The bytes of the file."""
    pages: "_Pages"


class _Pages(NamedTuple):
    first: Int64[np.ndarray, " pages+1"]
    """Number of the first row of each page, and of rows in all."""
    offset: Int64[np.ndarray, " pages"]
    """Where its values begin in the file."""


class VectorFile:
    """One shard of vectors; mapped when it is first read, and closed again: any number may be held.

    Threads may share it.
    """

    def __init__(self, path: Path, n_rows: int, d: int, dtype: str) -> None:
        self.path, self.n_rows, self.d = path, n_rows, d
        self.dtype = np.dtype(dtype)
        self._row_bytes = d * self.dtype.itemsize
        self._mapped: _Mapped | None = None
        self._is_plain = True
        self._turn = threading.Lock()

    def expect(self, runs: Spans) -> None:
        """Have the system begin to read what `place` will be asked for."""
        with suppress(ShardError):  # `place` will raise it
            if (mapped := self._map()) is not None:
                begin = mapped.memory.ctypes.data
                for at, n_bytes in self._parts(mapped.pages, runs).tolist():
                    _advise(begin + at, n_bytes, mmap.MADV_WILLNEED)

    def place(self, runs: Spans) -> Placed:
        """Bring runs of rows to memory and say where they are; waits for the disk.

        The file may be removed after that, but must not be shortened while its rows are used: the
        system ends a process that asks for what is no longer there.

        Raises:
            ShardError: the file is gone, or is not what the catalogue says.
        """
        mapped = self._map()
        try:
            if mapped is None:
                memory = self._decoded(runs)
                address = memory.ctypes.data + np.arange(len(memory)) * self._row_bytes
            else:
                memory = mapped.memory
                with suppress(FileNotFoundError):  # what is removed stays as long as it is mapped
                    if (size := self.path.stat().st_size) != len(memory):
                        raise ValueError(f"has {size} bytes, had {len(memory)}")
                begin, parts = memory.ctypes.data, self._parts(mapped.pages, runs)
                for at, n_bytes in parts.tolist():
                    _bring(begin + at, n_bytes)
                n = parts[:, 1] // self._row_bytes
                row = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
                address = begin + np.repeat(parts[:, 0], n) + row * self._row_bytes
        except (OSError, pa.ArrowException, IndexError, ValueError) as fault:
            raise self._fault(fault) from fault
        return Placed(address, (memory,))

    def _fault(self, fault: Exception) -> ShardError:
        return ShardError(
            f"{self.path}: cannot read vectors: {fault}. Bring the file back, or run "
            f"`lmmono store verify --repair` on the store, which drops only what is lost."
        )

    def _map(self) -> _Mapped | None:
        """Return the mapped file, or None where its vectors are not plain.

        Raises:
            ShardError: the file is gone, or is not what the catalogue says.
        """
        with self._turn:
            if self._mapped is None and self._is_plain:
                try:
                    with pa.memory_map(str(self.path)) as file:  # Python's mmap holds it open
                        memory = np.frombuffer(file.read_buffer(), np.uint8)
                    pages = self._find(memory)
                except (OSError, pa.ArrowException, IndexError, ValueError) as fault:
                    raise self._fault(fault) from fault
                self._is_plain = pages is not None
                if pages is not None:
                    self._mapped = _Mapped(memory, pages)
            return self._mapped

    def _parts(self, pages: _Pages, runs: Spans) -> Int64[np.ndarray, "parts 2"]:
        """Return where in the file rows lie one after the other, and how many bytes, in order."""
        rows, page = cut(runs, pages.first[:-1])
        at = pages.offset[page] + (rows[:, 0] - pages.first[page]) * self._row_bytes
        return np.stack([at, (rows[:, 1] - rows[:, 0]) * self._row_bytes], axis=1)

    def _find(self, memory: UInt8[np.ndarray, " bytes"]) -> _Pages | None:
        """Return where the values are, or None where they are not plain or not in whole rows."""
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
            at, end = chunk.data_page_offset, first[-1] + chunk.num_values // self.d
            while first[-1] < end:
                header, size = _struct(memory[at : at + _HEADER_BYTES].tobytes(), 0)
                n_rows, excess = divmod(_plain_values(header), self.d)
                if excess:
                    return None
                begin, at = at + size, at + size + header[3]
                offset.append(at - n_rows * self._row_bytes)
                first.append(first[-1] + n_rows)
                if offset[-1] < begin or at > len(memory):
                    raise ValueError("the values of a page are not where its header says")
        if first[-1] != self.n_rows:
            raise ValueError(f"holds {first[-1]} vectors of {self.d}, want {self.n_rows}")
        return _Pages(np.array(first, np.int64), np.array(offset, np.int64))

    def _decoded(self, runs: Spans) -> np.ndarray:
        """Return rows of a shard that is not plain, by way of its row groups."""
        parts = [np.empty((0, self.d), self.dtype)]
        with pq.ParquetFile(self.path) as file:
            for start, stop in runs.tolist():
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


def _bring(address: int, n_bytes: int) -> None:
    """Wait until bytes of a mapped file are in memory.

    Raises:
        OSError: they cannot be read; where the system does not tell, using them ends the process.
    """
    number = _advise(address, n_bytes, _POPULATE_READ) if sys.platform == "linux" else 0
    if number == errno.EFAULT:
        raise OSError(number, "the file ends too early, or the disk cannot be read")
    if number not in (0, errno.EINVAL):  # which says that Linux is older
        raise OSError(number, os.strerror(number))


def _advise(address: int, n_bytes: int, advice: int) -> int:
    """Tell the system what comes, and return why it cannot be, or 0.

    The C library's function, as Python's holds the interpreter's lock while the disk is read.
    """
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    size = ctypes.c_size_t(address + n_bytes - start)
    return ctypes.get_errno() if _C.madvise(ctypes.c_void_p(start), size, advice) else 0


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
