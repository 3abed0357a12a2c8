"""Intervals by formula: Wilson's, Student's t, the delete-one jackknife, and ratios of sums.

Tokens of one record hang together, so records are what is left out, each kind by itself. An
interval that takes tokens as independent covers the truth in 14 to 21 of 100 cases. The delete-one
jackknife on a straightened scale covers it in 94 to 96 at 20 + 20 records, the percentile bootstrap
in 92; see `benchmarks/interval_coverage.py`.
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray
from scipy.stats import norm
from scipy.stats import t as student_t

from lmmono.stats.agreement import Agreement
from lmmono.stats.estimate import LEVEL, Interval

Z = float(norm.ppf((1 + LEVEL) / 2))
"""Standard normal quantile of an interval of `LEVEL`."""

FEW_DOCUMENTS = 20
"""An interval over fewer documents is called approximate, since records of one document are alike.
Measured with document effects of log sd 0.5: 20 records of 3, 8, 40, 170 documents cover 0.43,
0.69, 0.87, 0.90; on Wikipedia under a trained CRATE 8 documents 0.90, 170 documents 0.92. The
percentile bootstrap of a ratio over 3 documents covers 0.76, over 8 documents 0.86."""

FEW_RECORDS, FEW_FIRING = 20, 10
"""With fewer records of a kind, or fewer records that fire, an interval is called approximate.

