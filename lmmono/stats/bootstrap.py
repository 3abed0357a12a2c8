"""Bootstrap intervals: what is drawn again is a document, a unit or a seed, never a token.

Tokens of one document hang together, so an interval that takes them as independent is too short.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, UInt16
from numpy import ndarray
from scipy.stats import bootstrap

from lmmono.stats.estimate import LEVEL, Estimate, Interval
from lmmono.stats.intervals import FEW_DOCUMENTS, student_quantile

DRAWS_AT_ONCE = 64
"""Redraws whose weights are held in float64 together: 64 x 100,000 documents are 51 MB."""

N_RESAMPLES = 9_999
"""Resamples of BCa: the 2.5 % point of 9,999 draws is a draw, not between two (n + 1 = 10,000)."""


@dataclass(frozen=True)
class DocumentDraws:
    """Documents drawn with replacement, as often as there are: the same draws for every measure.

    Equal draws make intervals of several dictionaries on one set of documents paired. The interval
    is that of percentiles; below 20 documents, where it covers too little (3 documents: 76 of 100),
    Student's t on the standard error of the redraws.
    """

    n_documents: int
    n_tokens: int
    n_resamples: int
    seed: int
    level: float

    @property
    def method(self) -> str:
        """What goes into `ci_method`."""
        if self._is_small:
            return (
                f"Student t over {self.n_documents} documents, error of {self.n_resamples} redraws"
            )
        return f"percentile bootstrap over documents, {self.n_resamples} resamples"

    @property
    def _is_small(self) -> bool:
        return 1 < self.n_documents < FEW_DOCUMENTS

    def _ends(
        self, value: Float[ndarray, "*n"] | float, drawn: Float[ndarray, "resamples *n"]
    ) -> Float[ndarray, "2 *n"]:
        if self._is_small:
            n = self.n_documents
            # redraws of n documents spread as if there were n - 1 of n
            error = drawn.std(axis=0) * math.sqrt(n / (n - 1))
            half = self._reach * error
            return np.stack([value - half, value + half])
        tail = (1 - self.level) / 2
        return np.quantile(drawn, [tail, 1 - tail], axis=0)

    @cached_property
    def _reach(self) -> Float[ndarray, ""]:
        """Student's quantile, once: scipy takes half a millisecond for it, as long as the rest."""
        return student_quantile(self.n_documents - 1, self.level)

    @cached_property
    def _weights(self) -> UInt16[ndarray, "resamples documents"]:
        rng = np.random.default_rng(self.seed)
        even = np.full(self.n_documents, 1 / self.n_documents)
        return rng.multinomial(self.n_documents, even, self.n_resamples).astype(np.uint16)

    def totals(
        self, sums: Float[ndarray, "documents *rest"]
    ) -> Float[ndarray, "one_plus_resamples *rest"]:
        """Return the sums over all documents, then those over each redraw of them."""
        flat = sums.reshape(len(sums), -1)
        totals = np.empty((1 + self.n_resamples, flat.shape[1]))
        totals[0] = flat.sum(axis=0)
        for first in range(0, self.n_resamples, DRAWS_AT_ONCE):
            part = self._weights[first : first + DRAWS_AT_ONCE].astype(np.float64)
            totals[1 + first : 1 + first + len(part)] = part @ flat
        return totals.reshape(-1, *sums.shape[1:])

    def estimate(
        self,
        values: Float[ndarray, " one_plus_resamples"],
        *,
        n: int | None = None,
        nan_fraction: float = 0.0,
        failure: str | None = None,
    ) -> Estimate:
        """Return a number from its value on all documents and on each redraw.

        One document alone says nothing of how documents differ: it gives no interval. Redraws on
        which the number is not defined are left out of it.

        Args:
            values: As a measure makes them of `totals`.
            n: Items that the number is about; tokens where not given.
            nan_fraction: Share of the items that were left out.
            failure: Why the number is not defined; it and its interval become NaN.
        """
        low = high = math.nan
        value = float(values[0])
        if failure is None and math.isnan(value):
            failure = "undefined"
        drawn = values[1:][np.isfinite(values[1:])]
        if failure is not None:
            value = math.nan
        elif self.n_documents > 1 and len(drawn):
            low, high = (float(end) for end in self._ends(value, drawn))
        count = self.n_tokens if n is None else n
        about = (self.level, self.method, count, self.n_tokens, self.n_documents)
        return Estimate(value, low, high, *about, nan_fraction, failure)

    def intervals(self, values: Float[ndarray, "one_plus_resamples n"]) -> Float[ndarray, "n 3"]:
        """Return value and interval of many numbers, each as `estimate` does; NaN where undefined.

        Numbers that every redraw defines, which are most, are sorted in one call.
        """
        whole = np.isfinite(values).all(axis=0) & (self.n_documents > 1) & (len(values) > 1)
        intervals = np.empty((values.shape[1], 3))
        if whole.any():
            intervals[whole, 0] = values[0, whole]
            intervals[whole, 1:] = self._ends(values[0, whole], values[1:, whole]).T
        for i in np.flatnonzero(~whole):
            estimate = self.estimate(values[:, i])
            intervals[i] = estimate.value, estimate.low, estimate.high
        return intervals


def ratio(above: Float[ndarray, "*n"], below: Float[ndarray, "*n"]) -> Float[ndarray, "*n"]:
    """Return above / below; NaN where `below` is not positive.

    >>> ratio(np.array([1.0, 1.0]), np.array([2.0, 0.0]))
    array([0.5, nan])
    """
    positive = below > 0
    return np.where(positive, above / np.where(positive, below, 1.0), np.nan)


def bca_interval(groups: Sequence[Float[ndarray, " _"]], seed: int = 0) -> Interval:
    """Return the BCa interval of the mean of group means; groups are resampled apart."""
    if all(np.ptp(group) == 0 for group in groups):
        mean = float(np.mean([group[0] for group in groups]))
        return mean, mean

    def mean_of_means(*groups: Float[ndarray, "..."], axis: int = -1) -> Float[ndarray, "..."]:
        return np.asarray(sum(group.mean(axis=axis) for group in groups) / len(groups))

    return bca(groups, mean_of_means, seed)


def bca(
    groups: Sequence[ndarray], statistic: Callable[..., Float[ndarray, "..."]], seed: int
) -> Interval:
    """Return scipy's BCa interval of a statistic of groups that are resampled apart.

    Args:
        groups: The items of each.
        statistic: Takes the groups and `axis`, along which their items lie.
        seed: Seed of the redraws.
    """
    result = bootstrap(
        tuple(groups),
        statistic,
        n_resamples=N_RESAMPLES,
        vectorized=True,
        confidence_level=LEVEL,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(result.low), float(result.high)
