"""Latents in the store: as if the model had given them, under names of their own, and queryable."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

import activation_store as astore
import lmmono as lm
from activation_store.read.replay import Replay
from lmmono.captures.capture import capture
from lmmono.captures.latents import store_latents
from lmmono.data.tokens import TokenCorpus, TokenRows, prepare
from lmmono.errors import DictionaryError
from lmmono.models.build import build_model
from lmmono.models.hooks import run_with_cache
from lmmono.recipe.sections import CrateModel, Data, PlantedCorpus, Splits

HOOK, STREAM = "blocks.0.mlp.hook_post", "blocks.0.hook_resid_post"
LATENTS = f"{STREAM}.hook_sae_acts_post"
D, D_SAE, N_CTX = 16, 24, 32


class Settings(BaseModel):
    arch: str = "relu"


@dataclass
class Relu:
    """A code that can be computed by hand: relu(x W - 0.5), signed where asked."""

    seed: int = 0
    signed: bool = False
    hook: str | None = STREAM
    d_in: int = D
    d_sae: int = D_SAE
    settings: Settings = field(default_factory=Settings)
    facts: dict[str, Any] = field(default_factory=dict)
    arch: str = "relu"

    @property
    def digest(self) -> str:
        return f"{self.seed:064d}"

    def tensors(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return {"W_dec": torch.randn(self.d_sae, self.d_in, generator=generator)}

    def encode(self, x: Tensor) -> Tensor:
        pre = x @ self.tensors()["W_dec"].T - 0.5
        return pre if self.signed else pre.relu()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    splits = Splits(val_fraction=0.2, explain_fraction=0.2, score_fraction=0.2)
    section = Data(corpus=PlantedCorpus(n_documents=80), splits=splits, n_ctx=N_CTX)
    return prepare(section, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def parts(corpus: TokenCorpus) -> list[TokenRows]:
    return [corpus.tokens("explain"), corpus.tokens("score")]


@pytest.fixture(scope="module")
def model(corpus: TokenCorpus) -> torch.nn.Module:
    section = CrateModel(arch="crate", n_layers=1, d_model=D, n_heads=2)
    return build_model(section, d_vocab=len(corpus.tokenizer), n_ctx=N_CTX, seed=0)


def whole_vectors(
    path: Path, parts: list[TokenRows], model: torch.nn.Module, dtype: astore.hooks.Dtype
) -> astore.Store:
    """Return a store with neurons, and vectors of the stream in a type of our choice."""
    store = astore.open(path, "w")
    capture(model, parts, hooks=HOOK, max_density=0.9, into=store)
    whole = [astore.Vectors(STREAM, D, dtype)]
    with store.writer(vectors=whole, n_ctx=N_CTX) as writer:
        for part in parts:
            ids = torch.from_numpy(part.ids.astype(np.int64))
            _, acts = run_with_cache(model, ids, STREAM)
            writer.add(part.seq_ids, part.ids, part.doc_ids, part.split, acts)
    return store


@pytest.fixture(scope="module")
def template(
    parts: list[TokenRows], model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("store") / "run"
    whole_vectors(path, parts, model, "float32").close()
    return path


@pytest.fixture
def store(template: Path, tmp_path: Path) -> astore.Store:
    shutil.copytree(template, tmp_path / "run")
    return astore.open(tmp_path / "run", "a")


def table(store: astore.Store, name: str, hook: str, order: str) -> dict[str, np.ndarray]:
    found = store.sql(f"FROM {name} WHERE hook = $hook ORDER BY {order}", hook=hook)
    columns = found.to_arrow_table().drop_columns(["hook"])
    return {each: columns[each].to_numpy(zero_copy_only=False) for each in columns.column_names}


def assert_alike(
    a: astore.Store, b: astore.Store, hook: str, rtol: float, atol: float = 0.0
) -> None:
    """Compare rows, statistics and exemplars of a hook in two stores."""
    for name, order in (
        ("acts", "seq_id, pos, unit"),
        ("unit_stats", "unit"),
        ("exemplars", "unit, kind, rank"),
    ):
        left, right = table(a, name, hook, order), table(b, name, hook, order)
        assert len(left["unit"]) == len(right["unit"]) > 0
        for column, values in left.items():
            if values.dtype.kind == "f":
                np.testing.assert_allclose(values, right[column], rtol, atol, err_msg=column)
            else:
                assert values.tolist() == right[column].tolist(), (name, column)


def test_latents_of_stored_vectors_are_those_of_a_live_capture(
    store: astore.Store, parts: list[TokenRows], model: torch.nn.Module, tmp_path: Path
) -> None:
    assert store_latents(store, Relu(), max_density=0.9) == LATENTS
    with astore.open(tmp_path / "live", "w") as live:
        capture(model, parts, hooks=HOOK, dictionaries=[Relu()], max_density=0.9, into=live)
        assert_alike(store, live, LATENTS, rtol=1e-5, atol=1e-6)
        assert_alike(store, live, HOOK, rtol=1e-6)
        named = "SELECT hook, latents_hook, d_sae FROM dictionaries"
        assert (
            store.sql(named).fetchall() == live.sql(named).fetchall() == [(STREAM, LATENTS, D_SAE)]
        )


def stream_of(store: astore.Store, hook: str = STREAM) -> np.ndarray:
    """Return all vectors in stored order, read by SQL."""
    rows = store.sql(
        "SELECT vector FROM vectors WHERE hook = $hook ORDER BY seq_id, pos", hook=hook
    ).fetchall()
    return np.array([vector for (vector,) in rows], np.float32)


def codes_of(store: astore.Store, code: Relu) -> np.ndarray:
    """Return the codes of all stored vectors, computed at one go."""
    return code.encode(torch.from_numpy(stream_of(store))).numpy()


def test_float16_vectors_give_the_latents_of_the_rounded_vectors(
    parts: list[TokenRows], model: torch.nn.Module, template: Path, tmp_path: Path
) -> None:
    code = Relu()
    with whole_vectors(tmp_path / "half", parts, model, "float16") as half:
        store_latents(half, code, max_density=0.9)
        wanted, exact = codes_of(half, code), codes_of(astore.open(template), code)
        rows = table(half, "acts", LATENTS, "seq_id, pos, unit")
        np.testing.assert_allclose(rows["act"], wanted[wanted > 0], rtol=1e-5, atol=1e-6)
        assert 0 < np.abs(wanted - exact).max() < 0.01


def test_statistics_are_those_of_numpy_over_every_token(store: astore.Store) -> None:
    code = Relu()
    store_latents(store, code, max_density=0.9)
    acts = codes_of(store, code).astype(np.float64)
    stats = table(store, "unit_stats", LATENTS, "unit")
    assert set(stats["n_tokens"]) == {len(acts)}
    np.testing.assert_array_equal(stats["n_active"], (acts > 0).sum(0))
    np.testing.assert_allclose(stats["mean"], acts.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["variance"], acts.var(0), rtol=1e-4)


def test_every_query_works_on_latents_as_on_neurons(store: astore.Store, tmp_path: Path) -> None:
    code = Relu()
    store_latents(store, code, max_density=0.9)
    acts = codes_of(store, code)
    tokens = store.sql("SELECT token_id FROM token_ids ORDER BY seq_id, pos").fetchnumpy()
    ids = np.asarray(tokens["token_id"])
    unit, other = int(acts.max(0).argmax()), int((acts > 0).sum(0).argmax())
    found = store.unit(LATENTS, unit)
    assert found.max_act == pytest.approx(acts[:, unit].max(), rel=1e-6)
    best = store.exemplars(LATENTS, unit, k=1)[0]
    assert best.act == pytest.approx(acts[:, unit].max(), rel=1e-6)
    query = "SELECT token_id, act FROM activations WHERE hook = $h AND unit = $u ORDER BY act"
    rows = store.sql(query, h=LATENTS, u=unit).fetchnumpy()
    firing = acts[:, unit] > 0
    order = np.argsort(acts[firing, unit], kind="stable")
    assert np.asarray(rows["token_id"]).tolist() == ids[firing][order].tolist()
    query = "SELECT n_a, n_b, n_both FROM coactivation($h, $a, $b)"
    both = (firing & (acts[:, other] > 0)).sum()
    counts = store.sql(query, h=LATENTS, a=unit, b=other).fetchall()[0]
    assert counts == (firing.sum(), (acts[:, other] > 0).sum(), both)
    query = "SELECT token_id, n_acts FROM token_profile($h, $u) ORDER BY token_id"
    profile = store.sql(query, h=LATENTS, u=unit).fetchall()
    assert profile == list(zip(*np.unique(ids[firing], return_counts=True), strict=True))
    lm.score(store, LATENTS, scorer="token_selectivity")
    query = """SELECT count(*) FROM all_scores WHERE hook = $h AND control IS NULL
        AND unit IS NOT NULL AND failure IS DISTINCT FROM 'silent'"""
    assert store.sql(query, h=LATENTS).fetchall()[0] == (int((acts > 0).any(0).sum()),)


def test_a_store_with_latents_is_verified_compacted_and_exported(
    store: astore.Store, tmp_path: Path
) -> None:
    store_latents(store, Relu(), max_density=0.9, commit_tokens=1)
    before = table(store, "acts", LATENTS, "seq_id, pos, unit")
    listed = "SELECT count(*) FROM shards WHERE hook = $h"
    assert store.sql(listed, h=LATENTS).fetchall()[0] > (1,)
    assert astore.compact(store.path).merged > 1
    store.refresh()
    assert store.sql(listed, h=LATENTS).fetchall()[0] == (1,)
    assert store.verify().ok
    after = table(store, "acts", LATENTS, "seq_id, pos, unit")
    assert all((before[name] == after[name]).all() for name in before)
    out = astore.export(store, "parquet", tmp_path / "out")
    exported = list((out / "acts" / f"hook={LATENTS}").glob("*.parquet"))
    assert sum(n_rows(path) for path in exported) == len(before["act"])


def n_rows(path: Path) -> int:
    return pq.read_metadata(path).num_rows


class Stopped(Exception):
    pass


def stop_at(tokens: int) -> lm.types.Progress:
    def progress(what: str, done: int, total: int, **facts: float) -> None:
        if done >= tokens:
            raise Stopped

    return progress


def test_a_stop_leaves_the_hook_away_and_the_next_call_stores_it_whole(
    store: astore.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmmono.captures.latents.CODE_BYTES", 4 * D_SAE * 64)
    with pytest.raises(Stopped):
        store_latents(store, Relu(), max_density=0.9, progress=stop_at(640))
    known = "SELECT n_tokens FROM hooks WHERE hook = $h"
    assert store.sql(known, h=LATENTS).fetchall() == []
    assert store.verify().ok
    store_latents(store, Relu(), max_density=0.9)
    assert store.sql(known, h=LATENTS).fetchall()[0] == (len(stream_of(store)),)


def test_with_commits_a_stopped_call_goes_on_and_ends_with_the_same_store(
    store: astore.Store, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmmono.captures.latents.CODE_BYTES", 4 * D_SAE * 64)
    settings: dict[str, Any] = {"max_density": 0.9, "commit_tokens": 1}
    with pytest.raises(Stopped):
        store_latents(store, Relu(), **settings, progress=stop_at(2048))
    seen = store.sql("SELECT n_tokens FROM hooks WHERE hook = $h", h=LATENTS).fetchall()[0]
    assert seen is not None and 0 < seen[0] < len(stream_of(store))
    store_latents(store, Relu(), **settings)
    shutil.copytree(template, tmp_path / "other")
    with astore.open(tmp_path / "other", "a") as other:
        store_latents(other, Relu(), **settings)
        assert_alike(store, other, LATENTS, rtol=0.0)


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[2])
import activation_store as astore, lmmono.captures.latents as latents
from test_latents import D_SAE, Relu
latents.CODE_BYTES = 4 * D_SAE * 64
die = lambda what, done, total, **facts: done >= 640 and os._exit(9)
latents.store_latents(astore.open(sys.argv[1], "a"), Relu(), max_density=0.9, progress=die)
"""


