"""Detection and fuzz: judges whose exact score is known, and what the records may not give away."""

import json
import re

import numpy as np
import pytest
from explained_store import CAT, HOOK, NOISE, ON_CAT, ON_PAIR, SILENT, planted_store
from scripted_judges import Scripted, always, at_random, labels, never

import activation_store as astore
import lmmono as lm
from lmmono.records.record_reader import RecordReader
from lmmono.records.sampler import CLASSES
from lmmono.registry.scorers import find_scorer
from lmmono.scores.classification import marked_tokens
from lmmono.scores.score_job import ScoreJob

KNOWN = [ON_CAT, ON_PAIR, SILENT, NOISE]
SETTINGS = {"window": 16, "n": 20}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    planted = planted_store(tmp_path_factory.mktemp("classes") / "run", n_rows=60)
    with astore.open(planted.path, mode="a") as store:
        lm.explain(store, HOOK, units=KNOWN)
    return planted


@pytest.fixture
def store(planted):
    with astore.open(planted.path, mode="a") as store:
        yield store


def rows_of(store, scorer, client=None, seed=0, **settings):
    settings = find_scorer(scorer).with_settings(changes=SETTINGS | settings)
    job = ScoreJob(
        store,
        HOOK,
        RecordReader(store, seed=seed),
        tuple(KNOWN),
        settings,
        explainer="token_lookup",
        seed=seed,
        client=client,
    )
    rows = find_scorer(scorer).load()(job)
    return {(row["metric"], row["unit"], row.get("control")): row for row in rows}


def is_cat(text):
    return f" w{CAT} " in f"{text.replace(' w', '  w')} "


def marks_cat_only(text):
    marked = re.findall(r"<<(.*?)>>", text)
    return bool(marked) and all(set(each.split()) == {f"w{CAT}"} for each in marked)


def test_a_judge_that_says_the_truth_scores_one_and_one_that_knows_nothing_scores_half(store):
    for scorer, rule in (("detection", is_cat), ("fuzz", marks_cat_only)):
        truth = rows_of(store, scorer, Scripted(labels(rule)))[scorer, ON_CAT, None]
        assert truth["value"] == 1.0
        assert {k: truth["details"][k] for k in ("tp", "tn", "fp", "fn")} == {
            "tp": 20, "tn": 20, "fp": 0, "fn": 0,
        }  # fmt: skip
        for judge, counts in ((always, (20, 0, 20, 0)), (never, (0, 20, 0, 20))):
            row = rows_of(store, scorer, Scripted(judge))[scorer, NOISE, None]
            assert row["value"] == 0.5
            assert tuple(row["details"][k] for k in ("tp", "tn", "fp", "fn")) == counts
        row = rows_of(store, scorer, Scripted(at_random()))[scorer, ON_CAT, None]
        assert row["ci_low"] < 0.5 < row["ci_high"]


def test_an_unparsable_answer_is_counted_and_neither_right_nor_wrong(store):
    turn = iter(range(10**6))
    rule = labels(is_cat)
    some = Scripted(lambda question: "I think so" if next(turn) % 2 else rule(question))
    row = rows_of(store, "detection", some)["detection", ON_CAT, None]
    unanswered = row["details"]["unanswered"]
    assert 0 < unanswered == row["n_failures"] < 40
    assert sum(row["details"].values()) == row["n"] == 40
    assert row["value"] == pytest.approx(1 - unanswered / 80)
    nothing = rows_of(store, "detection", Scripted(lambda _: "[1]"))["detection", ON_CAT, None]
    assert (nothing["value"], nothing["failure"]) == (None, "unparsed")
    assert nothing["reason"] == "want a list of 5 labels, got '[1]'"


@pytest.mark.parametrize("scorer", ["detection", "intruder", "surprisal", "simulation_tar"])
def test_why_a_judge_was_out_of_reach_stands_in_the_row(store, scorer):
    dead = Scripted(lambda _: None, name="dead", detail="HTTP 503: down")
    how = {"units": [ON_CAT, ON_PAIR], "controls": False}
    how |= {"simulator": "llm"} if scorer == "simulation_tar" else {}
    lm.score(store, HOOK, scorer=scorer, client=dead, **how)
    query = "SELECT value, failure, reason FROM scores WHERE metric = $metric AND unit = $unit"
    rows = store.sql(query, metric=scorer, unit=ON_CAT).fetchall()
    assert rows == [(None, "no_answer", "HTTP 503: down")]


