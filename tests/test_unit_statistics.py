"""Statistics of units against dense arrays, SciPy, scikit-learn and planted meanings."""

import numpy as np
import pytest
from explained_store import (
    CAT,
    D_VOCAB,
    DENSE,
    HOOK,
    NOISE,
    ON_CAT,
    ON_PAIR,
    PAIR_THEN,
    SILENT,
    planted_store,
    rows_of,
)
from scipy import stats

import activation_store as astore
import lmmono as lm
from lmmono.errors import ExplainError
from lmmono.records.corpus_excerpts import TokenGrid
from lmmono.records.record_reader import RecordReader
from lmmono.scores.decorrelation import tokens_apart, units_alike
from lmmono.scores.score_job import ScoreJob
from lmmono.scores.unit_statistics import Corpus, read_corpus, selectivity_columns


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_store(tmp_path_factory.mktemp("statistics") / "run", n_rows=60)


@pytest.fixture
def store(planted):
    with astore.open(planted.path, mode="a") as store:
        yield store


@pytest.fixture(scope="module")
def found(planted):
    with astore.open(planted.path) as store:
        return rows_of(store, "unit_statistics")


def test_density_and_kurtosis_are_those_of_the_dense_array(planted, found):
    acts = planted.acts[planted.rows("score")].astype(np.float64)
    for unit in (ON_CAT, NOISE, DENSE):
        mine = acts[..., unit].reshape(-1)
        assert found["unit_density", unit, None]["value"] == pytest.approx((mine > 0).mean())
        wanted = stats.kurtosis(mine, fisher=False)
        row = found["unit_kurtosis", unit, None]
        assert row["value"] == pytest.approx(wanted, rel=1e-5)
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
    assert found["unit_kurtosis", SILENT, None]["failure"] == "silent"


def test_kurtosis_agrees_with_the_table_of_statistics_up_to_the_other_split(store, found):
    query = "SELECT kurtosis FROM unit_stats WHERE hook = $hook AND unit = $unit"
    (both,) = store.sql(query, hook=HOOK, unit=NOISE).fetchall()[0]
    row = found["unit_kurtosis", NOISE, None]
    assert row["ci_low"] < both < row["ci_high"]


@pytest.fixture(scope="module")
def selective(planted):
    with astore.open(planted.path) as store:
        return rows_of(store, "token_selectivity")


def test_selectivity_of_frequent_units_is_one_minus_the_entropy_ratio(planted, selective):
    tokens = planted.token_ids.reshape(-1)
    base = stats.entropy(np.bincount(tokens))
    for unit in (ON_CAT, NOISE, DENSE):
        mass = np.bincount(tokens, planted.acts[..., unit].reshape(-1), D_VOCAB)
        row = selective["token_selectivity", unit, None]
        assert row["value"] == pytest.approx(1 - stats.entropy(mass) / base, abs=0.02)
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
    assert abs(selective["token_selectivity", ON_CAT, "shuffled"]["value"]) < 0.05
    assert selective["token_selectivity", SILENT, None]["failure"] == "silent"


def truth_and_text(kind, d_vocab=400):
    """Token frequencies of a text, those under a unit, and the unit's true selectivity."""
    text = 1 / np.arange(1, d_vocab + 1)
    text /= text.sum()
    unit = text.copy()
    if kind != "random":
        unit *= 0.5 if kind == "half" else 0.0
        unit[60] += 1 - unit.sum()
    return text, unit, 1 - stats.entropy(unit) / stats.entropy(text)


@pytest.mark.parametrize("kind", ["random", "half", "one token"])
@pytest.mark.parametrize("n_firing", [6, 40, 400])
def test_selectivity_covers_the_truth_however_rarely_a_unit_fires(kind, n_firing):
    text, unit, truth = truth_and_text(kind)
    rng, values, covered = np.random.default_rng(n_firing), [], 0
    for _ in range(60):
        tokens = rng.choice(len(text), n_firing, p=unit).astype(np.int32)
        document = rng.integers(60, size=n_firing)
        grid = TokenGrid("score", np.zeros(1, np.int64), n_firing, tokens, document)
        corpus = Corpus(grid, document, document % 10, 10, np.ones(10))
        acts = np.ones(n_firing, np.float32)
        row = selectivity_columns(np.arange(n_firing), acts, corpus, text)
        values.append(row["value"])
        covered += row["ci_low"] <= truth <= row["ci_high"]
        assert row["ci_high"] - row["ci_low"] > 0.02, "no interval has width 0"
    assert covered >= 54, f"covers {covered} of 60"
    if kind != "half":
        assert np.mean(values) == pytest.approx(truth, abs=0.1)


def test_six_firings_on_one_token_are_less_sure_than_sixty():
    text, _, _ = truth_and_text("one token")
    lows = []
    for n in (6, 60):
        grid = TokenGrid("score", np.zeros(1, np.int64), n, np.full(n, 60, np.int32), np.arange(n))
        corpus = Corpus(grid, np.arange(n), np.arange(n) % 10, 10, np.ones(10))
        row = selectivity_columns(np.arange(n), np.ones(n, np.float32), corpus, text)
        assert row["value"] > 0.95 and row["ci_high"] == 1.0
        lows.append(row["ci_low"])
    assert lows[0] < 0.5 < 0.85 < lows[1]


def test_a_unit_of_one_document_has_no_selectivity():
    text, _, _ = truth_and_text("random")
    tokens = np.arange(8, dtype=np.int32)
    grid = TokenGrid("score", np.zeros(1, np.int64), 8, tokens, np.zeros(8, np.int64))
    corpus = Corpus(grid, np.zeros(8, np.int64), np.zeros(8, np.int64), 1, np.ones(1))
    row = selectivity_columns(np.arange(8), np.ones(8, np.float32), corpus, text)
    assert (row["value"], row["failure"]) == (None, "too_few_records")


