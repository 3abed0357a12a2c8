"""Comparing two models: what the difference is, what its interval covers, what density explains."""

import numpy as np
import pytest
from explained_store import HOOK, planted_store

import activation_store as astore
import lmmono as lm
from lmmono.errors import ExplainError
from lmmono.stats.agreement import record_sums
from lmmono.studies.differences import NORMAL, _HookUnits, _Pair


def units(rng, n, mean, densities=None):
    densities = rng.random(n) if densities is None else densities
    return _HookUnits(rng.normal(mean, 0.2, n), np.ones(n, bool), densities)


def interval(pair, rng, kind=0, n_draws=50):
    a, b = pair.means(None)[kind]
    draws = np.array([pair.means(rng)[kind] for _ in range(n_draws)])
    half = NORMAL * (draws[:, 0] - draws[:, 1]).std(ddof=1)
    return a - b - half, a - b + half


def test_the_interval_over_units_covers_the_true_difference():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        a = [units(rng, 60, 0.6), units(rng, 40, 0.4)]
        b = [units(rng, 60, 0.5), units(rng, 40, 0.2)]
        low, high = interval(_Pair(a, b), rng)
        covered += low <= 0.15 <= high
    assert 0.90 <= covered / 200 <= 0.985


def test_a_score_that_only_follows_density_does_not_differ_at_equal_density():
    rng = np.random.default_rng(1)
    sides = []
    for shape in ((2.0, 1.0), (1.0, 2.0)):
        densities = rng.beta(*shape, 2000)
        noise = rng.normal(0, 0.05, 2000)
        sides.append([_HookUnits(densities + noise, np.ones(2000, bool), densities)])
    pair = _Pair(*sides)
    raw, _, matched = pair.means(None)
    assert raw[0] - raw[1] == pytest.approx(1 / 3, abs=0.03)
    assert matched[0] - matched[1] == pytest.approx(0.0, abs=0.02)
    assert 0.4 < pair.overlap < 0.7


def test_a_mean_of_defined_scores_leaves_the_others_out():
    values = np.array([0.5, 0.7, 0.0, 0.0])
    half = _HookUnits(values, np.array([True, True, False, False]), np.full(4, 0.1))
    whole = _HookUnits(np.full(4, 0.4), np.ones(4, bool), np.full(4, 0.1))
    raw, defined, _ = _Pair([half], [whole]).means(None)
    assert raw.tolist() == pytest.approx([0.3, 0.4])
    assert defined.tolist() == pytest.approx([0.6, 0.4])


def test_what_a_document_does_to_both_models_cancels():
    rng = np.random.default_rng(2)
    truth = rng.random((40, 12, 30)) * rng.gamma(0.5, 2.0, 12)[:, None]
    docs = np.tile(np.arange(12), (40, 1))
    there = np.ones(truth.shape, bool)

    def model():
        predicted = truth + rng.normal(0, 0.5, truth.shape)
        sums = record_sums(truth, predicted, there)
        nothing = np.ones(40)
        return [_HookUnits(nothing, np.ones(40, bool), nothing, sums, docs)]

    pair = _Pair(model(), model())
    draws = np.array([pair.means(rng)[0] for _ in range(200)])
    assert np.corrcoef(draws.T)[0, 1] > 0.8
    assert (draws[:, 0] - draws[:, 1]).std() < 0.5 * draws[:, 0].std()


def test_stores_of_the_same_corpus_are_paired_and_others_are_not(tmp_path):
    paths = [planted_store(tmp_path / str(seed), seed=seed).path for seed in (0, 1)]
    first, twin, other = (astore.open(paths[at], mode="a") for at in (0, 0, 1))
    for store in (first, other):
        lm.explain(store, HOOK)
        lm.score(store, HOOK)
    same = lm.compare(first, twin, hooks=HOOK)
    assert same.paired_documents
    assert same.raw.difference == 0 and same.raw.ci_low < 0 < same.raw.ci_high
    assert "1 training seed a side" in repr(same)
    stored = {
        (row["metric"], row["hook"]): row["value"]
        for row in lm.score(first, HOOK).summary
        if row["control"] is None
    }
    assert same.raw.a == pytest.approx(stored["simulation_tar", HOOK])
    assert same.defined.a == pytest.approx(stored["simulation_tar_defined", HOOK])
    differ = lm.compare(first, other, hooks=HOOK)
    assert not differ.paired_documents
    assert differ.undefined == (pytest.approx(2 / 6), pytest.approx(2 / 6))
    three = lm.compare([first, first, other], [other, twin, first], hooks=HOOK)
    assert three.n_seeds == 3 and len(three.pairs) == 3
    each = np.array([pair.raw.difference for pair in three.pairs])
    assert three.raw.difference == pytest.approx(each.mean())
    half = 4.302653 * each.std(ddof=1) / np.sqrt(3)
    assert three.raw.ci_high - three.raw.difference == pytest.approx(half, rel=1e-5)
    with pytest.raises(ExplainError, match="as many stores of both models, got 2 and 1"):
        lm.compare([first, twin], [other])
    with pytest.raises(ExplainError, match="no rows of token_selectivity .*lm.score"):
        lm.compare(first, other, scorer="token_selectivity", hooks=HOOK)
    with pytest.raises(ExplainError, match="scores hooks, not units"):
        lm.compare(first, other, scorer="feature_decorrelation")
