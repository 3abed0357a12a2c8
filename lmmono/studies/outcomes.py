"""What a robustness study measured: a handle on its rows, with the differences between families."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

import activation_store as astore
from lmmono.stats.intervals import student_interval
from lmmono.studies.comparisons import grouped, paired
from lmmono.suites.robustness_rows import Result

SHOWN = 40
"""Conditions that a handle shows, at most."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """Rows of table `robustness` that one call measured or found."""

    store: astore.Store | None
    """The store that holds them; None where they are in memory alone."""
    rows: tuple[dict[str, Any], ...]
    """One dict per row, with the columns of the table; each is of one seed."""
    hook: str
    """The hook that families read by default."""
    features: tuple[str, ...]
    """Families, in the order given; the first is what the others are compared with."""
    n_computed: int
    """Rows computed now."""
    n_found: int
    """Rows that were there already."""
    seconds: float
    """Wall time."""

    @property
    def results(self) -> list[Result]:
        """The rows as records, for `lmmono.studies.comparisons` and `hypotheses`."""
        return [_result(row) for row in self.rows]

    def df(self) -> Any:
        """Return the rows as a pandas data frame."""
        import pyarrow as pa

        plain = [{**row, "settings": str(row["settings"])} for row in self.rows]
        return pa.Table.from_pylist(plain).to_pandas()

    def __repr__(self) -> str:
        where = "in memory" if self.store is None else str(self.store.path)
        lines = [
            f"Outcomes({where}, {self.hook}: {self.n_computed:,} rows computed, {self.n_found:,} "
            f"were there; {self.seconds:.1f} s)"
        ]
        lines += _lines(self.results, self.features)
        failures = [row["failure"] for row in self.rows if row["failure"]]
        if failures:
            lines.append(f"  {len(failures)} rows have no value, such as: {failures[0]}")
        return "\n".join(lines)


def _result(row: Mapping[str, Any]) -> Result:
    kept: dict[str, Any] = {field.name: row[field.name] for field in fields(Result)}
    value = math.nan if row["value"] is None else float(row["value"])
    named: dict[str, Any] = {"feature": row["feature"].partition("@")[0], "value": value}
    return Result(**kept | named)


def _lines(results: Sequence[Result], features: Sequence[str]) -> list[str]:
    conditions = grouped(results, lambda each: (each.task, each.budget, each.condition))
    lines = [line for group in conditions[:SHOWN] for line in _condition(group, features)]
    if len(conditions) > SHOWN:
        lines.append(f"  and {len(conditions) - SHOWN} conditions more; see .results")
    return lines


def _condition(group: Sequence[Result], features: Sequence[str]) -> Iterator[str]:
    """Yield one line: the mean of every family, and its difference from the first."""
    first, by_family = group[0], {f: [r for r in group if r.feature == f] for f in features}
    told = [_told(f, mine, by_family[features[0]]) for f, mine in by_family.items() if mine]
    strength = "" if first.level is None else f" {first.level:g}"
    shots = "" if first.n_shots is None else f" {first.n_shots} shots"
    budget = "" if first.budget == "full" else f" budget {first.budget}"
    where = "" if first.split == "test" else f" {first.split}"
    about = f"{first.suite} {first.task}{where} {first.corruption or ''}{strength}{shots}{budget}"
    learner = "" if first.learner is None else f" [{first.learner}]"
    yield f"  {' '.join(about.split())}{learner}: {'; '.join(told)}"


def _told(feature: str, mine: Sequence[Result], baseline: Sequence[Result]) -> str:
    values = np.array([each.value for each in mine])
    known = values[~np.isnan(values)]
    if not len(known):
        return f"{feature} none"
    mean = f"{feature} {known.mean():.3f}"
    if not baseline or mine[0].feature == baseline[0].feature:
        return f"{mean} (n {len(known)})"
    differences = _differences(mine, baseline)
    if not len(differences):
        return mean
    if len(differences) == 1:
        return f"{mean} ({differences[0]:+.3f}, one seed)"
    _, low, high = student_interval([differences])
    return f"{mean} ({differences.mean():+.3f} [{low:+.3f}, {high:+.3f}])"


def _differences(mine: Sequence[Result], baseline: Sequence[Result]) -> np.ndarray:
    """Return the differences of one task, seed by seed."""
    pairs, _ = paired(mine, baseline)
    return np.array([a - b for each in pairs.values() for a, b in each])
