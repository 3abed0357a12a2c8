"""Measures over every stored token: checked against scikit-learn, scipy and by hand."""

import numpy as np
import pytest
from explained_store import CAT, D_VOCAB, HOOK, NOISE, ON_CAT, ON_PAIR, SILENT, planted_store
from scipy.stats import pearsonr
from sklearn.metrics import average_precision_score, f1_score, jaccard_score

import activation_store as astore
import lmmono as lm
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.token_lookup import Lookup
from lmmono.records.record_reader import RecordReader
from lmmono.records.sampler import Counts
from lmmono.registry.scorers import find_scorer
from lmmono.scores.population import count, read_tokens
from lmmono.scores.score_job import ScoreJob

UNITS = (ON_CAT, ON_PAIR, NOISE)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    planted = planted_store(tmp_path_factory.mktemp("population") / "run")
    with astore.open(planted.path, mode="a") as store:
        lm.explain(store, HOOK, explainer="context_rules", units=UNITS)
        lm.explain(store, HOOK, units=(*UNITS, SILENT))
        lm.score(store, HOOK, scorer="population", explainer="context_rules", controls=False)
        lm.score(store, HOOK, scorer="population")
    return planted


@pytest.fixture(scope="module")
def store(planted):
    with astore.open(planted.path) as store:
        yield store


def program_of(store, explainer, unit):
    reader = RecordReader(store)
    job = ScoreJob(store, HOOK, reader, explainer=explainer, controls=False)
    return job.explanations([unit])[None][0].program


@pytest.mark.parametrize("explainer", ["token_lookup", "context_rules"])
@pytest.mark.parametrize("unit", UNITS)
def test_the_measures_are_those_of_scikit_learn_and_scipy_on_every_token(
    planted, store, explainer, unit
):
    query = """SELECT metric, value, ci_low, ci_high, n, details FROM scores
        WHERE hook = $hook AND unit = $unit AND explainer = $explainer"""
    rows = store.sql(query, hook=HOOK, unit=unit, explainer=explainer).fetchall()
    found = {metric.removeprefix("population_"): value for metric, value, *_ in rows}
    windows = read_tokens(store, "score", 64).windows
    acts = planted.acts[planted.rows("score"), :, unit].reshape(-1).astype(np.float64)
    predicted = program_of(store, explainer, unit).simulate(windows)[windows >= 0]
    threshold = store.sql(
        "SELECT (details->>'threshold')::DOUBLE FROM scores WHERE metric = 'population_f1' "
        "AND hook = $hook AND unit = $unit AND explainer = $explainer",
        hook=HOOK, unit=unit, explainer=explainer,
    ).fetchall()[0][0]  # fmt: skip
    fires, said = acts > 0, predicted > threshold
    assert {row[4] for row in rows} == {len(acts)}
    assert found["f1"] == pytest.approx(f1_score(fires, said))
    assert found["iou"] == pytest.approx(jaccard_score(fires, said))
    assert found["auprc"] == pytest.approx(average_precision_score(fires, predicted))
    assert found["pearson"] == pytest.approx(pearsonr(acts, predicted)[0], abs=1e-6)
    cosine = acts @ predicted / np.linalg.norm(acts) / np.linalg.norm(predicted)
    assert found["cosine"] == pytest.approx(cosine, abs=1e-6)
    assert all(low <= value <= high for _, value, low, high, *_ in rows)


def test_a_known_unit_is_told_from_the_explanations_of_others_and_a_silent_one_is_undefined(store):
    query = """SELECT unit, control, value, nan_fraction FROM all_scores
        WHERE metric = 'population_f1' AND explainer = 'token_lookup' AND unit IS NOT NULL"""
    found = {row[:2]: row[2:] for row in store.sql(query).fetchall()}
    assert found[ON_CAT, None] == (1.0, 0.0)
    assert found[ON_CAT, "random_explanation"][0] < 0.3
    assert found[SILENT, None] == (0.0, 1.0)


