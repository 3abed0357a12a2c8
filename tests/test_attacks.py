"""Attacks against classifiers whose weak place is known, their checks, and preservation."""

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from lmmono.data.corruption.synonyms import synonyms_of
from lmmono.data.tasks.planted_tasks import planted_task
from lmmono.data.tasks.task import Labelled
from lmmono.data.tasks.task_registry import find_task
from lmmono.errors import DataError
from lmmono.suites.attack_checks import check_attack
from lmmono.suites.attacks import Limits, attack, slips
from lmmono.suites.hotflip import hotflip
from lmmono.suites.preservation import audit_preservation

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
        two_words, TEXTS[:1], LABELS[:1], method="characters", limits=Limits(max_changed=0.5)
    )
    assert two.results[0].success and sorted(two.results[0].changed) == [3, 5]
    few = attack(keyword, TEXTS, LABELS, method="characters", limits=Limits(max_queries=4))
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


@pytest.fixture(scope="module")
def probes():
    """Two probes of one task, one of words and one of their letters, and texts to attack."""
    made = planted_task("planted_polarity", n_train=120, n_val=2, n_test=10)
    train, test = made.parts["train"], made.parts["test"]
    found = []
    for analyzer, ngrams in (("word", (1, 1)), ("char_wb", (2, 3))):
        counts = CountVectorizer(analyzer=analyzer, ngram_range=ngrams)
        model = LogisticRegression(max_iter=500).fit(
            counts.fit_transform(train.texts), train.labels
        )
        found.append(lambda texts, c=counts, m=model: m.predict_proba(c.transform(texts)))
    return (*found, list(test.texts), test.labels)


def test_the_checks_pass_an_attack_that_works(probes) -> None:
    words, letters, texts, labels = probes
    checks = check_attack(words, texts, labels, method="characters", other=letters)
    assert checks.faults == ()
    assert checks.unbounded_accuracy <= 0.05 < checks.clean_accuracy
    budgets = list(checks.accuracy_by_budget.values())
    assert budgets == sorted(budgets, reverse=True)
    assert checks.direct_accuracy < checks.transfer_accuracy


def test_the_checks_tell_a_classifier_that_does_not_read_or_does_not_keep_to_its_answer() -> None:
    def constant(texts: list[str]) -> np.ndarray:
        return np.tile([0.0, 1.0], (len(texts), 1))

    checks = check_attack(constant, TEXTS, LABELS, method="characters")
    assert checks.unbounded_accuracy == 0.75
    assert any("without limits" in fault for fault in checks.faults)
    weaker = check_attack(constant, TEXTS, LABELS, method="characters", other=keyword)
    assert weaker.transfer_accuracy == 0.75 and len(weaker.faults) == 1


# --- HotFlip -------------------------------------------------------------------------------


def linear_score(weight: torch.Tensor):
    """Classes 0 and 1 from the sum of embeddings: to first order exact."""

    def score(embeds: torch.Tensor) -> torch.Tensor:
        lead = (embeds @ weight).sum(dim=1)
        return torch.stack([torch.zeros_like(lead), lead], dim=1)

    return score


def test_hotflip_makes_the_exchange_that_trying_all_of_them_finds() -> None:
    torch.manual_seed(0)
    embedding, weight = torch.randn(30, 5), torch.randn(5)
    worth = embedding @ weight
    ids = worth.topk(4).indices
    made = hotflip(linear_score(weight), embedding, ids, 1, flips=1, beam=3)
    place, token = int(worth[ids].argmax()), int(worth.argmin())
    assert made.places == (place,) and int(made.ids[place]) == token
    kept = [i for i in range(4) if i != place]
    assert torch.equal(made.ids[kept], ids[kept])
    assert made.margin == pytest.approx(float(worth[ids][kept].sum() + worth.min()), abs=1e-4)
    assert made.queries == 1 + 3 and made.gradients == 1
    more = hotflip(linear_score(weight), embedding, ids, 1, flips=4, beam=3)
    assert more.success and more.margin <= 0 and len(set(more.places)) == len(more.places)


