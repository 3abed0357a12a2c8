"""Parquet files of activations, written by compiled loops, and the Thrift of Parquet files.

Rows are sorted by unit, in row groups that share no unit. A general writer takes an array per
column and looks at every value: which dictionary entry it is, where its runs end. Rows that are
sorted by unit need neither: hook and unit are runs of a dictionary and cost nothing, the rest is
packed by compiled loops or, as activations hold too little redundancy to be worth compressing,
copied. Any Parquet reader reads the result.

Why it is here: encoding takes 5.7 ns per act, PyArrow's writer 29.3, and with it a capture takes
1.37 instead of 1.50 of the time of the forward pass (docs/results/store.md), where 1.4 is wanted.
When it goes: as soon as a capture with PyArrow's writer stays below 1.4.

Sources: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift,
https://github.com/apache/parquet-format/blob/master/Encodings.md and
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import numpy as np
from jaxtyping import Float, Int32, Int64, UInt8

from activation_store.compiled import compiled
from activation_store.hooks import Dtype

# Numbers of parquet.thrift: encodings, physical types, kinds of page and of text.
_PLAIN, _RLE, _DELTA, _RLE_DICTIONARY = 0, 3, 5, 8
_INT32, _FLOAT, _BYTE_ARRAY, _FIXED = 1, 4, 6, 7
_DATA_PAGE, _DICTIONARY_PAGE = 0, 2
_UTF8, _STRING_TYPE, _FLOAT16_TYPE = 0, 1, 15
_REQUIRED = 0
_CREATED_BY = "activation_store"

# Types of the compact protocol.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _BINARY, _LIST, _STRUCT = 1, 2, 3, 4, 5, 6, 8, 9, 12
_SHORT = [bytes([n]) for n in range(128)]  # most lengths are below 128

# The smallest block that the format allows, of four miniblocks: a sorted run of few values wastes
# little, and the width of each miniblock adapts to 32 values.
_BLOCK, _MINIBLOCKS, _MINIBLOCK = 128, 4, 32

Bytes = bytes | memoryview
_Bounds = tuple[bytes, bytes]


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
        self._hook, self._dtype, self._write = hook.encode(), np.dtype(dtype), write
        self._n_bytes = self._n_rows = 0
        self._row_groups: list[Value] = []
        self._packed = np.empty(0, np.uint8)
        self._put(b"PAR1")

    def append(self, rows: RowGroup) -> None:
        """Write one row group."""
        n = len(rows.act)
        if not n:
            return
        group = _GroupColumns(self._n_bytes)
        name = len(self._hook).to_bytes(4, "little") + self._hook
        group.runs("hook", _BYTE_ARRAY, name, np.array([n]), (self._hook, self._hook))
        group.runs("unit", _INT32, rows.units.tobytes(), rows.runs, _bounds(rows.units))
        group.column("seq_id", _INT32, _DELTA, n, self._delta(rows.seq_id), _bounds(rows.seq_id))
        group.column("pos", _INT32, _DELTA, n, self._delta(rows.pos))
        act = memoryview(rows.act.astype(self._dtype, copy=False).data).cast("B")
        group.column("act", self._act_type, _PLAIN, n, act)
        # one write for all that is small; the activations are not copied
        self._put(b"".join(group.parts[:-1]))
        self._put(act)
        self._row_groups.append(group.meta(n))
        self._n_rows += n

    def close(self) -> None:
        """Write the footer."""
        text = {6: i32(_UTF8), 10: struct({_STRING_TYPE: struct({})})}
        half = {10: struct({_FLOAT16_TYPE: struct({})})} if self._act_type == _FIXED else {}
        size = {2: i32(self._dtype.itemsize)} if half else {}
        schema = [
            struct({4: binary("schema"), 5: i32(5)}),
            struct({1: i32(_BYTE_ARRAY), 3: i32(_REQUIRED), 4: binary("hook"), **text}),
            *(
                struct({1: i32(_INT32), 3: i32(_REQUIRED), 4: binary(name)})
                for name in ("unit", "seq_id", "pos")
            ),
            struct({1: i32(self._act_type), **size, 3: i32(_REQUIRED), 4: binary("act"), **half}),
        ]
        # the order of each column's values, without which readers must not use the statistics
        orders = array([struct({1: struct({})})] * 5)
        facts = {1: i32(2), 2: array(schema), 3: i64(self._n_rows), 4: array(self._row_groups)}
        footer = struct({**facts, 6: binary(_CREATED_BY), 7: orders}).data
        self._put(footer + len(footer).to_bytes(4, "little") + b"PAR1")

    @property
    def _act_type(self) -> int:
        return _FLOAT if self._dtype == np.float32 else _FIXED

    def _put(self, data: Bytes) -> None:
        self._write(data)
        self._n_bytes += len(data)

    def _delta(self, values: Int32[np.ndarray, " n"]) -> bytes:
        if len(self._packed) < room(len(values)):
            self._packed = np.empty(room(len(values)), np.uint8)
        return self._packed[: delta_pack(values, self._packed)].tobytes()


class _GroupColumns:
    """The columns of one row group, as bytes and as the footer tells of them."""

    def __init__(self, start: int) -> None:
        """Begin at a place of the file."""
        self.parts: list[Bytes] = []
        self._start = self._at = start
        self._columns: list[Value] = []

    def runs(
        self, name: str, kind: int, entries: bytes, runs: Int64[np.ndarray, " k"], bounds: _Bounds
    ) -> None:
        """Add a column that has the i-th of its dictionary's k entries runs[i] times."""
        begin = self._at
        head = _page_head(_DICTIONARY_PAGE, entries)
        self._add(struct({**head, 7: struct({1: i32(len(runs)), 2: i32(_PLAIN)})}).data, entries)
        width = max(1, (len(runs) - 1).bit_length())
        packed = np.empty(room(len(runs)), np.uint8)
        data = bytes([width]) + packed[: run_lengths(runs, width, packed)].tobytes()
        self.column(name, kind, _RLE_DICTIONARY, int(runs.sum()), data, bounds, begin)

    def column(
        self,
        name: str,
        kind: int,
        encoding: int,
        n: int,
        data: Bytes,
        bounds: _Bounds | None = None,
        dictionary: int | None = None,
    ) -> None:
        """Add a column's one data page; `dictionary` is where the page of its entries begins."""
        page = self._at
        levels = {3: i32(_RLE), 4: i32(_RLE)}
        head = _page_head(_DATA_PAGE, data)
        self._add(struct({**head, 5: struct({1: i32(n), 2: i32(encoding), **levels})}).data, data)
        size = i64(self._at - (page if dictionary is None else dictionary))
        used = [encoding, _RLE] if dictionary is None else [encoding, _RLE, _PLAIN]
        facts = {1: i32(kind), 2: array([i32(code) for code in used]), 3: array([binary(name)])}
        facts |= {4: i32(0), 5: i64(n), 6: size, 7: size, 9: i64(page)}
        if dictionary is not None:
            facts[11] = i64(dictionary)
        if bounds is not None:
            low, high = bounds
            facts[12] = struct({3: i64(0), 5: binary(high), 6: binary(low)})
        self._columns.append(struct({2: i64(0), 3: struct(facts)}))

    def meta(self, n: int) -> "Value":
        """Return what the footer says of the row group, which has n rows."""
        size = i64(self._at - self._start)
        return struct({1: array(self._columns), 2: size, 3: i64(n), 6: size})

    def _add(self, *parts: Bytes) -> None:
        self.parts += parts
        self._at += sum(len(part) for part in parts)


