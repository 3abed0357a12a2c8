"""Attacks against classifiers whose weak place is known."""

import numpy as np
import pytest

from lmmono.data.corruption.synonyms import synonyms_of
from lmmono.errors import DataError
from lmmono.suites.attacks import AttackLimits, attack, slips

TEXTS = ["the film is good and  long", "a bad\nday at sea", "good food", "it is late"]
LABELS = np.array([1, 0, 1, 1])


def keyword(texts: list[str]) -> np.ndarray:
    """A classifier that looks for one word and else says class 0."""
    good = np.array(["good" in text.split() for text in texts], float)
    return np.stack([np.full(len(texts), 0.5), good], axis=1)


def test_an_attack_finds_the_one_word_that_decides_and_counts_its_queries() -> None:
    report = attack(keyword, TEXTS, LABELS, method="characters", seed=0)
    assert [r.skipped for r in report.results] == [False, False, False, True]
    first, second, third, _ = report.results
    assert first.success and first.changed == (3,)
    # one to look, six deletions, then the candidates for the word that matters most
    assert first.queries == 1 + 6 + len(slips(0)("good"))
    assert first.adversarial.split()[3] in slips(0)("good")
    assert first.adversarial.startswith("the film is ") and first.adversarial.endswith("and  long")
    assert not second.success  # no slip makes "good" of another word
    assert second.adversarial == TEXTS[1]
    assert third.success and third.queries == 1 + 2 + len(slips(0)("good"))
    assert report.clean_accuracy == 0.75
    assert report.accuracy_under_attack == 0.25
    assert report.success_rate == pytest.approx(2 / 3)
    assert report.changed_fraction == pytest.approx((1 / 6 + 1 / 2) / 2)


def test_a_word_attack_uses_only_the_words_it_was_given() -> None:
    lists = synonyms_of({"good": ["fine"], "bad": ["good"]})
    report = attack(keyword, TEXTS, LABELS, method="words", synonyms=lists)
    assert report.results[0].adversarial == "the film is fine and  long"
    assert report.results[1].adversarial == "a good\nday at sea"
    assert report.accuracy_under_attack == 0.0
    none = attack(keyword, TEXTS, LABELS, method="words", synonyms=synonyms_of({}))
    assert none.success_rate == 0.0 and np.isnan(none.changed_fraction)


def test_limits_on_queries_and_words_hold() -> None:
    def two_words(texts: list[str]) -> np.ndarray:
        good = np.array([sum(word in text.split() for word in ("good", "long")) for text in texts])
        return np.stack([np.full(len(texts), 0.5), good.astype(float)], axis=1)

    one = attack(two_words, TEXTS[:1], LABELS[:1], method="characters")
    assert len(one.results[0].changed) == 1 and not one.results[0].success  # 30 % of six words
    two = attack(
        two_words, TEXTS[:1], LABELS[:1], method="characters", limits=AttackLimits(max_changed=0.5)
    )
    assert two.results[0].success and sorted(two.results[0].changed) == [3, 5]
    few = attack(keyword, TEXTS, LABELS, method="characters", limits=AttackLimits(max_queries=4))
    assert all(result.queries <= 4 for result in few.results)
    asked: list[str] = []

    def counting(texts: list[str]) -> np.ndarray:
        asked.extend(texts)
        return keyword(texts)

    report = attack(counting, TEXTS, LABELS, method="characters")
    assert sum(result.queries for result in report.results) == len(asked)


def test_attacks_that_cannot_be_run_are_refused() -> None:
    with pytest.raises(DataError, match="did you mean words"):
        attack(keyword, TEXTS, LABELS, method="word")
    with pytest.raises(DataError, match="needs `synonyms`"):
        attack(keyword, TEXTS, LABELS, method="words")
    with pytest.raises(DataError, match="4 texts and 3 labels"):
        attack(keyword, TEXTS, LABELS[:3], method="characters")
