"""Vectors as they lie in a shard: the file is mapped to memory and its rows are used from there.

Our writer stores vectors uncompressed and plain, so the values of a page are its last bytes, as
they are in memory. Only page headers are parsed. Arrow's reader, which rebuilds the lists value by
value, takes several times as long (`benchmarks/stream.py`).
"""

import ctypes
import errno
import mmap
import os
import sys
import threading
import zlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt8

from activation_store.errors import ShardError
from activation_store.shards.parquet import read_struct

Spans = Int64[np.ndarray, "_ 2"]
"""Runs of numbers that follow each other: the first of each, and the one after its last."""


_PLAIN, _DATA_PAGE = 0, 0  # numbers of parquet.thrift
_HEADER_BYTES = 1024  # more than a page header of a column of numbers takes
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14, which mmap does not name
_C = ctypes.CDLL(None, use_errno=True)


class Placed(NamedTuple):
    """Rows in memory."""

    address: Int64[np.ndarray, " n"]
    """Where the bytes of each begin."""
    memory: tuple[np.ndarray, ...]
    """What they lie in; holding it keeps them there."""


class _MappedFile(NamedTuple):
    memory: UInt8[np.ndarray, " bytes"]
    """The bytes of the file."""
    pages: "_Pages"


class _Pages(NamedTuple):
    first: Int64[np.ndarray, " pages+1"]
    """Number of the first row of each page, and of rows in all."""
    offset: Int64[np.ndarray, " pages"]
    """Where its values begin in the file."""
    begin: Int64[np.ndarray, " pages"]
    """Where its bytes begin, which end with its values."""
    crc: Int64[np.ndarray, " pages"]
    """CRC-32 of its bytes; -1 where the header has none."""


class VectorFile:
    """One shard of vectors; mapped when it is first read, and closed again: any number may be held.

    Threads may share it.
    """

    def __init__(
        self, path: Path, n_rows: int, d: int, dtype: str, *, checked: bool = False
    ) -> None:
        """Touch nothing yet; `checked` compares each page with its CRC-32 when it is first used."""
        self.path, self.n_rows, self.d = path, n_rows, d
        self._checked = checked
        self._good_pages: set[int] = set()
        self.dtype = np.dtype(dtype)
        self._row_bytes = d * self.dtype.itemsize
        self._mapped: _MappedFile | None = None
        self._turn = threading.Lock()

    def expect(self, runs: Spans) -> None:
        """Prefetch: have the operating system begin to read what `place` will be asked for."""
        with suppress(ShardError):  # `place` will raise it
            mapped = self._map()
            begin = mapped.memory.ctypes.data
            for at, n_bytes in self._parts(mapped.pages, runs).tolist():
                _advise(begin + at, n_bytes, mmap.MADV_WILLNEED)

    def place(self, runs: Spans) -> Placed:
        """Bring runs of rows to memory and say where they are; waits for the disk.

        The file may be removed after that, but must not be truncated while its rows are used: the
        operating system ends a process that asks for what is no longer there.

        Raises:
            ShardError: the file is gone, or is not what the catalogue says.
        """
        mapped = self._map()
        memory, parts = mapped.memory, self._parts(mapped.pages, runs)
        begin = memory.ctypes.data
        try:
            with suppress(FileNotFoundError):  # a removed file stays as long as it is mapped
                if (size := self.path.stat().st_size) != len(memory):
                    raise ValueError(f"has {size} bytes, had {len(memory)}")
            for at, n_bytes in parts.tolist():
                _bring(begin + at, n_bytes)
            if self._checked:
                self._check(mapped, runs)
        except (OSError, ValueError) as fault:
            raise self._fault(fault) from fault
        n = parts[:, 1] // self._row_bytes
        row = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        return Placed(begin + np.repeat(parts[:, 0], n) + row * self._row_bytes, (memory,))

    def _fault(self, fault: Exception) -> ShardError:
        return ShardError(
            f"{self.path}: cannot read vectors: {fault}. Bring the file back, or run "
            f"`lmmono store verify --repair` on the store, which drops only what is lost."
        )

    def _map(self) -> _MappedFile:
        """Return the mapped file.

        Raises:
            ShardError: the file is gone, or is not what the catalogue says.
        """
        with self._turn:
            if self._mapped is None:
                try:
                    # Arrow's map, as Python's holds the file open
                    with pa.memory_map(str(self.path)) as file:
                        memory = np.frombuffer(file.read_buffer(), np.uint8)
                    self._mapped = _MappedFile(memory, self._find_pages(memory))
                except (OSError, pa.ArrowException, LookupError, ValueError) as fault:
                    raise self._fault(fault) from fault
            return self._mapped

    def _parts(self, pages: _Pages, runs: Spans) -> Int64[np.ndarray, "parts 2"]:
        """Return where in the file rows lie one after the other, and how many bytes, in order."""
        rows, page = cut(runs, pages.first[:-1])
        at = pages.offset[page] + (rows[:, 0] - pages.first[page]) * self._row_bytes
        return np.stack([at, (rows[:, 1] - rows[:, 0]) * self._row_bytes], axis=1)

    def _find_pages(self, memory: UInt8[np.ndarray, " bytes"]) -> _Pages:
        """Return where the values are.

        Raises:
            ValueError: the file is not as our writer makes it: plain pages of whole vectors.
        """
        with pq.ParquetFile(self.path) as file:
            metadata = file.metadata
        paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        column = next((i for i, path in enumerate(paths) if path.startswith("vector.")), None)
        if column is None:
            raise ValueError("has no column of vectors")
        first, offset, begins, crcs = [0], list[int](), list[int](), list[int]()
        for number in range(metadata.num_row_groups):
            chunk = metadata.row_group(number).column(column)
            if chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page:
                raise ValueError("its vectors are compressed, which no writer of this package does")
            at, end = chunk.data_page_offset, first[-1] + chunk.num_values // self.d
            while first[-1] < end:
                header, size = read_struct(memory[at : at + _HEADER_BYTES].tobytes(), 0)
                if header[1] != _DATA_PAGE or header[5][2] != _PLAIN:
                    raise ValueError("a page of another kind than our writer makes")
                n_rows, excess = divmod(header[5][1], self.d)
                begin, at = at + size, at + size + header[3]
                begins.append(begin)
                crcs.append(header[4] & 0xFFFFFFFF if 4 in header else -1)
                offset.append(at - n_rows * self._row_bytes)
                first.append(first[-1] + n_rows)
                if excess or offset[-1] < begin or at > len(memory):
                    raise ValueError("the values of a page are not where its header says")
        if first[-1] != self.n_rows:
            raise ValueError(f"holds {first[-1]} vectors of {self.d}, want {self.n_rows}")
        return _Pages(*(np.array(column, np.int64) for column in (first, offset, begins, crcs)))

    def _check(self, mapped: _MappedFile, runs: Spans) -> None:
        """Compare the pages that hold rows with their checksums, each once.

        Raises:
            ValueError: a page was changed.
        """
        pages = mapped.pages
        _, touched = cut(runs, pages.first[:-1])
        for page in set(touched.tolist()) - self._good_pages:
            end = pages.offset[page] + (pages.first[page + 1] - pages.first[page]) * self._row_bytes
            crc = zlib.crc32(mapped.memory[pages.begin[page] : end].data)
            if pages.crc[page] not in (-1, crc):
                raise ValueError(f"page {page} of its vectors was changed after it was written")
            self._good_pages.add(page)

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


