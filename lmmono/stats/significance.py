"""Is a mean difference more than chance: sign flips, Holm's correction, and an effect with both.

Differences are grouped by task. Seeds of one task are repetitions of that task: they are resampled
within it, and the mean is over the tasks at hand, not over tasks that might have been.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import permutation_test, ttest_1samp

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
    assert by_task and all(map(len, by_task))
    n, weights = sum(map(len, by_task)), [len(by_task) * len(d) for d in by_task]
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


@dataclass(frozen=True, slots=True)
class MeanTest:
    """A mean over training seeds: its interval, and whether it is nothing."""

    mean: float
    """Mean of the differences that there are; NaN where there is none."""
    ci_low: float
    """Lower end of the 95 % interval, Student's t; NaN below two seeds."""
    ci_high: float
    """Upper end."""
    p: float
    """Two-sided p of a mean of 0."""
    p_equivalent: float
    """p of a mean beyond the bound: the larger of two one-sided tests (Schuirmann 1987)."""
    n: int
    """Seeds."""

    def __str__(self) -> str:
        ends = "" if math.isnan(self.ci_low) else f" [{self.ci_low:+.3f}, {self.ci_high:+.3f}]"
        return f"{self.mean:+.3f}{ends}"


def mean_test(values: Float[ndarray, " seeds"], bound: float) -> MeanTest:
    """Return Student's t-test of a mean of 0, and of one within a bound of 0.

    A sign flip over five seeds cannot come out below 1/16, so it is no test for them. Seeds without
    a difference (NaN) leave none: a mean of the others would be of other runs.

    >>> test = mean_test(np.array([0.1, 0.2, 0.3]), bound=0.5)
    >>> round(test.p, 4), round(test.p_equivalent, 4)  # t = 0.2 / 0.0577 and (0.2 - 0.5) / 0.0577
    (0.0742, 0.0175)
    """
    n = len(values)
    if not n or np.isnan(values).any():
        return MeanTest(math.nan, math.nan, math.nan, math.nan, math.nan, n)
    mean, low, high = student_interval([values])
    if n < 2:
        return MeanTest(mean, low, high, math.nan, math.nan, n)
    if np.ptp(values) == 0:  # without spread, as where nothing was random
        return MeanTest(mean, low, high, float(mean == 0), float(abs(mean) >= bound), n)
    zero: Any = ttest_1samp(values, 0.0)
    above: Any = ttest_1samp(values, -bound, alternative="greater")
    below: Any = ttest_1samp(values, bound, alternative="less")
    return MeanTest(mean, low, high, float(zero.pvalue), float(max(above.pvalue, below.pvalue)), n)


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
