"""Components of variance against simulations with known components, and by hand."""

import numpy as np
import pytest

from lmmono.errors import ExplainError
from lmmono.stats.variance import components

FACTORS = ("architecture", "training seed", "record draw", "explainer")
NESTED = {"training seed": "architecture"}
TRUE = np.array([1.0, 0.5, 0.25, 2.0, 0.25])  # the last is what is left


def simulated(rng, shape=(4, 5, 6, 4)):
    sizes = np.sqrt(TRUE)
    a, s, d, e = shape
    return (
        sizes[0] * rng.normal(size=(a, 1, 1, 1))
        + sizes[1] * rng.normal(size=(a, s, 1, 1))  # other seeds in each architecture
        + sizes[2] * rng.normal(size=(1, 1, d, 1))
        + sizes[3] * rng.normal(size=(1, 1, 1, e))
        + sizes[4] * rng.normal(size=shape)
    )


def test_components_come_out_on_average_and_their_shares_are_covered():
    rng = np.random.default_rng(0)
    found = [components(simulated(rng), FACTORS, nested=NESTED, seed=i) for i in range(120)]
    variances = np.array([[part.variance for part in one] for one in found])
    error = variances.std(axis=0) / np.sqrt(len(found))
    # estimates below 0 count as 0, which lifts small ones a little
    assert (np.abs(variances.mean(axis=0) - TRUE) < 3 * error + 0.05).all()
    shares = TRUE / TRUE.sum()
    inside = [
        [
            part.share_low <= share <= part.share_high
            for part, share in zip(one, shares, strict=True)
        ]
        for one in found
    ]
    assert (np.mean(inside, axis=0) >= 0.88).all()
    assert np.allclose([sum(part.share for part in one) for one in found], 1.0)


def test_two_crossed_factors_are_those_of_the_textbook():
    x = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 9.0]])
    rows, columns = x.mean(axis=1), x.mean(axis=0)
    residual = x - rows[:, None] - columns + x.mean()
    rest = np.square(residual).sum() / 2
    of_rows = (3 * np.square(rows - x.mean()).sum() / 1 - rest) / 3
    of_columns = (2 * np.square(columns - x.mean()).sum() / 2 - rest) / 2
    found = components(x, ("rows", "columns"))
    assert [part.variance for part in found] == pytest.approx([of_rows, of_columns, rest])


def test_a_factor_of_one_level_and_a_missing_value_are_refused():
    with pytest.raises(ExplainError, match="two or more levels of each, got {'a': 2, 'b': 1}"):
        components(np.ones((2, 1)), ("a", "b"))
    with pytest.raises(ExplainError, match="a value for every combination"):
        components(np.array([[1.0, np.nan], [1.0, 2.0]]), ("a", "b"))