def test_calls_and_tokens_of_a_unit_are_told_once(store):
    client = Scripted(always)
    rows = rows_of(store, "detection", client)
    mine = [row for (_, unit, _), row in rows.items() if unit == ON_CAT and row.get("n_calls")]
    # 40 records in batches of 5, for the explanation and for each of two that are controls
    assert [row["n_calls"] for row in mine] == [8, 8, 8]
    assert sum(row.get("n_calls") or 0 for row in rows.values()) == len(client.prompts)
    assert mine[0]["judge"] == "scripted"
    assert mine[0]["prompt_hash"] != mine[1]["prompt_hash"]


def test_probabilities_of_the_labels_rank_records_where_the_client_gives_them():
    from lmmono.clients.client import Answer
    from lmmono.scores.judging import _parsed

    half = {"0": np.log(0.3), "1": np.log(0.1), " 1": np.log(0.1), "x": np.log(0.5)}
    sure = {"1": 0.0}
    answer = Answer(
        "[0,1]", tokens=("[", "0", ",", "1", "]"), alternatives=({}, half, {}, sure, {})
    )
    fires, scores = _parsed(answer, 2)
    assert fires.tolist() == [0, 1]
    assert scores == pytest.approx([0.4, 1.0])


def test_a_program_of_the_truth_detects_and_its_controls_do_not(store):
    rows = rows_of(store, "detection")
    assert rows["detection", ON_CAT, None]["value"] == 1.0
    assert rows["detection_auroc", ON_CAT, None]["value"] == 1.0
    pair = rows["detection", ON_PAIR, None]
    assert pair["value"] > rows["detection_near_miss", ON_PAIR, None]["value"] + 0.1
    for control in ("random_explanation", "shuffled_pairing", "matched_density"):
        row = rows["detection", ON_CAT, control]
        assert row["ci_low"] <= 0.5 <= row["ci_high"], control


def test_fuzz_by_a_program_finds_the_marks_where_the_unit_fires(store):
    rows = rows_of(store, "fuzz")
    for name in ("fuzz", "fuzz_active"):
        assert rows[name, ON_CAT, None]["value"] == 1.0
        noise = rows[name, NOISE, None]
        assert noise["ci_low"] < 0.5 < noise["ci_high"]


def test_a_unit_that_never_fires_has_chance_and_is_told_as_not_defined(store):
    row = rows_of(store, "detection")["detection", SILENT, None]
    assert (row["value"], row["nan_fraction"], row["failure"]) == (0.5, 1.0, "silent")


def test_marks_of_all_classes_lie_at_the_same_places_and_wrong_ones_never_where_it_fires(store):
    job = ScoreJob(store, HOOK, RecordReader(store), (ON_CAT, NOISE))
    contrasts = job.reader.contrasts(HOOK, "score", 20, window=16, units=job.units)
    marks = marked_tokens(contrasts, 0)
    ids = contrasts.token_ids(("firing", "silent", "more_firing"))
    full = (ids >= 0).all(axis=2)
    for i in range(2):
        true, silent, wrong = (marks[i, at : at + 20] for at in (0, 20, 40))
        pairs = full[i, :20] & full[i, 20:40]
        assert pairs.any()
        assert (true[pairs] == silent[pairs]).all()
        there = contrasts.index[i, 3] >= 0
        n_true = true[: there.sum()].sum(axis=1)
        assert (wrong[there].sum(axis=1) == n_true).mean() > 0.8
        assert not (wrong & (contrasts.acts[i, 3] > 0)).any()
        assert (contrasts.acts[i, 0][true] > 0).all()


def test_classes_are_what_they_say_and_share_no_record(planted, store):
    contrasts = RecordReader(store).contrasts(HOOK, "score", 20, window=16)
    excerpts = contrasts.excerpts
    for unit in (ON_CAT, ON_PAIR, NOISE):
        drawn = [each[each >= 0] for each in contrasts.index[unit]]
        merged = np.concatenate(drawn)
        assert len(set(merged)) == len(merged)
        for name, index in zip(CLASSES, drawn, strict=True):
            for i in index:
                pos, n = excerpts.first_pos[i], excerpts.lengths[i]
                acts = planted.acts[excerpts.seq_ids[i], pos : pos + n, unit]
                assert acts.any() == name.endswith("firing")
    ranked = RecordReader(store).contrasts(HOOK, "score", 20, window=16, ranked=True)
    assert (ranked.index[5, :2] >= 0).all(), "a unit that fires on every token has both classes"
    assert (contrasts.index[5, 1] == -1).all()


