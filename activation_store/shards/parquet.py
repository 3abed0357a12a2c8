"""Parquet files of activations: rows sorted by unit, in row groups that share no unit.

A general writer takes an array per column and looks at every value: which dictionary entry it is,
where its runs end. Rows that are sorted by unit need neither: hook and unit are runs of a
dictionary and cost nothing, the rest is packed by compiled loops (`packing`) or, as activations
hold too little redundancy to be worth compressing, copied. Any Parquet reader reads the result.

Source: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int32, Int64

from activation_store.hooks import Dtype
from activation_store.shards.packing import delta_pack, room, run_lengths
from activation_store.shards.thrift import Value, array, binary, i32, i64, struct

_PLAIN, _RLE, _DELTA, _RLE_DICTIONARY = 0, 3, 5, 8
_INT32, _FLOAT, _BYTE_ARRAY, _FIXED = 1, 4, 6, 7
_DATA_PAGE, _DICTIONARY_PAGE = 0, 2
_UTF8, _STRING_TYPE, _FLOAT16_TYPE = 0, 1, 15
_REQUIRED = 0
_CREATED_BY = "activation_store"

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
        group = _RowGroup(self._n_bytes)
        name = len(self._hook).to_bytes(4, "little") + self._hook
        group.runs("hook", _BYTE_ARRAY, name, np.array([n]), (self._hook, self._hook))
        group.runs("unit", _INT32, rows.units.tobytes(), rows.runs, _bounds(rows.units))
        group.column("seq_id", _INT32, _DELTA, n, self._delta(rows.seq_id), _bounds(rows.seq_id))
        group.column("pos", _INT32, _DELTA, n, self._delta(rows.pos))
        act = memoryview(rows.act.astype(self._dtype, copy=False).data).cast("B")
        group.column("act", self._act_type, _PLAIN, n, act)
        # one write for all that is small, and none of it a copy of the activations
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


class _RowGroup:
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
        head = {1: i32(_DICTIONARY_PAGE), 2: i32(len(entries)), 3: i32(len(entries))}
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
        head = {1: i32(_DATA_PAGE), 2: i32(len(data)), 3: i32(len(data))}
        self._add(struct({**head, 5: struct({1: i32(n), 2: i32(encoding), **levels})}).data, data)
        size = i64(self._at - (page if dictionary is None else dictionary))
        used = [encoding, _RLE] if dictionary is None else [encoding, _RLE, _PLAIN]
        facts = {1: i32(kind), 2: array([i32(one) for one in used]), 3: array([binary(name)])}
        facts |= {4: i32(0), 5: i64(n), 6: size, 7: size, 9: i64(page)}
        if dictionary is not None:
            facts[11] = i64(dictionary)
        if bounds is not None:
            low, high = bounds
            facts[12] = struct({3: i64(0), 5: binary(high), 6: binary(low)})
        self._columns.append(struct({2: i64(0), 3: struct(facts)}))

    def meta(self, n: int) -> Value:
        """Return what the footer says of the row group, which has n rows."""
        size = i64(self._at - self._start)
        return struct({1: array(self._columns), 2: size, 3: i64(n), 6: size})

    def _add(self, *parts: Bytes) -> None:
        self.parts += parts
        self._at += sum(len(part) for part in parts)


def _bounds(values: Int32[np.ndarray, " n"]) -> _Bounds:
    """Return the smallest and the largest value as the statistics hold them."""
    return values.min().tobytes(), values.max().tobytes()
