"""Parquet files of activations, written column by column in the form the rows already have.

A general writer takes an array per column and looks at every value: which dictionary entry it is,
where its runs end. Rows that are sorted by unit need neither for the hook and the unit, which here
cost nothing; the rest is packed by compiled loops or copied. Any Parquet reader reads the result.

Source: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

import struct as bytes_of
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int32, Int64

from activation_store.hooks import Dtype
from activation_store.packing import delta_pack, room, run_lengths
from activation_store.thrift import Value, array, binary, i32, i64, struct

_PLAIN, _RLE, _DELTA, _RLE_DICTIONARY = 0, 3, 5, 8
_INT32, _FLOAT, _BYTE_ARRAY, _FIXED = 1, 4, 6, 7
_DATA_PAGE, _DICTIONARY_PAGE = 0, 2
_UTF8, _STRING_TYPE, _FLOAT16_TYPE = 0, 1, 15
_CREATED_BY = "activation_store"

Bytes = bytes | memoryview


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows of one hook sorted by unit, seq_id, pos."""

    units: Int32[np.ndarray, " units"]
    """Units that have rows, ascending."""
    runs: Int64[np.ndarray, " units"]
    """Rows of each, >= 1."""
    seq_id: Int32[np.ndarray, " n"]
    pos: Int32[np.ndarray, " n"]
    act: Float[np.ndarray, " n"]


class ActsWriter:
    """Writes a Parquet file with columns hook, unit, seq_id, pos, act through `write`."""

    def __init__(self, hook: str, dtype: Dtype, write: Callable[[Bytes], object]) -> None:
        self._hook = hook.encode()
        self._dtype = dtype
        self._write = write
        self._at = 0
        self._n_rows = 0
        self._row_groups: list[Value] = []
        self._packed = np.empty(0, np.uint8)
        self._put(b"PAR1")

    def append(self, rows: RowGroup) -> None:
        """Write one row group."""
        n = len(rows.act)
        if len(self._packed) < room(n):
            self._packed = np.empty(room(n), np.uint8)
        packed = self._packed
        low, high = (f(rows.act).astype(self._dtype).tobytes() for f in (np.min, np.max))
        name = bytes_of.pack("<I", len(self._hook)) + self._hook
        kind = _FLOAT if self._dtype == "float32" else _FIXED
        units = rows.units.astype("<i4").tobytes()
        chunks = [
            self._coded("hook", _BYTE_ARRAY, name, np.array([n]), (self._hook, self._hook)),
            self._coded("unit", _INT32, units, rows.runs, _bounds(rows.units)),
        ]
        for column, values in (("seq_id", rows.seq_id), ("pos", rows.pos)):
            data = memoryview(packed.data)[: delta_pack(values, packed)]
            chunks.append(self._plain(column, _INT32, _DELTA, n, data, _bounds(values)))
        data = memoryview(rows.act.astype(self._dtype, copy=False).data).cast("B")
        chunks.append(self._plain("act", kind, _PLAIN, n, data, (low, high)))
        self._row_groups.append(_row_group(chunks, n))
        self._n_rows += n

    def close(self) -> None:
        """Write the footer."""
        kind = {1: i32(_FLOAT)} if self._dtype == "float32" else {1: i32(_FIXED), 2: i32(2)}
        half = {} if self._dtype == "float32" else {10: struct({_FLOAT16_TYPE: struct({})})}
        text = {6: i32(_UTF8), 10: struct({_STRING_TYPE: struct({})})}
        whole = {1: i32(_INT32), 3: i32(0)}
        schema = [
            struct({4: binary("schema"), 5: i32(5)}),
            struct({1: i32(_BYTE_ARRAY), 3: i32(0), 4: binary("hook"), **text}),
            *(struct({**whole, 4: binary(name)}) for name in ("unit", "seq_id", "pos")),
            struct({**kind, 3: i32(0), 4: binary("act"), **half}),
        ]
        # the order of each type's values, without which readers must not use the statistics
        orders = array([struct({1: struct({})})] * 5)
        meta = {1: i32(2), 2: array(schema), 3: i64(self._n_rows)}
        # a file may have no rows
        meta[4] = array(self._row_groups) if self._row_groups else Value(9, b"\x0c")
        footer = struct({**meta, 6: binary(_CREATED_BY), 7: orders}).data
        self._put(footer + bytes_of.pack("<I", len(footer)) + b"PAR1")

    def _put(self, *parts: Bytes) -> int:
        """Write the parts and return their size."""
        for part in parts:
            self._write(part)
        size = sum(len(part) for part in parts)
        self._at += size
        return size

    def _coded(
        self,
        name: str,
        kind: int,
        dictionary: bytes,
        runs: Int64[np.ndarray, " values"],
        bounds: tuple[bytes, bytes],
    ) -> "_Chunk":
        """Write a column of runs, each of the next value of its dictionary."""
        first, n = self._at, int(runs.sum())
        head = {1: i32(_DICTIONARY_PAGE), 2: i32(len(dictionary)), 3: i32(len(dictionary))}
        of_dictionary = struct({1: i32(len(runs)), 2: i32(_PLAIN)})
        size = self._put(struct({**head, 7: of_dictionary}).data, dictionary)
        width = max(1, (len(runs) - 1).bit_length())
        packed = np.empty(room(len(runs)), np.uint8)
        data = bytes([width]) + packed[: run_lengths(runs, width, packed)].tobytes()
        page = self._at
        size += self._put(_page(n, len(data), _RLE_DICTIONARY), data)
        return _chunk(name, kind, [_PLAIN, _RLE, _RLE_DICTIONARY], n, size, page, bounds, first)

    def _plain(
        self, name: str, kind: int, encoding: int, n: int, data: Bytes, bounds: tuple[bytes, bytes]
    ) -> "_Chunk":
        """Write a column of one page without a dictionary."""
        page = self._at
        size = self._put(_page(n, len(data), encoding), data)
        return _chunk(name, kind, [encoding, _RLE], n, size, page, bounds)