def _bring(address: int, n_bytes: int) -> None:
    """Wait until bytes of a mapped file are in memory.

    Raises:
        OSError: they cannot be read. Only Linux says so; elsewhere using them ends the process.
    """
    number = _advise(address, n_bytes, _POPULATE_READ) if sys.platform == "linux" else 0
    if number == errno.EFAULT:
        raise OSError(number, "the file ends too early, or the disk cannot be read")
    if number not in (0, errno.EINVAL):  # EINVAL: Linux is older than the advice
        raise OSError(number, os.strerror(number))


def _advise(address: int, n_bytes: int, advice: int) -> int:
    """Advise the operating system of what comes; return the number of its error, or 0.

    The C library's function, as Python's holds the interpreter's lock while the disk is read.
    """
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    size = ctypes.c_size_t(address + n_bytes - start)
    return ctypes.get_errno() if _C.madvise(ctypes.c_void_p(start), size, advice) else 0


def cut(spans: Spans, begins: Int64[np.ndarray, " k"]) -> tuple[Spans, Int64[np.ndarray, " m"]]:
    """Return the spans cut where the ranges begin, and the range that each part lies in.

    >>> parts, within = cut(np.array([[1, 5], [7, 8]]), np.array([0, 4, 6]))
    >>> parts.tolist(), within.tolist()
    ([[1, 4], [4, 5], [7, 8]], [0, 1, 2])
    """
    first = np.searchsorted(begins, spans[:, 0], "right") - 1
    n = np.searchsorted(begins, spans[:, 1], "left") - first
    within = np.repeat(first - np.cumsum(n) + n, n) + np.arange(n.sum())
    ends = np.append(begins[1:], np.iinfo(np.int64).max)
    parts = np.repeat(spans, n, axis=0)
    parts[:, 0] = np.maximum(parts[:, 0], begins[within])
    parts[:, 1] = np.minimum(parts[:, 1], ends[within])
    return parts, within
