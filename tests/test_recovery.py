"""True features found in codes: against scikit-learn, planted copies, and chance."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

import activation_store as astore
import lmmono as lm
from lmmono.data.truth import planted_language, row_truth
from lmmono.dictionaries.controls import Control
from lmmono.dictionaries.recovery import best_thresholds, choose, measure, recovery_of, scan
from lmmono.errors import DictionaryError
from lmmono.models.hooks import run_with_cache
from lmmono.stats.bootstrap import DocumentDraws

POST = "blocks.0.mlp.hook_post"


def sparse_codes(n: int, units: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.maximum(random.standard_normal((n, units)) - 0.8, 0.0).astype(np.float32)


def some_truth(n: int, features: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random((n, features)) < np.linspace(0.05, 0.6, features)


def test_correlation_and_auroc_are_those_of_numpy_and_scikit_learn():
    codes, truth = sparse_codes(300, 7), some_truth(300, 3)
    codes[:, 2] = 1.5
    correlation, auroc = scan(codes, truth)
    for f in range(3):
        for u in range(7):
            assert auroc[f, u] == pytest.approx(roc_auc_score(truth[:, f], codes[:, u]))
            by_hand = 0.0 if u == 2 else np.corrcoef(truth[:, f], codes[:, u])[0, 1]
            assert correlation[f, u] == pytest.approx(by_hand, abs=1e-7)
    assert np.isnan(scan(codes, np.zeros((300, 1), bool))[1]).all()


def test_the_best_threshold_for_each_feature_is_the_best_of_all():
    random = np.random.default_rng(0)
    acts, truth = random.integers(0, 6, 40).astype(float), random.random((40, 10)) < 0.3
    for there, f1, threshold in zip(truth.T, *best_thresholds(acts, truth), strict=True):
        cuts = [-np.inf, *(np.arange(6) + 0.5)]
        every = [f1_score(there, acts > cut, zero_division=0.0) for cut in cuts]
        assert f1 == pytest.approx(max(every))
        assert f1_score(there, acts > threshold) == pytest.approx(f1)


def test_held_out_numbers_are_those_of_scikit_learn_for_the_chosen_units():
    codes, truth = sparse_codes(400, 12), some_truth(400, 4)
    codes[:, 3] += truth[:, 0] * 2.0
    codes[:, 5] -= truth[:, 1] * 1.0
    documents = np.repeat(np.arange(20), 10)
    first, second = slice(0, 200), slice(200, 400)
    choice = choose(codes[first], truth[first], *scan(codes[first], truth[first]))
    assert choice.ranked[:2].tolist() == [3, 5] and choice.ranked_sign[:2].tolist() == [1.0, -1.0]
    assert choice.matched[:2].tolist() == [3, 5] and choice.split[0] == 3
    draws = DocumentDraws(20, 200, 50, 0, 0.95)
    found = measure(codes[second], truth[second], documents, choice, draws)
    assert found.auroc.shape == (51, 4)
    for f in range(4):
        acts = codes[second, choice.ranked[f]] * choice.ranked_sign[f]
        assert found.auroc[0, f] == pytest.approx(roc_auc_score(truth[second, f], acts))
        acts = codes[second, choice.matched[f]] * choice.matched_sign[f]
        by_hand = np.corrcoef(truth[second, f], acts)[0, 1]
        assert found.correlation[0, f] == pytest.approx(by_hand)
        said = codes[second, choice.split[f]] * choice.split_sign[f] > choice.threshold[f]
        assert found.f1[0, f] == pytest.approx(f1_score(truth[second, f], said))


def test_planted_copies_of_features_are_found_and_other_truth_is_not():
    truth = some_truth(2000, 6)
    codes = sparse_codes(2000, 40)
    home = [30, 4, 17, 22, 9, 0]
    codes[:, home] = truth * 1.0 + 0.05 * np.random.default_rng(3).random((2000, 6))
    report = recovery_of(codes, truth, np.arange(2000) // 25, controls={"noise": codes[:, 1:4]})
    own = report.table.filter([c is None for c in report.table["control"].to_pylist()])
    for measured in ("correlation", "auroc", "f1"):
        assert own[f"{measured}_unit"].to_pylist() == home
        assert min(own[measured].to_pylist()) > 0.99
    assert report.code.mcc.value > 0.99 and report.code.feature_f1.value == 1.0
    shuffled, noise = report.controls["shuffled_truth"], report.controls["noise"]
    assert abs(shuffled.mcc.value) < 0.05 and abs(shuffled.feature_auroc.value - 0.5) < 0.05
    # three units for six features: the others are not matched and count as 0
    assert noise.mcc.n == 6 and abs(noise.mcc.value) < 0.05
    assert report.table.num_rows == 3 * 6


def test_choosing_among_many_units_does_not_flatter():
    codes, truth = sparse_codes(1000, 600), some_truth(1000, 5)
    _, auroc = scan(codes, truth)
    assert np.abs(auroc - 0.5).max(axis=1)[0] > 0.1
    report = recovery_of(codes, truth, np.arange(1000) // 20)
    assert report.table["auroc"][0].as_py() < 0.6
    assert report.code.feature_auroc.value == pytest.approx(0.5, abs=0.04)
    assert report.code.mcc.value == pytest.approx(0.0, abs=0.06)
    assert report.code.feature_auroc.low < 0.5 < report.code.feature_auroc.high


def clustered(random: np.random.Generator, n_documents: int) -> tuple[np.ndarray, ...]:
    """Return acts, truth and documents whose tokens hang together, 20 to a document."""
    documents = np.repeat(np.arange(n_documents), 20)
    shift = random.standard_normal(n_documents)[documents]
    rate = random.beta(2, 3, n_documents)[documents]
    truth = random.random(len(documents)) < rate
    acts = truth * 1.0 + shift + random.standard_normal(len(documents))
    return acts[:, None], truth[:, None], documents


def test_intervals_of_held_out_numbers_cover_the_truth():
    random, repeats = np.random.default_rng(0), 200
    acts, truth, documents = clustered(random, 4000)
    choice = choose(acts, truth, *scan(acts, truth))
    names = ("correlation", "auroc", "f1")
    large = measure(acts, truth, documents, choice, DocumentDraws(4000, 80_000, 0, 0, 0.95))
    hits = dict.fromkeys(names, 0)
    for seed in range(repeats):
        acts, truth, documents = clustered(random, 40)
        draws = DocumentDraws(40, 800, 300, seed, 0.95)
        found = measure(acts, truth, documents, choice, draws)
        for name in names:
            interval = draws.estimate(getattr(found, name)[:, 0])
            hits[name] += interval.low <= getattr(large, name)[0, 0] <= interval.high
    assert all(0.88 <= hits[name] / repeats <= 0.985 for name in names), hits


def with_a_rare_feature(random: np.random.Generator, n_documents: int) -> tuple[np.ndarray, ...]:
    """Return acts, truth and documents of two features, one of them in every eighth document."""
    documents = np.repeat(np.arange(n_documents), 20)
    rate = np.stack([random.beta(2, 3, n_documents), 0.4 * (random.random(n_documents) < 0.12)], 1)
    truth = random.random((len(documents), 2)) < rate[documents]
    acts = truth * [1.0, 3.0] + 0.7 * random.standard_normal((len(documents), 2))
    return acts, truth, documents


def test_the_interval_of_the_mean_over_features_covers_though_redraws_lack_one():
    random, repeats, hits = np.random.default_rng(0), 150, 0
    large = recovery_of(*with_a_rare_feature(random, 8000), n_resamples=1).code.mcc.value
    for seed in range(repeats):
        acts, truth, documents = with_a_rare_feature(random, 80)
        found = recovery_of(acts, truth, documents, n_resamples=200, seed=seed).code.mcc
        hits += found.low <= large <= found.high
    assert 0.86 <= hits / repeats <= 0.99, hits


def test_features_that_a_half_does_not_show_are_left_out_and_counted():
    codes, truth = sparse_codes(200, 5), some_truth(200, 4)
    truth[:, 1] = False
    truth[:, 2] = True
    report = recovery_of(codes, truth, np.arange(200) // 10, features=list("abcd"))
    assert report.code.mcc.n == 2 and report.code.mcc.nan_fraction == 0.5
    rows = report.table.to_pylist()[:4]
    assert [row["auroc"] is None for row in rows] == [False, True, True, False]
    assert rows[1]["auroc_unit"] is None and rows[1]["feature"] == "b"
    nothing = recovery_of(codes, np.zeros((200, 2), bool), np.arange(200) // 10)
    assert nothing.code.feature_f1.failure == "undefined" and nothing.rows()[0]["value"] is None


def test_one_document_or_acts_that_are_not_finite_are_refused():
    codes, truth = sparse_codes(50, 3), some_truth(50, 2)
    with pytest.raises(DictionaryError, match="want two documents or more"):
        recovery_of(codes, truth, np.zeros(50, int))
    codes[4, 1] = np.nan
    with pytest.raises(DictionaryError, match="NaN or infinite"):
        recovery_of(codes, truth, np.arange(50))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> lm.Run:
    """A run on the planted language that has hardly been trained."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "r.yaml").write_text(
        f"name: r\nout: {folder}\nseed: 0\ndata: {{corpus: {{n_documents: 300}}, n_ctx: 32}}\n"
        "model: {arch: crate, n_layers: 1, d_model: 16, n_heads: 2}\n"
        "train: {steps: 2, batch_tokens: 64, warmup_steps: 1, eval_every_steps: 2}\n"
    )
    return lm.train(lm.Recipe.load(folder / "r.yaml"))


