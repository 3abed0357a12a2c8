"""Rows of table `robustness`: as records, in pairs, as areas under curves, and as a handle.

A row without a value stays, with its failure: a family that could not be fitted under heavy noise
must not look better for it.
"""

import base64
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

import activation_store as astore
from lmmono.data.corruption.label_noise import signal_margin
from lmmono.errors import DataError
from lmmono.recipe.robustness_settings import Robustness
from lmmono.registry.metrics import METRICS
from lmmono.stats.intervals import student_interval

FULL = "full"
"""Budget of a family that says none."""

REAL = "real"
"""Kind of label noise that a set has by itself: one strength, and no curve."""

FINE_TUNING = "fine_tuning"
"""Suite whose rows compare learners: the model tuned, and probes on its codes."""

CONTINUITY = "continuity"
"""Suite whose rows compare ways to tune; most of them are no accuracy."""

FLINT = "flint"
"""Suite whose rows compare classifiers and interpreters: column `probe` says which."""

APART = (CONTINUITY, FLINT)
"""Suites that have tables of their own: their rows are of no family."""

SHOWN = 40
"""Conditions that a handle shows, at most."""

_RESULTS = """SELECT suite, task, feature, corruption, level, probe, n_shots, metric, split, seed,
    value, n, failure, settings FROM robustness
    WHERE seed IS NOT NULL AND metric = $metric ORDER BY ALL"""


