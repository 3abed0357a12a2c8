"""The intruder: judges of known score, trials that give nothing away."""

import re

import numpy as np
import pytest
from explained_store import CAT, HOOK, NOISE, ON_CAT, ON_PAIR, SILENT, planted_store
from scripted_judges import Scripted, texts_of

import activation_store as astore
import lmmono as lm
from lmmono.records.record_reader import RecordReader
from lmmono.registry.scorers import find_scorer
from lmmono.scores.intruder import draw_trials
from lmmono.scores.score_job import ScoreJob

UNITS = (ON_CAT, ON_PAIR, SILENT, NOISE)
SETTINGS = {"window": 16, "trials": 10}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    planted = planted_store(tmp_path_factory.mktemp("intruder") / "run", n_rows=80)
    with astore.open(planted.path, mode="a") as store:
        lm.explain(store, HOOK, units=UNITS)
    return planted


@pytest.fixture
def store(planted):
    with astore.open(planted.path) as store:
        yield store


def rows_of(store, scorer, client=None):
    settings = find_scorer(scorer).with_settings(changes=SETTINGS)
    reader = RecordReader(store)
    job = ScoreJob(store, HOOK, reader, UNITS, settings, explainer="token_lookup", client=client)
    rows = find_scorer(scorer).load()(job)
    return {(row["unit"], row["control"]): row for row in rows}


def odd_one_out(question):
    cat_only = rf"(<<( w{CAT})+>>)"
    marked = [not re.search("<<", re.sub(cat_only, "", text)) for text in texts_of(question)]
    return f"It is {marked.index(False) + 1}." if marked.count(False) == 1 else "1"


def test_a_judge_that_knows_finds_every_intruder_and_a_constant_answer_is_near_chance(store):
    rows = rows_of(store, "intruder", Scripted(odd_one_out))
    assert rows[ON_CAT, None]["value"] == 1.0
    assert rows[ON_CAT, "shuffled_pairing"]["value"] < 0.6
    same = rows_of(store, "intruder", Scripted(lambda _: "2"))
    for unit in (ON_CAT, NOISE):
        assert same[unit, None]["ci_low"] < 0.2 < same[unit, None]["ci_high"]
    assert same[ON_CAT, None]["details"]["chance"] == 0.2
    assert same[SILENT, None]["nan_fraction"] == 1.0
    assert same[SILENT, None]["value"] == 0.2


def test_answers_without_one_number_count_as_guesses_and_none_at_all_as_a_failure(store):
    turn = iter(range(10**6))
    half = Scripted(lambda q: odd_one_out(q) if next(turn) % 2 else "9 or 1")
    row = rows_of(store, "intruder", half)[ON_CAT, None]
    assert row["n_failures"] == row["n"] / 2 == 5
    assert row["value"] == pytest.approx((5 + 5 * 0.2) / 10)
    row = rows_of(store, "intruder", Scripted(lambda _: "none"))[ON_CAT, None]
    assert (row["value"], row["failure"]) == (None, "unparsed")
    assert row["reason"] == "want one number of 1 to 5, got 'none'"


def test_a_program_of_the_truth_finds_intruders_and_one_that_ties_gets_its_share(store):
    rows = rows_of(store, "intruder_program")
    assert rows[ON_CAT, None]["value"] == 1.0
    assert rows[NOISE, None]["ci_low"] < 0.2 < rows[NOISE, None]["ci_high"]


def test_trials_use_the_same_marks_and_place_the_intruder_anywhere(store):
    job = ScoreJob(store, HOOK, RecordReader(store), (ON_CAT, NOISE))
    contrasts = job.reader.contrasts(HOOK, "score", 40, window=16, units=job.units)
    trials = draw_trials(contrasts, 10, 5, 0)[0]
    assert len(set(trials.intruder.tolist())) > 2
    for ids, marked, place in zip(trials.token_ids, trials.marked, trials.intruder, strict=True):
        fires = [(ids[i] == CAT).any() for i in range(5)]
        assert [not each for each in fires] == [i == place for i in range(5)]
        assert marked.any(axis=1).all()
    rows = trials.token_ids.reshape(-1, 16)
    assert len(np.unique(rows, axis=0)) == len(rows), "no record twice"
