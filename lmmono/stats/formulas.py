"""Formulas of metrics that several rooms compute: arithmetic on arrays and sums, nothing else."""

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

FIRES = 1e-5
"""A unit fires where its activation is larger than this, whatever the sign: codes that are not
rectified (PCA, residual streams) have concepts on both sides, and rounding leaves no zero exact."""

MIN_SUPPORT = 20
"""Items on which a unit fires, the fewest: below, most of a share is chance and E is near 1."""

N_SHUFFLES = 20
"""Shuffles of the labels whose mean is E."""


def kurtosis(
    n: float, power_sums: Float[ndarray, "4 units"], minimum_variance: float = 1e-12
) -> Float[ndarray, " units"]:
    """Return m4 / m2^2 per unit from the sums of x, x^2, x^3, x^4 over n values.

    A unit whose variance does not exceed `minimum_variance` has none: NaN.

    >>> kurtosis(4.0, np.array([[2.0], [2.0], [2.0], [2.0]]))  # 0, 0, 1, 1
    array([1.])
    """
    raw = power_sums / n
    m1, r2, r3, r4 = raw
    m2 = r2 - m1**2
    m4 = r4 - 4 * m1 * r3 + 6 * m1**2 * r2 - 3 * m1**4
    varies = m2 > minimum_variance
    return np.where(varies, m4 / np.where(varies, m2, 1.0) ** 2, np.nan)


def fvu(squared_error: float, variation: float) -> float:
    """Return the fraction of variance unexplained from two sums over the whole set.

    Never a mean of ratios. A set without variation has none: NaN.

    Args:
        squared_error: Sum over vectors and coordinates of (x - xhat)^2.
        variation: Sum over vectors and coordinates of (x - mean(x))^2.

    >>> fvu(1.0, 4.0)
    0.25
    """
    return squared_error / variation if variation > 0.0 else float("nan")


def entropies(weights: Float[ndarray, "*batch n"]) -> Float[ndarray, "*batch"]:
    """Return the entropy in nats of each distribution proportional to non-negative weights.

    Weights that are all zero have none: NaN.

    >>> entropies(np.array([[1.0, 1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])).round(4)
    array([1.0397,    nan])
    """
    total = weights.sum(axis=-1, keepdims=True)
    p = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    return np.where(total[..., 0] > 0, -(p * logs).sum(axis=-1), np.nan)


def fires(acts: Float[ndarray, "*shape"]) -> Bool[ndarray, "*shape"]:
    """Return where units fire."""
    return np.abs(acts) > FIRES


def consistency(
    firing: Bool[ndarray, "items units"], labels: Bool[ndarray, "items concepts"]
) -> Float[ndarray, " units"]:
    """Return the semantic consistency SC of each unit; NaN of one that never fires.

    It is the largest share of a concept among the items on which the unit fires (arXiv 2410.21331).
    Raw, it is large by chance where the unit fires rarely or a concept is common; `beyond_chance`
    takes that off.

    >>> firing = np.array([[True], [True], [True], [False]])
    >>> labels = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    >>> consistency(firing, labels).round(3)
    array([0.667])
    """
    counts = firing.T.astype(np.float32) @ labels.astype(np.float32)
    support = firing.sum(axis=0)
    return np.where(support > 0, counts.max(axis=1) / np.maximum(support, 1), np.nan)


def beyond_chance(
    raw: Float[ndarray, "*shape"], chance: Float[ndarray, "*#shape"]
) -> Float[ndarray, "*shape"]:
    """Return (SC - E) / (1 - E); NaN where E is 1, such as where all items have one concept.

    E is the mean SC over shuffled labels at the same support: a unit that fires everywhere has 0.

    >>> beyond_chance(np.array([0.75, 1.0]), np.array([0.5, 1.0]))
    array([0.5, nan])
    """
    has_room = chance < 1 - 1e-9  # E is a mean of float32 shares: 1 up to rounding
    return np.where(has_room, (raw - chance) / np.where(has_room, 1 - chance, 1.0), np.nan)
