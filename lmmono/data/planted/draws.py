"""Seeded choices that keep account: what each cost in nats is the source's own entropy."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import exp, log
from typing import Generic, TypeVar

import numpy as np

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Choice(Generic[Item]):
    """Items with the probabilities of being chosen."""

    items: tuple[Item, ...]
    """What can be chosen."""
    upper: tuple[float, ...]
    """Cumulated probability up to and with each item; the last is 1."""
    nats: tuple[float, ...]
    """-log probability of each item."""


def weighted(items: Sequence[Item], weights: Sequence[float] | None = None) -> Choice[Item]:
    """Return a choice with probabilities in proportion to the weights; equal ones by default."""
    weights = weights or [1.0] * len(items)
    total = sum(weights)
    upper = [part / total for part in accumulate(weights)]
    nats = [-log(weight / total) for weight in weights]
    return Choice(tuple(items), (*upper[:-1], 1.0), tuple(nats))


def zipf(items: Sequence[Item], rng: np.random.Generator, exponent: float = 1.0) -> Choice[Item]:
    """Return a choice with weight 1 / rank^exponent, the ranks drawn by the seeded generator."""
    ranks = rng.permutation(len(items)) + 1
    return weighted(items, [float(rank) ** -exponent for rank in ranks])


def mixed(first: Choice[Item], second: Choice[Item], second_share: float) -> Choice[Item]:
    """Return the choice that takes from `second` with the given probability, else from `first`."""
    weights = [
        share * exp(-nats)
        for choice, share in ((first, 1.0 - second_share), (second, second_share))
        for nats in choice.nats
    ]
    return weighted(first.items + second.items, weights)


class Draws:
    """The choices of one document, from numbers of its own seed."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.nats = 0.0
        """-log probability of all choices so far."""
        self._numbers = _uniform(rng)

    def pick(self, choice: Choice[Item]) -> Item:
        """Return one item of a choice."""
        i = bisect_right(choice.upper, next(self._numbers))
        self.nats += choice.nats[i]
        return choice.items[i]

    def chance(self, probability: float) -> bool:
        """Return True with the probability."""
        happens = next(self._numbers) < probability
        if 0.0 < probability < 1.0:
            self.nats -= log(probability if happens else 1.0 - probability)
        return happens


def _uniform(rng: np.random.Generator) -> Iterator[float]:
    while True:
        yield from rng.random(512).tolist()  # one call of numpy per document, not per choice
