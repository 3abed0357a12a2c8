"""Moments of every unit over all tokens, in float64, merged exactly.

State per unit: count, mean and the sums M2, M3, M4 of powers of the deviation from the mean, with
the smallest and largest value. Merging two states gives the state of their union (P. Pebay,
"Formulas for robust, one-pass parallel computation of covariances and arbitrary-order statistical
moments", SAND2008-6212), so batches and ranks can be taken in any grouping.
"""

from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float32, Float64, Int64

from activation_store.compiled import compiled

Floats = Float64[np.ndarray, " units"]


class Moments(NamedTuple):
    """Accumulated moments, one entry per unit; the arrays are changed in place."""

    n: Int64[np.ndarray, " units"]
    """Finite values seen."""
    active: Int64[np.ndarray, " units"]
    """Values above the hook's threshold."""
    mean: Float64[np.ndarray, " units"]
    m2: Float64[np.ndarray, " units"]
    """Sum of squared deviations from the mean; m3 and m4 the third and fourth powers."""
    m3: Float64[np.ndarray, " units"]
    m4: Float64[np.ndarray, " units"]
    low: Float32[np.ndarray, " units"]
    """Smallest value; +inf before the first."""
    high: Float32[np.ndarray, " units"]
    """Largest value; -inf before the first."""


def new_moments(n_units: int) -> Moments:
    """Return the moments of nothing."""
    low = np.full(n_units, np.inf, np.float32)
    return Moments(
        n=np.zeros(n_units, np.int64),
        active=np.zeros(n_units, np.int64),
        mean=np.zeros(n_units),
        m2=np.zeros(n_units),
        m3=np.zeros(n_units),
        m4=np.zeros(n_units),
        low=low,
        high=-low,
    )


@compiled
@no_type_check
def add_sums(
    moments: Moments,
    first: int,
    width: int,
    count: np.ndarray,
    shift: np.ndarray,
    sums: np.ndarray,
) -> None:
    """Merge values of units first.. into the moments.

    Given are, per unit, their count and the sums of the powers 1 to 4 of (value - shift).
    """
    for u in range(width):
        n = np.float64(count[u])
        if n > 0:
            s2, s3, s4 = sums[1, u], sums[2, u], sums[3, u]
            a = sums[0, u] / n
            b2 = s2 - n * a * a
            b3 = s3 - 3 * a * s2 + 2 * n * a * a * a
            b4 = s4 - 4 * a * s3 + 6 * a * a * s2 - 3 * n * a * a * a * a
            merge_unit(moments, first + u, n, shift[u] + a, max(b2, 0.0), b3, max(b4, 0.0))


@compiled
@no_type_check
def merge_unit(
    moments: Moments, u: int, nb: float, mean_b: float, b2: float, b3: float, b4: float
) -> None:
    """Merge the central moments of nb values into unit u: Pebay's pairwise update."""
    na = np.float64(moments.n[u])
    nb = np.float64(nb)
    n = na + nb
    d = mean_b - moments.mean[u]
    a2, a3, a4 = moments.m2[u], moments.m3[u], moments.m4[u]
    q = d / n
    moments.m4[u] = (
        a4
        + b4
        + d * q * q * q * na * nb * (na * na - na * nb + nb * nb)
        + 6 * q * q * (na * na * b2 + nb * nb * a2)
        + 4 * q * (na * b3 - nb * a3)
    )
    moments.m3[u] = a3 + b3 + d * q * q * na * nb * (na - nb) + 3 * q * (na * b2 - nb * a2)
    moments.m2[u] = a2 + b2 + d * q * na * nb
    moments.mean[u] += q * nb
    moments.n[u] += np.int64(nb)


@compiled
@no_type_check
def merge_moments(into: Moments, other: Moments) -> None:
    """Merge the moments of other tokens of the same units into `into`."""
    for u in range(into.n.shape[0]):
        into.active[u] += other.active[u]
        into.low[u] = min(into.low[u], other.low[u])
        into.high[u] = max(into.high[u], other.high[u])
        if other.n[u] > 0:
            merge_unit(into, u, other.n[u], other.mean[u], other.m2[u], other.m3[u], other.m4[u])


def shape_of(moments: Moments) -> tuple[Floats, Floats, Floats]:
    """Return variance, skewness m3 / m2^1.5 and kurtosis m4 / m2^2, which is 3 for a normal.

    NaN where a number is not defined: without tokens, or for a unit that never varies.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        n = moments.n.astype(np.float64)
        variance = moments.m2 / n
        skewness = (moments.m3 / n) / variance**1.5
        kurtosis = (moments.m4 / n) / variance**2
    flat = ~(variance > 0)
    return variance, np.where(flat, np.nan, skewness), np.where(flat, np.nan, kurtosis)
