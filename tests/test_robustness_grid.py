"""The grid: draws that all families share, rows that say what failed, and planted right answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lookup_model import HOOK, Lookup, large_task, small_task, true_code
from scipy.stats import binomtest

import lmmono as lm
from lmmono.data.tasks.task import Labelled, Task
from lmmono.errors import RobustnessError
from lmmono.probes.probe_jobs import fit_probes, telling
from lmmono.probes.problems import Problems
from lmmono.recipe.robustness_settings import Robustness
from lmmono.registry.suites import SUITES, find_suite
from lmmono.studies.comparisons import compare_families
from lmmono.suites.bench import semantic_consistency
from lmmono.suites.results import Outcomes
from lmmono.suites.suite_draws import SuiteDraw

BOTH = {"raw": None, "code": true_code}
SMALL = {"n_train": None, "n_val": 100, "n_test": 400, "hook": HOOK}
PLANTED = {"seeds": 7, "margins": (0.9,), "rates": ()}
"""Six seeds are the fewest whose sign-flip p can be below 0.05."""


@pytest.fixture(scope="module")
def model() -> Lookup:
    return Lookup()


@pytest.fixture(scope="module")
def task() -> Task:
    return large_task()


def draws(task: Task, suite: str, **settings: object) -> list[SuiteDraw]:
    return list(SUITES[suite].load()(task, Robustness.model_validate(settings)))


def measured(model, task, suite, features=BOTH, **settings) -> Outcomes:
    return lm.robustness(model, task, suite=suite, features=features, **{**SMALL, **settings})


def test_label_noise_flips_exactly_what_it_says_and_is_one_mask_at_a_seed(task):
    settings = {"seeds": 2, "margins": (1.0, 0.5, 0.0), "rates": (0.02,), "n_train": 100}
    made = draws(task, "noisy_labels", **settings, label_noise=("symmetric", "instance"))
    assert [d.level for d in made[:4]] == [0.0, 0.02, 0.25, 0.5]
    for draw in made:
        clean = task.part("train").labels[draw.train]
        val = task.part("val").labels[draw.val]
        if draw.level == 0.5 and draw.corruption == "symmetric":
            assert draw.failure == "unlearnable: symmetric noise of 0.5"
        else:
            assert (draw.labels != clean).sum() == round(draw.level * len(clean))
            assert (draw.val_labels != val).sum() == round(draw.level * len(val))
    again = draws(task, "noisy_labels", **settings, label_noise=("symmetric", "instance"))
    assert all(np.array_equal(a.labels, b.labels) for a, b in zip(made, again, strict=True))
    assert not np.array_equal(made[0].train, made[8].train), "seeds differ"
    flipped = [set(np.flatnonzero(d.labels != made[0].labels)) for d in made[:3]]
    assert flipped[0] < flipped[1] < flipped[2], "a higher rate flips what a lower one does"


def test_rates_of_equal_margin_follow_the_number_of_classes(task):
    settings = {"seeds": 1, "margins": (1.0, 0.8), "rates": ()}
    four = Task(
        "four",
        "",
        "",
        "",
        ("a", "b", "c", "d"),
        {name: Labelled(part.texts, np.arange(len(part)) % 4) for name, part in task.parts.items()},
    )
    for which, want in ((task, 0.1), (four, 0.15)):
        clean, noisy = draws(which, "noisy_labels", **settings)
        assert (clean.level, noisy.level) == (0.0, pytest.approx(want))
        assert noisy.facts["rho"] == pytest.approx(0.8)


def test_few_shots_are_balanced_nested_and_repeated(task):
    made = draws(task, "few_shot", seeds=2, shots=(1, 4, 40, 10_000), resamples=5)
    n_of = {k: sum(d.n_shots == k for d in made) for k in (1, 4, 40, 10_000)}
    assert n_of == {1: 5, 4: 5, 40: 2, 10_000: 2}
    by_key = {(d.n_shots, d.seed): d for d in made}
    for seed in range(2):
        one, four = by_key[1, seed], by_key[4, seed]
        assert np.bincount(four.labels).tolist() == [4, 4] == np.bincount(four.val_labels).tolist()
        assert set(one.train) < set(four.train)
        assert "20000 texts asked for, it has 160" in by_key[10_000, seed].failure


def test_what_a_task_lacks_is_a_row_that_says_so(model, task):
    few = {"seeds": 1, "shots": (2,)}
    other = measured(model, task, "ood", **few)
    assert [row["failure"] for row in other.rows] == 2 * ["the task has no part ood:<name>"]
    real = measured(model, task, "noisy_labels", **few, label_noise="real")
    told = {(row["level"], row["failure"]) for row in real.rows}
    assert told == {(0.0, None), (None, "the task has no real noisy labels")}
    flat = replace(task, parts={**task.parts, "val": Labelled((), np.zeros(0, np.int64))})
    without = measured(model, flat, "few_shot", seeds=1, shots=(2,), resamples=1)
    assert {row["failure"] for row in without.rows} == {
        "no validation example to choose settings on"
    }
    assert "rows have no value, such as: no validation" in repr(without)


def test_noise_of_severity_zero_is_clean_to_the_bit(model, task):
    settings = {"seeds": 2, "n_noised": 400, "severities": (5,)}
    noised = measured(
        model, task, "noisy_inputs", **settings, input_noise=("word_drop", "hidden_gaussian")
    )
    clean = measured(model, task, "noisy_labels", seeds=2, margins=(1.0,), rates=())
    value = {(r["feature"], r["seed"]): r["value"] for r in clean.rows}
    assert {r["level"] for r in noised.rows} == {0.0, 5.0} and len(noised.rows) == 16
    for row in noised.rows:
        mine = value[row["feature"], row["seed"]]
        assert row["value"] == mine if row["level"] == 0.0 else row["value"] < mine


def test_rows_carry_n_interval_seed_and_what_the_probe_read(model, task):
    made = measured(model, task, "noisy_labels", seeds=1, margins=(0.8,), rates=(), budgets=(3,))
    assert [row["feature"] for row in made.rows] == ["raw", "raw@3", "code", "code@3"]
    for row in made.rows:
        n_right = round(row["value"] * row["n"])
        want = binomtest(n_right, row["n"]).proportion_ci(method="wilson")
        assert (row["ci_low"], row["ci_high"]) == pytest.approx((want.low, want.high))
        assert row["n"] == 400 and row["metric"] == "accuracy" and row["seed"] == 0
        said = row["settings"]
        assert said["n_flipped"] == 16 and said["rho"] == pytest.approx(0.8)
        assert said["d"] == 96 and said["hook"] == HOOK and said["n_train"] == 160
        assert abs(said["semantic_consistency"]) < 0.05 or row["feature"].startswith("code")
        assert said["budget"] == ("3" if "@" in row["feature"] else "full")
    assert [(each.feature, each.budget) for each in made.results[:2]] == [
        ("raw", "full"),
        ("raw", "3"),
    ]


def test_consistency_is_corrected_for_chance():
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 600)
    dense = random.standard_normal((600, 30))
    sparse = np.where(random.random((600, 200)) < 0.05, 1.0, 0.0)
    for x in (dense, sparse):
        assert abs(semantic_consistency(x, labels, n_classes=4)[0]) < 0.02
    told = (
        np.where(random.random((600, 1)) < 0.8, labels[:, None] == np.arange(4), 0) * sparse[:, :4]
    )
    kept = np.concatenate([told, 1.0 * (labels[:, None] == np.arange(4))], axis=1)
    value, n, active = semantic_consistency(kept, labels, n_classes=4)
    assert n == 4 and value == pytest.approx(1.0), "the first four are active on too few texts"
    assert active == pytest.approx(0.25, abs=0.01)


def test_a_bag_of_words_learns_from_the_texts_and_labels_of_the_probes(model, task):
    settings = {"seeds": 2, "margins": (1.0, 0.4), "rates": (), "bag_of_words": True}
    made = measured(model, task, "noisy_labels", **settings)
    words = [row for row in made.rows if row["feature"] == "bag_of_words"]
    codes = [row for row in made.rows if row["feature"] == "raw"]
    assert made.features[-1] == "bag_of_words" and len(words) == len(codes) == 4
    for mine, theirs in zip(words, codes, strict=True):
        same = ("level", "corruption", "seed", "n", "probe")
        assert [mine[name] for name in same] == [theirs[name] for name in same]
        for fact in ("n_train", "n_flipped"):
            assert mine["settings"].get(fact) == theirs["settings"].get(fact)
    means = {level: np.mean([r["value"] for r in words if r["level"] == level]) for level in (0.0,)}
    assert means[0.0] > 1 / task.n_classes + 0.05
    # which texts are right stands in each row
    result = made.results[0]
    assert result.items is not None and result.items.mean() == pytest.approx(result.value)


def test_the_strongest_texts_tell_what_pooling_over_tokens_hides():
    """A unit of one class that is a little active everywhere, as a mean over tokens is."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 600)
    pooled = 0.05 * random.random((600, 4)) + (labels[:, None] == np.arange(4))
    everywhere, _, active = semantic_consistency(pooled, labels, n_classes=4)
    assert active > 0.99 and abs(everywhere) < 0.01
    strongest, n, share = semantic_consistency(pooled, labels, n_classes=4, strongest=0.1)
    assert n == 4 and strongest == pytest.approx(1.0) and share == pytest.approx(0.1)
    noise = random.random((600, 30))
    assert abs(semantic_consistency(noise, labels, n_classes=4, strongest=0.1)[0]) < 0.05


