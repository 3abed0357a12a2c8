"""The log of a training run: numbers as rows, kept in `metrics.parquet`."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lmmono.errors import TrainError
from lmmono.files.atomic import atomic_file
from lmmono.registry.metrics import METRICS
from lmmono.training.held_out import Evaluation

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("split", pa.string()),
        ("metric", pa.string()),
        ("metric_version", pa.int16()),
        ("layer", pa.int16()),
        ("value", pa.float64()),
        ("n_tokens", pa.int64()),
        ("seconds", pa.float64()),
    ]
)


@dataclass(frozen=True, slots=True)
class LogRow:
    """One measured number."""

    step: int
    """Optimizer steps taken before the measurement."""
    split: str
    """Split it was measured on."""
    metric: str
    """Name in `lmmono.registry.metrics.METRICS`, or `objective/NAME` for a term of the loss."""
    value: float
    """The number."""
    n_tokens: int
    """Tokens it was measured over."""
    seconds: float = 0.0
    """Training time so far."""
    layer: int | None = None
    """Block, where it belongs to one."""


class TrainingLog:
    """Rows in memory, written whole by `save`; a file on disk is always complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[LogRow] = []

    def add(self, rows: Iterable[LogRow]) -> None:
        """Append rows; they reach the disk with the next `save`."""
        self._rows.extend(rows)

    def table(self) -> pa.Table:
        """Return all rows as a table with the columns of `SCHEMA`."""
        records = [
            # a term of the loss is `objective/NAME`
            {**asdict(row), "metric_version": METRICS[row.metric.partition("/")[0]].version}
            for row in self._rows
        ]
        return pa.Table.from_pylist(records, schema=SCHEMA)

    def save(self, path: Path | None = None) -> None:
        """Write `metrics.parquet` whole, or a copy elsewhere; a crash leaves the old one.

        Raises:
            RunError: The disk refuses.
        """
        with atomic_file(path or self.path) as partial:
            pq.write_table(self.table(), partial)

    def resume(self, before_step: int) -> None:
        """Take up the rows that an earlier process wrote up to a step; later ones are dropped.

        Raises:
            TrainError: The file is damaged.
        """
        if not self.path.exists():
            return
        try:
            rows = pq.read_table(self.path, schema=SCHEMA).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise TrainError(
                f"{self.path}: cannot be read ({str(error).splitlines()[0]}); bring the file back, "
                "or remove it: the rows before this step are then missing"
            ) from error
        kept = [row for row in rows if row["step"] <= before_step]
        self._rows = [
            LogRow(**{k: v for k, v in row.items() if k != "metric_version"}) for row in kept
        ]


def evaluation_rows(result: Evaluation, step: int, seconds: float) -> list[LogRow]:
    """Return the rows of one evaluation: its loss, and every statistic of every layer."""
    rows = [LogRow(step, "val", "loss", result.loss, result.n_tokens, seconds)]
    for layer in result.layers:
        values = asdict(layer)
        i = values.pop("layer")
        rows += [
            LogRow(step, "val", name, value, result.n_tokens, seconds, layer=i)
            for name, value in values.items()
            if value is not None
        ]
    return rows
