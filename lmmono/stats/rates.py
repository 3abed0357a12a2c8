"""How well scores tell two classes of records apart, with intervals that take records as the items.

The intervals are closed formulas that stay open at the ends: a judge that is right 20 times of 20
may be wrong the next time.
"""

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import rankdata

from lmmono.stats.estimate import Interval
from lmmono.stats.intervals import Z, wilson

ACCURACY_METHOD = "Wilson over records of each class, joined by MOVER (Newcombe 1998)"
AUROC_METHOD = "score interval over records (Newcombe 2006, method 5)"
PRECISION_METHOD = "logit interval over firing records (Boyd et al. 2013)"
WILSON_METHOD = "Wilson"


def mean_of_two(
    first: float, first_ends: Interval, second: float, second_ends: Interval
) -> Interval:
    """Return the interval of the mean of two independent estimates from theirs (MOVER)."""
    centre = (first + second) / 2
    below = np.hypot(first - first_ends[0], second - second_ends[0]) / 2
    above = np.hypot(first_ends[1] - first, second_ends[1] - second) / 2
    return float(centre - below), float(centre + above)


def balanced_accuracy(
    right_firing: float, n_firing: int, right_other: float, n_other: int
) -> tuple[float, float, float]:
    """Return the mean of the two classes' shares that are right, and its interval.

    >>> balanced_accuracy(3.0, 4, 2.0, 4)[0]  # by hand: (0.75 + 0.5) / 2
    0.625
    """
    first, second = right_firing / n_firing, right_other / n_other
    ends = mean_of_two(first, wilson(right_firing, n_firing), second, wilson(right_other, n_other))
    return (first + second) / 2, *ends


def auroc(positive: Float[ndarray, " a"], negative: Float[ndarray, " b"]) -> float:
    """Return P(score of a positive > score of a negative), ties and missing scores (NaN) by half.

    From the ranks (Mann and Whitney), so that many items cost a sort.

    >>> auroc(np.array([3.0, 1.0]), np.array([1.0, 0.0]))
    0.875
    """
    positive, negative = np.asarray(positive, float), np.asarray(negative, float)
    a, b = positive[~np.isnan(positive)], negative[~np.isnan(negative)]
    n_pairs = len(positive) * len(negative)
    above = rankdata(np.concatenate([a, b]))[: len(a)].sum() - len(a) * (len(a) + 1) / 2
    return float((above + (n_pairs - len(a) * len(b)) / 2) / n_pairs)


def auroc_interval(area: float, n_firing: int, n_other: int) -> Interval:
    """Return the score interval of an AUROC: all areas that do not differ from it significantly.

    The variance at area A is A (1 - A) (1 + (N - 1) ((1 - A) / (2 - A) + A / (1 + A))) / (n m),
    with N = (n + m) / 2 (Newcombe 2006, method 5).
    """
    grid = np.linspace(0.0, 1.0, 2001)
    mean_n = (n_firing + n_other) / 2
    inner = 1 + (mean_n - 1) * ((1 - grid) / (2 - grid) + grid / (1 + grid))
    error = np.sqrt(grid * (1 - grid) * inner / (n_firing * n_other))
    # at 0 and 1 the error is 0: an area of 0 or 1 is kept in spite of rounding
    kept = grid[np.abs(grid - area) <= Z * error + 1e-9]
    if not len(kept):
        return area, area
    return float(min(kept[0], area)), float(max(kept[-1], area))


def average_precision(firing: Float[ndarray, " a"], other: Float[ndarray, " b"]) -> float:
    """Return the sum of (R_k - R_{k-1}) P_k over thresholds; missing scores rank last."""
    scores = np.nan_to_num(np.concatenate([firing, other]), nan=-np.inf)
    is_firing = np.arange(len(scores)) < len(firing)
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(is_firing[order])
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    recall, precision = hits[last] / max(len(firing), 1), hits[last] / (last + 1)
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def average_precision_interval(value: float, n_firing: int) -> Interval:
    """Return the logit interval of an average precision over `n_firing` records (Boyd 2013)."""
    p = (value * n_firing + 0.5) / (n_firing + 1)
    centre, half = np.log(p / (1 - p)), Z / np.sqrt(n_firing * p * (1 - p))
    low, high = (1 / (1 + np.exp(-(centre + sign * half))) for sign in (-1, 1))
    return float(min(low, value)), float(max(high, value))


def best_threshold(firing: Float[ndarray, " a"], other: Float[ndarray, " b"]) -> float:
    """Return the threshold with the best balanced accuracy, half way between two scores.

    Of equally good ones the middle; a record fires where its score is above.
    """
    values = np.unique(np.concatenate([firing, other]))
    cuts = np.concatenate([[values[0] - 1], (values[1:] + values[:-1]) / 2, [values[-1] + 1]])
    a, b = np.sort(firing), np.sort(other)
    right = 1 - np.searchsorted(a, cuts, side="right") / len(a)
    right += np.searchsorted(b, cuts, side="right") / len(b)
    best = np.flatnonzero(right >= right.max() - 1e-12)
    return float(cuts[best[len(best) // 2]])