def identity() -> Control:
    dictionary = Control("raw").fit(np.eye(64, dtype=np.float32))
    dictionary.hook = POST
    return dictionary


def test_a_dictionary_is_measured_on_the_planted_language(run, tmp_path):
    rows = run.tokens("train").limit(1500)
    report = lm.recovery(identity(), (run.model, rows))
    _, acts = run_with_cache(run.model, torch.from_numpy(rows.ids.astype(np.int64)), POST)
    by_hand = recovery_of(
        acts[POST].flatten(0, 1).numpy(),
        row_truth(run.corpus, rows).reshape(rows.ids.size, -1),
        rows.doc_ids.ravel(),
    )
    assert report.code.mcc.value == pytest.approx(by_hand.code.mcc.value, rel=1e-4)
    assert report.controls["raw"].mcc == report.code.mcc
    assert set(report.controls) == {"shuffled_truth", "random_directions", "raw"}
    names = [feature.name for feature in planted_language(run.corpus).features]
    assert report.table["feature"].to_pylist() == 4 * names
    # even an untrained model's neurons know the word; shuffled truth tells nothing
    assert report.code.feature_auroc.low > report.controls["shuffled_truth"].feature_auroc.high
    with astore.open(tmp_path / "run", "w") as store:
        assert store.append("all_scores", report.rows("raw")) == 12
        last = store.sql(
            "SELECT control FROM all_scores WHERE metric = 'feature_auroc' ORDER BY value LIMIT 1"
        ).fetchone()
    assert last == ("shuffled_truth",)


