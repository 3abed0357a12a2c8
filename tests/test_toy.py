"""The toy study: closed forms, codes that are what they are called, and rows that pair up."""

import numpy as np
import pytest
from typer.testing import CliRunner

import activation_store as astore
from lmmono.cli.app import app
from lmmono.errors import DataError
from lmmono.reports.toy_tables import superposition_tables, two_feature_table
from lmmono.studies.comparisons import compare_families
from lmmono.suites.results import read_results
from lmmono.toy.codes import ToyData, axes, dimensionality, random_code, trained
from lmmono.toy.separability import (
    MONO,
    POLY,
    TwoFeatureErrors,
    mean_ratio,
    noisy_ratio,
    two_feature_errors,
    two_feature_ratio,
)
from lmmono.toy.superposition import ToySettings, superposition

SMALL = ToySettings(
    n_train=(100, 400), label_noise=(0.0, 0.4), input_noise=(0.2,), seeds=2, steps=50, n_test=500
)


def drawn(p: float, n: int = 400_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.random((n, 2)) * (rng.random((n, 2)) < p)
    x = x[x.any(axis=1)]
    return x, x[:, 0] > x[:, 1]


def ratio(code: np.ndarray, y: np.ndarray) -> float:
    return (code[y].mean() - code[~y].mean()) ** 2 / (code[y].var() + code[~y].var())


@pytest.mark.parametrize(
    ("p", "mono", "poly", "within"),
    [(1.0, 1, 4, 1e-12), (0.2, 2.30, 5.57, 0.02), (0.05, 2.81, 5.91, 0.02)],
)
def test_the_ratios_of_two_features_are_those_of_the_literature(p, mono, poly, within):
    assert two_feature_ratio(p, MONO) == pytest.approx(mono, abs=within)
    assert two_feature_ratio(p, POLY) == pytest.approx(poly, abs=within)


@pytest.mark.parametrize("weights", [MONO, POLY, (0.7, 0.4)])
def test_the_closed_form_is_what_samples_give(weights):
    x, y = drawn(0.3)
    code, rng = x @ np.array(weights), np.random.default_rng(1)
    assert two_feature_ratio(0.3, weights) == pytest.approx(ratio(code, y), rel=0.02)
    shifted = (x + 0.2 * rng.standard_normal(x.shape)) @ np.array(weights)
    told = two_feature_ratio(0.3, weights, input_noise=0.2)
    assert told == pytest.approx(ratio(shifted, y), rel=0.02)
    flipped = y ^ (rng.random(len(y)) < 0.3)
    told = two_feature_ratio(0.3, weights, label_noise=0.3)
    assert told == pytest.approx(ratio(code, flipped), rel=0.05)


def test_ties_counted_as_negative_turn_the_moment_scores_around_and_not_the_errors():
    """With both features absent in 64 of 100 samples, J prefers x1 and a probe x1 - x2."""
    mono, poly = (two_feature_ratio(0.2, code, ties="negative") for code in (MONO, POLY))
    assert mono > poly
    x = np.random.default_rng(0).random((400_000, 2))
    x *= np.random.default_rng(1).random(x.shape) < 0.2
    y = x[:, 0] > x[:, 1]
    assert mono == pytest.approx(ratio(x[:, 0], y), rel=0.02)
    assert poly == pytest.approx(ratio(x[:, 0] - x[:, 1], y), rel=0.02)
    best_on_x1 = min(np.mean((x[:, 0] > cut) != y) for cut in np.linspace(0, 1, 50))
    assert np.mean((x[:, 0] - x[:, 1] > 0) != y) == 0.0 < best_on_x1


def test_label_noise_never_changes_the_order_of_two_codes():
    ratios = np.linspace(0.01, 20, 50)
    for rate in (0.0, 0.1, 0.25, 0.4, 0.49):
        noisy = [noisy_ratio(each, rate) for each in ratios.tolist()]
        assert (np.diff(noisy) > 0).all()
    for p in (1.0, 0.5, 0.2, 0.05):
        for sigma in (0.0, 0.1, 1.0, 10.0):
            mono, poly = (two_feature_ratio(p, c, input_noise=sigma) for c in (MONO, POLY))
            assert poly > mono


def test_a_probe_on_the_polysemantic_code_of_two_features_is_better_at_every_noise():
    for each in two_feature_errors((1.0, 0.2), (0.0, 0.25, 0.4), draws=8):
        assert each.poly > each.mono > 0.5
    table = two_feature_table([TwoFeatureErrors(1.0, 0.0, 0.75, 0.99)], 10)
    assert table.rows[0][:4] == ("1", "0", "1.000", "4.000")


def test_the_mean_ratio_is_the_one_dimensional_one_and_the_best_of_all_directions():
    x, y = drawn(0.4, 5_000)
    code, labels = x @ np.array(POLY)[:, None], y.astype(int)
    assert mean_ratio(code, labels, 2) == pytest.approx(ratio(code[:, 0], y))
    best = max(ratio(x @ np.array([np.cos(a), np.sin(a)]), y) for a in np.linspace(0, np.pi, 721))
    assert mean_ratio(x, labels, 2) == pytest.approx(best, rel=1e-3)
    assert np.isnan(mean_ratio(x, np.zeros(len(x), int), 2))


def test_dense_features_are_kept_apart_and_sparse_ones_share():
    dense, sparse = (
        dimensionality(trained(data, 4, [0], steps=steps, importance=importance)[0])
        for data, steps, importance in ((ToyData(1.0, 8), 3000, 0.6), (ToyData(0.03, 8), 600, 1.0))
    )
    assert (dense[:4] > 0.9).all() and (dense[4:] < 0.1).all()
    assert (sparse > 0.3).all() and (sparse < 0.8).all()


def test_every_code_has_the_energy_of_the_axes_and_is_its_seeds_own():
    codes = trained(ToyData(0.05), 20, [0, 1], steps=2) + [axes(20, 40), random_code(20, 40, 0)]
    assert all(np.square(code).sum() == pytest.approx(20) for code in codes)
    assert not np.allclose(codes[0], codes[1])
    again = trained(ToyData(0.05), 20, [1], steps=2)[0]
    np.testing.assert_allclose(codes[1], again, atol=1e-6)
    assert dimensionality(axes(20, 40)).tolist() == [1.0] * 20 + [0.0] * 20


def test_the_data_always_has_a_largest_feature_and_the_spread_it_says():
    x = ToyData(0.05).draw(2_000, np.random.default_rng(0))
    assert x.any(axis=1).all()
    plain = ToyData(0.3)._draw(100_000, np.random.default_rng(0))
    assert plain.std() == pytest.approx(ToyData(0.3).spread, rel=0.01)


@pytest.fixture(scope="module")
def found():
    return superposition(SMALL)


def test_every_arm_has_every_condition_and_pairs_up(found):
    accuracies = [each for each in found.results if each.metric == "accuracy"]
    # arms x seeds x sizes x (clean, one rate, one level)
    assert len(accuracies) == 4 * 2 * 2 * 3
    assert all(0 <= each.value <= 1 for each in accuracies)
    compared = compare_families(accuracies, "poly")
    assert {each.effect.n_seeds for each in compared} == {2}
    assert {each.n_lost for each in compared} == {0}
    assert len(compared) == 3 * 2 * 3
    assert superposition(SMALL).results == found.results


def test_a_code_that_drops_half_of_the_features_cannot_tell_them_apart(found):
    clean = {
        each.feature: each.value
        for each in found.results
        if each.metric == "accuracy" and each.level == 0 and each.n_shots == 10 and each.seed == 0
    }
    assert clean["mono"] < 0.6
    mono = next(each for each in found.capacities if each.arm == "mono")
    assert (mono.alone, mono.shared, mono.dropped) == (20, 0, 20)


def test_where_only_its_own_features_matter_the_monosemantic_code_is_exact():
    settings = ToySettings(
        targets="coded", n_train=(2_000,), label_noise=(0.0,), input_noise=(), seeds=1, steps=1,
        n_test=1_000,
    )  # fmt: skip
    clean = {
        each.feature: each.value
        for each in superposition(settings).results
        if each.metric == "accuracy"
    }
    assert clean["mono"] > 0.9 > clean["random"]


def test_the_tables_hold_error_and_moment_score(found):
    tables = superposition_tables(found, draws=1)
    titles = [each.title for each in tables]
    assert titles[0].startswith("Codes of 40 features") and titles[-1].startswith("Two features")
    assert sum(": accuracy" in title for title in titles) == 4
    assert sum(": fisher_ratio" in title for title in titles) == 2
    assert all(len(row) == len(each.columns) for each in tables for row in each.rows)


def test_the_command_prints_the_tables_and_writes_the_rows(tmp_path):
    command = ["toy", "superposition", "--seeds", "1", "--n-train", "50", "--steps", "2"]
    done = CliRunner().invoke(app, [*command, "--store", str(tmp_path / "toy")])
    assert done.exit_code == 0, done.output
    assert "Accuracy less that of poly" in done.output
    with astore.open(tmp_path / "toy") as store:
        rows = read_results(store)
    assert {each.feature for each in rows} == {"mono", "mono_learned", "poly", "random"}
    assert {each.task for each in rows} == {"superposition_all_p0.05"}


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(DataError, match="toy: p: want a share"):
        ToySettings(p=0.0)
    with pytest.raises(DataError, match="label noise from 0 on"):
        ToySettings(label_noise=(0.1,))