def test_tokens_that_changed_places_in_the_score_split_leave_chance(tmp_path, planted):
    rng, mine = np.random.default_rng(0), planted.rows("score")
    ids = planted.token_ids.copy()
    ids[mine] = rng.permutation(ids[mine].reshape(-1)).reshape(ids[mine].shape)
    with astore.open(tmp_path / "run", mode="w") as store:
        rows = [astore.Rows(HOOK, 6, max_density=1.0)]
        with store.writer(rows=rows, n_ctx=ids.shape[1]) as writer:
            for split in ("explain", "score"):
                here = planted.rows(split)
                acts = {HOOK: planted.acts[here]}
                seq = np.arange(here.start, here.stop)
                writer.add(seq, ids[here], planted.doc_ids[here], split, acts)
        lm.explain(store, HOOK, units=KNOWN)
        for scorer, metrics in (
            ("detection", ("detection", "detection_auroc")),
            ("fuzz", ("fuzz", "fuzz_auroc", "fuzz_active", "fuzz_active_auroc")),
        ):
            found = rows_of(store, scorer, n=50)
            for metric in metrics:
                row = found[metric, ON_CAT, None]
                assert row["ci_low"] < 0.5 < row["ci_high"], metric


def test_rows_are_stored_and_summed_up_with_the_share_not_defined(store):
    found = lm.score(store, HOOK, scorer=["detection", "fuzz"], units=KNOWN, **SETTINGS)
    summary = {(row["metric"], row["control"]): row for row in found.summary}
    assert summary["detection", None]["nan_fraction"] == 0.25
    query = (
        "SELECT details FROM all_scores WHERE metric = 'fuzz' AND unit = $unit AND control IS NULL"
    )
    (details,) = store.sql(query, unit=ON_CAT).fetchall()[0]
    assert json.loads(details)["tp"] == 20
    again = lm.score(store, HOOK, scorer=["detection", "fuzz"], units=KNOWN, **SETTINGS)
    assert (again.n_units, again.n_found) == (0, 2 * len(KNOWN))


def test_a_judge_out_of_reach_is_asked_again_and_one_that_answers_badly_is_not(store):
    how = {"scorer": "detection", "units": KNOWN, "controls": False, **SETTINGS}
    dead = lm.score(store, HOOK, client=Scripted(lambda _: None), **how)
    assert dead.n_units == len(KNOWN) and repr(dead)
    badly = lm.score(store, HOOK, client=Scripted(lambda _: "I cannot say"), **how)
    assert badly.n_units == len(KNOWN) - 1, "the silent unit was never asked about"
    assert lm.score(store, HOOK, client=Scripted(always), **how).n_units == 0
    query = "SELECT DISTINCT failure FROM all_scores WHERE judge = 'scripted' AND unit = $unit"
    assert store.sql(query, unit=ON_CAT).fetchall() == [("unparsed",)]


def test_a_connection_that_breaks_half_way_leaves_no_score(store):
    turn, rule = iter(range(10**6)), labels(is_cat)
    broken = Scripted(lambda question: None if next(turn) % 4 == 0 else rule(question))
    row = rows_of(store, "detection", broken)["detection", ON_CAT, None]
    assert (row["value"], row["failure"]) == (None, "no_answer")


def test_a_connection_that_breaks_at_a_control_is_asked_again(store):
    how = {"units": [ON_CAT], "scorer": "detection", "seed": 5}
    turn, rule = iter(range(10**6)), labels(is_cat)
    alone = Scripted(rule, name="another")
    lm.score(store, HOOK, client=alone, controls=False, **how)
    n_asked = len(alone.prompts)
    broken = Scripted(lambda question: rule(question) if next(turn) < n_asked else None)
    lm.score(store, HOOK, client=broken, **how)
    query = """SELECT control, failure FROM all_scores WHERE seed = 5 AND unit = $unit
        AND judge = 'scripted' AND metric = 'detection' AND failure IS NOT NULL ORDER BY ALL"""
    failed = store.sql(query, unit=ON_CAT).fetchall()
    assert failed == [("matched_density", "no_answer"), ("random_explanation", "no_answer")]
    assert lm.score(store, HOOK, client=Scripted(rule), **how).n_units == 1
    assert store.sql(query, unit=ON_CAT).fetchall() == []
    assert lm.score(store, HOOK, client=Scripted(rule), **how).n_units == 0


def test_a_new_explanation_is_scored_and_another_judge_is_asked(store):
    how = {"scorer": "detection", "units": KNOWN, "controls": False, **SETTINGS}
    first, other = Scripted(always), Scripted(never)
    other.name = "other"
    lm.score(store, HOOK, client=first, **how)
    n = lm.score(store, HOOK, client=other, **how).n_units
    assert n == len(KNOWN) and other.prompts
    assert lm.score(store, HOOK, client=first, **how).n_units == 0
    lm.explain(store, HOOK, units=KNOWN, overwrite=True)
    assert lm.score(store, HOOK, client=first, **how).n_units == len(KNOWN)
