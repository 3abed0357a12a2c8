"""Matches of dictionaries of several seeds, against brute force, sae-lens and planted copies."""

from itertools import permutations

import numpy as np
import pytest
import torch
from small_dictionaries import Given
from torch.nn.functional import normalize

import activation_store as astore
import lmmono as lm
from lmmono.dictionaries.controls import Control
from lmmono.dictionaries.stability import matched_cosines
from lmmono.errors import DictionaryError

HOOK = "blocks.0.mlp.hook_post"


def unit(n: int, d: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return random / np.linalg.norm(random, axis=1, keepdims=True)


def with_directions(directions: np.ndarray, seed: int = 0) -> Given:
    given = Given(directions.shape[1], len(directions), seed, HOOK)
    given.weights["W_dec"] = torch.from_numpy(directions)
    return given


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("signed", [True, False])
def test_the_match_of_four_latents_is_the_best_of_all_orders(seed, signed):
    first, second = unit(4, 3, seed), unit(4, 3, 100 + seed)
    cosines = first @ second.T if signed else np.abs(first @ second.T)
    best = max(cosines[np.arange(4), order].sum() for order in permutations(range(4)))
    assert matched_cosines(first, second, signed).sum() == pytest.approx(best, rel=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sae_lens_finds_the_same_mean():
    from sae_lens.synthetic.evals import mean_correlation_coefficient

    first, second = unit(30, 8, 0), unit(30, 8, 1)
    theirs = mean_correlation_coefficient(torch.from_numpy(first), torch.from_numpy(second))
    fits = [with_directions(first), with_directions(3.0 * second)]
    assert lm.stability(fits, signed=False).cosine.value == pytest.approx(theirs, rel=1e-5)


def test_fits_that_share_half_their_directions_have_half_in_common():
    shared, random = unit(40, 32, 0), np.random.default_rng(9)
    fits = []
    for seed in range(3):
        own = np.concatenate([shared, unit(40, 32, 1 + seed)])
        fits.append(with_directions(own[random.permutation(80)], seed))
    report = lm.stability(fits)
    assert report.share.value == pytest.approx(0.5)
    assert report.floor_share.value == 0.0 and report.share.low >= 0.0
    assert report.cosine.value == pytest.approx(np.mean(report.pairs["cosine"].to_numpy()))
    # random directions match about as well as the half that is not shared
    rest = 2 * report.cosine.value - 1
    assert report.floor_cosine.value == pytest.approx(rest, abs=0.08)
    assert report.pairs.num_rows == 3 and report.pairs["n_matched"].to_pylist() == [80] * 3


def test_the_interval_of_several_seeds_is_over_seeds():
    fits = [with_directions(unit(20, 8, seed), seed) for seed in range(4)]
    report = lm.stability(fits)
    pairs = {(r["first"], r["second"]): r["cosine"] for r in report.pairs.to_pylist()}
    without = [np.mean([c for pair, c in pairs.items() if fit not in pair]) for fit in range(4)]
    error = np.sqrt(3 / 4 * np.square(without - np.mean(without)).sum())
    assert report.cosine.high - report.cosine.value == pytest.approx(3.1824463 * error, rel=1e-5)
    assert report.cosine.method == "jackknife over seeds"
    two = lm.stability(fits[:2]).cosine
    assert two.method.startswith("percentile bootstrap over matched latents")
    assert two.low < two.value < two.high


def test_dead_latents_are_left_out_of_the_second_figure():
    shared = unit(30, 16, 0)
    fits = [with_directions(np.concatenate([shared, unit(30, 16, 1 + s)]), s) for s in range(2)]
    firing = [np.r_[np.full(30, 7), np.zeros(30)], np.r_[np.full(30, 2), np.zeros(30)]]
    report = lm.stability(fits, firing=firing)
    assert report.alive is not None
    assert report.share.value == pytest.approx(0.5) and report.alive.share.value == 1.0
    assert report.alive.pairs["n_matched"].to_pylist() == [30]
    presets = {(row["preset"], row["control"]) for row in report.rows("twins")}
    assert presets == {(p, c) for p in (None, "alive") for c in (None, "random_directions")}


def test_the_sign_counts_unless_it_is_said_to_mean_nothing():
    first = np.eye(6, dtype=np.float32)
    fits = [with_directions(first), with_directions(-first, 1)]
    assert lm.stability(fits).share.value == 0.0
    assert lm.stability(fits, signed=False).share.value == 1.0
    rows = lm.stability(fits, 0.8, signed=False).rows()
    assert {row["preset"] for row in rows} == {"unsigned", "unsigned, above 0.8"}


def test_rows_go_into_a_store(tmp_path):
    rows = lm.stability([with_directions(unit(9, 4, s), s) for s in range(3)]).rows("topk_9")
    with astore.open(tmp_path / "run", "w") as store:
        store.append("all_scores", rows)
        assert store.append("all_scores", rows) == 4
        found = store.sql(
            "SELECT value, ci_low, n_tokens FROM all_scores WHERE metric = 'stability_cosine' "
            "AND control IS NULL"
        ).fetchall()
    assert found == [(rows[0]["value"], rows[0]["ci_low"], None)]


def test_what_cannot_be_compared_is_refused():
    given = with_directions(unit(9, 4, 0))
    with pytest.raises(DictionaryError, match="want two fits or more, got 1"):
        lm.stability([given])
    with pytest.raises(DictionaryError, match="of one d_in, got 4, 5"):
        lm.stability([given, with_directions(unit(9, 5, 0))])
    with pytest.raises(DictionaryError, match="of one d_in, got 4, 0"):
        lm.stability([given, Control("raw")])
    with pytest.raises(DictionaryError, match=r"\[9, 9\] of them, got \[9, 8\]"):
        lm.stability([given, given], firing=[np.ones(9), np.ones(8)])
    with pytest.raises(DictionaryError, match="all are dead"):
        lm.stability([given, given], firing=[np.ones(9), np.zeros(9)])


def test_directions_of_length_zero_are_not_matched():
    first = unit(8, 4, 0)
    first[3:] = 0.0
    assert torch.equal(normalize(torch.from_numpy(first), dim=1)[3:], torch.zeros(5, 4))
    report = lm.stability([with_directions(first), with_directions(unit(8, 4, 1), 1)])
    assert report.pairs["n_matched"].to_pylist() == [3]
