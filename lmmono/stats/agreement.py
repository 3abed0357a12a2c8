"""How well a predicted series agrees with a true one, from sums per record.

All formulas work on sums over tokens, so that leaving records out or drawing them again costs an
addition. The series of a unit is all tokens of all its records, one after the other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy.stats import rankdata

NO_VARIATION = 1e-10
"""A series whose variance is below this share of its mean square is constant."""

Sums = Float[ndarray, "*batch sums"]
"""n, t, p, tt, pp, tp, |t - p|, |t|, and of ranks: t, p, tt, pp, tp."""


def record_sums(
    truth: Float[ndarray, "units records window"],
    predicted: Float[ndarray, "units records window"],
    present: Bool[ndarray, "units records window"],
) -> Float[ndarray, "units records sums"]:
    """Return the sums of each record over the tokens that are there.

    Ranks are average ranks over all tokens of the unit that are there.
    """
    t = np.where(present, truth, 0.0).astype(np.float64)
    p = np.where(present, predicted, 0.0).astype(np.float64)
    parts = [present.astype(np.float64), t, p, t * t, p * p, t * p, np.abs(t - p), np.abs(t)]
    sums = [part.sum(axis=-1) for part in parts]
    rank_t, rank_p = _ranked(t, present), _ranked(p, present)
    pairs = ((rank_t, None), (rank_p, None), (rank_t, rank_t), (rank_p, rank_p), (rank_t, rank_p))
    sums += [(a if b is None else a * b).sum(axis=-1) for a, b in pairs]
    return np.stack(sums, axis=-1)


def _ranked(values: ndarray, present: ndarray) -> Float[ndarray, "units records window"]:
    """Return the average rank of each value among those there, minus the mean rank; 0 elsewhere."""
    shape = (len(values), values[0].size if len(values) else 0)
    is_there = present.reshape(shape)
    # what is not there ranks after everything that is
    ranks = rankdata(np.where(is_there, values.reshape(shape), np.inf), axis=1)
    middle = (is_there.sum(axis=1, keepdims=True) + 1) / 2
    return np.where(is_there, ranks - middle, 0.0).reshape(values.shape)


def pearson(sums: Sums) -> Float[ndarray, "*batch"]:
    """Return Pearson's correlation over all tokens; NaN where a series is constant.

    OpenAI's `ev_correlation_score`, Bills et al. 2023.
    """
    return _correlation(*(sums[..., i] for i in (0, 1, 2, 3, 4, 5)))


def spearman(sums: Sums) -> Float[ndarray, "*batch"]:
    """Return Spearman's correlation; NaN where a series is constant.

    Ranks are those among all records; where some are left out they are not taken anew.
    """
    return _correlation(*(sums[..., i] for i in (0, 8, 9, 10, 11, 12)))


def centred_r2(sums: Sums) -> Float[ndarray, "*batch"]:
    """Return 1 - sum(t - p)^2 / sum(t - mean t)^2; NaN where the truth is constant."""
    n, t, tt = sums[..., 0], sums[..., 1], sums[..., 3]
    variation = tt - t * t / np.maximum(n, 1)
    return _one_minus(_squared_error(sums), variation, variation > NO_VARIATION * tt)


def uncentred_r2(sums: Sums) -> Float[ndarray, "*batch"]:
    """Return 1 - mean(t - p)^2 / mean t^2; NaN where the truth is silent.

    OpenAI's `rsquared_score`; no mean is subtracted.
    """
    return _one_minus(_squared_error(sums), sums[..., 3], sums[..., 3] > 0)


def deviation_explained(sums: Sums) -> Float[ndarray, "*batch"]:
    """Return 1 - mean|t - p| / mean|t|; NaN where the truth is silent.

    OpenAI's `absolute_dev_explained_score`.
    """
    return _one_minus(sums[..., 6], sums[..., 7], sums[..., 7] > 1e-30)


def _squared_error(sums: Sums) -> Float[ndarray, "*batch"]:
    return np.maximum(sums[..., 3] + sums[..., 4] - 2 * sums[..., 5], 0.0)


def _one_minus(error: ndarray, variation: ndarray, defined: ndarray) -> ndarray:
    return np.where(defined, 1 - error / np.where(defined, variation, 1.0), np.nan)


def _correlation(
    n: ndarray, t: ndarray, p: ndarray, tt: ndarray, pp: ndarray, tp: ndarray
) -> ndarray:
    n = np.maximum(n, 1)
    var_t, var_p = tt - t * t / n, pp - p * p / n
    defined = (var_t > NO_VARIATION * tt) & (var_p > NO_VARIATION * pp)
    scale = np.sqrt(np.where(defined, var_t * var_p, 1.0))
    return np.where(defined, np.clip((tp - t * p / n) / scale, -1, 1), np.nan)


@dataclass(frozen=True, slots=True)
class Agreement:
    """One measure of agreement."""

    of: Callable[[Sums], ndarray]
    """Value from sums; NaN where it is not defined."""
    scale: Literal["correlation", "explained"]
    """Correlations lie in [-1, 1]; explained shares are at most 1, without a lower bound."""

    def straight(self, value: ndarray) -> ndarray:
        """Return the value on the scale where its error is even: Fisher's z, or -log(1 - x)."""
        # a perfect value has no finite place on either scale
        if self.scale == "correlation":
            return np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12))
        return -np.log(np.maximum(1 - value, 1e-12))

    def back(self, value: ndarray) -> ndarray:
        """Undo `straight`."""
        return np.tanh(value) if self.scale == "correlation" else 1 - np.exp(-value)


AGREEMENTS: dict[str, Agreement] = {
    "pearson": Agreement(pearson, "correlation"),
    "spearman": Agreement(spearman, "correlation"),
    "r2": Agreement(centred_r2, "explained"),
    "uncentred_r2": Agreement(uncentred_r2, "explained"),
    "deviation": Agreement(deviation_explained, "explained"),
}
"""Measures by the last part of their metric's name; the first is the headline."""
