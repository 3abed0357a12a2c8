"""95 % intervals: over the records of a unit, and over the units of a model.

Tokens of one record hang together, so records are what is resampled, each kind by itself. An
interval that takes tokens as independent covers the truth in 14 to 21 of 100 cases. The delete-one
jackknife on a straightened scale covers it in 94 to 96 at 20 + 20 records, the percentile bootstrap
in 92; see `benchmarks/interval_coverage.py`.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.stats import t as student_t

from lmmono.stats.agreement import Agreement

LEVEL = 0.95
"""Coverage that the intervals aim at."""

FEW_RECORDS, FEW_FIRING = 20, 10
"""With fewer records of a kind, or fewer records that fire, an interval is called approximate.

Measured by `benchmarks/interval_coverage.py`: 90 of 100 at 5 + 5 records, 83 at 20 random ones of
which 3 fire.
"""


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
) -> tuple[Float[ndarray, " units"], Float[ndarray, " units"]]:
    """Return the interval of each unit: delete-one-record jackknife within kinds, Student's t.

    On the straightened scale the variance is the sum over kinds of (n - 1) / n sum (d - mean d)^2
    over the values d without one record, and the degrees of freedom are Satterthwaite's. A value
    that is not defined without some record counts as 0 there.

    Args:
        sums: Sums of each record; see `agreement.record_sums`.
        present: Which records there are.
        kinds: Number of the kind of each column; kinds are resampled apart.
        agreement: The measure.

    Returns:
        Lower and upper ends; NaN where the value is not defined or a kind has fewer than 2 records.
    """
    value = agreement.of(sums.sum(axis=1))
    without = np.nan_to_num(agreement.of(leave_one_out(sums)), nan=0.0)
    left = agreement.straight(without)
    variance, weight = np.zeros(len(sums)), np.zeros(len(sums))
    enough = ~np.isnan(value)
    for kind in np.unique(kinds):
        mine = present & (kinds == kind)
        n = mine.sum(axis=1)
        enough &= n >= 2
        n = np.maximum(n, 2)
        mean = np.where(mine, left, 0.0).sum(axis=1) / n
        part = (n - 1) / n * np.square(np.where(mine, left - mean[:, None], 0.0)).sum(axis=1)
        variance += part
        weight += part**2 / (n - 1)
    freedom = np.maximum(variance**2 / np.maximum(weight, 1e-300), 1.0)
    half = student_t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(variance)
    centre = agreement.straight(np.nan_to_num(value))
    # the straightened scale ends just before 1, so a perfect value would lie outside
    low = np.minimum(agreement.back(centre - half), value)
    high = np.maximum(agreement.back(centre + half), value)
    return np.where(enough, low, np.nan), np.where(enough, high, np.nan)


def unit_method(n_fewest: int, n_firing: int) -> str:
    """Return the name of a unit's interval; says where it covers less than it aims at.

    Args:
        n_fewest: Records of the rarest kind.
        n_firing: Records in which the unit fires.
    """
    name = "jackknife over records within kinds, Student t on the straightened scale"
    if n_fewest >= FEW_RECORDS and n_firing >= FEW_FIRING:
        return name
    return f"{name}; approximate: {n_fewest} records of a kind, {n_firing} fire"


def mean_interval(
    groups: list[Float[ndarray, " _"]],
) -> tuple[float, float, float]:
    """Return the mean over groups of their means, and its interval over units within groups.

    Student's t with Satterthwaite's degrees of freedom; NaN ends where a group has one unit.
    """
    means = np.array([group.mean() for group in groups])
    if min(len(group) for group in groups) < 2:
        return float(means.mean()), float("nan"), float("nan")
    parts = np.array([group.var(ddof=1) / len(group) for group in groups]) / len(groups) ** 2
    weight = (parts**2 / np.array([len(group) - 1 for group in groups])).sum()
    freedom = max(parts.sum() ** 2 / max(weight, 1e-300), 1.0)
    half = float(student_t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(parts.sum()))
    return float(means.mean()), float(means.mean()) - half, float(means.mean()) + half
