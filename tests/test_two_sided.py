"""Two-sided records: weights without bias, and recall and precision as over every token."""

import numpy as np
import pytest
import test_embedding
from explained_store import HOOK, NOISE, ON_CAT, ON_PAIR, planted_store

import activation_store as astore
import lmmono as lm
from lmmono.errors import ExplainError
from lmmono.records.record_reader import RecordReader
from lmmono.records.sides import draw_weights
from lmmono.registry.scorers import find_scorer
from lmmono.scores.embedding import SentenceEncoder
from lmmono.scores.score_job import ScoreJob
from lmmono.scores.two_sided import SeenRecords

SIDES = ("active", "predicted", "random")
UNITS = (ON_CAT, ON_PAIR, NOISE)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    planted = planted_store(tmp_path_factory.mktemp("sides") / "run")
    with astore.open(planted.path, mode="a") as store:
        lm.explain(store, HOOK, units=UNITS)
        lm.score(store, HOOK, scorer="population", controls=False, window=16)
        yield store


def rows_of(store, scorer, *, reader=None, seed=0, client=None, controls=False, **settings):
    record = find_scorer(scorer)
    changes = {"sides": SIDES, **({"window": 16} if hasattr(record.settings, "window") else {})}
    changes |= settings
    job = ScoreJob(store, HOOK, reader or RecordReader(store, seed=seed), UNITS,
                   record.with_settings(changes=changes), explainer="token_lookup",
                   controls=controls, seed=seed, client=client)  # fmt: skip
    return {(row["metric"], row["unit"], row.get("control")): row for row in record.load()(job)}


def test_weighted_draws_from_frames_that_overlap_sum_to_the_population_without_bias():
    """Hand-made frames: 30, 12 and 60 of 60 items, 5 drawn of each, 4,000 times."""
    rng = np.random.default_rng(0)
    frames = np.zeros((60, 3), bool)
    frames[:30, 0] = frames[25:37, 1] = frames[:, 2] = True
    y = rng.normal(1.0, 2.0, 60)
    sizes, n, totals = frames.sum(axis=0), 5, np.zeros(4000)
    for draw in range(len(totals)):
        picks = np.stack([rng.choice(np.flatnonzero(f), n, replace=False) for f in frames.T])
        weights = draw_weights(frames[picks], np.full(3, n), sizes)
        totals[draw] = (weights * y[picks]).sum()
    error = totals.std() / np.sqrt(len(totals))
    assert abs(totals.mean() - y.sum()) < 3 * error
    assert error < 0.02 * abs(y.sum())


def test_with_all_records_drawn_every_measure_is_that_of_the_population(store):
    rows = rows_of(store, "simulation_random", per_side=10_000)
    names = {"recall": "recall", "precision": "precision", "f1": "f1", "weighted": "pearson"}
    query = "SELECT metric, unit, value FROM scores WHERE metric LIKE 'population_%'"
    whole = {row[:2]: row[2] for row in store.sql(query).fetchall()}
    for unit in UNITS:
        for name, of in names.items():
            found = rows[f"simulation_random_{name}", unit, None]["value"]
            # excerpts leave out windows of under 8 tokens and repeated ones
            assert found == pytest.approx(whole[f"population_{of}", unit], abs=0.02), (unit, name)


def test_few_records_estimate_the_same_over_seeds_and_say_how_many_there_were(store):
    query = "SELECT unit, value FROM scores WHERE metric = 'population_recall'"
    whole, reader = dict(store.sql(query).fetchall()), RecordReader(store)
    found = [rows_of(store, "simulation_tar", reader=reader, seed=seed, per_side=8)
             for seed in range(12)]  # fmt: skip
    values = np.array([rows["simulation_tar_recall", NOISE, None]["value"] for rows in found])
    assert abs(values.mean() - whole[NOISE]) < 3 * values.std() / np.sqrt(12) + 0.02
    details = found[0]["simulation_tar_f1", NOISE, None]["details"]
    assert details["active"]["n"] == 8 < details["active"]["of"]
    assert set(details) == set(SIDES)


def test_detection_counts_whole_records_and_controls_are_scored_too(store):
    rows = rows_of(store, "detection", controls=True)
    for name in ("recall", "precision", "f1"):
        row = rows[f"detection_{name}", ON_CAT, None]
        assert row["value"] == 1.0 and 0.7 < row["ci_low"] < row["ci_high"] == 1.0
    # the best threshold of an explanation that says nothing calls every record firing
    assert rows["detection_precision", ON_CAT, "random_explanation"]["value"] < 0.7


