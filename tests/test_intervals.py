"""Agreement from sums, and intervals that cover what they say."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr, t
from sklearn.metrics import r2_score

from lmmono.stats.agreement import AGREEMENTS, record_sums
from lmmono.stats.bootstrap import DocumentDraws
from lmmono.stats.intervals import leave_one_out, student_interval, unit_intervals, unit_method

TRUTH = np.array([[0.0, 2.0, 0.0, 4.0], [1.0, 0.0, 0.0, 3.0]])
PREDICTED = np.array([[1.0, 2.0, 0.0, 3.0], [0.0, 0.0, 1.0, 3.0]])


def agreement(name, truth, predicted, there=None):
    there = np.ones(truth.shape, bool) if there is None else there
    return AGREEMENTS[name].of(record_sums(truth[None], predicted[None], there[None]).sum(axis=1))[
        0
    ]


def test_openais_three_formulas_by_hand():
    # t = 0 2 0 4 1 0 0 3, p = 1 2 0 3 0 0 1 3: sum t = sum p = 10, sum t^2 = 30, sum p^2 = 24,
    # sum t p = 25, sum (t - p)^2 = 4, sum |t - p| = 4, over 8 tokens
    pearson = (25 - 100 / 8) / np.sqrt((30 - 100 / 8) * (24 - 100 / 8))
    assert agreement("pearson", TRUTH, PREDICTED) == pytest.approx(pearson)
    assert agreement("uncentred_r2", TRUTH, PREDICTED) == pytest.approx(1 - (4 / 8) / (30 / 8))
    assert agreement("deviation", TRUTH, PREDICTED) == pytest.approx(1 - (4 / 8) / (10 / 8))
    assert agreement("r2", TRUTH, PREDICTED) == pytest.approx(1 - 4 / (30 - 100 / 8))


def test_measures_are_those_of_scipy_and_scikit_learn_over_concatenated_tokens():
    rng = np.random.default_rng(0)
    truth = np.maximum(rng.normal(size=(40, 64)) - 1, 0)
    predicted = truth * rng.random((40, 64)) + np.round(rng.random((40, 64)), 1)
    there = rng.random((40, 64)) < 0.9
    a, b = truth[there], predicted[there]
    by_hand = {
        "pearson": pearsonr(a, b)[0],
        "spearman": spearmanr(a, b)[0],
        "r2": r2_score(a, b),
        "uncentred_r2": 1 - np.mean((a - b) ** 2) / np.mean(a**2),
        "deviation": 1 - np.mean(np.abs(a - b)) / np.mean(np.abs(a)),
    }
    for name, wanted in by_hand.items():
        assert agreement(name, truth, predicted, there) == pytest.approx(wanted, abs=1e-12), name
    of_records = [pearsonr(*pair)[0] for pair in zip(truth, predicted, strict=True)]
    assert abs(np.mean(of_records) - by_hand["pearson"]) > 0.005, "not the mean over records"


@pytest.mark.parametrize("name", AGREEMENTS)
def test_the_truth_agrees_with_itself_and_a_silent_truth_with_nothing(name):
    silent = np.zeros_like(TRUTH)
    assert agreement(name, TRUTH, TRUTH) == pytest.approx(1.0)
    assert np.isnan(agreement(name, silent, PREDICTED))


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, 1e6])
def test_a_constant_prediction_has_no_correlation(constant):
    for name in ("pearson", "spearman"):
        assert np.isnan(agreement(name, TRUTH, np.full_like(TRUTH, constant)))
        assert np.isnan(agreement(name, np.full_like(TRUTH, constant), PREDICTED))
    assert agreement("r2", TRUTH, np.full_like(TRUTH, TRUTH.mean())) == pytest.approx(0.0)


def test_what_is_left_without_a_record_is_the_value_of_the_others():
    rng = np.random.default_rng(1)
    truth, predicted = rng.random((1, 7, 9)), rng.random((1, 7, 9))
    left = leave_one_out(record_sums(truth, predicted, np.ones(truth.shape, bool)))
    for i in range(7):
        others = np.arange(7) != i
        wanted = pearsonr(truth[0, others].reshape(-1), predicted[0, others].reshape(-1))[0]
        assert AGREEMENTS["pearson"].of(left[0, i]) == pytest.approx(wanted)


def test_the_interval_of_one_kind_is_the_textbook_jackknife():
    rng = np.random.default_rng(2)
    truth = rng.random((1, 12, 20))
    predicted = truth + rng.random((1, 12, 20))
    sums = record_sums(truth, predicted, np.ones(truth.shape, bool))
    pearson = AGREEMENTS["pearson"]
    low, high = unit_intervals(sums, np.ones((1, 12), bool), np.zeros(12, int), pearson)
    z = np.arctanh(pearson.of(leave_one_out(sums))[0])
    error = np.sqrt(11 / 12 * np.square(z - z.mean()).sum())
    centre = np.arctanh(pearsonr(truth.reshape(-1), predicted.reshape(-1))[0])
    half = t.ppf(0.975, 11) * error
    assert (low[0], high[0]) == pytest.approx((np.tanh(centre - half), np.tanh(centre + half)))


def test_missing_records_and_single_ones_are_not_resampled():
    rng = np.random.default_rng(3)
    truth, predicted = rng.random((2, 6, 9)), rng.random((2, 6, 9))
    there = np.ones(truth.shape, bool)
    there[1, 4:] = False
    present, kinds = there.any(axis=2), np.array([0, 0, 0, 1, 1, 1])
    sums = record_sums(truth, predicted, there)
    low, high = unit_intervals(sums, present, kinds, AGREEMENTS["pearson"])
    assert np.isfinite([low[0], high[0]]).all()
    assert np.isnan([low[1], high[1]]).all(), "one record of a kind says nothing of its spread"
    both = unit_intervals(sums[:, :4], present[:, :4], kinds[:4] * 0, AGREEMENTS["pearson"])
    alone = unit_intervals(sums[1:, :4], present[1:, :4], kinds[:4] * 0, AGREEMENTS["pearson"])
    assert both[0][1] == alone[0][0]
    assert "approximate" not in unit_method(20, 10)
    assert "approximate: 19 records of a kind" in unit_method(19, 10)
    assert "9 fire" in unit_method(20, 9)


def planted(rng, n, n_top, n_random):
    """Records of a unit and a simulator that hears it in 70 of 100 records; see the benchmark."""
    n_records = n_top + n_random
    present = np.ones((n, n_records), bool)
    present[:, n_top:] = rng.random((n, n_random)) < 0.15
    spots = rng.random((n, n_records, 64)) < 0.08
    truth = spots * present[..., None] * rng.gamma(3, 1, spots.shape)
    heard = (rng.random((n, n_records)) < 0.7)[..., None]
    predicted = np.where(heard, truth * rng.gamma(4, 0.25, spots.shape), 0)
    false_alarm = (~present & (rng.random((n, n_records)) < 0.15))[..., None]
    predicted += false_alarm * (rng.random(spots.shape) < 0.08) * rng.gamma(3, 1, spots.shape)
    return record_sums(truth, predicted, np.ones(truth.shape, bool))


def test_intervals_of_twenty_and_twenty_records_cover_the_truth_in_90_to_98_of_100():
    rng = np.random.default_rng(0)
    pearson, spearman = AGREEMENTS["pearson"], AGREEMENTS["spearman"]
    many = planted(rng, 20, 1000, 1000).sum(axis=1)
    sums, kinds = planted(rng, 600, 20, 20), np.repeat([0, 1], 20)
    present = np.ones(sums.shape[:2], bool)
    for measure in (pearson, spearman):
        truth = measure.of(many).mean()
        low, high = unit_intervals(sums, present, kinds, measure)
        covered = ((low <= truth) & (truth <= high)).mean()
        assert 0.90 <= covered <= 0.98, covered
        assert 0.15 < np.median(high - low) < 0.40, "and is no wider than it must be"


def test_the_interval_of_a_mean_is_students_and_of_several_hooks_is_pooled():
    rng = np.random.default_rng(4)
    one, two = rng.normal(1, 1, 30), rng.normal(3, 2, 50)
    mean, low, high = student_interval([one])
    half = t.ppf(0.975, 29) * one.std(ddof=1) / np.sqrt(30)
    assert (mean, low, high) == pytest.approx((one.mean(), one.mean() - half, one.mean() + half))
    mean, low, high = student_interval([one, two])
    assert mean == pytest.approx((one.mean() + two.mean()) / 2)
    error = np.sqrt(one.var(ddof=1) / 30 + two.var(ddof=1) / 50) / 2
    assert high - low == pytest.approx(2 * t.ppf(0.975, 70) * error, rel=0.01)
    assert np.isnan(student_interval([one, two[:1]])[1])
    covered = 0
    for _ in range(400):
        _, low, high = student_interval([rng.exponential(1, 64), rng.exponential(2, 64)])
        covered += low <= 1.5 <= high
    assert 0.91 <= covered / 400 <= 0.98


def test_many_intervals_are_those_of_each_number_alone():
    draws = DocumentDraws(5, 50, 40, 0, 0.9)
    values = np.random.default_rng(0).normal(size=(41, 4))
    values[3, 1] = np.nan  # not defined on one redraw
    values[0, 2] = np.nan  # not defined at all
    values[1:, 3] = np.inf
    alone = [draws.estimate(column) for column in values.T]
    wanted = [(each.value, each.low, each.high) for each in alone]
    np.testing.assert_array_equal(draws.intervals(values), wanted)
    none = DocumentDraws(1, 50, 0, 0, 0.9).intervals(values[:1])
    np.testing.assert_array_equal(none[:2, 0], values[0, :2])
    assert np.isnan(none[:, 1:]).all()
