"""Registered hypotheses: each verdict on planted rows, and the reason where there is none."""

from dataclasses import replace

import numpy as np
import pytest
from planted_results import noisy_labels, other_domain, result

from lmmono.stats.significance import effect
from lmmono.studies.doses import Dose
from lmmono.studies.hypotheses import Evidence, from_all, verdicts
from lmmono.suites.results import Result

DENSE = {"raw": 0.0, "pca-16": 0.0, "random_projection-64": 0.0}


def verdict(name: str, rows, **evidence):
    (found,) = verdicts([name], Evidence(rows, **evidence))
    return found


@pytest.mark.parametrize(
    ("gain", "outcome"), [(0.02, "supported"), (0.0, "not supported"), (-0.02, "opposite")]
)
def test_h1_and_h2_say_what_was_planted(gain, outcome):
    rows = noisy_labels(DENSE | {"sae-64": gain, "random_topk-64-8": 0.1})
    for name in ("H1", "H2"):
        found = verdict(name, rows)
        assert found.outcome == outcome, found
        (only,) = found.findings
        assert only.what == "sae-64 (full)" and only.n == 10
        assert only.value == pytest.approx(gain, abs=0.006)


def test_h1_reads_mild_noise_only_and_h2_strong_noise_only():
    mild = noisy_labels(DENSE | {"sae": 0.03}, levels=(0.0, 0.05, 0.1))
    strong = noisy_labels(DENSE | {"sae": -0.03}, levels=(0.4, 0.45))
    found = verdicts(["H1", "H2"], Evidence([*mild, *strong]))
    assert [each.outcome for each in found] == ["supported", "opposite"]
    (missing,) = verdicts(["H2"], Evidence(mild))
    assert missing.outcome == "not tested" and "margin from 0 to 0.2" in missing.reason


def test_a_code_must_beat_the_best_dense_control_and_not_the_first():
    rows = noisy_labels({"raw": 0.0, "pca-16": 0.04, "sae": 0.02})
    found = verdict("H1", rows)
    assert found.outcome == "not supported" and found.findings[0].against == "pca-16"
    assert found.findings[0].ci_high < 0, "surely below the best, and above the other"
    worst = verdict("H1", noisy_labels({"raw": 0.0, "pca-16": 0.04, "sae": -0.02}))
    assert worst.outcome == "opposite" and worst.findings[0].against == "pca-16"


def test_equal_codes_are_rarely_told_apart_whichever_control_had_luck():
    outcomes = []
    for draw in range(60):
        rng = np.random.default_rng(draw)
        made = {name: effect([rng.normal(size=8)]) for name in ("raw", "pca", "dense")}
        outcomes.append(replace(from_all("sae", made), p_holm=from_all("sae", made).p).outcome)
    assert outcomes.count("not supported") >= 54


def test_better_than_the_best_means_better_than_each_and_opposite_is_worse_than_each():
    d = np.array([0.1, 0.2, 0.15, 0.12, 0.18, 0.11, 0.16])
    surely, unsure, worse = effect([d]), effect([d - 0.1]), effect([-d])
    better = from_all("sae", {"raw": surely, "pca": unsure})
    assert (better.against, better.p) == ("pca", unsure.p)
    assert (better.value, better.ci_low) == (unsure.value, unsure.ci_low)
    below = from_all("sae", {"raw": surely, "pca": unsure, "dense": worse})
    assert (below.against, below.value, below.p) == ("dense", worse.value, 1.0)
    lowest = from_all("sae", {"raw": worse, "dense": effect([-d - 0.1])})
    assert (lowest.against, lowest.p, lowest.all_below) == ("dense", worse.p, worse.ci_high)


def test_budgets_are_not_mixed():
    full = noisy_labels(DENSE | {"sae": 0.02})
    small = [
        result(r.feature, r.value - 0.1, level=r.level, seed=r.seed, corruption=r.corruption,
               settings={"n_classes": 2, "budget": 16})
        for r in noisy_labels({"raw": 0.0, "sae": -0.02})
    ]  # fmt: skip
    found = verdict("H1", [*full, *small])
    assert {f.what: f.outcome for f in found.findings} == {
        "sae (16)": "opposite",
        "sae (full)": "supported",
    }
    assert found.outcome == "not supported" and "1 supported, 1 opposite" in found.reason


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "no row of noisy_labels"),
        (noisy_labels({"raw": 0.0}), "no family that is claimed"),
        (noisy_labels({"sae": 0.0, "relu": 0.0}), "no dense control"),
        (noisy_labels(DENSE | {"sae": 0.0}, seeds=4), "topic has 4 whole seeds, want 5"),
        (noisy_labels(DENSE | {"sae": 0.1}, seeds=5), "5 seeds give no p below 0.05"),
        (noisy_labels(DENSE | {"a": 0.1, "b": 0.1}, seeds=6), "6 seeds give no p below 0.05 over"),
        ([result("sae", settings={})], "do not say n_classes"),
        ([result("sae", probe="oracle_logistic")], "no row of noisy_labels"),
    ],
)
def test_what_cannot_be_judged_is_not_tested_and_says_why(rows, reason):
    found = verdict("H1", rows)
    assert found.outcome == "not tested" and reason in found.reason


