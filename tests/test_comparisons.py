"""Paired statistics: against scipy, by hand, and covering what they say they cover."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from planted_results import noisy_labels, other_domain, result
from scipy import stats

import activation_store as astore
from lmmono.errors import DataError
from lmmono.recipe.robustness_settings import Robustness
from lmmono.stats import bootstrap, significance
from lmmono.stats.significance import effect, holm, sign_flip_p
from lmmono.studies.comparisons import compare_families
from lmmono.studies.doses import Dose, dose_responses, read_doses, spearman_interval
from lmmono.studies.effective import effective_robustness, logit
from lmmono.suites.results import (
    AskedRows,
    areas_and_starts,
    paired,
    read_results,
    severity_changes,
    stored_rows,
)


def skewed(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).exponential(size=n) - 0.7


def test_the_interval_of_many_seeds_is_scipys_bca_bootstrap():
    d = skewed(24)
    found = effect([d], seed=3)
    want = stats.bootstrap(
        (d,), np.mean, n_resamples=9_999, method="BCa", rng=np.random.default_rng(3)
    ).confidence_interval
    assert (found.value, found.n_seeds) == (pytest.approx(d.mean()), 24)
    assert (found.ci_low, found.ci_high) == pytest.approx((want.low, want.high), rel=0.02)
    assert found.ci_method.startswith("BCa")


def test_fewer_seeds_have_students_interval_as_scipy_gives_it():
    d = skewed(6)
    found, want = effect([d]), stats.ttest_1samp(d, 0).confidence_interval(0.95)
    assert (found.ci_low, found.ci_high) == pytest.approx((want.low, want.high))
    assert "Student t" in found.ci_method and "6 of a task" in found.ci_method


def test_tasks_count_alike_however_many_seeds_they_have():
    a, b = skewed(5), skewed(9, seed=1) + 1
    found = effect([a, b])
    assert found.value == pytest.approx((a.mean() + b.mean()) / 2)
    # half the difference of the means of a and -b is what Welch's interval is of
    want = stats.ttest_ind(a, -b, equal_var=False).confidence_interval(0.95)
    assert (found.ci_low, found.ci_high) == pytest.approx((want.low / 2, want.high / 2))
    signs = np.array(list(itertools.product((1, -1), repeat=14)))
    shares = np.concatenate([a / 10, b / 18])
    sums = np.abs(signs @ shares)
    assert found.p == pytest.approx(np.mean(sums >= abs(shares.sum()) - 1e-12), abs=0.01)


@pytest.mark.parametrize("n", [2, 5, 9, 12])
def test_p_of_few_pairs_counts_every_pattern_of_signs(n):
    d = skewed(n, seed=n).round(1)
    signs = np.array(list(itertools.product((1, -1), repeat=n)))
    want = np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-9)
    assert sign_flip_p(d) == pytest.approx(want)
    assert sign_flip_p(np.ones(n)) == effect([np.ones(n)]).least_p == 2 ** (1 - n)


def test_p_of_many_pairs_is_near_that_of_the_t_test():
    d = np.random.default_rng(2).normal(0.3, 1, 40)
    assert sign_flip_p(d) == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=0.02)


def test_what_does_not_vary_has_an_interval_of_one_point_and_one_seed_has_none():
    alike = effect([np.full(24, 0.25)])
    assert (alike.value, alike.ci_low, alike.ci_high) == (0.25, 0.25, 0.25)
    assert effect([np.zeros(12)]).p == 1.0
    one = effect([np.array([0.3])])
    assert one.value == 0.3 and math.isnan(one.ci_low) and one.p == 1.0
    of_tasks = effect([np.array([x]) for x in (0.1, 0.3, 0.2)])
    want = stats.ttest_1samp([0.1, 0.3, 0.2], 0).confidence_interval(0.95)
    assert (of_tasks.ci_low, of_tasks.ci_high) == pytest.approx((want.low, want.high))


@pytest.mark.parametrize("n", [5, 10, 24])
def test_intervals_cover_the_mean_of_normal_differences(n, monkeypatch):
    monkeypatch.setattr(bootstrap, "N_RESAMPLES", 499)
    draws = np.random.default_rng(0).normal(0.4, 1.0, (400, n))
    ends = [significance._interval([d], seed)[:2] for seed, d in enumerate(draws)]
    assert 0.91 <= np.mean([low <= 0.4 <= high for low, high in ends]) <= 0.985


def test_intervals_of_effective_robustness_cover_what_was_planted():
    covered = []
    for seed in range(60):
        rows = other_domain({"raw": 0.0, "pca-16": 0.0, "sae": 0.1}, seeds=6, draw=seed, spread=0.2)
        (found,) = effective_robustness(rows, ["raw", "pca-16"])
        covered.append(found.effect.ci_low <= 0.1 <= found.effect.ci_high)
    assert 0.87 <= np.mean(covered) <= 1.0


def test_sign_flips_reject_five_in_a_hundred_where_nothing_differs():
    draws = np.random.default_rng(1).normal(size=(300, 8))
    assert np.mean([sign_flip_p(d) < 0.05 for d in draws]) == pytest.approx(0.05, abs=0.03)


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    with_nan = holm([0.01, math.nan, 0.6])
    assert with_nan[0] == 0.02 and math.isnan(with_nan[1]) and with_nan[2] == 0.6
    assert holm([]) == []


def test_pairs_share_task_seed_and_draw_and_failures_are_counted():
    ours = [
        result("sae", 0.8, seed=0, settings={"draw": 0}),
        result("sae", 0.6, seed=0, settings={"draw": 1}),
        result("sae", 0.9, seed=1),
        result("sae", math.nan, seed=2, failure="one_class"),
        result("sae", 0.7, seed=3),
    ]
    theirs = [
        result("raw", 0.7, seed=0, settings={"draw": 0}),
        result("raw", 0.7, seed=0, settings={"draw": 1}),
        result("raw", 0.5, seed=1),
        result("raw", 0.5, seed=2),
    ]
    pairs, lost = paired(ours, theirs)
    assert pairs == {"topic": [(pytest.approx(0.7), 0.7), (0.9, 0.5)]}
    assert lost == 2
    with pytest.raises(DataError, match="sae has two rows of task topic, seed 1"):
        paired([*ours, ours[2]], theirs)


def test_a_code_that_helps_under_noise_is_found_to_help_and_one_that_does_not_is_not():
    rows = noisy_labels({"raw": 0.0, "sae": 0.02, "pca-16": 0.0, "harmful": -0.02})
    found = {(c.feature, c.condition[2]): c for c in compare_families(rows, "raw")}
    for level in (0.05, 0.1, 0.4, 0.45):
        assert found["sae", level].effect.ci_low > 0 and found["sae", level].p_holm < 0.05
        assert found["harmful", level].effect.ci_high < 0
        assert found["pca-16", level].p_holm > 0.01
        assert found["sae", level].win_rate > 0.9 > 0.1 > found["harmful", level].win_rate
    assert found["sae", 0.0].p_holm > 0.01
    assert found["sae", 0.1].effect.value == pytest.approx(0.02, abs=0.006)
    with pytest.raises(DataError, match="'rwa'; did you mean raw"):
        compare_families(rows, "rwa")


def test_several_tasks_come_by_themselves_and_together_and_budgets_meet_their_like():
    rows = noisy_labels({"raw": 0.0, "sae": 0.02}, tasks=("topic", "polarity"), levels=(0.1,))
    assert [c.task for c in compare_families(rows, "raw")] == ["polarity", "topic", "all"]
    small = [result(f, v, settings={"budget": 16}) for f, v in (("raw", 0.4), ("sae", 0.6))]
    (found,) = compare_families([*small, result("raw", 0.9)], "raw")
    assert (found.budget, found.baseline_mean) == ("16", 0.4)


def test_wins_go_to_the_lower_value_where_lower_is_better():
    rows = [
        result(f, v, metric="loss", seed=s) for s in (0, 1) for f, v in (("a", 1.0), ("b", 2.0))
    ]
    (found,) = compare_families(rows, "b")
    assert found.effect.value == -1 and found.win_rate == 1.0


def test_the_area_is_made_of_trapezoids_from_the_clean_value_on():
    rows = [result(level=0.0, value=1.0, corruption=None), result(level=0.1, value=0.8)]
    rows += [result(level=0.4, value=0.5), result("sae", 0.9, level=0.1)]
    rows += [result("sae", 0.9, level=0.0, corruption=None)]
    (raw, _), (sae, _) = areas_and_starts(rows)
    assert raw.value == pytest.approx((0.1 * 0.9 + 0.3 * 0.65) / 0.4) and raw.level is None
    assert math.isnan(sae.value) and sae.failure == "incomplete_curve"
    hopeless = [result(f, math.nan, level=0.5, failure="unlearnable") for f in ("raw", "sae")]
    assert next(areas_and_starts([*rows, *hopeless]))[0].value == raw.value
    change = severity_changes(rows)[0]
    assert change.value == pytest.approx(raw.value - 1.0), "what noise takes away, on average"
    real = result(level=0.17, corruption="real")
    assert next(areas_and_starts([*rows, real]))[0] == raw
    assert real.condition == result(level=0.18, corruption="real", seed=1).condition


def test_rows_of_earlier_settings_are_left_out_of_what_a_recipe_shows(tmp_path):
    settings = Robustness(
        suites=("noisy_inputs", "noisy_labels", "few_shot"),
        input_noise=("typos",),
        severities=(1, 3),
        shots=(4,),
        seeds=2,
        resamples=3,
        budgets=(16,),
    )
    typos = {"suite": "noisy_inputs", "corruption": "typos"}
    shots = {"suite": "few_shot", "corruption": None, "level": None}
    kept = [
        result(**typos, level=0.0),
        result(**typos, level=3.0),
        result(seed=1),
        result(feature="raw@16"),
        result(**shots, n_shots=4, seed=2),
    ]
    left = [
        result(**typos, level=2.0),
        result(**typos | {"corruption": "ocr"}, level=3.0),
        result(corruption="instance"),
        result(seed=2),
        result(probe="gce"),
        result(task="trec"),
        result(feature="pca"),
        result(feature="raw@32"),
        result(**shots, n_shots=16),
        result(**shots | {"suite": "ood"}),
    ]
    with astore.open(tmp_path / "run", mode="w") as store:
        store.append("robustness", stored_rows([*left, *kept]))
        found = read_results(store, asked=AskedRows(settings, ["topic"], ["raw"]))
    known = [replace(each, feature="raw") for each in kept]
    assert sorted(map(str, found)) == sorted(map(str, known))


def test_rows_come_back_from_a_store_as_they_were(tmp_path):
    rows = [result("sae", 0.8), result("raw", math.nan, failure="one_class", n=None)]
    with astore.open(tmp_path / "a", "w") as store:
        store.append("robustness", stored_rows(rows))
        summary = stored_rows([result("sae", 0.8)])[0] | {"seed": None}
        store.append("robustness", [summary])
        failed, kept = read_results(store)
    assert kept == rows[0]
    assert math.isnan(failed.value) and failed.failure == "one_class"
    assert kept.margin == pytest.approx(0.8) and math.isnan(result(settings={}).margin)


def test_effective_robustness_is_the_distance_above_the_baselines_line():
    rows = other_domain({"raw": 0.0, "pca-16": 0.0, "sae": 0.5, "worse": -0.5, "same": 0.0})
    found = {e.feature: e for e in effective_robustness(rows, ["raw", "pca-16"])}
    assert set(found) == {"sae", "worse", "same"}
    assert found["sae"].effect.value == pytest.approx(0.5, abs=0.02)
    assert found["sae"].effect.ci_low > 0.45 and found["sae"].p_holm < 0.05
    assert found["worse"].effect.ci_high < -0.45
    assert found["same"].effect.ci_low < 0 < found["same"].effect.ci_high
    many = other_domain({"raw": 0.0, "sae": 0.5}, seeds=24)
    (bca,) = effective_robustness(many, ["raw"])
    assert bca.effect.ci_method.startswith("BCa")
    assert 0.4 < bca.effect.ci_low < bca.effect.value < bca.effect.ci_high < 0.6
    home = {(r.feature, r.seed, r.n_shots): r.value for r in rows if r.split == "test"}
    away = {(r.feature, r.seed, r.n_shots): r.value for r in rows if r.split != "test"}
    base = [key for key in home if key[0] in ("raw", "pca-16")]
    line = stats.linregress(
        [logit(home[key], 10**7) for key in base], [logit(away[key], 10**7) for key in base]
    )
    assert found["sae"].slope == pytest.approx(line.slope, rel=1e-6)
    assert found["sae"].intercept == pytest.approx(line.intercept, abs=1e-6)


def test_a_line_needs_baselines_that_differ_at_home():
    rows = [
        result(f, 0.8, split=split, seed=seed, suite="ood")
        for f in ("raw", "sae")
        for split in ("test", "ood:shifted")
        for seed in range(6)
    ]
    with pytest.raises(DataError, match="topic, ood:shifted.*got 6 with SD 0.000"):
        effective_robustness(rows, ["raw"])


def test_the_dose_response_is_spearmans_and_stays_within_a_width():
    rng = np.random.default_rng(0)
    x = rng.random(24)
    y = x + 0.4 * rng.standard_normal(24)
    doses = [Dose(f"sae-{i}", 64 if i < 20 else 128, "sc", float(v)) for i, v in enumerate(x)]
    gains = {f"sae-{i}": float(v) for i, v in enumerate(y)}
    narrow, wide = dose_responses([*doses, Dose("no gain", 64, "sc", 0.1)], gains)
    want = stats.spearmanr(x[:20], y[:20])
    assert (narrow.width, narrow.n, wide.width, wide.n) == (64, 20, 128, 4)
    assert narrow.rho == pytest.approx(want.statistic)
    assert narrow.p == pytest.approx(want.pvalue, abs=0.005)
    assert narrow.ci_low < narrow.rho < narrow.ci_high
    assert narrow.slope == pytest.approx(stats.theilslopes(y[:20], x[:20]).slope)
    assert narrow.slope_low < narrow.slope < narrow.slope_high


def test_the_interval_of_spearmans_correlation_covers_it():
    r, n = 0.6, 20
    draws = np.random.default_rng(0).multivariate_normal([0, 0], [[1, r], [r, 1]], (400, n))
    true = 6 / math.pi * math.asin(r / 2)
    ends = [spearman_interval(stats.spearmanr(d).statistic, n) for d in draws]
    assert 0.92 <= np.mean([low <= true <= high for low, high in ends]) <= 0.99


def test_doses_are_read_for_the_dictionaries_whose_latents_were_scored(tmp_path):
    hook = "blocks.0.hook_resid_post"
    latents = f"{hook}.hook_sae_acts_post"
    about = {"hook": hook, "arch": "topk", "d_in": 4}
    with astore.open(tmp_path / "a", "w") as store:
        rows = [about | {"name": "a", "d_sae": 8, "latents_hook": latents}]
        store.append("dictionaries", [*rows, about | {"name": "b", "d_sae": 8}])
        row = {"metric": "semantic_consistency", "metric_version": 1, "split": "score", "seed": 0}
        store.append("all_scores", [row | {"hook": latents, "value": 0.3}])
        store.append("all_scores", [row | {"hook": latents, "value": 0.9, "unit": 1}])
        assert read_doses(store) == [Dose("a", 8, "semantic_consistency", 0.3)]
        named = {"hook": hook, "dictionary": "b", "metric": "mcc", "value": 0.7}
        store.append("all_scores", [row | named, row | named | {"control": "shuffled"}])
        both = [Dose("a", 8, "semantic_consistency", 0.3), Dose("b", 8, "mcc", 0.7)]
        assert read_doses(store, ["semantic_consistency", "mcc"], hook) == both
        assert read_doses(store, ["mcc"], "blocks.1.hook_resid_post") == []