def test_skipped_tokens_and_padding_do_not_count(run):
    rows = run.tokens("train").limit(1500)
    doc_ids = np.array(rows.doc_ids)
    doc_ids[:, -3:] = -1  # as padding on the right
    rows = replace(rows, doc_ids=doc_ids)
    skip = astore.Skip((int(np.bincount(rows.ids.ravel()).argmax()),), 1)
    report = lm.recovery(identity(), (run.model, rows), skip=skip, max_tokens=None)
    _, acts = run_with_cache(run.model, torch.from_numpy(rows.ids.astype(np.int64)), POST)
    counts = ((doc_ids >= 0) & (rows.ids != skip.token_ids[0])).ravel()
    counts[:: rows.n_ctx] = False
    by_hand = recovery_of(
        acts[POST].flatten(0, 1).numpy()[counts],
        row_truth(run.corpus, rows).reshape(rows.ids.size, -1)[counts],
        doc_ids.ravel()[counts],
    )
    assert report.code.mcc.value == pytest.approx(by_hand.code.mcc.value, rel=1e-3)
    assert report.code.mcc.value != lm.recovery(identity(), (run.model, rows)).code.mcc.value


def test_a_run_is_taken_as_a_whole(run):
    ours = lm.recovery(identity(), run, max_tokens=640, n_resamples=20)
    rows = run.tokens("val")
    theirs = lm.recovery(identity(), (run.model, rows), max_tokens=640, n_resamples=20)
    assert ours.split == "val" and ours.rows() == theirs.rows()