def test_a_process_killed_on_the_way_leaves_a_whole_store_without_the_hook(
    store: astore.Store,
) -> None:
    assert forks.start("-c", KILLED, store.path, Path(__file__).parent).wait() == 9
    assert LATENTS not in store.info().hooks
    assert store.verify().ok
    store_latents(store, Relu(), max_density=0.9)
    assert LATENTS in store.info().hooks and not store.verify().left_over


def test_stored_again_nothing_changes_and_a_second_dictionary_has_its_own_hook(
    store: astore.Store,
) -> None:
    assert store_latents(store, Relu(), max_density=0.9) == LATENTS
    before = store.sql("FROM shards ORDER BY file").fetchall()
    assert store_latents(store, Relu(), max_density=0.9) == LATENTS
    assert store.sql("FROM shards ORDER BY file").fetchall() == before
    second = f"{STREAM}.mine.hook_sae_acts_post"
    assert store_latents(store, Relu(1), name="mine", max_density=0.9) == second
    assert store_latents(store, Relu(1), max_density=0.9) == second
    third = f"{STREAM}.relu_24_00000000.hook_sae_acts_post"
    assert store_latents(store, Relu(2), name="relu_24", max_density=0.9) != third
    listed = "SELECT name, latents_hook FROM dictionaries ORDER BY digest"
    assert [hook for _, hook in store.sql(listed).fetchall()][:2] == [LATENTS, second]
    with pytest.raises(DictionaryError, match="'mine' with other weights.*give another name"):
        store_latents(store, Relu(3), name="mine")
    with pytest.raises(DictionaryError, match="letters, digits"):
        store_latents(store, Relu(3), name="a.b")