def test_the_influence_of_a_document_is_the_slope_of_the_average_precision_in_its_weight(store):
    rng = np.random.default_rng(0)
    tokens = read_tokens(store, "score", 64)
    table = rng.integers(0, 6, D_VOCAB).astype(float)  # many ties
    levels = tokens.predicted(Lookup(np.arange(D_VOCAB), table, 0.0))
    firing = np.sort(rng.choice(len(tokens.ids), 200, replace=False))
    acts = rng.random(200).astype(np.float32)
    counts = count(tokens, levels, 2.5, firing, acts)
    assert counts.influence.sum() == pytest.approx(0.0, abs=1e-12)
    is_firing = np.isin(np.arange(len(tokens.ids)), firing)
    scores, step = table[tokens.ids], 1e-4
    for document in (0, 3, tokens.n_documents - 1):
        moved = [
            average_precision_score(
                is_firing, scores, sample_weight=1 + sign * step * (tokens.documents == document)
            )
            for sign in (-1, 1)
        ]
        slope = (moved[1] - moved[0]) / (2 * step)
        assert counts.influence[document] == pytest.approx(slope, abs=1e-6)


def test_the_threshold_is_that_of_the_best_f1_on_other_documents(store):
    tokens = read_tokens(store, "explain", 64)
    firing = np.flatnonzero(tokens.ids == CAT)
    table = np.where(np.arange(D_VOCAB) == CAT, 2.0, np.arange(D_VOCAB) / D_VOCAB)
    levels = tokens.predicted(Lookup(np.arange(D_VOCAB), table, 0.0))
    assert levels.best_threshold(firing) == pytest.approx((2.0 + (D_VOCAB - 1) / D_VOCAB) / 2)
    assert levels.best_threshold(firing[:0]) == 1.0


def test_an_explanation_without_a_program_is_refused(store, monkeypatch):
    said = {unit: Explanation(HOOK, unit, "people", "cats") for unit in range(6)}
    monkeypatch.setattr("lmmono.scores.score_job.kept_explanations", lambda *_: said)
    job = ScoreJob(store, HOOK, RecordReader(store), (0, 1), find_scorer("population").settings,
                   explainer="people", controls=False)  # fmt: skip
    with pytest.raises(lm.errors.ExplainError, match="by people have no program"):
        find_scorer("population").load()(job)


def test_tokens_that_the_capture_left_out_are_no_silence_to_any_measure(planted, tmp_path):
    skip, split = astore.Skip(token_ids=(5,), first=9), planted.rows("score")
    with astore.open(tmp_path / "run", "w") as store:
        rows = [astore.Rows(HOOK, 6, max_density=1.0)]
        with store.writer(rows=rows, n_ctx=planted.token_ids.shape[1], skip=skip) as writer:
            for name in ("explain", "score"):
                arrays = [x[planted.rows(name)] for x in (planted.token_ids, planted.doc_ids)]
                seq = np.arange(planted.rows(name).start, planted.rows(name).stop)
                acts = {HOOK: planted.acts[planted.rows(name)]}
                writer.add(seq, *arrays, name, acts)
        store.add_vocabulary([f" w{i}" for i in range(D_VOCAB)])
        lm.explain(store, HOOK, units=[NOISE])
        how = {"units": [NOISE], "controls": False}
        lm.score(store, HOOK, scorer=["population", "unit_statistics", "simulation_random"], **how)
        query = "SELECT metric, value, n_tokens FROM all_scores WHERE unit = $unit"
        found = {name: (value, n) for name, value, n in store.sql(query, unit=NOISE).fetchall()}
        program = program_of(store, "token_lookup", NOISE)
        records = RecordReader(store).records(HOOK, "score", Counts(random=20), units=[NOISE])
    counts = (np.arange(planted.token_ids.shape[1]) >= 9) & (planted.token_ids[split] != 5)
    acts = planted.acts[split, :, NOISE][counts].astype(np.float64)
    predicted = program.simulate(planted.token_ids[split])[counts]
    assert found["population_f1"][1] == counts.sum() < counts.size
    cosine = acts @ predicted / np.sqrt(acts @ acts * (predicted @ predicted))
    assert found["population_cosine"][0] == pytest.approx(cosine)
    assert found["unit_density"][0] == pytest.approx((acts > 0).mean())
    cells = records.excerpts.cells_of(records.index[0])
    kept = (cells >= 0) & counts.reshape(-1)[cells]
    truth = np.where(kept, planted.acts[split, :, NOISE].reshape(-1)[cells], 0.0)
    said = program.simulate(records.excerpts.token_ids[records.index[0]])
    assert found["simulation_random"][0] == pytest.approx(pearsonr(truth[kept], said[kept])[0])
