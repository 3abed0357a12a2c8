"""Numbers with their intervals: documents are drawn again, not tokens, which hang together.

A measure here is a function of sums over documents. `Draws.totals` gives the sums of all documents
and of every redraw, so that a measure is written once, for all of them.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, UInt16
from numpy import ndarray
from scipy.stats import t as student_t

DRAWS_AT_ONCE = 64
"""Redraws whose weights are held in float64 together."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured number, its interval, and what it was measured on."""

    value: float
    """The number; NaN where it is not defined, and then `failure` says why."""
    low: float
    """Lower end of the interval; NaN where there is none."""
    high: float
    """Upper end of the interval; NaN where there is none."""
    level: float
    """Coverage that the interval aims at."""
    method: str
    """How the interval was made, and what was drawn again."""
    n: int
    """Items that the number is about."""
    n_tokens: int
    """Tokens that were looked at; 0 where the number is about weights alone."""
    n_documents: int
    """Documents that they come from."""
    nan_fraction: float = 0.0
    """Share of the items for which the number is not defined; they are left out."""
    failure: str | None = None
    """Why there is no number."""

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        if self.failure is not None:
            return f"undefined ({self.failure})"
        if math.isnan(self.low):
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def row(self) -> dict[str, object]:
        """Return the columns of table `scores` that say this; what is not defined is left empty."""
        numbers = {"value": self.value, "ci_low": self.low, "ci_high": self.high}
        return {
            **{name: None if math.isnan(value) else value for name, value in numbers.items()},
            "ci_level": self.level,
            "ci_method": self.method,
            "n": self.n,
            "n_tokens": self.n_tokens or None,
            "n_documents": self.n_documents or None,
            "nan_fraction": self.nan_fraction,
            "failure": self.failure,
        }


@dataclass(frozen=True)
class Draws:
    """Documents drawn with replacement, as often as there are: the same draws for every measure.

    Equal draws make intervals of several dictionaries on one set of documents paired.
    """

    n_documents: int
    n_tokens: int
    n_resamples: int
    seed: int
    level: float

    @property
    def method(self) -> str:
        """What goes into `ci_method`."""
        return f"percentile bootstrap over documents, {self.n_resamples} resamples"

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
        found = np.empty((1 + self.n_resamples, flat.shape[1]))
        found[0] = flat.sum(axis=0)
        for first in range(0, self.n_resamples, DRAWS_AT_ONCE):
            part = self._weights[first : first + DRAWS_AT_ONCE].astype(np.float64)
            found[1 + first : 1 + first + len(part)] = part @ flat
        return found.reshape(-1, *sums.shape[1:])

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
            tail = (1 - self.level) / 2
            low, high = (float(each) for each in np.quantile(drawn, [tail, 1 - tail]))
        count = self.n_tokens if n is None else n
        about = (self.level, self.method, count, self.n_tokens, self.n_documents)
        return Estimate(value, low, high, *about, nan_fraction, failure)


def ratio(above: Float[ndarray, "*n"], below: Float[ndarray, "*n"]) -> Float[ndarray, "*n"]:
    """Return above / below; NaN where `below` is not positive.

    >>> ratio(np.array([1.0, 1.0]), np.array([2.0, 0.0]))
    array([0.5, nan])
    """
    positive = below > 0
    return np.where(positive, above / np.where(positive, below, 1.0), np.nan)


def jackknife(value: float, left_out: Float[ndarray, " n"], level: float) -> tuple[float, float]:
    """Return the interval of a value from those with one item left out each (Student's t).

    Efron and Stein 1981: the variance is not too small on average.

    Raises:
        AssertionError: There are fewer than two items.
    """
    n = len(left_out)
    assert n > 1, n
    variance = (n - 1) / n * float(np.square(left_out - left_out.mean()).sum())
    half = float(student_t.ppf((1 + level) / 2, n - 1)) * math.sqrt(variance)
    return value - half, value + half
