"""What stores say of dictionaries: one record each, with every measure and its interval."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import activation_store as astore
from lmmono.errors import RunError, nearest
from lmmono.registry.metrics import METRICS
from lmmono.runs.folder import Run, open_run

CONTROLS = ("raw", "pca", "random", "dense")
"""Kinds of dictionary that are no result, only what results are held against."""

Interval = tuple[float, float, float]
"""Value, lower and upper end; NaN where there is none."""

_ABOUT = ("hook", "name", "arch", "control")

_MEASURES = """
SELECT d.hook, d.name, d.arch, s.control, s.metric, s.preset, s.value, s.ci_low, s.ci_high
FROM dictionaries d
JOIN all_scores s ON s.hook = d.hook AND s.dictionary = d.name
WHERE s.unit IS NULL AND s.split = 'score'
    AND (s.control IS NULL OR s.control IN ('shuffled', 'untrained'))
ORDER BY ALL
"""

_STABILITIES = """
SELECT hook, dictionary, value, ci_low, ci_high FROM all_scores
WHERE metric = 'stability_cosine' AND control IS NOT DISTINCT FROM $control
    AND (preset IS NULL OR preset = 'unsigned')
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """One dictionary, and what was measured of it."""

    run: str
    """Folder of the run, or name of the store."""
    hook: str
    """Hook that it is of."""
    name: str
    """Its name."""
    arch: str
    """Its kind."""
    control: str | None
    """What it is a control by: its kind, `shuffled` or `untrained`; None for a result."""
    measures: Mapping[str, Interval]
    """By metric, with the preset in brackets where it has one: `ce_loss_recovered (mean)`."""

    def get(self, measure: str) -> Interval:
        """Return a measure; NaN where it was not taken or is not defined."""
        return self.measures.get(measure, (math.nan, math.nan, math.nan))


def measured(source: Any) -> list[Measured]:
    """Return the dictionaries of a store, a run, their paths, or a sequence of these.

    Raises:
        RunError: A path holds no store.
        StoreError: A store cannot be opened.
    """
    if isinstance(source, Measured):
        return [source]
    if isinstance(source, astore.Store):
        return _read(source, source.path.parent.name)
    if isinstance(source, Sequence) and not isinstance(source, str):
        return [dictionary for part in source for dictionary in measured(part)]
    if isinstance(source, Run):
        with source.reading() as store:
            return _read(store, source.name)
    path = _store_file(Path(source))
    with astore.open(path) as store:
        return _read(store, path.parent.name)


def check_measure(measure: str) -> str:
    """Return the metric that a measure is of.

    Raises:
        RunError: There is no such metric.
    """
    metric = measure.partition(" (")[0]
    if metric not in METRICS:
        raise RunError(f"{measure}: no such metric; {nearest(metric, METRICS)}")
    return metric


def _store_file(path: Path) -> Path:
    return path if path.is_file() else open_run(path).store_path


def stabilities(store: astore.Store, control: str | None = None) -> dict[tuple[str, str], Interval]:
    """Return the mean cosine between seeds, by hook and name of the entry of `dictionary.learn`.

    Args:
        store: Open store.
        control: `random_directions` gives that of as many random directions.
    """
    rows = store.sql(_STABILITIES, control=control).to_arrow_table().to_pylist()
    return {(row["hook"], row["dictionary"]): _interval(row) for row in rows}


def _read(store: astore.Store, run: str) -> list[Measured]:
    rows = store.sql(_MEASURES).to_arrow_table().to_pylist()
    dictionaries: list[Measured] = []
    for (hook, name, arch, taken), part in groupby(rows, key=itemgetter(*_ABOUT)):
        control = taken or (arch if arch in CONTROLS else None)
        measures = {_measure(row): _interval(row) for row in part}
        dictionaries.append(Measured(run, hook, name, arch, control, measures))
    return dictionaries


def _measure(row: Mapping[str, Any]) -> str:
    return row["metric"] + (f" ({row['preset']})" if row["preset"] else "")


def _interval(row: Mapping[str, Any]) -> Interval:
    value, low, high = (row[key] for key in ("value", "ci_low", "ci_high"))
    numbers = [math.nan if number is None else float(number) for number in (value, low, high)]
    return numbers[0], numbers[1], numbers[2]
