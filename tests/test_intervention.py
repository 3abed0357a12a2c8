"""Steering and ablation on a tiny model, against passes made by hand."""

import copy
import shutil

import duckdb
import numpy as np
import pytest
import torch
from explained_store import D_VOCAB
from small_models import tiny

import activation_store as astore
import lmmono as lm
from activation_store.write.recorder import digest
from lmmono.errors import ExplainError
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.token_lookup import Lookup
from lmmono.models.hooks import Edit, run_with_cache, run_with_edit
from lmmono.records.record_reader import RecordReader
from lmmono.registry.scorers import find_scorer
from lmmono.scores.intervention import Predictions, correlation
from lmmono.scores.score_job import ScoreJob
from lmmono.scores.steering import Steering, divergence

HOOK = "blocks.0.mlp.hook_post"
N_ROWS, N_CTX = 24, 24


@pytest.fixture(scope="module")
def model():
    return tiny("gpt2")


@pytest.fixture(scope="module")
def path(tmp_path_factory, model):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, min(D_VOCAB, model.config.vocab_size), (N_ROWS, N_CTX))
    _, acts = run_with_cache(model, torch.from_numpy(ids), HOOK)
    acts = acts[HOOK].numpy()
    docs = np.arange(N_ROWS)[:, None].repeat(N_CTX, 1)
    path = tmp_path_factory.mktemp("steered") / "run"
    with astore.open(path, mode="w") as store:
        store.add_vocabulary([f" w{i}" for i in range(model.config.vocab_size)])
        rows = [astore.Rows(HOOK, acts.shape[2], max_density=1.0)]
        with store.writer(rows=rows, n_ctx=N_CTX) as writer:
            for split, mine in (("explain", slice(0, 12)), ("score", slice(12, 24))):
                seq = np.arange(N_ROWS)[mine]
                writer.add(seq, ids[mine], docs[mine], split, {HOOK: acts[mine]})
        programs = [
            Explanation(HOOK, unit, "token_lookup", "t", Lookup(np.array([unit]), np.ones(1), 0.0))
            for unit in range(4)
        ]
        store.append("explanations", [each.row() | {"seed": 0} for each in programs])
    return path


@pytest.fixture
def store(path):
    with astore.open(path) as store:
        yield store


def job_of(store, model, scorer="effect", units=(0, 1, 2, 3), **settings):
    typed = find_scorer(scorer).with_settings(changes={"prompt": 8, **settings})
    reader = RecordReader(store)
    return ScoreJob(store, HOOK, reader, units, typed, explainer="token_lookup", model=model)


def test_steering_reaches_the_kl_asked_for_and_is_an_edit_of_the_last_token(store, model):
    steering = Steering(job_of(store, model, kl=0.05))
    found = list(steering.steered())
    assert [each.unit for each in found] == [0, 1, 2, 3]
    for steered in found:
        if np.isnan(steered.strength):
            continue
        assert steered.kl.mean() == pytest.approx(0.05, rel=0.02)
        added = steered.strength * steering.max_act[steered.unit]
        direction = torch.zeros(steering.directions([0], False).shape[1])
        direction[steered.unit] = added
        edit = Edit(HOOK, "add", positions=[-1], direction=direction)
        clean, _ = run_with_cache(model, steering.prompts, HOOK)
        other = run_with_edit(model, steering.prompts, edit)
        change = (other - clean)[:, -1]
        change = change - change.mean(1, keepdim=True)
        assert steered.changes == pytest.approx(change.numpy(), abs=1e-4)
    assert sum(not np.isnan(each.strength) for each in found) >= 2
    random = list(steering.steered(random=True))
    assert random[0].changes != pytest.approx(found[0].changes, abs=1e-4)


def test_divergence_is_the_sum_of_p_ln_p_over_q():
    a, b = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    p, q = a.softmax(-1), b.softmax(-1)
    assert float(divergence(a, b)) == pytest.approx(float((p * (p / q).log()).sum()))
    assert float(divergence(a, a)) == 0.0


