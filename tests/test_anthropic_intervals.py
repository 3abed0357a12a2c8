"""The 60 examples of `anthropic_intervals`, and its correlation against SciPy."""

import numpy as np
import pytest
from explained_store import HOOK, NOISE, ON_CAT, SILENT, planted_store
from scipy.stats import spearmanr

import activation_store as astore
import lmmono as lm
from lmmono.explanations.stored_explanations import read_explanations
from lmmono.records.record_reader import RecordReader
from lmmono.records.sampler import HALF, INTERVAL_KINDS, INTERVAL_PLAN, read_interval_records
from lmmono.registry.scorers import find_scorer
from lmmono.scores.score_job import ScoreJob

UNITS = (ON_CAT, SILENT, NOISE)


def interval_records(job):
    return read_interval_records(job.store, job.hook, units=job.units, seed=job.seed)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    planted = planted_store(tmp_path_factory.mktemp("anthropic") / "run", n_rows=80)
    with astore.open(planted.path, mode="a") as store:
        lm.explain(store, HOOK, units=UNITS)
    return planted


@pytest.fixture
def job(planted):
    with astore.open(planted.path) as store:
        settings = find_scorer("anthropic_intervals").settings
        yield ScoreJob(store, HOOK, RecordReader(store), UNITS, settings, explainer="token_lookup")


def test_sixty_examples_of_nine_tokens_come_from_all_levels(planted, job):
    records = interval_records(job)
    assert (sum(INTERVAL_PLAN.values()), 2 * HALF + 1) == (60, 9)
    noise = UNITS.index(NOISE)
    cells = records.cells[noise]
    assert (cells >= 0).all()
    acts = planted.acts[planted.rows("score"), :, NOISE].reshape(-1)
    at = acts[cells]
    assert at[INTERVAL_KINDS == 0].min() > np.quantile(acts[acts > 0], 0.98)
    levels = np.ceil(at[INTERVAL_KINDS == 1] / acts.max() * 11 - 1e-6).astype(int)
    assert levels.tolist() == [level for level in range(11, -1, -1) for _ in range(2)]
    assert len(np.unique(records.token_ids[noise], axis=0)) == 60, "no text twice"
    assert (records.acts[noise][:, HALF] == at).all()
    for cell, ids in zip(cells, records.token_ids[noise], strict=True):
        for offset, token in zip(range(-4, 5), ids, strict=True):
            if token >= 0:
                assert records.grid.token_ids[cell + offset] == token
                assert records.grid.doc_ids[cell + offset] == records.grid.doc_ids[cell]


def test_the_value_is_spearmans_correlation_of_all_predictions(job):
    records = interval_records(job)
    rows = {
        (row["unit"], row["control"]): row for row in find_scorer("anthropic_intervals").load()(job)
    }
    found = read_explanations(job.store, HOOK, "token_lookup", 0)
    for unit in (ON_CAT, NOISE):
        i = UNITS.index(unit)
        ids, truth = records.token_ids[i], records.acts[i]
        wanted = spearmanr(found[unit].program.simulate(ids)[ids >= 0], truth[ids >= 0])[0]
        assert rows[unit, None]["value"] == pytest.approx(wanted)
    assert rows[ON_CAT, None]["value"] > 0.95
    assert abs(rows[ON_CAT, "shuffled_pairing"]["value"]) < 0.3
    centre = np.zeros(truth.shape)
    centre[:, HALF] = 1
    wanted = spearmanr(centre[ids >= 0], truth[ids >= 0])[0]
    assert rows[NOISE, "centre_token"]["value"] == pytest.approx(wanted)
    assert rows[SILENT, None]["value"] == 0.0
    assert rows[SILENT, None]["nan_fraction"] == 1.0