def test_hotflip_keeps_to_the_free_places_and_the_tokens_allowed() -> None:
    torch.manual_seed(1)
    embedding, weight = torch.randn(30, 5), torch.randn(5)
    ids = (embedding @ weight).topk(4).indices
    free = torch.tensor([False, True, False, True])
    made = hotflip(
        linear_score(weight),
        embedding,
        ids,
        1,
        flips=2,
        free=free,
        may_become=lambda token: torch.tensor([(token + 1) % 30, (token + 2) % 30]),
    )
    assert torch.equal(made.ids[~free], ids[~free])
    for place in made.places:
        assert (int(made.ids[place]) - int(ids[place])) % 30 in (1, 2)
    wrong = hotflip(linear_score(weight), embedding, ids, 0)
    assert wrong.skipped and not wrong.success and wrong.queries == 1
    with pytest.raises(DataError, match="no position"):
        hotflip(linear_score(weight), embedding, ids, 1, free=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(DataError, match="want one flip"):
        hotflip(linear_score(weight), embedding, ids, 1, flips=0)


# --- preservation --------------------------------------------------------------------------

PAIRED = Labelled(
    (
        "the long film was good from start to end",
        "the long film was bad from start to end",
        "I liked all of it very much today",
        "I hated all of it very much today",
    )
    * 6,
    np.array([1, 0, 1, 0] * 6),
    pairs=np.array([i + 1 if i % 2 == 0 else i - 1 for i in range(24)]),
)


def test_noise_that_swaps_the_deciding_words_is_told_from_noise_that_is_blind() -> None:
    turning = synonyms_of(
        {"good": ["bad"], "bad": ["good"], "liked": ["hated"], "hated": ["liked"]}
    )
    blind = synonyms_of({word: [word + "x"] for text in PAIRED.texts for word in text.split()})
    (bad,) = audit_preservation(PAIRED, ["synonyms"], [5], seed=0, synonyms=turning)
    assert bad.became_partner_fraction == bad.crossed_fraction == 1.0
    assert bad.decisive_changed_fraction == 1.0
    assert bad.selectivity > 5
    (good,) = audit_preservation(PAIRED, ["synonyms"], [3], seed=0, synonyms=blind)
    assert good.became_partner_fraction == 0.0
    assert good.changed_fraction == pytest.approx(0.3, abs=0.07)


def test_a_classifier_says_which_pairs_can_still_be_told_apart() -> None:
    def reads(texts: list[str]) -> np.ndarray:
        praise = np.array([{"good", "liked"} & set(text.split()) != set() for text in texts])
        blame = np.array([{"bad", "hated"} & set(text.split()) != set() for text in texts])
        return np.stack([blame, praise], axis=1).astype(float)

    rows = audit_preservation(PAIRED, ["case", "formatting"], [1, 5], seed=0, predict=reads)
    assert [(row.kind, row.severity) for row in rows] == [
        ("case", 1),
        ("case", 5),
        ("formatting", 1),
        ("formatting", 5),
    ]
    assert all(row.told_apart_clean_fraction == 1.0 for row in rows)
    assert rows[1].told_apart_fraction < rows[0].told_apart_fraction
    assert rows[3].told_apart_fraction == 1.0
    assert rows[3].changed_fraction == 0.0 and np.isnan(rows[3].selectivity)


def test_parts_without_pairs_or_with_pairs_of_one_class_are_refused() -> None:
    with pytest.raises(DataError, match="this part has none"):
        audit_preservation(Labelled(("a", "b"), np.array([0, 1])), ["case"], seed=0)
    alike = Labelled(("a", "b"), np.array([1, 1]), pairs=np.array([1, 0]))
    with pytest.raises(DataError, match="2 of 2 texts are of their partner's class"):
        audit_preservation(alike, ["case"], seed=0)


def test_typing_slips_keep_the_label_of_revised_reviews(shared) -> None:
    part = find_task("imdb_counterfactual", folder=shared / "data").parts["ood:contrast"]
    few = part.take(np.arange(12))
    (row,) = audit_preservation(few, ["typos"], [3], seed=0)
    assert row.became_partner_fraction == 0.0 and row.crossed_fraction < 0.2
    assert 0.03 < row.changed_fraction < 0.07