@dataclass(frozen=True, slots=True)
class Result:
    """What one code achieved under one condition with one seed."""

    suite: str
    """Suite that it is of."""
    task: str
    """Name of the task."""
    feature: str
    """Feature family."""
    corruption: str | None
    """Kind of corruption; None for none."""
    level: float | None
    """Strength of the corruption, 0 is clean; None for an area over levels."""
    probe: str | None
    """Learner."""
    n_shots: int | None
    """Labelled examples per class; None for all."""
    metric: str
    """Name of the formula."""
    split: str | None
    """Part of the task that it was measured on."""
    seed: int
    """Seed of the repetition, shared by all families."""
    value: float
    """The result; NaN where it failed."""
    n: int | None = None
    """Items that the value averages over."""
    failure: str | None = None
    """Why there is no value."""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further settings: `draw`, `budget`, `n_classes`, `d`, `dictionary`."""

    @property
    def draw(self) -> int:
        """Noise draw within the seed; 0 where each seed has one."""
        return int(self.settings.get("draw", 0))

    @property
    def budget(self) -> str:
        """Dimensions that the probe may read, as text; `full` where it may read all."""
        return str(self.settings.get("budget") or FULL)

    @property
    def key(self) -> tuple[str, int, int]:
        """Return what two families must share to be a pair: task, seed and noise draw."""
        return self.task, self.seed, self.draw

    @property
    def strength(self) -> float | str | None:
        """The level; `as given` for real noisy labels, whose share differs between seeds."""
        return "as given" if self.corruption == REAL and self.level else self.level

    @property
    def learner(self) -> str | None:
        """Learner that families share; None where learners are what is compared."""
        return None if self.suite == FINE_TUNING else self.probe

    @property
    def condition(self) -> tuple[Any, ...]:
        """Return what else they must share: all but the family, its budget, task, seed, draw."""
        parts = (self.suite, self.corruption, self.strength, self.learner, self.n_shots)
        return *parts, self.metric, self.split

    @property
    def items(self) -> Float[ndarray, " n"] | None:
        """Return the value of each test text, the same texts in all rows of a condition.

        None where a row does not say which texts are right.
        """
        items = self.settings.get("items")
        if items is not None or "right" not in self.settings or not self.n:
            return items
        bits = np.frombuffer(base64.b64decode(self.settings["right"]), np.uint8)
        return np.unpackbits(bits, count=self.n).astype(np.float64)

    @property
    def margin(self) -> float:
        """Return rho = 1 - eta C / (C - 1), what symmetric label noise leaves of the signal.

        NaN where the number of classes is not known.
        """
        n_classes = self.settings.get("n_classes")
        if n_classes is None or self.level is None:
            return math.nan
        return signal_margin(self.level, int(n_classes))


@dataclass(frozen=True, slots=True)
class AskedRows:
    """The rows that settings ask for; a store keeps those of earlier settings too."""

    settings: Robustness
    """What the study is of."""
    tasks: Sequence[str]
    """Names of its tasks."""
    features: Sequence[str] | None
    """Names of its families and tuned models; None takes all."""

    def covers(self, row: Mapping[str, Any]) -> bool:
        """Say whether a row of table `robustness` is one of them."""
        settings, suite = self.settings, row["suite"]
        if suite not in settings.suites or row["task"] not in self.tasks:
            return False
        if suite == "noisy_inputs":
            levels = (0, *settings.severities)
            asked = row["corruption"] in settings.input_noise and row["level"] in levels
        elif suite == "noisy_labels":
            asked = row["corruption"] in settings.label_noise
        else:
            asked = row["n_shots"] is None or row["n_shots"] in settings.shots
        return asked and row["seed"] < self._n_seeds(row) and self._is_of_these(row)

    def _n_seeds(self, row: Mapping[str, Any]) -> int:
        settings = self.settings
        if row["suite"] == FINE_TUNING:
            return settings.fine_tuning.seeds or settings.seeds
        return settings.seeds if row["n_shots"] is None else max(settings.seeds, settings.resamples)

    def _is_of_these(self, row: Mapping[str, Any]) -> bool:
        name, _, budget = row["feature"].partition("@")
        if self.features is not None and name not in self.features:
            return False
        if row["suite"] == FLINT:
            return name in self.settings.flint.labels
        if row["suite"] == CONTINUITY:
            return row["probe"] == self.settings.fine_tuning.loss
        if row["suite"] == FINE_TUNING and row["probe"] not in self.settings.learners:
            return row["probe"] == self.settings.fine_tuning.loss
        budgets = [str(budget) for budget in self.settings.budgets]
        return row["probe"] in self.settings.learners and budget in ("", *budgets)


def read_results(
    store: astore.Store, metric: str = "accuracy", asked: AskedRows | None = None
) -> list[Result]:
    """Return the rows of a store that are of one seed each; summaries over seeds are left out.

    Args:
        store: The store.
        metric: Metric of the rows.
        asked: Those to return; None returns all.
    """
    rows = store.sql(_RESULTS, metric=metric).to_arrow_table().to_pylist()
    return [
        result_of({**row, "settings": json.loads(row["settings"] or "{}")})
        for row in rows
        if asked is None or asked.covers(row)
    ]


def result_of(row: Mapping[str, Any]) -> Result:
    """Return a row, its settings as a mapping, as a record."""
    columns: dict[str, Any] = {field.name: row[field.name] for field in fields(Result)}
    columns["value"] = math.nan if row["value"] is None else float(row["value"])
    # a budget stands behind the name, as in sae@16, and in the settings
    columns["feature"] = str(row["feature"]).partition("@")[0]
    return Result(**columns)


def severity_changes(results: Iterable[Result]) -> list[Result]:
    """Return what noise does to a family on average: its area less its value at level 0.

    A family that is better without noise and falls as low as the others under it has the larger
    area and the larger fall: the one is no measure of robustness without the other.
    """
    changes: list[Result] = []
    for area, clean in areas_and_starts(results):
        one, other = area.items, None if clean is None else clean.items
        change = None
        if one is not None and other is not None and one.shape == other.shape:
            change = one - other
        settings = _with_items(area.settings, change)
        start = math.nan if clean is None else clean.value
        changes.append(replace(area, value=area.value - start, settings=settings))
    return changes


def _with_items(
    settings: Mapping[str, Any], items: Float[ndarray, " n"] | None
) -> Mapping[str, Any]:
    """Return the settings of a row of several, with the value of each text where it is known."""
    kept = {name: value for name, value in settings.items() if name not in ("right", "items")}
    return kept if items is None else {**kept, "items": items}


def areas_and_starts(results: Iterable[Result]) -> Iterator[tuple[Result, Result | None]]:
    """Yield the area under each family's curve of value over level, with the row at level 0.

    Trapezoids over the levels from 0 on, divided by the largest level, so that the area is on the
    scale of the value: mostly what the family has without noise; what noise takes away is in
    `severity_changes`. Levels at which no family has a value, such as a rate at which nothing can
    be learned, are left out; a curve that lacks a value that another family has has no area:
    `incomplete_curve`.
    """
    clean: dict[tuple[Any, ...], Result] = {}
    curves: dict[tuple[Any, ...], dict[float, Result]] = {}
    levels: dict[tuple[Any, ...], set[float]] = {}
    for result in results:
        if result.level is None or result.corruption == REAL:
            continue
        if not result.level:
            clean[*_curve(result), result.corruption] = result
            continue
        curves.setdefault((*_curve(result), result.corruption), {})[result.level] = result
        if not math.isnan(result.value):
            levels.setdefault(_kind(result), set()).add(result.level)
    for (*curve, corruption), points in curves.items():
        first = next(iter(points.values()))
        if _kind(first) not in levels:
            continue
        start = clean.get((*curve, corruption)) or clean.get((*curve, None))
        along = [0.0, *sorted(levels[_kind(first)])]
        values = [math.nan if start is None else start.value]
        values += [points[level].value if level in points else math.nan for level in along[1:]]
        area = float(np.trapezoid(values, along)) / along[-1]
        failure = "incomplete_curve" if math.isnan(area) else None
        rows = [start, *(points.get(level) for level in along[1:])]
        items = [row.items for row in rows if row is not None]
        of_levels = [of_texts for of_texts in items if of_texts is not None]
        mean = None
        if len(of_levels) == len(along) and len({len(of_texts) for of_texts in of_levels}) == 1:
            mean = np.trapezoid(np.stack(of_levels), along, axis=0) / along[-1]
        settings = _with_items(first.settings, mean)
        yield replace(first, level=None, value=area, failure=failure, settings=settings), start


def _curve(result: Result) -> tuple[Any, ...]:
    about = (result.suite, result.feature, result.budget, result.learner, result.n_shots)
    return *about, result.metric, result.split, *result.key


def _kind(result: Result) -> tuple[Any, ...]:
    about = (result.suite, result.task, result.corruption, result.learner, result.n_shots)
    return *about, result.metric, result.split


def grouped(results: Iterable[Result], key: Callable[[Result], Any]) -> list[list[Result]]:
    """Return results in groups of equal key, in the order in which the keys first come."""
    groups: dict[Any, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return list(groups.values())


def paired(
    ours: Iterable[Result], theirs: Iterable[Result]
) -> tuple[dict[str, list[tuple[float, float]]], int]:
    """Return the pairs of each task, one per seed, and how many pairs were lost.

    Several draws or conditions of one seed are averaged: they share its training set.

    Raises:
        DataError: A family has two rows for one pair.
    """
    our_values, their_values = (_by_pair(results) for results in (ours, theirs))
    seeds: dict[tuple[str, int], list[tuple[float, float]]] = {}
    n_lost = 0
    for key in sorted(our_values.keys() | their_values.keys(), key=repr):
        pair = (our_values.get(key, math.nan), their_values.get(key, math.nan))
        if math.isnan(sum(pair)):
            n_lost += 1
        else:
            seeds.setdefault(key[0][:2], []).append(pair)
    by_task: dict[str, list[tuple[float, float]]] = {}
    for (task, _), pairs in seeds.items():
        a, b = np.mean(pairs, axis=0).tolist()
        by_task.setdefault(task, []).append((a, b))
    return by_task, n_lost


def _by_pair(results: Iterable[Result]) -> dict[tuple[Any, ...], float]:
    values: dict[tuple[Any, ...], float] = {}
    for result in results:
        key = (result.key, result.condition)
        if key in values:
            raise DataError(
                f"{result.feature} has two rows of task {result.task}, seed {result.seed}, "
                f"condition {result.condition}: give each family a name and a budget of its own"
            )
        values[key] = result.value
    return values


def stored_rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Return results as rows of table `robustness`."""
    rows: list[dict[str, Any]] = []
    for result in results:
        row = asdict(result) | {"metric_version": METRICS[result.metric].version}
        rows.append(row | {"value": None if math.isnan(result.value) else result.value})
    return rows


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
        """The rows as records, for `lmmono.studies`."""
        return [result_of(row) for row in self.rows]

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


