"""Capture: what the store holds is what the model computed, on documents kept for it."""

import hashlib
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from small_models import tiny

import activation_store as astore
import lmmono as lm
from lmmono.captures.capture import capture
from lmmono.captures.forecast import forecast
from lmmono.data.tokens import TokenCorpus, TokenRows, prepare
from lmmono.errors import ModelError, RunError
from lmmono.models.build import build_model
from lmmono.models.hooks import run_with_cache
from lmmono.pipeline import run_stages, train
from lmmono.recipe import Recipe
from lmmono.recipe.sections import Capture, CrateModel, Data, Gpt2Model, PlantedCorpus, Splits
from lmmono.reports.side_by_side import run_tables

HOOK = "blocks.1.mlp.hook_post"
STREAM = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    splits = Splits(val_fraction=0.2, explain_fraction=0.2, score_fraction=0.2)
    section = Data(corpus=PlantedCorpus(n_documents=150), splits=splits, n_ctx=32)
    return prepare(section, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(corpus: TokenCorpus) -> torch.nn.Module:
    section = CrateModel(arch="crate", n_layers=2, d_model=16, n_heads=2)
    return build_model(section, d_vocab=len(corpus.tokenizer), n_ctx=32, seed=0)


@pytest.fixture(scope="module")
def store(corpus: TokenCorpus, model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory):
    parts = [corpus.tokens("explain"), corpus.tokens("score")]
    path = tmp_path_factory.mktemp("store") / "store.duckdb"
    with astore.open(path, mode="w") as store:
        yield capture(model, parts, vectors=STREAM, into=store, max_density=0.9)


def all_activations(corpus: TokenCorpus, model: torch.nn.Module, hook: str) -> np.ndarray:
    """Return [tokens, d] of both splits, computed at one go without the store."""
    ids = np.concatenate([corpus.tokens("explain").ids, corpus.tokens("score").ids])
    _, acts = run_with_cache(model, torch.from_numpy(ids.astype(np.int64)), hook)
    return acts[hook].flatten(0, 1).numpy()


def test_gated_neurons_are_stored_with_both_signs_where_asked(corpus: TokenCorpus, tmp_path: Path):
    llama, rows = tiny("llama", vocab_size=len(corpus.tokenizer)), corpus.tokens("explain")
    with astore.open(tmp_path / "store.duckdb", mode="w") as store:
        capture(llama, rows, hooks=HOOK, into=store, signed=True, max_density=0.9)
        query = "SELECT hook, sum(act) FROM activations GROUP BY ALL ORDER BY ALL"
        sums = store.sql(query).fetchall()
    ids = torch.from_numpy(rows.ids.astype(np.int64))
    acts = run_with_cache(llama, ids, HOOK)[1][HOOK].double()
    assert [hook for hook, _ in sums] == [HOOK, f"{HOOK}_neg"]
    wanted = [float(half.clamp_min(0).sum()) for half in (acts, -acts)]
    assert [total for _, total in sums] == pytest.approx(wanted, rel=1e-5)


def test_every_stored_activation_is_the_models_own(
    store: astore.Store, corpus: TokenCorpus, model: torch.nn.Module
) -> None:
    wanted = all_activations(corpus, model, HOOK)
    rows = store.sql("SELECT * FROM activations WHERE hook = $hook", hook=HOOK).fetchall()
    assert len(rows) == int((wanted > 0).sum())
    seq_ids = np.concatenate([corpus.tokens("explain").seq_ids, corpus.tokens("score").seq_ids])
    place = {int(seq): i for i, seq in enumerate(seq_ids)}
    ids = np.concatenate([corpus.tokens("explain").ids, corpus.tokens("score").ids])
    docs = np.concatenate([corpus.tokens("explain").doc_ids, corpus.tokens("score").doc_ids])
    words = corpus.vocabulary()
    for _, unit, seq, pos, doc, _, token_id, token, act in rows[::97]:
        i = place[seq]
        assert act == pytest.approx(wanted[i * 32 + pos, unit], rel=1e-4)
        assert (doc, token_id) == (docs[i, pos], ids[i, pos])
        assert token == words[token_id]


def test_only_documents_of_the_asked_splits_are_stored(
    store: astore.Store, corpus: TokenCorpus
) -> None:
    kept = store.sql("SELECT DISTINCT split, doc_id FROM tokens").fetchall()
    split_of = dict(
        zip(*(corpus.documents[c].to_pylist() for c in ("doc_id", "split")), strict=True)
    )
    assert {split for split, _ in kept} == {"explain", "score"}
    assert all(split_of[doc] == split for split, doc in kept)


def test_statistics_cover_all_tokens_and_agree_with_scipy(
    store: astore.Store, corpus: TokenCorpus, model: torch.nn.Module
) -> None:
    a = all_activations(corpus, model, HOOK).astype(np.float64)
    query = """SELECT n_tokens, density, mean, kurtosis, max_act FROM unit_stats
        WHERE hook = $hook ORDER BY unit"""
    n, density, mean, kurtosis, top = np.array(store.sql(query, hook=HOOK).fetchall()).T
    assert (n == len(a)).all()
    np.testing.assert_allclose(density, (a > 0).mean(axis=0), atol=2 / len(a))
    np.testing.assert_allclose(mean, a.mean(axis=0), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(top, a.max(axis=0), rtol=1e-4)
    np.testing.assert_allclose(kurtosis, stats.kurtosis(a, axis=0, fisher=False), rtol=1e-3)


def test_vectors_are_whole_to_half_precision(
    store: astore.Store, corpus: TokenCorpus, model: torch.nn.Module
) -> None:
    wanted = all_activations(corpus, model, STREAM)
    query = "SELECT vector FROM vectors WHERE hook = $hook ORDER BY seq_id, pos"
    got = np.array([row[0] for row in store.sql(query, hook=STREAM).fetchall()])
    np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=1e-4)


def test_an_interrupted_capture_ends_with_the_same_bytes(
    corpus: TokenCorpus, model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commits every 10 rows cut batches of 7, which run whole again: their bits must be equal."""
    monkeypatch.setattr("activation_store.write.writer.GROUP_TOKENS", 5 * 32)
    often = partialmethod(astore.Store.writer, commit_tokens=10 * 32)
    monkeypatch.setattr(astore.Store, "writer", often)
    n_run: list[int] = []

    def interrupt(what: str, done: int, total: int, **facts: float) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    rows, small = corpus.tokens("explain"), {"batch_tokens": 7 * 32, "max_density": 0.9}
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda _, inputs: n_run.append(len(inputs[0])))
    for name in ("whole", "stopped"):
        with astore.open(tmp_path / name / "store.duckdb", mode="w") as store:
            if name == "stopped":
                with pytest.raises(KeyboardInterrupt):
                    capture(model, rows, into=store, progress=interrupt, **small)
                n_kept = len(store.sql("SELECT DISTINCT seq_id FROM token_ids").fetchall())
                assert 0 < n_kept < len(rows) and n_kept % 7, "a commit has cut a batch"
            capture(model, rows, into=store, **small)
    handle.remove()
    assert set(n_run) - {0, 1} == {7, len(rows) % 7} - {0, 1}, "one row asks for the widths"
    digests = []
    for name in ("whole", "stopped"):
        with astore.open(tmp_path / name / "store.duckdb") as store:
            acts = store.sql("SELECT * FROM acts ORDER BY ALL").fetchall()
            exemplars = store.sql("SELECT * FROM exemplars ORDER BY ALL").fetchall()
            digests.append(hashlib.sha256(repr((acts, exemplars)).encode()).hexdigest())
    assert digests[0] == digests[1]


def test_a_dense_hook_is_refused_as_rows_with_its_size(corpus: TokenCorpus, tmp_path: Path) -> None:
    section = Gpt2Model(arch="gpt2", n_layers=1, d_model=16, n_heads=2, activation="gelu_new")
    gelu = build_model(section, d_vocab=len(corpus.tokenizer), n_ctx=32, seed=0)
    with astore.open(tmp_path / "store.duckdb", mode="w") as store:
        with pytest.raises(astore.StoreError, match=r"density|dense"):
            capture(gelu, corpus.tokens("explain"), threshold=-1.0, into=store)
        assert store.info().n_acts == 0


def test_all_settings_of_the_store_are_reachable(
    corpus: TokenCorpus, model: torch.nn.Module, tmp_path: Path
) -> None:
    """Types, units, the share that is kept: in Python as here, in a recipe by the same names."""
    tokens, seen = corpus.tokens("val"), {"hooks": HOOK, "vectors": STREAM, "max_density": 0.9}
    ids = torch.from_numpy(tokens.ids.astype(np.int64))
    acts = run_with_cache(model, ids, [HOOK, STREAM])[1]
    wanted = acts[HOOK].flatten(0, 1).numpy()
    with astore.open(tmp_path / "a.duckdb", mode="w") as store:
        capture(model, tokens, into=store, units=[1, 5], vectors_dtype="float32", **seen)
        assert set(store.sql("SELECT DISTINCT unit FROM acts").fetchall()) == {(1,), (5,)}
        assert store.info().n_acts == (wanted[:, [1, 5]] > 0).sum()
        (batch,) = store.vectors(STREAM, batch_tokens=tokens.ids.size, shuffle=False)
        assert (np.asarray(batch) == acts[STREAM].flatten(0, 1).numpy()).all(), "no bit is lost"
    with astore.open(tmp_path / "b.duckdb", mode="w") as store:
        capture(model, tokens, into=store, top_p=0.5, dtype="float16", **seen)
        kept = store.sql("SELECT sum(act) FROM acts").fetchone()[0]
        assert 0.5 <= kept / wanted.clip(0).sum() < 0.9
        values = np.array(store.sql("SELECT act FROM acts").fetchall(), np.float32)
        assert (values == values.astype(np.float16)).all()
        for wrong in ({"units": (5, 1)}, {"top_p": 0.5, "threshold": -1.0}, {"dtype": "float64"}):
            with pytest.raises(RunError, match=next(reversed(wrong))):
                capture(model, tokens, into=store, **wrong)


def test_dense_units_store_their_strongest_activations_and_statistics_of_all(
    corpus: TokenCorpus, tmp_path: Path
) -> None:
    section = Gpt2Model(arch="gpt2", n_layers=1, d_model=16, n_heads=2, activation="gelu_new")
    gelu = build_model(section, d_vocab=len(corpus.tokenizer), n_ctx=32, seed=0)
    tokens, hook = corpus.tokens("explain"), "blocks.0.mlp.hook_post"
    ids = torch.from_numpy(tokens.ids.astype(np.int64))
    acts = run_with_cache(gelu, ids, [hook])[1][hook].flatten(0, 1).numpy()
    acts = acts[(tokens.doc_ids >= 0).reshape(-1)]
    settings = {"hooks": hook, "max_density": 1.0}
    with (
        astore.open(tmp_path / "all.duckdb", mode="w") as whole,
        astore.open(tmp_path / "few.duckdb", mode="w") as few,
    ):
        capture(gelu, tokens, into=whole, **settings)
        capture(gelu, tokens[:4], into=few, acts_per_token=4, **settings)
        capture(gelu, tokens, into=few, acts_per_token=4, **settings)  # keeps the first one's cuts
        stats = "SELECT * EXCLUDE stored_from FROM unit_stats ORDER BY unit"
        assert few.sql(stats).fetchall() == whole.sql(stats).fetchall()
        exemplars = "FROM exemplars WHERE kind = 'top' ORDER BY ALL"
        assert few.sql(exemplars).fetchall() == whole.sql(exemplars).fetchall()
        query = "SELECT stored_from FROM unit_stats ORDER BY unit"
        cuts = np.array(few.sql(query).fetchall(), np.float32)[:, 0]
        first = acts[
            : 4 * 32
        ]  # cuts are of the first capture's rows: 4 of 64 units, 8 of 128 tokens
        np.testing.assert_array_equal(cuts, np.sort(first, axis=0)[-8].clip(0))
        stored = few.sql("SELECT unit, count(*) FROM acts GROUP BY unit ORDER BY unit").fetchall()
        assert stored == list(enumerate(((acts > 0) & (acts >= cuts)).sum(0).tolist()))


def test_a_forecast_is_of_the_bytes_that_a_capture_takes(
    model: torch.nn.Module, tmp_path: Path
) -> None:
    settings = Capture(hooks=(HOOK,), batch_tokens=256, max_density=1.0)
    told = forecast(model, settings, n_ctx=32, seed=5)
    ids = np.random.default_rng(5).integers(0, model.config.vocab_size, (24, 32)).astype(np.uint32)
    rows = TokenRows(ids, np.arange(24, dtype=np.int32)[:, None].repeat(32, 1), 0, "explain")
    with astore.open(tmp_path / "store.duckdb", mode="w") as store:
        capture(model, rows, hooks=HOOK, max_density=1.0, into=store)
        ((n_bytes,),) = store.sql("SELECT sum(n_bytes) FROM shards").fetchall()
    assert told.bytes_per_token == pytest.approx(n_bytes / ids.size, rel=0.02)
    assert told.tokens_per_second > 0
    weights = sum(w.nbytes for w in model.parameters())
    assert weights < told.peak_bytes < 2**35


def test_a_second_capture_adds_what_is_new_and_refuses_other_tokens_of_a_sequence(
    corpus: TokenCorpus, model: torch.nn.Module, tmp_path: Path
) -> None:
    rows, options = corpus.tokens("val"), {"hooks": HOOK, "max_density": 0.9}
    path = tmp_path / "store.duckdb"
    for mode, part in (("w", rows[:8]), ("a", rows[4:12]), ("a", corpus.tokens("score")[:3])):
        with astore.open(path, mode) as store:
            capture(model, part, into=store, **options)
    with astore.open(path) as store:
        found = {int(seq) for (seq,) in store.sql("SELECT DISTINCT seq_id FROM tokens").fetchall()}
        n_acts = store.info().n_acts
    wanted = [*rows.seq_ids[:12], *corpus.tokens("score").seq_ids[:3]]
    assert found == set(map(int, wanted))
    ids = np.concatenate([rows.ids[:12], corpus.tokens("score").ids[:3]]).astype(np.int64)
    acts = run_with_cache(model, torch.from_numpy(ids), HOOK)[1][HOOK]
    assert n_acts == int((acts > 0).sum()), "rows 4 to 8 are there once"
    other = replace(rows[:8], ids=rows.ids[:8][:, ::-1].copy())
    with (
        astore.open(path, "a") as store,
        pytest.raises(astore.StoreError, match="sequence .* its tokens or documents differ"),
    ):
        capture(model, other, into=store, **options)


def test_left_out_tokens_count_nowhere_and_stay_in_the_text(
    corpus: TokenCorpus, model: torch.nn.Module, tmp_path: Path
) -> None:
    rows, special = corpus.tokens("val"), corpus.tokenizer.all_special_ids
    acts = run_with_cache(model, torch.from_numpy(rows.ids.astype(np.int64)), HOOK)[1][HOOK].numpy()
    counts = ~np.isin(rows.ids, special) & (np.arange(rows.n_ctx) >= 2)
    skip = {"special": True, "first": 2}
    with astore.open(tmp_path / "store.duckdb", mode="w") as store:
        capture(model, rows, hooks=HOOK, into=store, skip=skip, max_density=0.9)
        facts = store.sql("SELECT n_active, n_tokens FROM unit_stats ORDER BY unit").fetchall()
        n_tokens = store.sql("SELECT count(*) FROM tokens").fetchone()[0]
    assert [n for n, _ in facts] == list((acts[counts] > 0).sum(axis=0))
    assert {n for _, n in facts} == {counts.sum()}
    assert n_tokens == rows.ids.size


def test_wrong_names_and_settings_say_what_exists(
    corpus: TokenCorpus, model: torch.nn.Module, tmp_path: Path
) -> None:
    with astore.open(tmp_path / "store.duckdb", mode="w") as store:
        with pytest.raises(ModelError, match=r"did you mean blocks.1.mlp.hook_post"):
            capture(model, corpus.tokens("val"), hooks="blocks.1.mlp.hook_pots", into=store)
        with pytest.raises(RunError, match="treshold"):
            capture(model, corpus.tokens("val"), treshold=0.1, into=store)


def test_a_run_is_captured_once_and_compared(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""
name: tiny
seed: 0
out: {tmp_path / "runs"}
data: {{corpus: {{kind: planted, n_documents: 300}}, n_ctx: 32}}
model: {{arch: crate, n_layers: 1, d_model: 16, n_heads: 2}}
train: {{steps: 5, batch_tokens: 256, warmup_steps: 1, eval_tokens: 512}}
capture: {{max_tokens: 640, max_density: 0.9}}
"""
    )
    run = run_stages(train(Recipe.load(path)), "capture")
    before = run.store_path.stat().st_mtime_ns
    assert run_stages(run, "capture").store_path.stat().st_mtime_ns == before
    with astore.open(run.store_path, mode="a") as store:
        lm.score(store, "blocks.0.mlp.hook_post", scorer="token_selectivity")
        (facts,) = store.sql("SELECT run, arch, n_ctx, n_layers FROM runs").fetchall()
        assert facts == ("tiny", "crate", 32, 1)
    layers, neurons = run_tables([run])
    assert layers.rows[0][:2] == ("tiny", "blocks.0.mlp.hook_post")
    assert len(neurons.rows) == 6
    assert all("«" in row[-1] for row in neurons.rows)
