"""Intervals over seeds and the test texts that they share: by hand, and their coverage."""

import numpy as np
import pytest

from lmmono.stats.intervals import student_interval
from lmmono.stats.two_way import two_way_mean
from lmmono.studies.comparisons import compare_families
from lmmono.suites.bench import packed
from lmmono.suites.results import Result, severity_changes


def test_the_mean_squares_are_those_of_the_textbook():
    x = np.array([[1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]])
    found = two_way_mean([x])
    ms_seeds, ms_items, ms_rest = 1 / 8, 11 / 24, 1 / 8
    error = np.sqrt((ms_seeds + ms_items - ms_rest) / 8)
    freedom = (11 / 24) ** 2 / (ms_seeds**2 / 1 + ms_items**2 / 3 + ms_rest**2 / 3)
    from scipy.stats import t

    half = t.ppf(0.975, freedom) * error
    assert (found.mean, found.ci_low) == pytest.approx((0.625, 0.625 - half))
    assert found.p == pytest.approx(2 * t.sf(0.625 / error, freedom))


def simulated(rng: np.random.Generator, n_seeds: int, n_items: int) -> np.ndarray:
    """Return differences of two codes that are equal on average over all texts and trainings."""
    seed, item = rng.normal(0, 0.02, n_seeds), rng.normal(0, 0.3, n_items)
    return seed[:, None] + item + rng.normal(0, 0.4, (n_seeds, n_items))


@pytest.mark.parametrize(("n_seeds", "n_items"), [(10, 200), (3, 1000), (10, 40)])
def test_two_equal_codes_are_covered_and_seeds_alone_do_not_cover_them(n_seeds, n_items):
    rng, n, both, alone = np.random.default_rng(0), 600, 0, 0
    for _ in range(n):
        x = simulated(rng, n_seeds, n_items)
        found = two_way_mean([x])
        both += found.ci_low <= 0 <= found.ci_high
        _, low, high = student_interval([x.mean(axis=1)])
        alone += low <= 0 <= high
    assert 0.93 <= both / n <= 0.985
    if n_items <= 200 and n_seeds == 10:
        assert alone / n < 0.9


def test_tasks_are_fixed_and_their_variances_add():
    rng, n, inside = np.random.default_rng(1), 400, 0
    for _ in range(n):
        tasks = [simulated(rng, 5, size) + shift for size, shift in ((100, 0.5), (300, -0.1))]
        found = two_way_mean(tasks)
        inside += found.ci_low <= 0.2 <= found.ci_high
    assert 0.93 <= inside / n <= 0.985


def rows_of(feature: str, right: np.ndarray, level: float) -> list[Result]:
    """Return rows of a family whose right texts are known, one per seed."""
    about = ("noisy_inputs", "topic", feature, "typos", level, "logistic", None, "accuracy", "test")
    return [
        Result(*about, seed, float(of.mean()), len(of), None, {"right": packed(of)})
        for seed, of in enumerate(right)
    ]


def test_rows_that_say_which_texts_are_right_get_intervals_over_both():
    rng = np.random.default_rng(2)
    a, b = rng.random((2, 6, 37)) < 0.7
    rows = [*rows_of("raw", b, 1.0), *rows_of("sae", a, 1.0)]
    assert np.array_equal(rows[0].items, b[0])
    (found,) = compare_families(rows, "raw")
    want = two_way_mean([a.astype(float) - b.astype(float)])
    assert found.effect.value == pytest.approx(want.mean)
    assert (found.effect.ci_low, found.effect.p) == pytest.approx((want.ci_low, want.p))
    assert "two-way over seeds and test texts" in found.effect.ci_method

    clean = rng.random((6, 37)) < 0.9
    changes = severity_changes([*rows_of("sae", clean, 0.0), *rows_of("sae", a, 1.0)])
    # one level: the area is the mean of both ends
    wanted = (clean.astype(float) + a) / 2 - clean
    assert [row.value for row in changes] == pytest.approx(wanted.mean(axis=1).tolist())
    np.testing.assert_allclose([row.items for row in changes], wanted)
