"""Parquet files of activations: rows sorted by unit, in row groups that share no unit.

Columns that repeat (hook, unit) are dictionaries, sorted ones are deltas, activations are plain:
they hold too little redundancy to be worth compressing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int32, Int64

from activation_store.hooks import Dtype
from activation_store.shards import ACTS

Bytes = bytes | pa.Buffer
"""What Arrow writes."""

_PAGE_ROWS = 1 << 20
"""Most rows of a page, and that Arrow encodes at a time: one page per column of a row group."""


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


class _Sink:
    """What Arrow needs of a file that takes bytes through `write`."""

    closed = False

    def __init__(self, write: Callable[[Bytes], object]) -> None:
        self._write, self._n_bytes = write, 0

    def write(self, data: Bytes) -> int:
        self._write(data)
        self._n_bytes += len(memoryview(data))
        return len(memoryview(data))

    def tell(self) -> int:
        return self._n_bytes

    def flush(self) -> None:
        """Nothing is buffered here."""


class ActsWriter:
    """Writes a Parquet file with columns hook, unit, seq_id, pos, act through `write`."""

    def __init__(self, hook: str, dtype: Dtype, write: Callable[[Bytes], object]) -> None:
        self._hook, self._dtype = pa.array([hook]), dtype
        name, *fields = [field.with_nullable(False) for field in ACTS]
        kind = pa.float32() if dtype == "float32" else pa.float16()
        # one name: places of a byte are encoded in six tenths of the time that places of four take
        name = name.with_type(pa.dictionary(pa.int8(), pa.string()))
        self._schema = pa.schema([name, *fields[:-1], fields[-1].with_type(kind)])
        self._parquet = pq.ParquetWriter(
            _Sink(write),
            self._schema,
            use_dictionary=["hook", "unit"],  # pyright: ignore[reportArgumentType]
            column_encoding=dict.fromkeys(("seq_id", "pos"), "DELTA_BINARY_PACKED"),
            # what finds row groups; Arrow looks at every value for the others too
            write_statistics=["hook", "unit", "seq_id"],  # pyright: ignore[reportArgumentType]
            write_batch_size=_PAGE_ROWS,
            max_rows_per_page=_PAGE_ROWS,
            compression="none",
            store_schema=False,
            version="2.6",
        )

    def append(self, rows: RowGroup) -> None:
        """Write one row group."""
        n = len(rows.act)
        arrays = [
            pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int8)), self._hook),
            pa.array(np.repeat(rows.units, rows.runs)),
            pa.array(rows.seq_id),
            pa.array(rows.pos),
            pa.array(rows.act.astype(self._dtype, copy=False)),
        ]
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        self._parquet.write_table(table, row_group_size=max(n, 1))

    def close(self) -> None:
        """Write the footer."""
        self._parquet.close()