def _lines(results: Sequence[Result], features: Sequence[str]) -> list[str]:
    conditions = grouped(results, lambda result: (result.task, result.budget, result.condition))
    lines = [line for group in conditions[:SHOWN] for line in _condition(group, features)]
    if len(conditions) > SHOWN:
        lines.append(f"  and {len(conditions) - SHOWN} conditions more; see .results")
    return lines


def _condition(group: Sequence[Result], features: Sequence[str]) -> Iterator[str]:
    """Yield one line: the mean of every family, and its difference from the first."""
    first, by_family = group[0], {f: [r for r in group if r.feature == f] for f in features}
    summaries = [_summary(f, ours, by_family[features[0]]) for f, ours in by_family.items() if ours]
    strength = "" if first.level is None else f" {first.level:g}"
    shots = "" if first.n_shots is None else f" {first.n_shots} shots"
    budget = "" if first.budget == "full" else f" budget {first.budget}"
    where = "" if first.split == "test" else f" {first.split}"
    about = f"{first.suite} {first.task}{where} {first.corruption or ''}{strength}{shots}{budget}"
    learner = "" if first.learner is None else f" [{first.learner}]"
    yield f"  {' '.join(about.split())}{learner}: {'; '.join(summaries)}"


def _summary(feature: str, ours: Sequence[Result], baseline: Sequence[Result]) -> str:
    values = np.array([result.value for result in ours])
    values = values[~np.isnan(values)]
    if not len(values):
        return f"{feature} none"
    mean = f"{feature} {values.mean():.3f}"
    if not baseline or ours[0].feature == baseline[0].feature:
        return f"{mean} (n {len(values)})"
    pairs, _ = paired(ours, baseline)
    differences = np.array([a - b for task in pairs.values() for a, b in task])
    if not len(differences):
        return mean
    if len(differences) == 1:
        return f"{mean} ({differences[0]:+.3f}, one seed)"
    _, low, high = student_interval([differences])
    return f"{mean} ({differences.mean():+.3f} [{low:+.3f}, {high:+.3f}])"
