"""Statistics with labels: hand values, chance, planted concepts."""

import numpy as np
import pytest
from explained_store import (
    CAT,
    HOOK,
    NOISE,
    ON_CAT,
    ON_PAIR,
    PAIR_THEN,
    SILENT,
    planted_store,
    rows_of,
)

import activation_store as astore
import lmmono as lm
from lmmono.errors import ExplainError
from lmmono.records.record_reader import RecordReader
from lmmono.registry.scorer_settings import LabelledSettings
from lmmono.scores.labelled import selectivity, strongest
from lmmono.scores.labelled_items import TokenLabels, read_labelled
from lmmono.scores.score_job import ScoreJob
from lmmono.stats.formulas import consistency


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_store(tmp_path_factory.mktemp("labelled") / "run", n_rows=60)


@pytest.fixture
def store(planted):
    with astore.open(planted.path) as store:
        yield store


@pytest.fixture
def labels(planted):
    """Is it the cat? Is it the second of the pair? Is its number even?"""
    ids = planted.token_ids
    truth = np.stack([ids == CAT, ids == PAIR_THEN, ids % 2 == 0], axis=2)
    return TokenLabels(np.arange(len(ids)), truth, ("cat", "pair", "even"))


def test_consistency_is_the_largest_share_and_selectivity_a_contrast_of_means():
    acts = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    labels = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    assert consistency(acts > 0, labels).tolist() == pytest.approx([2 / 3, 1.0])
    # unit 0: means 2 with, 1 without; unit 1: 2 with, 0 without
    assert selectivity(acts, labels, np.array([0, 1])).tolist() == pytest.approx([1 / 3, 1.0])
    assert strongest(acts, 0.5).tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]


def test_random_labels_give_the_expected_chance_at_small_support_and_none_after_correction():
    # two even classes, support 5: E[max share] = 0.6875, by the binomial
    rng = np.random.default_rng(0)
    firing = np.zeros((200, 400), bool)
    firing[:5] = True
    shares = []
    for _ in range(30):
        classes = rng.permutation(np.arange(200) % 2)
        shares.append(consistency(firing[:, :1], np.stack([classes == 0, classes == 1], 1))[0])
    assert np.mean(shares) == pytest.approx(0.6875, abs=0.05)


def test_units_of_known_concepts_are_consistent_and_noise_is_not(store, labels):
    rows = rows_of(store, "labelled", labels, items=5760)
    for metric in ("class_selectivity", "semantic_consistency", "semantic_consistency_raw"):
        assert rows[metric, ON_CAT, None]["value"] == pytest.approx(1.0)
    noise = rows["semantic_consistency", NOISE, None]
    assert abs(noise["value"]) < 0.1
    assert rows["semantic_consistency_raw", NOISE, None]["value"] > 0.4, "even numbers are common"
    floor = rows["semantic_consistency", ON_CAT, "shuffled_labels"]
    assert floor["value"] < 0.3
    assert rows["semantic_consistency", SILENT, None]["failure"] == "silent"
    assert rows["semantic_consistency", ON_PAIR, None]["value"] == pytest.approx(1.0)


def test_classes_of_documents_label_excerpts(planted, store):
    classes = {doc: ("a", "b")[doc % 2] for doc in np.unique(planted.doc_ids).tolist()}
    rows = rows_of(store, "labelled", classes)
    row = rows["semantic_consistency", NOISE, None]
    assert row["ci_low"] < 0.05 < 0.2 + row["ci_high"]
    assert rows["semantic_consistency_raw", NOISE, None]["value"] == pytest.approx(0.5, abs=0.15)


def test_a_probe_of_one_unit_knows_its_concept(store, labels):
    rows = rows_of(store, "sparse_probing", labels, items=5000)
    row = rows["sparse_probing_auc_1", None, None]
    assert row["details"]["cat"] == pytest.approx(1.0)
    assert row["details"]["even"] < 0.8
    assert rows["sparse_probing_auc_1", None, "shuffled_labels"]["value"] < 0.65
    assert rows["sparse_probing_auc_5", None, None]["value"] >= row["value"] - 0.05


def test_fms_is_high_where_one_unit_holds_the_concept_and_counts_redundancy(store, labels):
    # without the unit that is a number for each token, so that one threshold finds the cat
    rows = rows_of(store, "fms", labels, units=(ON_CAT, ON_PAIR, NOISE), items=5000)
    cat = rows["fms", None, None]["details"]["cat"]
    assert cat["accuracy"] == pytest.approx(1.0, abs=0.01)
    assert cat["fms"] > 0.9
    assert rows["fms", None, None]["details"]["even"]["fms"] < cat["fms"]


def test_fms_follows_its_equation_by_hand():
    from lmmono.scores.unit_probing import monosemanticity

    # best 0.9, without it 0.6, deeper trees 0.92 and 0.94
    value = monosemanticity(0.9, 0.6, [0.92, 0.94])
    assert value == pytest.approx(0.9 * (0.6 + (1 - 0.03)) / 2)
    assert monosemanticity(0.9, 0.9, [0.9]) == pytest.approx(0.9 * (0 + 1) / 2)


def test_shuffled_labels_keep_how_many_items_have_each_concept(store, labels):
    job = ScoreJob(
        store, HOOK, RecordReader(store), settings=LabelledSettings(items=2000), labels=labels
    )
    found = read_labelled(job, "score")
    for seed in range(3):
        other = found.shuffled(np.random.default_rng(seed))
        assert (other.sum(axis=0) == found.labels.sum(axis=0)).all()
        assert (other != found.labels).any()


def test_units_with_little_support_have_no_consistency(store, labels):
    rows = rows_of(store, "labelled", labels, items=200)
    row = rows["semantic_consistency", ON_CAT, None]
    assert 0 < row["n"] < 20
    assert (row["value"], row["failure"]) == (None, "too_few_records")


def test_labels_that_do_not_fit_are_told(store, labels):
    half = TokenLabels(labels.seq_ids[:10], labels.truth[:10])
    for wrong, message in ((half, "rows of split"), ({0: "a"}, "documents of"), (3, "got int")):
        with pytest.raises(ExplainError, match=message):
            rows_of(store, "labelled", wrong)


def test_scores_under_other_labels_are_other_scores(planted, labels):
    store = astore.open(planted.path, mode="a")
    first = lm.score(store, HOOK, scorer="labelled", labels=labels, items=500)
    assert lm.score(store, HOOK, scorer="labelled", labels=labels, items=500).n_units == 0
    truth = labels.truth.copy()
    truth[0, 0, 0] ^= True
    other = TokenLabels(labels.seq_ids, truth, labels.names)
    again = lm.score(store, HOOK, scorer="labelled", labels=other, items=500)
    assert again.n_units == first.n_units > 0 and again.preset != first.preset
