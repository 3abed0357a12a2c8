"""Comparing two models: what the difference is, what its interval covers, what density explains."""

import numpy as np
import pytest
from explained_store import HOOK, planted_store

import activation_store as astore
import lmmono as lm
from lmmono.errors import ExplainError
from lmmono.registry.metrics import METRICS
from lmmono.stats.agreement import record_sums
from lmmono.stats.intervals import Z
from lmmono.studies.differences import HookUnits, UnitPair


def units(rng, n, mean, densities=None):
    densities = rng.random(n) if densities is None else densities
    return HookUnits(rng.normal(mean, 0.2, n), np.ones(n, bool), densities)


def interval(pair, rng, kind=0, n_draws=50):
    a, b = pair.means(None)[kind]
    draws = np.array([pair.means(rng)[kind] for _ in range(n_draws)])
    half = Z * (draws[:, 0] - draws[:, 1]).std(ddof=1)
    return a - b - half, a - b + half


def test_the_interval_over_units_covers_the_true_difference():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        a = [units(rng, 60, 0.6), units(rng, 40, 0.4)]
        b = [units(rng, 60, 0.5), units(rng, 40, 0.2)]
        low, high = interval(UnitPair(a, b), rng)
        covered += low <= 0.15 <= high
    assert 0.90 <= covered / 200 <= 0.985


def test_a_score_that_only_follows_density_does_not_differ_at_equal_density():
    rng = np.random.default_rng(1)
    sides = []
    for shape in ((2.0, 1.0), (1.0, 2.0)):
        densities = rng.beta(*shape, 2000)
        noise = rng.normal(0, 0.05, 2000)
        sides.append([HookUnits(densities + noise, np.ones(2000, bool), densities)])
    pair = UnitPair(*sides)
    raw, _, matched = pair.means(None)
    assert raw[0] - raw[1] == pytest.approx(1 / 3, abs=0.03)
    assert matched[0] - matched[1] == pytest.approx(0.0, abs=0.02)
    assert 0.4 < pair.overlap < 0.7


def test_a_mean_of_defined_scores_leaves_the_others_out():
    values = np.array([0.5, 0.7, 0.0, 0.0])
    half = HookUnits(values, np.array([True, True, False, False]), np.full(4, 0.1))
    whole = HookUnits(np.full(4, 0.4), np.ones(4, bool), np.full(4, 0.1))
    raw, defined, _ = UnitPair([half], [whole]).means(None)
    assert raw.tolist() == pytest.approx([0.3, 0.4])
    assert defined.tolist() == pytest.approx([0.6, 0.4])


def layer(values, defined=None, n=20):
    defined = np.ones(n, bool) if defined is None else defined
    return HookUnits(np.where(defined, values, 0.0), defined, np.full(n, 0.1))


def test_a_layer_without_a_defined_unit_counts_for_nothing_among_the_defined():
    empty, full = layer(0.0, np.zeros(20, bool)), layer(0.8)
    pair = UnitPair([empty, full], [full, full])
    raw, defined, _ = pair.means(None)
    assert raw.tolist() == pytest.approx([0.4, 0.8])
    assert defined.tolist() == pytest.approx([0.8, 0.8])
    rng = np.random.default_rng(0)
    draws = np.array([pair.means(rng)[1] for _ in range(50)])
    assert draws[:, 0] == pytest.approx(0.8), "a draw that misses units of a layer adds no 0"


def test_few_defined_units_make_no_interval_and_none_no_difference():
    few = layer(0.8, np.arange(20) < 3)
    none = layer(0.0, np.zeros(20, bool))
    assert "3 and 20 defined units; want 10" in UnitPair([few], [layer(0.5)]).failures()[1]
    assert np.isnan(UnitPair([none], [layer(0.5)]).means(None)[1]).tolist() == [True, False]


def test_a_layer_with_few_defined_units_does_not_make_half_of_the_mean():
    few, many = layer(0.0, np.arange(20) < 1), layer(0.9)
    _, defined, _ = UnitPair([few, many], [many, many]).means(None)
    assert defined[0] == pytest.approx(0.9 * 20 / 21)


def test_densities_that_hardly_overlap_are_not_matched():
    rng = np.random.default_rng(0)
    low = HookUnits(np.ones(50), np.ones(50, bool), rng.uniform(0, 0.1, 50))
    high = HookUnits(np.ones(50), np.ones(50, bool), rng.uniform(0.5, 0.6, 50))
    pair = UnitPair([low], [high])
    assert np.isnan(pair.means(None)[2]).all() and "overlap" in pair.failures()[2]


def test_units_without_a_value_are_undefined_and_stand_for_chance_only_where_there_is_one(tmp_path):
    stores = []
    for name, n_silent in (("a", 0), ("b", 3)):
        store = planted_store(tmp_path / name, seed=0)
        store = astore.open(store.path, mode="a")
        for metric in ("token_selectivity", "detection"):
            rows = [
                {
                    "metric": metric, "metric_version": METRICS[metric].version, "hook": HOOK,
                    "unit": unit, "value": None if unit < n_silent else 1.0,
                    "failure": "unparsed" if unit < n_silent else None,
                    "seed": 0 if metric == "detection" else None, "split": "score",
                    "explainer": "token_lookup" if metric == "detection" else None,
                }
                for unit in range(6)
            ]  # fmt: skip
            store.append("all_scores", rows)
        stores.append(store)
    silent = lm.compare(*stores, scorer="token_selectivity", hooks=HOOK)
    assert silent.undefined == (0.0, 0.5)
    assert np.isnan(silent.raw.difference) and "no chance level" in repr(silent)
    assert silent.defined.difference == 0.0
    judged = lm.compare(*stores, scorer="detection", hooks=HOOK)
    assert judged.undefined == (0.0, 0.5)
    assert (judged.raw.a, judged.raw.b) == (1.0, 0.75), "half of the units at a chance of 0.5"


def test_what_a_document_does_to_both_models_cancels():
    rng = np.random.default_rng(2)
    truth = rng.random((40, 12, 30)) * rng.gamma(0.5, 2.0, 12)[:, None]
    docs = np.tile(np.arange(12), (40, 1))
    there = np.ones(truth.shape, bool)

    def model():
        predicted = truth + rng.normal(0, 0.5, truth.shape)
        sums = record_sums(truth, predicted, there)
        nothing = np.ones(40)
        return [HookUnits(nothing, np.ones(40, bool), nothing, sums, docs)]

    pair = UnitPair(model(), model())
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