def test_a_row_that_an_evaluation_wrote_keeps_its_measures(store: astore.Store) -> None:
    row = {"hook": STREAM, "name": "mine", "arch": "relu", "d_in": D, "d_sae": D_SAE}
    store.append("dictionaries", [{**row, "digest": Relu().digest, "l0": 4.5, "settings": {}}])
    store_latents(store, Relu(), max_density=0.9)
    found = store.sql("SELECT name, l0, latents_hook, settings FROM dictionaries").fetchall()
    assert found == [("mine", 4.5, LATENTS, "{}")]


def test_signed_codes_are_refused_or_stored_as_two_halves(store: astore.Store) -> None:
    code = Relu(signed=True)
    with pytest.raises(DictionaryError, match="negative values.*halves=True"):
        store_latents(store, code, max_density=0.9)
    assert LATENTS not in store.info().hooks
    store_latents(store, code, max_density=0.9, halves=True)
    acts = codes_of(store, code)
    wanted = np.concatenate([acts.clip(min=0), (-acts).clip(min=0)], axis=1)
    rows = table(store, "acts", LATENTS, "seq_id, pos, unit")
    np.testing.assert_array_equal(rows["unit"], np.nonzero(wanted > 0)[1])
    np.testing.assert_allclose(rows["act"], wanted[wanted > 0], rtol=1e-5, atol=1e-6)