def _page_head(kind: int, data: Bytes) -> dict[int, "Value"]:
    """Return what every page header says: kind, sizes, and the CRC-32 of the page's bytes."""
    crc = zlib.crc32(data)
    # the format has no unsigned integers
    return {1: i32(kind), 2: i32(len(data)), 3: i32(len(data)), 4: i32(crc - ((crc >> 31) << 32))}


def _bounds(values: Int32[np.ndarray, " n"]) -> _Bounds:
    """Return the smallest and the largest value as the statistics hold them."""
    return values.min().tobytes(), values.max().tobytes()


def room(n: int) -> int:
    """Return the most bytes that n values can take in either encoding."""
    return 10 * n + 1024


@compiled
@no_type_check
def delta_pack(values: Int32[np.ndarray, " n"], out: UInt8[np.ndarray, " bytes"]) -> int:
    """Write values as DELTA_BINARY_PACKED and return the bytes taken; n >= 1."""
    # numba checks a signed index for one that counts from the end; an unsigned one it does not
    n = np.uint64(values.shape[0])
    at = _put(out, np.uint64(0), np.int64(_BLOCK))
    at = _put(out, at, np.int64(_MINIBLOCKS))
    at = _put(out, at, np.int64(n))
    at = _put(out, at, _zigzag(np.int64(values[0])))
    delta = np.zeros(_BLOCK, np.int64)
    done = np.uint64(1)
    while done < n:
        m = min(np.uint64(_BLOCK), n - done)
        before = np.int64(values[done - np.uint64(1)])
        least = np.int64(values[done]) - before
        for k in range(m):
            value = np.int64(values[done + k])
            delta[k] = value - before
            least = min(least, delta[k])
            before = value
        for k in range(m):
            delta[k] -= least
        for k in range(m, np.uint64(_BLOCK)):
            delta[k] = 0
        at = _put(out, at, _zigzag(least))
        widths = at
        at += np.uint64(_MINIBLOCKS)
        for miniblock in range(_MINIBLOCKS):
            part = delta[miniblock * _MINIBLOCK : (miniblock + 1) * _MINIBLOCK]
            width, at = _pack(part, out, at)
            out[widths + np.uint64(miniblock)] = width
        done += m
    return np.int64(at)


