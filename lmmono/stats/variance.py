"""Which choice moves a score: shares of its variance by crossed and nested factors.

One value for each combination of levels, such as corpus half x record draw x explainer x model.
Random effects without interactions: the variance of a value is the sum of a component for each
factor and one for what is left. In a balanced design with N values and L levels of a factor the
mean squares have the expectations (Searle, Casella and McCulloch 1992, chapter 4)

    E MS(factor) = residual + N / L component,         E MS(residual) = residual

and, for seeds nested in architectures, E MS(seed) = residual + N / L_seed seed and
E MS(architecture) = residual + N / L_seed seed + N / L_arch architecture. Estimates below 0 count
as 0. Intervals are generalised ones (Weerahandi 1995): mean squares over their chi-squares are
drawn again, and the shares made of them anew; few levels give wide intervals, as they should.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from lmmono.errors import ExplainError
from lmmono.stats.estimate import LEVEL

N_PIVOTS = 20_000
"""Draws of an interval: its ends move by about 1 % of a share between seeds."""

RESIDUAL = "interactions and the rest"


@dataclass(frozen=True, slots=True)
class Component:
    """What one factor adds to the variance of a score."""

    name: str
    """The factor."""
    n_levels: int
    """Levels of the factor that were measured."""
    variance: float
    """Its component, in squared units of the score; 0 where the estimate is below."""
    share: float
    """Of the sum of all components, 0 to 1."""
    share_low: float
    """Lower end of the 95 % interval of the share."""
    share_high: float
    """Upper end."""


def components(
    values: Float[ndarray, "*levels"],
    factors: Sequence[str],
    *,
    nested: Mapping[str, str] | None = None,
    seed: int = 0,
) -> tuple[Component, ...]:
    """Return the components of a balanced design, in the order of the factors, the rest last.

    Args:
        values: One value for each combination; an axis per factor.
        factors: Name of each axis.
        nested: Factors whose levels are others within each level of another one, as
            `{"training seed": "architecture"}`; each outer factor holds one.
        seed: Seed of the intervals.

    Raises:
        ExplainError: A factor with one level, or a value that is missing.

    >>> x = np.array([[1.0, 1.0], [3.0, 3.0]])
    >>> [round(part.share, 2) for part in components(x, ("a", "b"))]
    [1.0, 0.0, 0.0]
    """
    nested = dict(nested or {})
    if values.ndim != len(factors) or min(values.shape) < 2:
        shape = dict(zip(factors, values.shape, strict=False))
        raise ExplainError(f"components of variance want two or more levels of each, got {shape}")
    if not np.isfinite(values).all():
        raise ExplainError("components of variance want a value for every combination")
    n, grand = values.size, values.mean()
    axis = {name: i for i, name in enumerate(factors)}
    squares: dict[str, float] = {}
    freedom: dict[str, int] = {}
    per: dict[str, float] = {}  # values behind each mean
    for name in factors:
        kept = [axis[name]] + ([axis[nested[name]]] if name in nested else [])
        means = values.mean(axis=tuple(i for i in range(values.ndim) if i not in kept))
        around = np.asarray(grand)
        if name in nested:
            around = means.mean(axis=sorted(kept).index(axis[name]), keepdims=True)
        per[name] = n / means.size
        squares[name] = per[name] * float(np.square(means - around).sum())
        freedom[name] = means.size - around.size
    squares[RESIDUAL] = max(float(np.square(values - grand).sum()) - sum(squares.values()), 0.0)
    freedom[RESIDUAL] = n - 1 - sum(freedom.values())
    if freedom[RESIDUAL] < 1:
        raise ExplainError("components of variance want more combinations than factors have levels")
    inner = {outer: name for name, outer in nested.items()}

    def solved(mean_squares: Mapping[str, ndarray]) -> Float[ndarray, "parts draws"]:
        """Return the components of mean squares."""
        below = {name: mean_squares[inner.get(name, RESIDUAL)] for name in factors}
        parts = [(mean_squares[name] - below[name]) / per[name] for name in factors]
        return np.maximum(np.stack([*parts, mean_squares[RESIDUAL]]), 0.0)

    names = (*factors, RESIDUAL)
    estimates = solved({name: np.array([squares[name] / freedom[name]]) for name in names})[:, 0]
    rng = np.random.default_rng(seed)
    drawn = solved({name: squares[name] / rng.chisquare(freedom[name], N_PIVOTS) for name in names})
    total = drawn.sum(axis=0)
    shares = drawn / np.where(total > 0, total, 1.0)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(shares, [tail, 1 - tail], axis=1)
    whole = estimates.sum()
    levels = {name: values.shape[axis[name]] for name in factors} | {RESIDUAL: freedom[RESIDUAL]}
    return tuple(
        Component(
            name,
            levels[name],
            float(part),
            float(part / whole) if whole > 0 else 0.0,
            float(low[i]),
            float(high[i]),
        )  # fmt: skip
        for i, (name, part) in enumerate(zip(names, estimates, strict=True))
    )
