"""Means over seeds with their intervals, as cells of tables."""

import math
from collections.abc import Iterable, Mapping

import numpy as np

from lmmono.registry.metrics import METRICS
from lmmono.reports.table import Interval
from lmmono.stats.intervals import student_interval


def over_seeds(values: Iterable[float], metric: str | None = None) -> Interval | None:
    """Return the mean over seeds with its 95 % interval; None where no seed has a value.

    NaN values are left out. Student's t knows no bounds, so that its ends are cut where no value of
    the metric can be; the interval covers as often.

    >>> str(over_seeds([0.9, 0.98, 1.0], "accuracy"))
    '0.96 [0.829, 1]'
    >>> str(over_seeds([0.9, 0.98, 1.0]))
    '0.96 [0.829, 1.09]'
    """
    defined = np.array([value for value in values if not math.isnan(value)])
    if not len(defined):
        return None
    mean, low, high = student_interval([defined])
    least, most = (-math.inf, math.inf) if metric is None else METRICS[metric].bounds
    return Interval(mean, max(low, least), min(high, most))  # NaN, of one seed, stays


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """Return the mean difference over seeds that both have; None where there is none."""
    return over_seeds(ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys()))