def test_max_tokens_takes_whole_sequences_and_a_later_call_takes_the_rest(
    store: astore.Store,
) -> None:
    seen = "SELECT n_tokens FROM hooks WHERE hook = $h"
    store_latents(store, Relu(), max_tokens=5 * N_CTX + 3, max_density=0.9)
    assert store.sql(seen, h=LATENTS).fetchall()[0] == (5 * N_CTX,)
    store_latents(store, Relu(), max_density=0.9)
    assert store.sql(seen, h=LATENTS).fetchall()[0] == (len(stream_of(store)),)


def test_padding_and_vectors_that_were_not_finite_are_left_out_as_in_a_capture(
    tmp_path: Path,
) -> None:
    code, rng = Relu(d_in=4, d_sae=6, hook="h"), np.random.default_rng(0)
    x = rng.normal(size=(6, 8, 4)).astype(np.float32)
    ids, docs = rng.integers(1, 50, (6, 8)), np.repeat(np.arange(6), 8).reshape(6, 8)
    docs[1, 5:], docs[4, :2] = -1, -1
    x[2, 3], x[3, 0, 1] = np.nan, np.inf
    seq = np.array([0, 2, 4, 7, 9, 30])
    codes = code.encode(torch.from_numpy(np.nan_to_num(x, posinf=0))).numpy()
    codes[2, 3], codes[3, 0] = np.nan, np.nan
    whole, rows = [astore.Vectors("h", 4, "float32")], [astore.Rows("h.hook_sae_acts_post", 6)]
    with (
        astore.open(tmp_path / "a", "w") as again,
        astore.open(tmp_path / "b", "w") as live,
        pytest.warns(astore.DroppedWarning, match="2 of .* tokens have no vector"),
        again.writer(vectors=whole, n_ctx=8) as first,
        live.writer(rows=rows, n_ctx=8) as second,
    ):
        for part, split in ((slice(0, 3), "x"), (slice(3, 6), "y")):
            first.add(seq[part], ids[part], docs[part], split, {"h": x[part]})
            second.add(seq[part], ids[part], docs[part], split, {rows[0].hook: codes[part]})
    with astore.open(tmp_path / "a", "a") as again, astore.open(tmp_path / "b") as live:
        batches = list(Replay(again, "h").batches(lambda ids, *_: ids != seq[0]))
        assert [list(batch.seq_ids) for batch in batches] == [[2, 4], [7, 9, 30]]
        assert [batch.split for batch in batches] == ["x", "y"]
        store_latents(again, code)
        assert_alike(again, live, rows[0].hook, rtol=1e-6, atol=1e-7)
        assert again.verify().ok
        query = "SELECT seq_id, pos, split FROM tokens ORDER BY ALL"
        assert again.sql(query).fetchall() == live.sql(query).fetchall()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (Relu(d_in=0), "not fitted"),
        (Relu(hook=None), "does not know its hook"),
        (Relu(d_in=8), "have width 16, the dictionary wants 8"),
    ],
)
def test_a_dictionary_that_does_not_fit_the_store_is_refused(
    template: Path, code: Relu, message: str
) -> None:
    with pytest.raises(DictionaryError, match=message):
        store_latents(astore.open(template), code)


