"""What a probe achieves on the code of two features, whose moment score `separability` gives."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from sklearn.linear_model import LogisticRegression

from lmmono.toy.separability import MONO, POLY

N_TRAIN, N_TEST = 200, 5_000


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
    found: list[TwoFeatureErrors] = []
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
        found += [
            TwoFeatureErrors(p, rate, *pair) for rate, pair in zip(label_noise, means, strict=True)
        ]
    return found


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
    probe = LogisticRegression(C=100.0).fit(train @ np.array(code)[:, None], labels)
    return float(probe.score(test @ np.array(code)[:, None], _labels(test)))
