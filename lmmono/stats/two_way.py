"""A mean over repetitions and the items that all of them share: both were drawn, so both vary.

Ten probes judged on one set of 200 texts agree on which texts are hard, so an interval over the ten
alone leaves the texts out: two equal codes then differ surely in 40 of 100 cases. With x[s, i] of
repetition s and item i,

    var(mean) = (MS_seeds + MS_items - MS_rest) / (S N)

is without bias where both are drawn at random (Cornfield and Tukey 1956), and Satterthwaite's
degrees of freedom give Student's t.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import t as student_t

from lmmono.stats.intervals import student_quantile


@dataclass(frozen=True, slots=True)
class TwoWayMean:
    """A mean over repetitions and the items that they share."""

    mean: float
    ci_low: float
    """Lower end of the 95 % interval; NaN below two repetitions or two items."""
    ci_high: float
    p: float
    """Two-sided p of a mean of 0."""
    n_seeds: int
    n_items: int


def two_way_mean(by_task: Sequence[Float[ndarray, "seeds items"]]) -> TwoWayMean:
    """Return the mean over tasks of the means over seeds and items, with its interval and p.

    Tasks count alike and are fixed; their texts and seeds are drawn apart.

    >>> x = np.array([[1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]])
    >>> found = two_way_mean([x])  # mean squares: seeds 1/8, items 11/24, rest 1/8
    >>> round(found.mean, 3), round(found.ci_low, 3)
    (0.625, -0.282)
    """
    n_seeds, n_items = (sum(x.shape[axis] for x in by_task) for axis in (0, 1))
    mean = float(np.mean([x.mean() for x in by_task]))
    if min(min(x.shape) for x in by_task) < 2:
        return TwoWayMean(mean, math.nan, math.nan, math.nan, n_seeds, n_items)
    variance = weight = 0.0
    for x in by_task:
        part, freedom = _variance(x)
        variance += part / len(by_task) ** 2
        weight += (part / len(by_task) ** 2) ** 2 / freedom
    if variance == 0.0:
        return TwoWayMean(mean, mean, mean, float(mean == 0.0), n_seeds, n_items)
    freedom, error = variance**2 / weight, math.sqrt(variance)
    half = float(student_quantile(freedom)) * error
    p = 2 * float(student_t.sf(abs(mean) / error, freedom))
    return TwoWayMean(mean, mean - half, mean + half, p, n_seeds, n_items)


def _variance(x: Float[ndarray, "seeds items"]) -> tuple[float, float]:
    """Return the variance of the mean of one task, and its degrees of freedom."""
    n_seeds, n_items = x.shape
    rows, columns = x.mean(axis=1), x.mean(axis=0)
    ms_seeds = n_items * float(rows.var(ddof=1))
    ms_items = n_seeds * float(columns.var(ddof=1))
    rest = x - rows[:, None] - columns + x.mean()
    n_rest = (n_seeds - 1) * (n_items - 1)
    ms_rest = float(np.square(rest).sum()) / n_rest
    # by chance the difference may be below what one of both alone says
    total = max(ms_seeds + ms_items - ms_rest, ms_seeds, ms_items)
    parts = ms_seeds**2 / (n_seeds - 1) + ms_items**2 / (n_items - 1) + ms_rest**2 / n_rest
    freedom = max(total**2 / parts, 1.0) if parts else 1.0
    return total / x.size, freedom