def test_ablation_sets_the_unit_to_zero_where_it_fires(store, model):
    steering = Steering(job_of(store, model))
    found = dict(steering.ablated())
    assert all((kl >= 0).all() for kl in found.values())
    assert any(kl.size and kl.max() > 0 for kl in found.values())
    rows = find_scorer("effect").load()(job_of(store, model))
    metrics = {row["metric"] for row in rows}
    assert metrics == {"ablation_kl", "steering_kl", "steering_strength"}
    told = [row["details"]["promoted"] for row in rows if row.get("details")]
    assert all(len(each) == 8 for each in told)


def test_an_explanation_that_names_what_is_promoted_correlates_with_the_change():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=50)
    changes = truth + 0.1 * rng.normal(size=(8, 50))
    value, low, high = correlation(changes, truth)
    assert value == pytest.approx(np.corrcoef(changes.mean(0), truth)[0, 1])
    assert low < value < high
    assert abs(correlation(changes, rng.normal(size=50))[0]) < 0.5
    assert np.isnan(correlation(changes, np.ones(50))[0])


def test_following_tokens_are_predicted_from_bigrams_and_own_ones_from_the_program(store):
    from lmmono.records.corpus_excerpts import TokenGrid

    ids = np.array([1, 2, 1, 2, 3, 1, 2, 3, 1, 2, 3, 3, 1, 2, 0, 0, 0, 0, 0] * 5, np.int32)
    grid = TokenGrid("explain", np.array([0]), len(ids), ids, np.zeros(len(ids), np.int64))
    predictions = Predictions(grid, 8, 4)
    of_one = Explanation(HOOK, 0, "t", "t", Lookup(np.array([1]), np.ones(1), 0.0))
    assert predictions.own(of_one).tolist() == [0, 1, 0, 0]
    assert predictions.following(of_one).argmax() == 2, "2 always follows 1"


def test_interventions_have_rows_for_both_predictions_and_for_random_directions(store, model):
    rows = find_scorer("intervention").load()(job_of(store, model, "intervention", kl=0.05))
    controls = {row["control"] for row in rows}
    assert controls == {None, "random_explanation", "matched_density", "random_direction"}
    assert len(rows) == 4 * 2 * 4
    assert all(-1 <= row["value"] <= 1 for row in rows)


def test_scores_of_another_model_are_rows_of_their_own(path, model, tmp_path):
    shutil.copytree(path, tmp_path / "run")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.transformer.h[0].mlp.c_proj.weight.mul_(3)
    digests = {digest(each)[:12]: each for each in (model, other)}
    with astore.open(tmp_path / "run", mode="a") as store:
        for again in (False, True):
            for name, each in digests.items():
                how = {"units": [0], "controls": False, "prompt": 8}
                made = lm.score(store, HOOK, scorer="effect", model=each, **how)
                assert made.preset is not None and f"model={name}" in made.preset
                assert made.n_found == again
        query = """SELECT preset, value FROM scores
            WHERE metric = 'ablation_kl' AND unit = 0"""
        rows = dict(store.sql(query).fetchall())
    assert len(rows) == 2 and len(set(rows.values())) == 2
    with duckdb.connect(tmp_path / "run" / "store.duckdb") as con:  # as lm.capture pins it
        con.execute("INSERT INTO meta VALUES ('model_digest', $1)", [digest(model)])
    with astore.open(tmp_path / "run", mode="a") as store:
        made = lm.score(store, HOOK, scorer="effect", model=model, **how)
    assert made.preset == "prompt=8"


def test_a_hook_that_the_model_lacks_is_told(store, model):
    job = job_of(store, model)
    from dataclasses import replace

    with pytest.raises(ExplainError, match="no such hook"):
        Steering(replace(job, hook="blocks.0.hook_resid_post.hook_sae_acts_post"))