def test_families_can_be_named_as_claimed_or_as_controls():
    rows = noisy_labels({"neurons": 0.03, "mine": 0.0})
    assert verdict("H1", rows, claimed=["neurons"], dense=["mine"]).outcome == "supported"


@pytest.mark.parametrize(("slope", "outcome"), [(0.1, "supported"), (-0.1, "opposite")])
def test_h3_follows_the_planted_slope_over_twenty_dictionaries(slope, outcome):
    doses = [Dose(f"sae-{i}", 64, "semantic_consistency", i / 24) for i in range(24)]
    rows = noisy_labels({"raw": 0.0} | {d.feature: slope * d.value for d in doses}, seeds=5)
    found = verdict("H3", rows, doses=doses)
    assert found.outcome == outcome
    assert found.findings[0].what == "width 64" and found.findings[0].n == 24
    few = verdict("H3", rows, doses=doses[:10])
    assert few.outcome == "not tested" and few.reason.endswith("and a gain, got 10 of width 64")


def said_of_codes(rows: list[Result], measure: dict[str, float | None]) -> list[Result]:
    """Rows that say of their codes what those of a run do."""
    return [
        replace(r, settings={**r.settings, "d": 64, "semantic_consistency": measure[r.feature]})
        for r in rows
    ]


def test_h3_is_not_tested_where_pooled_codes_are_active_on_nearly_all_texts():
    measure = {f"sae-{i}": 0.002 + i / 9999 for i in range(24)}
    gains = {"raw": 0.0} | dict.fromkeys(measure, 0.01)
    rows = said_of_codes(noisy_labels(gains, seeds=5), {"raw": 0.0} | measure)
    for share, outcome in ((0.995, "not tested"), (0.3, "not supported")):
        active = [replace(r, settings={**r.settings, "active_fraction": share}) for r in rows]
        found = verdict("H3", active)
        assert found.outcome == outcome, found
    assert "active on 30.0%" not in found.reason


def test_h3_takes_the_measure_from_the_rows_themselves():
    measure = {f"sae-{i}": i / 24 for i in range(24)}
    gains = {"raw": 0.0} | {name: 0.1 * value for name, value in measure.items()}
    rows = said_of_codes(
        noisy_labels(gains, seeds=5, tasks=("topic", "other")), {"raw": 0.0} | measure
    )
    found = verdict("H3", rows)
    assert found.outcome == "supported" and found.findings[0].n == 24
    narrow = [replace(r, settings={**r.settings, "budget": "16"}) for r in rows]
    pooled = [replace(r, feature=f"{r.feature}:max") for r in rows if r.feature != "raw"]
    again = verdict("H3", [*rows, *narrow, *pooled])
    assert again == found, "budgets and further poolings are no dictionaries more"
    lacking = [
        replace(r, settings={**r.settings, "semantic_consistency": None})
        if r.task == "other" and r.feature in ("sae-1", "sae-2", "sae-3", "sae-4", "sae-5")
        else r
        for r in rows
    ]
    reason = verdict("H3", lacking).reason
    assert reason.endswith("got 19 of width 64"), "a mean over fewer tasks is another measure"
    assert verdict("H3", rows, doses=[]).reason.endswith("got none"), "another was asked for"
    same = said_of_codes(rows, dict.fromkeys(gains, 0.5))
    assert "is the same in all dictionaries" in verdict("H3", same).reason


@pytest.mark.parametrize(
    ("above", "outcome"), [(0.4, "supported"), (0.0, "not supported"), (-0.4, "opposite")]
)
def test_h4_asks_for_robustness_beyond_the_line(above, outcome):
    rows = other_domain({"raw": 0.0, "pca-16": 0.0, "sae": above})
    found = verdict("H4", rows)
    assert found.outcome == outcome
    assert found.findings[0].what == "sae: topic -> shifted"
    at_home = [each for each in rows if each.split == "test"]
    assert verdict("H4", at_home).outcome == "not tested"
