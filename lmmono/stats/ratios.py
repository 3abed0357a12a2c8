"""Ratios of sums over documents, with intervals that stay open where all documents agree."""

import math
from functools import cache

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from lmmono.stats.intervals import student_quantile

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
