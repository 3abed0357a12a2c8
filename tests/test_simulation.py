"""Simulation scorers: exact scores of known programs, controls, presets, rows and resumption."""

import json

import numpy as np
import pytest
from explained_store import (
    CAT,
    DENSE,
    HOOK,
    NOISE,
    ON_CAT,
    ON_PAIR,
    OTHER,
    SILENT,
    TWO_DOCUMENTS,
    planted_store,
)
from scipy.stats import pearsonr

import activation_store as astore
import lmmono as lm
from lmmono.errors import ExplainError
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.explanation_controls import Constant
from lmmono.explanations.stored_explanations import kept_explanations
from lmmono.explanations.token_lookup import Lookup
from lmmono.records import record_reader
from lmmono.records.record_reader import RecordReader
from lmmono.registry.metrics import METRICS
from lmmono.registry.scorers import SCORERS, find_scorer
from lmmono.scores import simulation
from lmmono.scores.score_job import ScoreJob
from lmmono.scores.simulation import scored_records, simulated

BOTH = ["simulation_tar", "simulation_random"]
MEASURES = ("", "_spearman", "_r2", "_uncentred_r2", "_deviation")


def store_programs(store, explainer, programs, hook=HOOK):
    rows = [
        Explanation(hook, unit, explainer, text="by hand", program=program, seed=0).row()
        for unit, program in programs.items()
    ]
    store.append("explanations", rows)


def unit_rows(store, explainer, metric="simulation_tar", control=None):
    query = """SELECT * FROM all_scores WHERE explainer = $explainer AND metric = $metric
        AND control IS NOT DISTINCT FROM $control AND unit IS NOT NULL AND preset IS NULL
        ORDER BY unit"""
    table = store.sql(query, explainer=explainer, metric=metric, control=control).to_arrow_table()
    return {row["unit"]: row for row in table.to_pylist()}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_store(tmp_path_factory.mktemp("simulation") / "run")


@pytest.fixture(scope="module")
def store(planted):
    with astore.open(planted.path, mode="a") as store:
        lm.explain(store, HOOK)
        lm.score(store, HOOK, scorer=BOTH)
        yield store


def test_programs_of_known_skill_get_their_exact_scores(store):
    ids = np.arange(60)
    truth = {ON_CAT: Lookup(np.array([CAT]), np.array([2.0]), 0.0)}
    truth[DENSE] = Lookup(ids, 0.1 + ids / 40, 0.0)
    store_programs(store, "truth", truth)
    store_programs(store, "zero", {unit: Constant(0.0) for unit in truth})
    store_programs(store, "same", {unit: Constant(3.0) for unit in truth})
    coin = np.random.default_rng(0).random(60)
    store_programs(store, "coin", {unit: Lookup(ids, coin, 0.0) for unit in (NOISE, ON_CAT)})
    for name in ("truth", "zero", "same", "coin"):
        lm.score(store, HOOK, scorer=BOTH, explainer=name)
    for scorer in BOTH:
        for measure in MEASURES:
            for row in unit_rows(store, "truth", scorer + measure).values():
                assert row["value"] == pytest.approx(1.0, abs=1e-6), scorer + measure
                assert row["nan_fraction"] == 0
        for name in ("zero", "same"):
            for measure in ("", "_spearman"):
                for row in unit_rows(store, name, scorer + measure).values():
                    assert (row["value"], row["nan_fraction"]) == (0.0, 1.0)
                    assert row["ci_low"] is None and row["failure"] is None
        for row in unit_rows(store, "zero", f"{scorer}_uncentred_r2").values():
            assert row["value"] == pytest.approx(0.0)
        assert abs(unit_rows(store, "coin", scorer)[NOISE]["value"]) < 0.1


