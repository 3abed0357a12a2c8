"""The curves of a fit: loss, L0, FVU and dead share as rows, kept in `metrics.parquet`."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lmmono.registry.metrics import METRICS

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("metric", pa.string()),
        ("metric_version", pa.int16()),
        ("value", pa.float64()),
        ("n_tokens", pa.int64()),
        ("seconds", pa.float64()),
    ]
)
FILE = "metrics.parquet"


class Curves:
    """Rows in memory, written whole by `save`; a file on disk is always complete."""

    def __init__(self) -> None:
        self._rows: list[dict[str, object]] = []

    def add(self, step: int, values: dict[str, float], n_tokens: int, seconds: float) -> None:
        """Append what was measured after a step on `n_tokens` vectors; NaN is left out."""
        fresh: list[dict[str, object]] = [
            {
                "step": step,
                "metric": name,
                "metric_version": METRICS[name].version,
                "value": value,
                "n_tokens": n_tokens,
                "seconds": seconds,
            }
            for name, value in values.items()
            if value == value
        ]
        self._rows += fresh

    def table(self) -> pa.Table:
        """Return all rows as a table with the columns of `SCHEMA`."""
        return pa.Table.from_pylist(self._rows, schema=SCHEMA)

    def save(self, folder: Path) -> None:
        """Write the rows so far as `metrics.parquet`."""
        write_curves(folder, self.table())

    def resume(self, folder: Path, step: int) -> None:
        """Take up the rows that an earlier process wrote up to a step; later ones are dropped."""
        found = read_curves(folder)
        if found is not None:
            self._rows = [row for row in found.to_pylist() if row["step"] <= step]


def read_curves(folder: Path) -> pa.Table | None:
    """Return the curves in a folder, or None where there are none."""
    path = folder / FILE
    return pq.read_table(path) if path.exists() else None


def write_curves(folder: Path, table: pa.Table) -> None:
    """Write `metrics.parquet` beside its old version, then take its place."""
    temporary = folder / (FILE + ".tmp")
    pq.write_table(table, temporary)
    os.replace(temporary, folder / FILE)