def test_sides_that_were_not_drawn_leave_their_measures_undefined(store):
    rows = rows_of(store, "detection", sides=("active",))
    undefined = {name: rows[f"detection_{name}", ON_CAT, None]["nan_fraction"]
                 for name in ("recall", "precision", "f1", "weighted")}  # fmt: skip
    assert undefined == {"recall": 0.0, "precision": 1.0, "f1": 1.0, "weighted": 1.0}
    with pytest.raises(ExplainError, match="sides: want any of 'active', 'predicted', 'random'"):
        rows_of(store, "detection", sides=("left",))


def test_with_all_short_examples_drawn_intervals_count_the_population(store):
    rows = rows_of(store, "anthropic_intervals", per_side=10_000)
    query = "SELECT metric, unit, value FROM scores WHERE metric LIKE 'population_%'"
    whole = {row[:2]: row[2] for row in store.sql(query).fetchall()}
    for unit in (ON_CAT, NOISE):  # the pair needs the word before, which a cut may take away
        for name, of in {"recall": "recall", "precision": "precision", "f1": "f1"}.items():
            found = rows[f"anthropic_intervals_{name}", unit, None]["value"]
            assert found == pytest.approx(whole[f"population_{of}", unit], abs=0.05), (unit, name)


def test_believed_marks_are_counted_by_hand():
    """Active: two records of two marked tokens, one believed. Predicted: one believed, half right.

    The strongest half of firing is marked as in `fuzz`, so the 0.1 beside the 1.0 is not.
    """
    truth = np.array([[[1.0, 1.0, 0.1], [0.0, 1.0, 1.0]], [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    marked = np.array([[[1, 1, 0], [0, 1, 1]], [[1, 1, 0], [0, 1, 1]]], bool)
    ids, zeros = np.ones(truth.shape, np.int64), np.zeros(truth.shape)
    seen = SeenRecords(ids, truth, zeros, marked, marked, np.ones((2, 2)), np.zeros((2, 2), int))
    fires, says, both = seen.counted("marks", np.array([[True, False], [True, False]]))
    assert fires[0].tolist() == [2, 2] and both[0].tolist() == [2, 0]  # recall 2 of 4
    assert says[1].tolist() == [2, 0] and both[1].tolist() == [1, 0]  # precision 1 of 2


def test_fuzz_judges_marks_of_both_sides_and_refuses_the_side_without_marks(store):
    rows = rows_of(store, "fuzz", sides=("active", "predicted"), controls=True)
    for name in ("recall", "precision", "f1"):
        assert rows[f"fuzz_{name}", ON_CAT, None]["value"] == 1.0
    assert ("fuzz_weighted", ON_CAT, None) not in rows
    assert rows["fuzz_f1", ON_CAT, "random_explanation"]["value"] < 0.5
    with pytest.raises(ExplainError, match="sides: want any of 'active', 'predicted', got"):
        rows_of(store, "fuzz")


@pytest.mark.parametrize("scorer", ["embedding", "surprisal"])
def test_what_places_texts_says_yes_above_a_threshold_of_other_documents(store, scorer):
    client = test_embedding.Reader() if scorer == "surprisal" else None
    settings = {"n": 20, "per_side": 10}
    if scorer == "embedding":
        settings["encoder"] = SentenceEncoder("words", test_embedding.bag_of_words)
    rows = rows_of(store, scorer, client=client, **settings)
    for name in ("recall", "precision", "f1", "weighted"):
        # the reader is not asked about a text's first word
        least = {"embedding": 1.0, "surprisal": 0.7}[scorer]
        assert rows[f"{scorer}_{name}", ON_CAT, None]["value"] >= least, name
    # nothing in a text tells where noise fires
    assert rows[f"{scorer}_f1", NOISE, None]["value"] < 0.9


@pytest.mark.parametrize(
    ("scorer", "reason"),
    [
        ("intruder", "it reads no explanation"),
        ("intruder_program", "a trial says which record is weakest"),
        ("population", "it draws no records"),
    ],
)
def test_scorers_without_sides_say_why(scorer, reason):
    with pytest.raises(ExplainError, match=f"{scorer}: no setting 'sides'; {reason}"):
        find_scorer(scorer).with_settings(changes={"sides": ["active"]})