def test_the_value_is_pearson_over_the_tokens_of_all_records(store):
    reader = RecordReader(store)
    explained = kept_explanations(reader, HOOK, "token_lookup")
    records = reader.records(HOOK, "score", lm.records.Counts(top=20, random=20))
    for scorer, kinds in (
        ("simulation_tar", ("top", "random")),
        ("simulation_random", ("random",)),
    ):
        rows, columns = unit_rows(store, "token_lookup", scorer), records.columns(*kinds)
        for unit in (ON_CAT, ON_PAIR, NOISE, DENSE):
            ids = records.token_ids(unit)[columns]
            predicted = explained[unit].program.simulate(ids)[ids >= 0]
            acts = records.acts[unit][columns][ids >= 0]
            assert rows[unit]["value"] == pytest.approx(pearsonr(acts, predicted)[0])
            assert rows[unit]["n_tokens"] == len(acts)
            assert rows[unit]["n_records"] == (records.index[unit, columns] >= 0).sum()
            docs = records.excerpts.doc_ids[records.index[unit, columns]]
            assert rows[unit]["n_documents"] == len(set(docs[records.index[unit, columns] >= 0]))


def test_every_row_says_where_it_comes_from(store):
    for row in unit_rows(store, "token_lookup").values():
        assert row["metric_version"] == METRICS["simulation_tar"].version
        assert (row["seed"], row["split"], row["explainer"]) == (0, "score", "token_lookup")
        assert row["n_records"] > 0 and row["n_tokens"] > 0 and row["seconds"] > 0
        assert row["nan_fraction"] in (0, 1)
        if row["ci_low"] is not None:
            assert row["ci_low"] <= row["value"] <= row["ci_high"]
            assert row["ci_level"] == 0.95
            assert row["ci_method"].startswith("jackknife over records within kinds")
    assert set(SCORERS["simulation_tar"].metrics) <= set(METRICS)


def test_a_unit_without_an_explanation_scores_0_and_is_counted(store):
    rows = unit_rows(store, "token_lookup")
    for unit, failure in ((SILENT, "silent"), (TWO_DOCUMENTS, "too_few_records")):
        assert rows[unit]["failure"] == failure
        assert (rows[unit]["value"], rows[unit]["nan_fraction"]) == (0.0, 1.0)
        assert rows[unit]["n_failures"] == 0


def test_controls_stay_low_where_the_score_is_high(store):
    score = unit_rows(store, "token_lookup")
    assert score[ON_CAT]["value"] > 0.99
    for control in ("random_explanation", "shuffled_pairing", "matched_density"):
        rows = unit_rows(store, "token_lookup", control=control)
        assert rows.keys() == score.keys()
        assert rows[ON_CAT]["value"] < 0.4, control
        assert rows[DENSE]["value"] < 0.4, control


def test_what_is_said_of_another_unit_is_read_on_the_scale_of_the_unit_itself(store):
    said = {ON_CAT: Lookup(np.array([CAT]), np.array([2.0]), 0.0)}
    said[DENSE] = Lookup(np.arange(60), 0.1 + np.arange(60) / 40, 0.0)
    store_programs(store, "two", said)
    lm.score(store, HOOK, explainer="two", scorer="simulation_random")
    records = RecordReader(store).records(HOOK, "score", lm.records.Counts(random=20))
    ids = records.token_ids(DENSE)
    (largest,) = store.sql(f"SELECT max_act FROM unit_stats WHERE unit = {DENSE}").fetchall()[0]
    predicted = said[ON_CAT].simulate(ids)[ids >= 0] * largest / 2.0
    acts = records.acts[DENSE][ids >= 0].astype(float)
    rows = unit_rows(store, "two", "simulation_random_deviation", control="random_explanation")
    wanted = 1 - np.abs(acts - predicted).sum() / acts.sum()
    assert rows[DENSE]["value"] == pytest.approx(wanted)


