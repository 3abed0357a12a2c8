"""Is a mean difference more than chance: sign flips, Holm's correction, and an effect with both.

Differences are grouped by task. Seeds of one task are repetitions of that task: they are resampled
within it, and the mean is over the tasks at hand, not over tasks that might have been.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import permutation_test

from lmmono.stats.bootstrap import N_RESAMPLES, bca_interval
from lmmono.stats.intervals import student_interval

FEW_SEEDS = 20
"""With fewer seeds of a task the interval is Student's t: BCa covered 0.87 to 0.91 at n = 10."""


@dataclass(frozen=True, slots=True)
class Effect:
    """A mean difference with its interval and p."""

    value: float
    """Mean over tasks of the mean over seeds."""
    ci_low: float
    """Lower end of the 95 % interval; NaN where there is none."""
    ci_high: float
    """Upper end."""
    p: float
    """Two-sided, of flipping the signs of differences."""
    least_p: float
    """The least p that so many seeds can give; above 0.05, no result can be significant."""
    n_seeds: int
    """Differences, over all tasks."""
    n_tasks: int
    """Tasks."""
    ci_method: str
    """How the interval was made."""

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.ci_low:+.4f}, {self.ci_high:+.4f}], p = {self.p:.3g}"


def effect(by_task: Sequence[Float[ndarray, " _"]], *, seed: int = 0) -> Effect:
    """Return the mean difference with its interval over seeds within tasks, and sign-flip p.

    The interval is Student's t below `FEW_SEEDS` seeds of a task, and the BCa bootstrap above. p
    flips the signs of single differences, all 2^n ways where these are at most 10,000 and as many
    random ways otherwise. Tasks of a single seed are resampled themselves.

    Args:
        by_task: Differences of each task, one per seed.
        seed: Seed of the resampling.
    """
    assert by_task and all(len(each) for each in by_task)
    n, weights = sum(map(len, by_task)), [len(by_task) * len(each) for each in by_task]
    shares = np.concatenate([d / w for d, w in zip(by_task, weights, strict=True)])
    groups = by_task if min(map(len, by_task)) > 1 else [shares * n]
    low, high, method = _interval(groups, seed)
    return Effect(
        float(shares.sum()),
        low,
        high,
        sign_flip_p(shares, seed=seed),
        min(1.0, 2.0 ** (1 - n)),
        n,
        len(by_task),
        method,
    )


def _interval(groups: Sequence[Float[ndarray, " _"]], seed: int) -> tuple[float, float, str]:
    """Return both ends and the method; groups are resampled apart and count alike."""
    n = min(map(len, groups))
    if n < 2:
        return math.nan, math.nan, "none: one seed"
    if n < FEW_SEEDS:
        return *student_interval(groups)[1:], f"Student t over seeds within tasks ({n} of a task)"
    return *bca_interval(groups, seed), "BCa bootstrap over seeds within tasks"


def sign_flip_p(shares: Float[ndarray, " pairs"], *, seed: int = 0) -> float:
    """Return the two-sided p of a sum whose terms are as likely positive as negative.

    >>> sign_flip_p(np.array([1.0, 2.0, 3.0]))  # 2 of the 8 sign patterns sum to 6 or -6
    0.25
    """
    if len(shares) < 2 or not shares.any():
        return 1.0
    result = permutation_test(
        (shares,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=N_RESAMPLES,
        batch=2_000,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Return p corrected for testing all at once (Holm 1979); NaN stays and does not count.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    corrected, largest = list(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def win_rate(differences: Float[ndarray, " pairs"]) -> float:
    """Return the share of differences above 0, ties by half.

    >>> win_rate(np.array([0.2, 0.0, -0.1, 0.3]))
    0.625
    """
    return float(np.mean((np.sign(differences) + 1) / 2))
