"""Rates of classification and their intervals, against scikit-learn, hand values and coverage."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score

from lmmono.stats import rates


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_auroc_and_average_precision_are_those_of_scikit_learn_ties_included(rng):
    for digits in (0, 1, 6):
        firing, other = (rng.normal(shift, 1, n).round(digits) for shift, n in ((1, 13), (0, 29)))
        truth, scores = np.arange(42) < 13, np.concatenate([firing, other])
        assert rates.auroc(firing, other) == pytest.approx(roc_auc_score(truth, scores))
        wanted = average_precision_score(truth, scores)
        assert rates.average_precision(firing, other) == pytest.approx(wanted)


def test_balanced_accuracy_is_that_of_scikit_learn_and_of_a_hand_count():
    truth, said = [1] * 4 + [0] * 10, [1, 1, 0, 1] + [0] * 7 + [1] * 3
    found, low, high = rates.balanced_accuracy(3.0, 4, 7.0, 10)
    assert found == pytest.approx(balanced_accuracy_score(truth, said)) == (0.75 + 0.7) / 2
    assert low < found < high


def test_a_judge_that_always_says_no_has_the_majority_floor_of_saebench_but_half_when_balanced():
    n_firing, n_other = 4, 10
    assert (0 + n_other) / (n_firing + n_other) == pytest.approx(0.714, abs=5e-4)
    assert rates.balanced_accuracy(0.0, n_firing, float(n_other), n_other)[0] == 0.5


def test_what_is_not_answered_counts_half_in_the_area_and_last_in_precision():
    nothing = np.full(3, np.nan)
    assert rates.auroc(nothing, np.array([1.0, 0.0])) == 0.5
    assert rates.auroc(np.array([2.0, np.nan]), np.array([1.0])) == 0.75
    assert rates.average_precision(np.array([np.nan]), np.array([1.0, 0.0])) == 1 / 3


def test_intervals_stay_open_where_the_judge_is_always_right():
    accuracy, low, high = rates.balanced_accuracy(20.0, 20, 20.0, 20)
    assert (accuracy, high) == (1.0, 1.0)
    assert 0.85 < low < 0.95
    low, high = rates.auroc_interval(1.0, 20, 20)
    assert (high, 0.85 < low < 1.0) == (1.0, True)
    assert rates.average_precision_interval(1.0, 20)[0] < 0.95


def test_intervals_of_20_and_20_records_cover_the_truth(rng):
    n, times = 20, 400
    shift = 1.0
    area, hits = 0.760, np.zeros(2)  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    right = 0.691  # Phi(shift / 2): both classes at the threshold half way
    for _ in range(times):
        firing, other = rng.normal(shift, 1, n), rng.normal(0, 1, n)
        low, high = rates.auroc_interval(rates.auroc(firing, other), n, n)
        hits[0] += low <= area <= high
        counts = float((firing > shift / 2).sum()), n, float((other <= shift / 2).sum()), n
        _, low, high = rates.balanced_accuracy(*counts)
        hits[1] += low <= right <= high
    assert ((hits / times > 0.9) & (hits / times < 0.985)).all(), hits / times


def test_the_threshold_is_the_best_one_between_the_classes():
    assert rates.best_threshold(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 2.5
    firing, other = np.array([5.0, 1.0, 4.0]), np.array([0.0, 2.0, 0.5])
    assert 2.0 < rates.best_threshold(firing, other) < 4.0