def test_shuffled_pairing_keeps_a_record_with_others_of_its_kind(store):
    settings = find_scorer("simulation_tar").with_settings(changes={"top": 4, "random": 6})
    job = ScoreJob(store, HOOK, RecordReader(store), settings=settings, explainer="token_lookup")
    records = scored_records(job, ("top", "random"))
    partner = simulation._partners(job, records, np.arange(6))
    for unit in (ON_CAT, NOISE):
        assert sorted(partner[unit]) == list(range(10))
        assert (partner[unit] != np.arange(10)).all(), "never with itself"
        assert set(partner[unit][:4]) == set(range(4)), "top with top"
    names = [series.control for series in simulated(job, records)]
    others = ["random_explanation", "matched_density"]
    assert names == [None, "shuffled_pairing", *others]


def test_means_count_what_is_not_defined_as_0_and_also_leave_it_out(store):
    units = unit_rows(store, "token_lookup")
    values = np.array([row["value"] for row in units.values()])
    defined = np.array([row["nan_fraction"] == 0 for row in units.values()])
    query = """SELECT metric, value, ci_low, ci_high, n, nan_fraction, details, hook FROM all_scores
        WHERE unit IS NULL AND control IS NULL AND explainer = 'token_lookup' AND preset IS NULL
            AND metric IN ('simulation_tar', 'simulation_tar_defined')"""
    rows = {(row[0], row[-1]): row[1:-1] for row in store.sql(query).fetchall()}
    assert {hook for _, hook in rows} == {HOOK, "blocks.*.mlp.hook_post"}
    for hook in (HOOK, "blocks.*.mlp.hook_post"):
        value, low, high, n, nan_fraction, details = rows["simulation_tar", hook]
        assert value == pytest.approx(values.mean())
        assert (n, nan_fraction) == (6, pytest.approx(2 / 6))
        assert low < value < high
        assert json.loads(details)["median"] == pytest.approx(np.median(values))
        value, _, _, n, _, _ = rows["simulation_tar_defined", hook]
        assert value == pytest.approx(values[defined].mean())
        assert n == 4


def test_finished_units_are_not_scored_again_and_a_run_that_was_cut_goes_on(store, monkeypatch):
    again = lm.score(store, HOOK, scorer=BOTH)
    assert (again.n_units, again.n_found) == (0, 12)
    lm.explain(store, OTHER)
    scored, first = [], simulation.score_top_and_random

    def dies_after_one_hook(job):
        scored.append(job.hook)
        if job.hook == OTHER:
            raise KeyboardInterrupt
        return first(job)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(simulation, "score_top_and_random", dies_after_one_hook)
        lm.score(store, explainer="token_lookup", seed=1)
    assert scored == [HOOK, OTHER]
    went_on = lm.score(store, explainer="token_lookup", seed=1)
    assert (went_on.n_units, went_on.n_found) == (6, 6)
    whole = {
        row["n"]
        for row in went_on.summary
        if row["hook"] == "blocks.*.mlp.hook_post" and row["metric"] == "simulation_tar"
    }
    assert whole == {12}
    for controls, n_scored in ((False, 6), (True, 4), (True, 0)):
        last = lm.score(store, HOOK, seed=2, controls=controls)
        assert last.n_units == n_scored, "units with a value are scored again for their controls"
    (n,) = store.sql(
        "SELECT count(*) FROM all_scores WHERE seed = 2 AND control = $control "
        "AND metric = 'simulation_tar' AND unit IS NOT NULL",
        control=CONTROLS[1],
    ).fetchone()
    assert n == 4


def test_a_subset_gets_the_scores_that_all_units_get(tmp_path):
    planted = planted_store(tmp_path / "run")
    with astore.open(planted.path, mode="a") as store:
        lm.explain(store, HOOK)
        lm.score(store, HOOK, units=[NOISE, DENSE])
        few = {control: unit_rows(store, "token_lookup", control=control) for control in CONTROLS}
        lm.score(store, HOOK, overwrite=True)
        for control in CONTROLS:
            for unit, row in unit_rows(store, "token_lookup", control=control).items():
                if unit in few[control]:
                    assert few[control][unit]["value"] == row["value"], control


