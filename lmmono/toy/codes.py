"""Tied auto-encoders x -> ReLU(W'W x + b) of sparse features: the codes of the toy study.

Elhage et al. 2022 (transformer-circuits.pub/2022/toy_model): with dense features W keeps d of them
apart, with sparse ones it packs more than d into superposition.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

RATE, BATCH = 5e-3, 128
"""Adam's rate, falling to 0 so that features settle, and samples per step."""


@dataclass(frozen=True, slots=True)
class ToyData:
    """Features x_i that are uniform on [0, 1] with probability p and else 0."""

    p: float = 0.05
    """Probability that a feature is there."""
    n_features: int = 40
    """Features."""

    @property
    def spread(self) -> float:
        """Standard deviation of one feature."""
        return float(np.sqrt(self.p / 3 - self.p**2 / 4))

    def draw(self, n: int, rng: np.random.Generator) -> Float[ndarray, "n features"]:
        """Return samples, each with some feature: without one, none is the largest."""
        x = self._draw(n, rng)
        while (empty := ~x.any(axis=1)).any():
            x[empty] = self._draw(int(empty.sum()), rng)
        return x

    def _draw(self, n: int, rng: np.random.Generator) -> Float[ndarray, "n features"]:
        shape = (n, self.n_features)
        return rng.random(shape) * (rng.random(shape) < self.p)


def axes(d: int, n_features: int) -> Float[ndarray, "d features"]:
    """Return the code by hand: the first d features on an axis each, the others nowhere."""
    return np.eye(d, n_features)


def random_code(d: int, n_features: int, seed: int) -> Float[ndarray, "d features"]:
    """Return features in random directions, with the energy of `axes`."""
    random = np.random.default_rng((seed, 3))  # 3: a stream of its own
    return scaled(random.standard_normal((d, n_features)))


def scaled(weight: Float[ndarray, "d features"]) -> Float[ndarray, "d features"]:
    """Return an encoder with the energy |W|_F^2 = d of `axes`.

    Noise on x then has the same energy in every code.
    """
    return weight * np.sqrt(len(weight) / np.square(weight).sum())


def trained(
    data: ToyData, d: int, seeds: Sequence[int], *, steps: int, importance: float = 1.0
) -> list[Float[ndarray, "d features"]]:
    """Return the encoder learned with each seed, all at once, scaled.

    Args:
        data: What is reconstructed; empty samples count too.
        d: Dimensions of the code.
        seeds: One per encoder; they draw its start and its samples.
        steps: Steps of Adam.
        importance: Feature i weighs importance^i in the loss.
    """
    n = data.n_features
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    first = [torch.randn(d, n, generator=draw) / n**0.5 for draw in draws]
    weight = torch.stack(first).requires_grad_()
    bias = torch.zeros(len(seeds), 1, n, requires_grad=True)
    weights = importance ** torch.arange(n)
    optimizer = torch.optim.Adam([weight, bias], lr=RATE)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        x = torch.stack([_samples(data, draw) for draw in draws])
        back = torch.relu(x @ weight.mT @ weight + bias)
        loss = (weights * (x - back) ** 2).sum(dim=-1).mean(dim=-1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [scaled(encoder.double().numpy()) for encoder in weight.detach()]


def _samples(data: ToyData, draw: torch.Generator) -> Float[Tensor, "batch features"]:
    shape = (BATCH, data.n_features)
    return torch.rand(shape, generator=draw) * (torch.rand(shape, generator=draw) < data.p)


def dimensionality(weight: Float[ndarray, "d features"]) -> Float[ndarray, " features"]:
    """Return the share of a dimension that each feature has for itself.

    D_i = |w_i|^4 / sum_j (w_i . w_j)^2, 0 for a feature that is nowhere. 1 is a feature alone.

    >>> dimensionality(np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]]))
    array([0.5, 0.5, 1. ])
    """
    gram = weight.T @ weight
    square = np.square(np.diag(gram))
    # a feature without a direction has none: else 0 / 0
    return np.where(square > 1e-12, square / np.maximum(np.square(gram).sum(axis=1), 1e-12), 0.0)
