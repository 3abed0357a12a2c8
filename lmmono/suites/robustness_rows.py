"""Rows of table `robustness` as records, and the area under a family's severity curve.

A row without a value stays, with its failure: a family that could not be fitted under heavy noise
must not look better for it.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

import activation_store as astore
from lmmono.data.corruption.labels import signal_margin
from lmmono.recipe.robustness_settings import Robustness
from lmmono.registry.metrics import METRICS

FULL = "full"
"""Budget of a family that says none."""

REAL = "real"
"""Kind of label noise that a set has by itself: one strength, and no curve."""

FINE_TUNING = "fine_tuning"
"""Suite whose rows compare learners: the model tuned, and probes on its codes."""

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
    def margin(self) -> float:
        """Return rho = 1 - eta C / (C - 1), what symmetric label noise leaves of the signal.

        NaN where the number of classes is not known.
        """
        n_classes = self.settings.get("n_classes")
        if n_classes is None or self.level is None:
            return math.nan
        return signal_margin(self.level, int(n_classes))


@dataclass(frozen=True, slots=True)
class Asked:
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
        if row["suite"] == FINE_TUNING and row["probe"] not in self.settings.learners:
            return row["probe"] == self.settings.fine_tuning.loss
        budgets = [str(each) for each in self.settings.budgets]
        return row["probe"] in self.settings.learners and budget in ("", *budgets)


def read_results(
    store: astore.Store, metric: str = "accuracy", asked: Asked | None = None
) -> list[Result]:
    """Return the rows of a store that are of one seed each; summaries over seeds are left out.

    Args:
        store: The store.
        metric: Metric of the rows.
        asked: Those to return; None returns all.
    """
    rows = store.sql(_RESULTS, metric=metric).to_arrow_table().to_pylist()
    return [Result(**row | _read(row)) for row in rows if asked is None or asked.covers(row)]


def _read(row: Mapping[str, Any]) -> dict[str, Any]:
    value = math.nan if row["value"] is None else float(row["value"])
    # a budget stands behind the name, as in sae@16, and in the settings
    feature = str(row["feature"]).partition("@")[0]
    return {"feature": feature, "value": value, "settings": json.loads(row["settings"] or "{}")}


def severity_areas(results: Iterable[Result]) -> list[Result]:
    """Return the area under each family's curve of value over level, per corruption and seed.

    Trapezoids over the levels from 0 on, divided by the largest level, so that the area is on the
    scale of the value. Levels at which no family has a value, such as a rate at which nothing can
    be learned, are left out; a curve that lacks a value that another family has has no area:
    `incomplete_curve`.
    """
    given = [each for each in results if each.level is not None and each.corruption != REAL]
    clean: dict[tuple[Any, ...], Result] = {}
    curves: dict[tuple[Any, ...], dict[float, Result]] = {}
    for each in given:
        if each.level:
            curves.setdefault((*_curve(each), each.corruption), {})[each.level] = each
        else:
            clean[*_curve(each), each.corruption] = each
    levels: dict[tuple[Any, ...], set[float]] = {}
    for each in given:
        if each.level and not math.isnan(each.value):
            levels.setdefault(_kind(each), set()).add(each.level)
    found: list[Result] = []
    for (*curve, corruption), points in curves.items():
        first = next(iter(points.values()))
        start = clean.get((*curve, corruption)) or clean.get((*curve, None))
        if _kind(first) in levels:
            found.append(_area(first, start, points, levels[_kind(first)]))
    return found


def _curve(result: Result) -> tuple[Any, ...]:
    about = (result.suite, result.feature, result.budget, result.learner, result.n_shots)
    return *about, result.metric, result.split, *result.key


def _kind(result: Result) -> tuple[Any, ...]:
    about = (result.suite, result.task, result.corruption, result.learner, result.n_shots)
    return *about, result.metric, result.split


def _area(
    first: Result, start: Result | None, points: Mapping[float, Result], levels: set[float]
) -> Result:
    """Return the area of one curve."""
    along = [0.0, *sorted(levels)]
    values = [math.nan if start is None else start.value]
    values += [points[level].value if level in points else math.nan for level in along[1:]]
    area = float(np.trapezoid(values, along)) / along[-1]
    failure = "incomplete_curve" if math.isnan(area) else None
    return replace(first, level=None, value=area, failure=failure)


def stored_rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Return results as rows of table `robustness`."""
    rows: list[dict[str, Any]] = []
    for each in results:
        row = asdict(each) | {"metric_version": METRICS[each.metric].version}
        rows.append(row | {"value": None if math.isnan(each.value) else each.value})
    return rows