@compiled
@no_type_check
def _pack(delta: np.ndarray, out: np.ndarray, at: np.uint64) -> tuple[int, np.uint64]:
    """Write one miniblock with as few bits per value as it needs; return the bits and the end."""
    every = np.int64(0)
    for k in range(_MINIBLOCK):
        every |= delta[k]
    width = 0
    while every >> width:
        width += 1
    if width == 0:
        return 0, at
    word_bits, bits = np.uint64(0), np.uint64(0)
    for k in range(_MINIBLOCK):
        word_bits |= np.uint64(delta[k]) << bits
        bits += np.uint64(width)
        if bits >= np.uint64(32):
            word = np.uint32(word_bits)
            for byte in range(4):
                out[at + np.uint64(byte)] = (word >> np.uint32(8 * byte)) & np.uint32(0xFF)
            at += np.uint64(4)
            word_bits >>= np.uint64(32)
            bits -= np.uint64(32)
    return width, at


@compiled
@no_type_check
def run_lengths(
    runs: Int64[np.ndarray, " values"], width: int, out: UInt8[np.ndarray, " bytes"]
) -> int:
    """Write value i repeated runs[i] times, for every i, as RLE of that bit width; return bytes."""
    at = np.uint64(0)
    for i in range(runs.shape[0]):
        if runs[i] > 0:
            at = _put(out, at, 2 * runs[i])
            for byte in range((width + 7) // 8):
                out[at] = (i >> (8 * byte)) & 0xFF
                at += np.uint64(1)
    return np.int64(at)


@compiled
@no_type_check
def _put(out: np.ndarray, at: np.uint64, n: int) -> np.uint64:
    """Write n >= 0 as a varint and return the end."""
    while n > 127:
        out[at] = n & 127 | 128
        at += np.uint64(1)
        n >>= 7
    out[at] = n
    return at + np.uint64(1)


@compiled
@no_type_check
def _zigzag(n: int) -> int:
    return 2 * n if n >= 0 else -2 * n - 1


@dataclass(frozen=True, slots=True)
class Value:
    """A value in Thrift's compact protocol, with its type."""

    kind: int
    data: bytes


def varint(n: int) -> bytes:
    """Return n >= 0 in groups of seven bits, the lowest first.

    >>> varint(300).hex()
    'ac02'
    """
    if n < 128:
        return _SHORT[n]
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def zigzag(n: int) -> bytes:
    """Return an integer of either sign as a varint: 0, -1, 1, -2, ...

    >>> zigzag(-2).hex()
    '03'
    """
    return varint(2 * n if n >= 0 else -2 * n - 1)


def i32(n: int) -> Value:
    """Return a 32-bit integer."""
    return Value(_I32, zigzag(n))


def i64(n: int) -> Value:
    """Return a 64-bit integer."""
    return Value(_I64, zigzag(n))


def binary(data: bytes | str) -> Value:
    """Return bytes, or text as UTF-8."""
    data = data.encode() if isinstance(data, str) else data
    return Value(_BINARY, varint(len(data)) + data)


def array(items: Sequence[Value]) -> Value:
    """Return a list of values of one type; an empty one is of structures."""
    kind, n = items[0].kind if items else _STRUCT, len(items)
    head = bytes([n << 4 | kind]) if n < 15 else bytes([0xF0 | kind]) + varint(n)
    return Value(_LIST, head + b"".join(item.data for item in items))


def struct(fields: Mapping[int, Value]) -> Value:
    """Return a structure; `fields` by their number, ascending.

    >>> struct({1: i32(1), 3: struct({})}).data.hex()
    '15022c0000'
    """
    out, last = bytearray(), 0
    for number, value in fields.items():
        assert 0 < number - last < 16
        out += bytes([(number - last) << 4 | value.kind]) + value.data
        last = number
    return Value(_STRUCT, bytes(out) + b"\0")


def read_struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Return the fields of a structure by their numbers, and the place after it.

    Lists, which page headers do not have, are refused.

    Raises:
        ValueError: a field of another type.
        IndexError: the data end before the structure does.

    >>> read_struct(bytes.fromhex("15022c0000"), 0)
    ({1: 1, 3: {}}, 5)
    """
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[at]) != 0:
        at, kind = at + 1, head & 15
        if head >> 4:
            number += head >> 4
        else:
            value, at = _read_varint(data, at)
            number = (value >> 1) ^ -(value & 1)
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        elif kind == _BYTE:
            fields[number], at = data[at], at + 1
        elif kind in (_I16, _I32, _I64):
            value, at = _read_varint(data, at)
            fields[number] = (value >> 1) ^ -(value & 1)
        elif kind == _BINARY:
            size, at = _read_varint(data, at)
            fields[number], at = data[at : at + size], at + size
        elif kind == _STRUCT:
            fields[number], at = read_struct(data, at)
        else:
            raise ValueError(f"a page header with a field of type {kind}")
    return fields, at + 1


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