def test_what_the_store_cannot_do_is_said(template: Path) -> None:
    with pytest.raises(astore.StoreError, match="open for reading"):
        store_latents(astore.open(template), Relu())
    with pytest.raises(astore.ContentError, match="captured as rows only"):
        store_latents(astore.open(template), Relu(hook=HOOK))
    with pytest.raises(DictionaryError, match="topk"):
        store_latents(astore.open(template), Relu(), topk=3)


def test_two_dictionaries_are_captured_live_by_hook_and_one_given_twice_is_refused(
    parts: list[TokenRows], model: torch.nn.Module, tmp_path: Path
) -> None:
    anonymous = Relu(hook=None)
    with astore.open(tmp_path / "run", "w") as store:
        codes = {STREAM: anonymous, "blocks.0.hook_mlp_out": Relu(1, hook=None)}
        capture(model, parts, hooks=HOOK, dictionaries=codes, max_density=0.9, into=store)
        assert set(store.info().hooks) == {HOOK, *(f"{h}.hook_sae_acts_post" for h in codes)}
        with pytest.raises(DictionaryError, match="given twice"):
            capture(model, parts, dictionaries=[Relu(), Relu()], into=store)


def test_latents_of_a_trained_sae_have_at_most_k_rows_per_token(store: astore.Store) -> None:
    sae = lm.SAE(arch="topk", d_sae=32, k=3, steps=150, lr=1e-2, dead_window_steps=1000)
    sae.fit(store.vectors(STREAM, batch_tokens=256))
    hook = lm.store_latents(store, sae)
    most = "SELECT max(n) FROM (SELECT count(*) n FROM acts WHERE hook = $h GROUP BY seq_id, pos)"
    assert store.sql(most, h=hook).fetchall()[0] == (3,)
    row = store.sql("SELECT arch, d_sae, digest, settings->>'k' FROM dictionaries").fetchall()[0]
    assert row == ("topk", 32, sae.digest, "3")