def test_a_budgeted_probe_reads_the_coordinates_that_tell_most(task):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(300, 20, generator=random)
    y = (x[:, 7] + 0.5 * x[:, 11] > 0).long()
    assert telling(x[:200], y[:200], 2, 2).tolist() == [7, 11]
    problems = Problems(x[:200], y[None, :200], x[200:], y[None, 200:], 2, (0,))
    narrow = fit_probes(problems, "logistic", 2)
    assert narrow.weight[0, 0].nonzero()[:, 0].tolist() == [7, 11]
    only = Problems(x[:200, [7, 11]], y[None, :200], x[200:, [7, 11]], y[None, 200:], 2, (0,))
    wide = fit_probes(only, "logistic")
    assert torch.allclose(narrow.weight[0][:, [7, 11]], wide.weight[0], atol=1e-4)


def test_a_sparse_code_that_truly_helps_is_found_to_help(model):
    made = measured(model, small_task(), "noisy_labels", **PLANTED)
    (found,) = compare_families(made.results, "raw")
    assert found.effect.ci_low > 0.02 and found.p_holm < 0.05 and found.win_rate == 1.0


def test_a_sparse_code_that_does_not_help_is_found_not_to(model):
    made = measured(model, large_task(), "noisy_labels", **PLANTED)
    (found,) = compare_families(made.results, "raw")
    assert found.effect.ci_high < 0 and found.p_holm < 0.05 and found.win_rate == 0.0


def test_settings_that_cannot_be_are_told(model, task):
    with pytest.raises(RobustnessError, match="did you mean noisy_labels"):
        find_suite("noisy_lables")
    for settings, fault in (
        ({"suite": "noisy_label"}, "robustness: suites"),
        ({"suite": "ood", "n_trian": 5}, "robustness: n_trian: Extra inputs"),
        ({"suite": "ood", "features": {"a@b": None}}, "names without @ and :"),
        ({"suite": "ood", "features": {"a": "rawr"}}, "did you mean raw?"),
        ({"suite": "ood", "learners": ("logistic", "logistic")}, "want each once"),
    ):
        with pytest.raises(RobustnessError, match=fault):
            lm.robustness(model, task, **{"hook": HOOK, **settings})
    with pytest.raises(RobustnessError, match="want one or several different"):
        lm.robustness(model, [task, task], suite="ood", hook=HOOK)