CONTROLS = (None, "random_explanation", "shuffled_pairing", "matched_density")


def test_the_protocol_that_leaks_is_told_apart_and_shares_documents(store):
    for preset, split in (("openai", "score"), ("openai_crate", "score")):
        lm.explain(store, HOOK, preset=preset)
        scores = lm.score(store, HOOK, preset=preset)
        assert scores.explainer == f"token_lookup:{preset}"
        query = "SELECT count(*), min(split), max(n_records) FROM all_scores WHERE preset = $preset"
        n, found, n_records = store.sql(query, preset=preset).fetchall()[0]
        assert n and found == split
        per_unit = "SELECT max(n_records) FROM all_scores WHERE preset = $preset AND unit = $unit"
        assert store.sql(per_unit, preset=preset, unit=DENSE).fetchall()[0] == (10,)
    changed = lm.score(store, HOOK, top=5, random=5, controls=False)
    assert changed.preset == "random=5,top=5"


def test_scorers_named_together_read_the_store_once(store, monkeypatch):
    calls, real = [], record_reader.read_excerpts

    def counted(store, split, *, window):
        calls.append((split, window))
        return real(store, split, window=window)

    monkeypatch.setattr(record_reader, "read_excerpts", counted)
    lm.score(store, HOOK, scorer=BOTH, overwrite=True)
    assert calls == [("score", 64)]


def test_what_cannot_be_scored_says_why(store):
    for faulty, said in (
        ({"scorer": "simulation_tra"}, "did you mean simulation_tar"),
        ({"preset": "paper"}, "simulation_tar: no preset 'paper'; it has: openai, openai_crate"),
        ({"tops": 3}, "no setting 'tops'; did you mean top"),
        ({"hooks": HOOK, "explainer": "nobody"}, "no explanations of .* by 'nobody' .*lm.explain"),
        ({"hooks": "blocks.9.*"}, "no hook"),
    ):
        with pytest.raises(ExplainError, match=said):
            lm.score(store, **faulty)
    store_programs(store, "mute", {0: None, 1: None})
    with pytest.raises(ExplainError, match="explanations by mute have no program"):
        lm.score(store, HOOK, explainer="mute")
    with pytest.raises(ExplainError, match="5 of the 6 units are not explained by one"):
        store_programs(store, "one", {0: Constant(1.0)})
        lm.score(store, HOOK, explainer="one", units=range(6))


def test_the_handle_shows_the_score_beside_its_controls(store):
    shown = repr(lm.score(store, HOOK))
    assert "0 units scored, 6 were there" in shown
    for control in ("random_explanation", "shuffled_pairing", "matched_density"):
        assert f"simulation_tar [{control}]" in shown


def test_the_scores_of_a_control_run_become_rows_of_that_control(tmp_path):
    stores = []
    for seed in (0, 1):
        store = astore.open(planted_store(tmp_path / str(seed), seed=seed).path, mode="a")
        lm.explain(store, HOOK)
        stores.append(store)
    store, other = stores
    with pytest.raises(ExplainError, match="'other_model' has no rows of simulation_tar .*first"):
        lm.score(store, HOOK, controls={"other_model": other})
    wanted = lm.score(other, HOOK, controls=False)
    scores = lm.score(store, HOOK, controls={"other_model": astore.open(other.path)})
    theirs = {unit: row["value"] for unit, row in unit_rows(other, "token_lookup").items()}
    copied = unit_rows(store, "token_lookup", control="other_model")
    assert {unit: row["value"] for unit, row in copied.items()} == theirs
    mean = {(row["hook"], row["control"]): row["value"] for row in scores.summary[::-1]}
    assert mean[HOOK, "other_model"] == pytest.approx(
        next(row["value"] for row in wanted.summary if row["hook"] == HOOK)
    )
    assert {"random_explanation", "shuffled_pairing"} <= {row["control"] for row in scores.summary}