def test_purity_and_ngrams_know_the_planted_token_and_pair(found):
    assert found["token_purity", ON_CAT, None]["value"] == 1.0
    assert found["token_purity", ON_PAIR, None]["value"] == 1.0
    assert found["ngram_consistency", ON_PAIR, None]["value"] == 1.0
    for metric, unit in (("ngram_consistency", ON_CAT), ("token_purity", NOISE)):
        assert found[metric, unit, None]["value"] < 0.2
    assert found["token_purity", ON_CAT, "shuffled"]["value"] < 0.2
    assert CAT != PAIR_THEN
    for row in found.values():
        if row["metric"] in ("token_purity", "ngram_consistency") and row["value"] is not None:
            assert row["ci_high"] - row["ci_low"] > 0.05, "documents that agree leave doubt"
            assert row["ci_low"] <= row["value"] <= row["ci_high"]


def test_the_monosemanticity_scale_is_the_mean_squared_z_of_the_top_percent(planted, found):
    acts = planted.acts[planted.rows("score")].astype(np.float64)
    for unit in (ON_CAT, NOISE):
        z = np.sort(acts[..., unit].reshape(-1))[::-1]
        top = z[: int(np.ceil(0.01 * len(z)))]
        wanted = np.square(top - z.mean()).mean() / z.var()
        assert found["monosemanticity_scale", unit, None]["value"] == pytest.approx(wanted)


def test_the_interval_leaves_out_groups_of_documents_in_turn(planted, store, found):
    corpus = read_corpus(ScoreJob(store, HOOK, RecordReader(store)), "score")
    acts = planted.acts[planted.rows("score"), :, NOISE].reshape(-1) > 0
    left = [acts[corpus.groups != group].mean() for group in range(10)]
    n, half = 10, stats.t.ppf(0.975, 9) * np.sqrt(9 / 10 * np.square(left - np.mean(left)).sum())
    row = found["unit_density", NOISE, None]
    assert len(left) == n
    assert row["ci_high"] - row["value"] == pytest.approx(half)


def test_statistics_are_stored_and_found_again(store):
    first = lm.score(store, HOOK, scorer="unit_statistics")
    assert (first.n_units, first.n_found) == (6, 0)
    assert lm.score(store, HOOK, scorer="unit_statistics").n_found == 6


def test_decorrelation_is_that_of_dense_matrices():
    rng = np.random.default_rng(0)
    acts, groups = rng.normal(size=(30, 5)).astype(np.float32), np.arange(30) % 3
    unit = acts / np.linalg.norm(acts, axis=1, keepdims=True)
    apart = groups[:, None] != groups
    assert tokens_apart(acts, groups) == pytest.approx(1 - (unit @ unit.T)[apart].mean(), abs=1e-6)
    r2 = np.square(np.corrcoef(acts.T))[~np.eye(5, dtype=bool)].mean()
    assert units_alike(acts) == pytest.approx(r2, abs=1e-6)
    twice = np.repeat(acts[:, :1], 4, axis=1)
    assert units_alike(twice) == pytest.approx(1.0, abs=1e-6)


def test_a_hook_has_one_row_of_each_and_shuffled_units_are_less_alike(store):
    rows = rows_of(store, "feature_decorrelation", tokens=2000)
    assert rows["unit_correlation", None, "shuffled"]["value"] < 0.01
    assert 0 < rows["feature_decorrelation", None, None]["value"] < 1
    lm.score(store, HOOK, scorer="feature_decorrelation")
    assert lm.score(store, HOOK, scorer="feature_decorrelation").n_units == 0


@pytest.mark.parametrize("settings", [{"top_p": 0.5}, {"threshold": -0.5}])
def test_what_a_hook_leaves_out_does_not_change_density_and_kurtosis(tmp_path, settings):
    rng = np.random.default_rng(0)
    acts = rng.normal(0.2, 1.0, (40, 16, 4)).astype(np.float32)
    ids, docs = rng.integers(1, 30, (40, 16)), np.repeat(np.arange(40), 16).reshape(40, 16)
    with astore.open(tmp_path / "run", mode="w") as store:
        hook = astore.Rows(HOOK, 4, max_density=1.0, **settings)
        with store.writer(rows=[hook], n_ctx=16) as writer:
            for split, part in (("explain", slice(0, 20)), ("score", slice(20, 40))):
                seq = np.arange(40)[part]
                writer.add(seq, ids[part], docs[part], split, {HOOK: acts[part]})
        lm.score(store, HOOK, scorer="unit_statistics")
        query = "SELECT metric, unit, value, failure FROM all_scores WHERE unit IS NOT NULL"
        rows = {row[:2]: row[2:] for row in store.sql(query).fetchall()}
        threshold = settings.get("threshold", 0.0)
        for unit in range(4):
            every = acts[..., unit].reshape(-1).astype(np.float64)
            assert rows["unit_density", unit][0] == pytest.approx((every > threshold).mean())
            wanted = stats.kurtosis(every, fisher=False)
            assert rows["unit_kurtosis", unit][0] == pytest.approx(wanted, rel=1e-3)
            assert rows["monosemanticity_scale", unit] == (None, "not_all_stored")
        if "top_p" in settings:
            with pytest.raises(ExplainError, match="top_p=0.5, so weak activations are missing"):
                lm.score(store, HOOK, scorer="token_selectivity")
