"""Comparing kinds of model along their training, on trainings whose difference is planted."""

import numpy as np
import pytest
from scipy import stats

from lmmono.errors import RecipeError
from lmmono.recipe.registration import read_registration, register
from lmmono.stats.significance import mean_test
from lmmono.studies.along_training import (
    KeptModel,
    KeptTraining,
    at_equal_loss,
    at_equal_tokens,
    difference,
    verdicts,
)
from lmmono.studies.differences import HookUnits


def block(score: float, n: int = 20, density: float = 0.1) -> HookUnits:
    return HookUnits(np.full(n, score), np.ones(n, bool), np.full(n, density))


def training(losses, scores, tokens, floor=0.0) -> KeptTraining:
    models = tuple(
        KeptModel(i, n, loss, (block(score), block(score + 0.1)))
        for i, (loss, score, n) in enumerate(zip(losses, scores, tokens, strict=True))
    )
    return KeptTraining(models, (block(floor), block(floor)))


def test_a_difference_that_is_all_training_goes_at_equal_loss():
    """Scores are 1 - loss / 10 in both kinds, and one learns faster."""
    tokens = (100, 200, 400, 800)
    slow, fast = (
        training(losses, [1 - loss / 10 for loss in losses], tokens, floor=0.2)
        for losses in ((8.0, 7.0, 6.5, 6.0), (7.0, 5.5, 5.2, 5.0))
    )
    by_tokens = at_equal_tokens(slow, fast)
    assert list(by_tokens) == list(tokens)
    assert by_tokens[800].tolist() == pytest.approx([-0.1] * 3)
    meeting = at_equal_loss(slow, fast)
    assert meeting.level == 6.0
    assert meeting.differences.tolist() == pytest.approx([0.0] * 3, abs=1e-12)
    # loss 6.0 lies two thirds of the way from 7.0 at 100 tokens to 5.5 at 200
    assert meeting.n_tokens == pytest.approx((800, 100 * 2 ** (2 / 3)))
    other_way = at_equal_loss(fast, slow)
    assert other_way.differences.tolist() == pytest.approx([0.0] * 3, abs=1e-12)
    assert other_way.n_tokens == pytest.approx(meeting.n_tokens[::-1])


def test_floors_are_subtracted_and_the_last_block_left_out_where_there_is_another():
    a = training((6.0,), (0.7,), (100,), floor=0.4)
    b = training((6.0,), (0.6,), (100,), floor=0.5)
    assert at_equal_tokens(a, b)[100].tolist() == pytest.approx([0.2] * 3)
    low, high = (block(0.1), block(0.9)), (block(0.1), block(0.2))
    one = KeptTraining((KeptModel(1, 100, 6.0, low),))
    other = KeptTraining((KeptModel(1, 100, 6.0, high),))
    assert at_equal_tokens(one, other)[100][0] == pytest.approx(0.35)
    assert at_equal_tokens(one, other, last_block=False)[100][0] == pytest.approx(0.0)
    single = KeptTraining((KeptModel(1, 100, 6.0, low[:1]),))
    assert np.isnan(at_equal_tokens(single, single, last_block=False)[100]).all()


def test_nothing_is_extrapolated_beyond_the_first_kept_step():
    slow = training((8.0, 7.0), (0.2, 0.3), (100, 200))
    fast = training((6.0, 5.0), (0.4, 0.5), (100, 200))
    meeting = at_equal_loss(slow, fast)
    assert np.isnan(meeting.differences).all() and np.isnan(meeting.n_tokens[1])
    exact = at_equal_loss(slow, training((7.0, 5.0), (0.4, 0.5), (100, 200)))
    assert exact.differences[0] == pytest.approx(-0.1)


def test_densities_without_overlap_have_no_matched_difference():
    found = difference([block(0.5, density=0.01)], [block(0.4, density=0.5)])
    assert found[0] == pytest.approx(0.1) and np.isnan(found[2])


def test_a_mean_is_tested_as_scipy_does_and_against_a_bound():
    values = np.array([0.031, 0.012, 0.025, 0.019, 0.022])
    test = mean_test(values, bound=0.05)
    assert test.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    t = (values.mean() - 0.05) / stats.sem(values)
    assert test.p_equivalent == pytest.approx(stats.t.cdf(t, 4))
    low, high = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert (test.ci_low, test.ci_high) == pytest.approx((low, high))
    assert np.isnan(mean_test(np.array([0.1, np.nan]), 0.05).mean)


def test_verdicts_follow_their_definition():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.005, (4, 5))
    noise -= noise.mean(axis=1, keepdims=True)
    cases = [
        (noise[0] + 0.1, 1, "supported"),
        (noise[1] + 0.1, -1, "opposite"),
        (noise[2] + 0.0005, 1, "equivalent"),
        (noise[3] * 20 + 0.01, 1, "inconclusive"),
        (np.array([0.1]), 1, "not tested"),
    ]
    found = verdicts([(values, sign) for values, sign, _ in cases], bound=0.02)
    assert [each.word for each in found] == [word for *_, word in cases]
    smallest = min(found[:4], key=lambda each: each.test.p)
    assert smallest.p_holm == pytest.approx(5 * smallest.test.p)  # the untested one counts too


def test_equal_kinds_are_called_different_in_one_family_of_twenty():
    """Six tests over five seeds, nothing between the kinds: Holm keeps the family at 5 %."""
    rng, n = np.random.default_rng(1), 400
    wrong = 0
    for _ in range(n):
        values = rng.normal(0, 0.01, (6, 5))
        words = [each.word for each in verdicts([(v, 1) for v in values], bound=0.001)]
        wrong += any(word in ("supported", "opposite") for word in words)
    assert wrong / n < 0.08


def test_claims_are_noted_once_with_their_digest(tmp_path):
    claims, log = tmp_path / "claims.yaml", tmp_path / "docs" / "registered.jsonl"
    claims.write_text("about: a\ntests: [{name: x, a: p, b: q, scorer: s, expected: lower}]\n")
    first = register(claims, log, "abc")
    assert register(claims, log, "def") == first and len(log.read_text().splitlines()) == 1
    claims.write_text(claims.read_text() + "bound: 0.1\n")
    assert register(claims, log, "def")["sha256"] != first["sha256"]
    assert len(log.read_text().splitlines()) == 2
    claims.write_text("about: a\ntests: [{name: x, expected: sideways}]\n")
    with pytest.raises(RecipeError, match=r"tests\.0\.expected"):
        read_registration(claims)
    claims.write_text("about: a\n")
    for lines in ("[1]\n", "{}\n", "no json\n"):
        log.write_text(lines)
        with pytest.raises(RecipeError, match="is no log of registered files"):
            register(claims, log, "abc")
        assert log.read_text() == lines