Measured by `benchmarks/interval_coverage.py`: 90 of 100 at 5 + 5 records, 83 at 20 random ones of
which 3 fire.
"""


def wilson(right: float, n: int) -> Interval:
    """Return Wilson's interval of a share of n items.

    Our own since scipy's `proportion_ci` takes whole counts only, and scorers have fractions.

    >>> [round(end, 4) for end in wilson(20.0, 20)]
    [0.8389, 1.0]
    """
    p, z2 = right / n, Z**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return float(max(centre - half, 0.0)), float(min(centre + half, 1.0))


def student_quantile(
    freedom: Float[ndarray, "*batch"] | float | int, level: float = LEVEL
) -> Float[ndarray, "*batch"]:
    """Return how many standard errors an interval reaches to each side."""
    return np.asarray(student_t.ppf((1 + level) / 2, freedom))


def student_interval(groups: Sequence[Float[ndarray, " _"]]) -> tuple[float, float, float]:
    """Return the mean over groups of their means, and its interval over the items within groups.

    Groups (hooks, tasks) count alike and are fixed; items within them (units, seeds) are what
    varies. Student's t with Satterthwaite's degrees of freedom; the ends are NaN where a group has
    fewer than two items.

    >>> [round(x, 3) for x in student_interval([np.array([1.0, 2.0, 3.0])])]  # 2 -+ 4.303 / sqrt 3
    [2.0, -0.484, 4.484]
    """
    mean = float(np.mean([group.mean() for group in groups]))
    if min(len(group) for group in groups) < 2:
        return mean, math.nan, math.nan
    parts = np.array([group.var(ddof=1) / len(group) for group in groups]) / len(groups) ** 2
    weight = (parts**2 / np.array([len(group) - 1 for group in groups])).sum()
    freedom = max(parts.sum() ** 2 / max(weight, 1e-300), 1.0)  # equal values: 0 / 0
    half = float(student_quantile(freedom) * np.sqrt(parts.sum()))
    return mean, mean - half, mean + half


def jackknife_interval(
    values: Float[ndarray, "*batch"] | float,
    left_out: Float[ndarray, "*batch n"],
    level: float = LEVEL,
) -> tuple[Float[ndarray, "*batch"], Float[ndarray, "*batch"]]:
    """Return the interval of values from those with one item (document, seed) left out each.

    Student's t; the jackknife's variance is not too small on average (Efron and Stein 1981). NaN
    where there are fewer than two items.
    """
    n = left_out.shape[-1]
    if n < 2:
        nothing = np.full(np.shape(values), np.nan)
        return nothing, nothing
    spread = left_out - left_out.mean(axis=-1, keepdims=True)
    error = np.sqrt((n - 1) / n * np.square(spread).sum(axis=-1))
    half = student_quantile(n - 1, level) * error
    return np.asarray(values - half), np.asarray(values + half)


def cluster_error(values: Float[ndarray, " n"], clusters: Shaped[ndarray, " n"]) -> float:
    """Return the standard error of a mean whose items hang together within clusters.

    The mean is over items, what varies is clusters (documents): with residual sums r over each of
    m clusters it is sqrt(m / (m - 1) sum r^2) / n (Liang and Zeger 1986, for a mean). NaN for one
    cluster.

    >>> cluster_error(np.array([1.0, 1.0, 3.0, 3.0]), np.array([0, 0, 1, 1]))  # sums -2 and 2
    1.0
    """
    _, number = np.unique(clusters, return_inverse=True)
    residuals = np.bincount(number.ravel(), values - values.mean())
    n, m = len(values), len(residuals)
    return math.sqrt(m / (m - 1) * float(np.square(residuals).sum())) / n if m > 1 else math.nan


def leave_one_out(
    sums: Float[ndarray, "units records sums"],
) -> Float[ndarray, "units records sums"]:
    """Return the sums of each unit without each one of its records."""
    return sums.sum(axis=1, keepdims=True) - sums


def unit_intervals(
    sums: Float[ndarray, "units records sums"],
    present: Bool[ndarray, "units records"],
    kinds: Int[ndarray, " records"],
    agreement: Agreement,
    documents: Int[ndarray, "units records"] | None = None,
) -> tuple[Float[ndarray, " units"], Float[ndarray, " units"]]:
    """Return the interval of each unit: delete-one-record jackknife within kinds, Student's t.

    On the straightened scale the variance is the sum over kinds of (n - 1) / n sum (d - mean d)^2
    over the values d without one record, and the degrees of freedom are Satterthwaite's. A value
    that is not defined without some record counts as 0 there. Records of one document are alike:
    given documents, the parts d - mean d are summed by document, over all kinds, before they are
    squared; with m documents the variance grows by m / (m - 1), and the degrees of freedom are
    m - 1 at most.

    Args:
        sums: Sums of each record; see `agreement.record_sums`.
        present: Which records there are.
        kinds: Number of the kind of each column; kinds are resampled apart.
        agreement: The measure.
        documents: Document of each record; None takes records as independent.

    Returns:
        Lower and upper ends; NaN where the value is not defined or a kind has fewer than 2 records.
    """
    value = agreement.of(sums.sum(axis=1))
    without = np.nan_to_num(agreement.of(leave_one_out(sums)), nan=0.0)
    left = agreement.straight(without)
    variance, weight, gaps = np.zeros(len(sums)), np.zeros(len(sums)), np.zeros(present.shape)
    enough = ~np.isnan(value)
    for kind in np.unique(kinds):
        of_kind = present & (kinds == kind)
        n = of_kind.sum(axis=1)
        enough &= n >= 2
        n = np.maximum(n, 2)
        mean = np.where(of_kind, left, 0.0).sum(axis=1) / n
        gap = np.where(of_kind, left - mean[:, None], 0.0) * np.sqrt((n - 1) / n)[:, None]
        gaps += gap
        part = np.square(gap).sum(axis=1)
        variance += part
        weight += part**2 / (n - 1)
    # Welch and Satterthwaite; 0 / 0 where nothing varies
    freedom = np.maximum(variance**2 / np.maximum(weight, 1e-300), 1.0)
    if documents is not None:
        variance, m = _squared_by_document(gaps, documents, present)
        variance *= m / np.maximum(m - 1, 1)
        freedom = np.maximum(np.minimum(freedom, m - 1), 1.0)
        enough &= m >= 2
    half = student_quantile(freedom) * np.sqrt(variance)
    centre = agreement.straight(np.nan_to_num(value))
    # the straightened scale ends just before 1, so a perfect value would lie outside
    low = np.minimum(agreement.back(centre - half), value)
    high = np.maximum(agreement.back(centre + half), value)
    return np.where(enough, low, np.nan), np.where(enough, high, np.nan)


def _squared_by_document(
    gaps: Float[ndarray, "units records"],
    documents: Int[ndarray, "units records"],
    present: Bool[ndarray, "units records"],
) -> tuple[Float[ndarray, " units"], Int[ndarray, " units"]]:
    """Return the sum over documents of squared sums of gaps, and the number of documents."""
    unit, record = np.nonzero(present)
    keys = np.stack([unit, documents[unit, record]], axis=1)
    names, number = np.unique(keys, axis=0, return_inverse=True)
    by_document = np.bincount(number.ravel(), gaps[unit, record], len(names))
    of_unit = names[:, 0]
    squared = np.bincount(of_unit, np.square(by_document), len(gaps))
    return squared, np.bincount(of_unit, minlength=len(gaps))


def unit_method(n_fewest: int, n_firing: int) -> str:
    """Return the name of a unit's interval; says where it covers less than it aims at.

    Args:
        n_fewest: Records of the rarest kind.
        n_firing: Records in which the unit fires.
    """
    name = "jackknife over records within kinds, by document, Student t on the straightened scale"
    if n_fewest >= FEW_RECORDS and n_firing >= FEW_FIRING:
        return name
    return f"{name}; approximate: {n_fewest} records of a kind, {n_firing} fire"


AGREEING = (0.0, 0.0, 1.0, 1.0)
"""Where four more documents stand in the interval of a share: z^2 / 2 = 2 failures and 2 successes
(Agresti and Coull 1998), so that documents which all agree do not make an interval of width 0."""


@cache
def _quantile(freedom: int) -> float:
    # scipy takes 0.2 ms for one, and every unit of a hook wants one
    return float(student_quantile(freedom))


def ratio_interval(
    above: Float[ndarray, " documents"],
    below: Float[ndarray, " documents"],
    added: tuple[float, ...] = AGREEING,
) -> tuple[float, float]:
    """Return the 95 % interval of sum(above) / sum(below), documents being what is drawn.

    The delta method with Student's t, after documents of mean size were added. Coverage of a share
    with 3 to 100 documents of three items, alike within a document or not: 0.94 or more
    (`benchmarks/interval_coverage.py`).

    Args:
        above: Numerator of each document.
        below: Denominator of each document, above 0.
        added: The ratio of each document that is added.

    >>> low, high = ratio_interval(np.full(6, 1.0), np.full(6, 1.0))  # six of six
    >>> round(low, 2), round(high, 2)
    (0.5, 1.1)
    """
    if not len(below):
        return math.nan, math.nan
    size = below.mean()
    above = np.concatenate([above, size * np.array(added)])
    below = np.concatenate([below, np.full(len(added), size)])
    n, ratio = len(below), above.sum() / below.sum()
    error = np.sqrt(n / (n - 1) * np.square(above - ratio * below).sum()) / below.sum()
    half = _quantile(n - 1) * float(error)
    return float(ratio) - half, float(ratio) + half