class _Chunk(NamedTuple):
    """One column of one row group, as the footer tells of it."""

    meta: Value
    size: int


def _chunk(
    name: str,
    kind: int,
    encodings: Sequence[int],
    n: int,
    size: int,
    page: int,
    bounds: tuple[bytes, bytes],
    dictionary: int | None = None,
) -> _Chunk:
    """Describe a column of one row group that has `size` bytes and its data at `page`."""
    fields = {
        1: i32(kind),
        2: array([i32(encoding) for encoding in encodings]),
        3: array([binary(name)]),
        4: i32(0),
        5: i64(n),
        6: i64(size),
        7: i64(size),
        9: i64(page),
    }
    if dictionary is not None:
        fields[11] = i64(dictionary)
    low, high = bounds
    fields[12] = struct({3: i64(0), 5: binary(high), 6: binary(low)})
    return _Chunk(struct(fields), size)


def _row_group(chunks: Sequence[_Chunk], n: int) -> Value:
    columns = array([struct({2: i64(0), 3: chunk.meta}) for chunk in chunks])
    size = sum(chunk.size for chunk in chunks)
    return struct({1: columns, 2: i64(size), 3: i64(n), 6: i64(size)})


def _page(n: int, size: int, encoding: int) -> bytes:
    """Return the header of a data page of n values, none of them null."""
    head = {1: i32(_DATA_PAGE), 2: i32(size), 3: i32(size)}
    data = struct({1: i32(n), 2: i32(encoding), 3: i32(_RLE), 4: i32(_RLE)})
    return struct({**head, 5: data}).data


def _bounds(values: Int32[np.ndarray, " n"]) -> tuple[bytes, bytes]:
    """Return the smallest and the largest value as the statistics hold them."""
    return bytes_of.pack("<i", values.min()), bytes_of.pack("<i", values.max())
