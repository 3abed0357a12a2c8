"""The moment score of a code next to what a probe on it gets wrong: Fisher ratios of classes.

For one number the ratio is J = (m1 - m0)^2 / (V1 + V0) of the class means and variances. Theory of
monosemantic codes (arXiv 2410.21331, section 4.3) speaks of such moments, not of errors; the two
can order codes differently, see `two_feature_ratio` with ties.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

Ties = Literal["dropped", "negative"]

MONO, POLY = (1.0, 0.0), (1.0, -1.0)
"""Weights of the paper's two codes of two features: x1 and x1 - x2."""


def noisy_ratio(ratio: float, label_noise: float) -> float:
    """Return J after balanced symmetric label noise: (1 - 2 eta)^2 J / (1 + 2 eta (1 - eta) J).

    Mixing the classes moves the means together and the variances apart. The result grows with J
    whatever eta < 1/2, so label noise of this kind never changes which of two codes has more.

    >>> noisy_ratio(4.0, 0.0), noisy_ratio(4.0, 0.5)
    (4.0, 0.0)
    """
    return (1 - 2 * label_noise) ** 2 * ratio / (1 + 2 * label_noise * (1 - label_noise) * ratio)


def two_feature_ratio(
    p: float,
    weights: tuple[float, float],
    *,
    input_noise: float = 0.0,
    label_noise: float = 0.0,
    ties: Ties = "dropped",
) -> float:
    """Return J of the code w1 x1 + w2 x2 for y = [x1 > x2], in closed form.

    x_i is uniform on [0, 1] with probability p and else 0.

    Args:
        p: Probability that a feature is there.
        weights: Those of the code.
        input_noise: Standard deviation of Gaussian noise on each x_i.
        label_noise: Share of labels flipped; wants balanced classes, which dropped ties give.
        ties: What becomes of samples with neither feature: `dropped`, or `negative`, y = 0.
    """
    assert ties == "dropped" or not label_noise, "the classes are not balanced"
    both, one, none = p * p / 2, p * (1 - p), (1 - p) ** 2
    # moments x1, x2, x1^2, x2^2, x1 x2 where x1 > x2: of both features, of one, of none
    apart = [np.array([2 / 3, 1 / 3, 1 / 2, 1 / 6, 1 / 4]), np.array([1 / 2, 0, 1 / 3, 0, 0])]
    swap = [1, 0, 3, 2, 4]
    above = (both * apart[0] + one * apart[1]) / (both + one)
    tied = none if ties == "negative" else 0.0
    below = (both * apart[0][swap] + one * apart[1][swap]) / (both + one + tied)
    (m1, v1), (m0, v0) = (_code_moments(part, weights) for part in (above, below))
    noise = 2 * input_noise**2 * (weights[0] ** 2 + weights[1] ** 2)
    return noisy_ratio(float((m1 - m0) ** 2 / (v1 + v0 + noise)), label_noise)


def _code_moments(
    moments: Float[ndarray, "5"], weights: tuple[float, float]
) -> tuple[float, float]:
    """Return mean and variance of a weighted sum from x1, x2, x1^2, x2^2, x1 x2."""
    a, b = weights
    mean = a * moments[0] + b * moments[1]
    square = a * a * moments[2] + b * b * moments[3] + 2 * a * b * moments[4]
    return float(mean), float(square - mean**2)


def mean_ratio(code: Float[ndarray, "n d"], labels: Int[ndarray, " n"], n_classes: int) -> float:
    """Return the mean over classes of J of each class against the rest, in its best direction.

    In d dimensions the best direction has J = delta' (S1 + S0)^-1 delta, delta the difference of
    means and S the covariances. Classes with fewer than 2 samples are left out.
    """
    ratios: list[float] = []
    whole, square = code.sum(axis=0), code.T @ code
    for label in range(n_classes):
        members = code[labels == label]
        if len(members) < 2 or len(members) > len(code) - 2:
            continue
        total, outer, n = members.sum(axis=0), members.T @ members, len(members)
        rest = len(code) - n
        delta = total / n - (whole - total) / rest
        spread = _covariance(total, outer, n) + _covariance(whole - total, square - outer, rest)
        # a direction that never varies is of no use to a probe either
        ratios.append(float(delta @ np.linalg.pinv(spread, hermitian=True) @ delta))
    return float(np.mean(ratios)) if ratios else float("nan")


def _covariance(
    total: Float[ndarray, " d"], outer: Float[ndarray, "d d"], n: int
) -> Float[ndarray, "d d"]:
    mean = total / n
    return outer / n - np.outer(mean, mean)


N_TRAIN, N_TEST = 200, 5_000
"""Samples of a draw of `two_feature_errors`."""


@dataclass(frozen=True, slots=True)
class TwoFeatureErrors:
    """Accuracy on clean labels of probes that learned from noisy ones, mean over draws."""

    p: float
    """Probability that a feature is there."""
    label_noise: float
    """Share of training labels flipped."""
    mono: float
    """Of a probe on x1."""
    poly: float
    """Of a probe on x1 - x2."""


def two_feature_errors(
    probabilities: Sequence[float], label_noise: Sequence[float], *, draws: int = 50, seed: int = 0
) -> list[TwoFeatureErrors]:
    """Return the accuracy of both codes at every p and rate; both meet the same draws.

    Args:
        probabilities: Probabilities that a feature is there; samples with neither are dropped.
        label_noise: Shares of exactly so many of 200 training labels flipped.
        draws: Training and test sets per p.
        seed: Seed of them.
    """
    errors: list[TwoFeatureErrors] = []
    for p in probabilities:
        right = np.zeros((draws, len(label_noise), 2))
        for draw in range(draws):
            rng = np.random.default_rng((seed, draw))
            train, test = _samples(p, N_TRAIN, rng), _samples(p, N_TEST, rng)
            order = rng.permutation(N_TRAIN)
            for i, rate in enumerate(label_noise):
                labels = _labels(train)
                labels[order[: round(rate * N_TRAIN)]] ^= 1
                right[draw, i] = [_accuracy(train, labels, test, code) for code in (MONO, POLY)]
        means = right.mean(axis=0).tolist()
        errors += [
            TwoFeatureErrors(p, rate, *pair) for rate, pair in zip(label_noise, means, strict=True)
        ]
    return errors


def _samples(p: float, n: int, rng: np.random.Generator) -> Float[ndarray, "n 2"]:
    """Return samples with at least one of the features."""
    x = np.zeros((n, 2))
    while (empty := ~x.any(axis=1)).any():
        shape = (int(empty.sum()), 2)
        x[empty] = rng.random(shape) * (rng.random(shape) < p)
    return x


def _labels(x: Float[ndarray, "n 2"]) -> Int[ndarray, " n"]:
    return (x[:, 0] > x[:, 1]).astype(np.int64)


def _accuracy(
    train: Float[ndarray, "n 2"],
    labels: Int[ndarray, " n"],
    test: Float[ndarray, "m 2"],
    code: tuple[float, float],
) -> float:
    """Return the share of test samples that a one-dimensional logistic probe gets right."""
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(C=100.0).fit(train @ np.array(code)[:, None], labels)
    return float(probe.score(test @ np.array(code)[:, None], _labels(test)))
