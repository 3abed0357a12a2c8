"""Exports are whole or not there, and other tools' readers find in them what the store holds."""

import json
import math
from dataclasses import dataclass, field
from urllib.parse import unquote

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from small_store import HOOK, HOSTILE, N_CTX, WORDS, small_store

import activation_store as astore
from activation_store import Rows
from activation_store.read.exporting import export, export_delphi, export_openai, export_parquet

D, CTX, N = 12, 16, 24


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def store(small):
    with astore.open(small.path) as opened:
        yield opened


def test_parquet_is_read_by_pyarrow_polars_and_duckdb(small, store, tmp_path):
    out = export_parquet(store, tmp_path / "out")
    names = {unquote(p.name.removeprefix("hook=")) for p in (out / "acts").iterdir()}
    assert names == {HOOK, HOSTILE}
    want = store.sql("SELECT unit, seq_id, pos, act FROM acts WHERE hook = $h", h=HOOK).fetchall()
    acts = pl.read_parquet(out / "acts" / f"hook={HOOK}" / "*.parquet", hive_partitioning=False)
    assert sorted(acts.rows()) == sorted(want)
    vectors = pq.read_table(out / "vectors" / "hook=resid" / "00000.parquet")
    flat = vectors.column("vector").combine_chunks().flatten().to_numpy()
    np.testing.assert_array_equal(flat, small.vectors.astype(np.float16).reshape(-1))
    tokens = duckdb.sql(f"SELECT token_id FROM '{out}/tokens/*.parquet' ORDER BY seq_id, pos")
    assert [t for (t,) in tokens.fetchall()] == small.token_ids.reshape(-1).tolist()
    for table in ("documents", "exemplars", "hooks", "unit_stats", "vocabulary"):
        found = duckdb.sql(f"SELECT * FROM '{out}/tables/{table}.parquet' ORDER BY ALL").fetchall()
        assert found == store.sql(f"SELECT * FROM {table} ORDER BY ALL").fetchall()


@pytest.mark.parametrize("kind", ["acts", "tokens", "vectors"])
@pytest.mark.parametrize("to", ["parquet", "delphi", "openai"])
def test_damaged_bytes_get_no_new_checksum(tmp_path, kind, to):
    small = small_store(tmp_path / "run")
    with astore.open(small.path) as store:
        query = "SELECT file FROM shards WHERE kind = $kind AND coalesce(hook, $hook) = $hook"
        hook = "resid" if kind == "vectors" else HOOK
        (name,) = store.sql(query + " LIMIT 1", kind=kind, hook=hook).fetchone()
        shard = small.path / "store" / name
        data = bytearray(shard.read_bytes())
        data[len(data) // 3] ^= 1
        shard.write_bytes(data)
        hooks = () if to == "parquet" else (HOOK,)
        if kind == "vectors" and to != "parquet":  # not read for these
            export(store, to, tmp_path / "out", hooks)
            return
        with pytest.raises(astore.ShardError, match=f"{name}: .*verify --repair"):
            export(store, to, tmp_path / "out", hooks)
    assert not (tmp_path / "out").exists()


def test_delphi_reads_its_layout(small, store, tmp_path):
    """The reading is that of delphi's TensorBuffer.load, without torch."""
    out = export_delphi(store, tmp_path / "out", n_splits=4, model_name="some/model")
    assert len(list(out.iterdir())) == 2
    for hook, acts in small.acts.items():
        (folder,) = [path for path in out.iterdir() if unquote(path.name) == hook]
        dense = np.zeros_like(acts)
        edges = []
        for path in folder.glob("*.safetensors"):
            start, end = map(int, path.stem.split("_"))
            edges.append((start, end))
            data = load_file(path)
            assert data["locations"].dtype == np.uint16
            assert data["activations"].dtype == np.float16
            np.testing.assert_array_equal(data["tokens"], small.token_ids)
            row, pos, unit = data["locations"].astype(np.int64).T
            assert ((unit >= 0) & (unit <= end - start)).all()
            dense[row, pos, unit + start] = data["activations"]
        np.testing.assert_array_equal(dense, acts)  # multiples of 1/8, exact in float16
        assert sorted(edges) == [(0, 0), (1, 2), (3, 3), (4, 5)]  # as torch.linspace(0, 6, 5)
        config = json.loads((folder / "config.json").read_text())
        assert (config["ctx_len"], config["model_name"]) == (N_CTX, "some/model")


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """A store with real statistics and exemplars of every kind."""
    path = tmp_path_factory.mktemp("captured") / "run"
    x = np.maximum(np.random.default_rng(0).normal(size=(N, CTX, D)), 0).astype(np.float32)
    x[:, :, 3] = 0  # never fires
    ids = np.random.default_rng(1).integers(0, len(WORDS), (N, CTX))
    docs = np.arange(N * CTX).reshape(N, CTX) // 10
    with astore.open(path, "w") as made:
        made.add_vocabulary(WORDS)
        rows = [Rows("blocks.7.mlp.hook_post", D, max_density=1.0, top_k=5, random_k=6)]
        with made.writer(rows=rows, n_ctx=CTX) as writer:
            writer.add(np.arange(N), ids, docs, "train", {rows[0].hook: x})
        yield made, x, ids, docs


@dataclass
class ActivationRecord:
    tokens: list[str]
    activations: list[float]


@dataclass
class NeuronId:
    layer_index: int
    neuron_index: int


@dataclass
class NeuronRecord:
    """The fields of neuron_explainer.activations.activations, which `loads` fills by name."""

    neuron_id: NeuronId
    random_sample: list = field(default_factory=list)
    random_sample_by_quantile: list | None = None
    quantile_boundaries: list | None = None
    mean: float | None = math.nan
    variance: float | None = math.nan
    skewness: float | None = math.nan
    kurtosis: float | None = math.nan
    most_positive_activation_records: list = field(default_factory=list)


KNOWN = {kind.__name__: kind for kind in (ActivationRecord, NeuronId, NeuronRecord)}


def loads(text: str):
    def hook(found: dict):
        return KNOWN[found.pop("dataclass_name")](**found)

    return json.loads(text, object_hook=hook)


def test_openai_reads_its_records(captured, tmp_path):
    store, x, ids, docs = captured
    out = export_openai(store, tmp_path / "out", "blocks.7.mlp.hook_post", before=3, after=4)
    assert sorted(int(p.stem) for p in (out / "7").iterdir()) == list(range(D))
    for unit in range(D):
        record = loads((out / "7" / f"{unit}.json").read_text())
        assert record.neuron_id == NeuronId(7, unit)
        values = x[..., unit].astype(np.float64)
        assert record.mean == pytest.approx(values.mean())
        assert record.variance == pytest.approx(values.var())
        assert len(record.random_sample) == 6
        if unit == 3:
            assert record.kurtosis is None
            assert record.most_positive_activation_records == []
            assert record.random_sample_by_quantile is None
            continue
        z = (values - values.mean()) / values.std()
        assert record.kurtosis == pytest.approx((z**4).mean())
        assert record.skewness == pytest.approx((z**3).mean())
        assert len(record.most_positive_activation_records) == 5
        assert len(record.random_sample_by_quantile) == 10
        assert record.quantile_boundaries == sorted(record.quantile_boundaries)
        best = record.most_positive_activation_records[0]
        assert max(best.activations) == values.max()
        seq, pos = np.unravel_index(values.argmax(), values.shape)
        around = [p for p in range(pos - 3, pos + 5) if 0 <= p < CTX]
        around = [p for p in around if docs[seq, p] == docs[seq, pos]]
        assert best.tokens == [WORDS[ids[seq, p]] for p in around]
        assert best.activations == [x[seq, p, unit] for p in around]


def test_an_export_that_fails_leaves_nothing(small, tmp_path):
    copy = small_store(tmp_path / "run")
    with astore.open(copy.path) as store:
        shard = max((copy.path / "store").glob("vectors-*"))
        shard.write_bytes(shard.read_bytes()[:50])
        with pytest.raises(astore.StoreError, match=f"{shard.name}.*verify --repair"):
            export_parquet(store, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_folder_with_something_in_it_is_not_touched(store, tmp_path):
    (tmp_path / "out").mkdir()
    export(store, "parquet", tmp_path / "out")
    before = sorted((tmp_path / "out").rglob("*"))
    with pytest.raises(astore.StoreError, match="is there already"):
        export(store, "delphi", tmp_path / "out")
    assert sorted((tmp_path / "out").rglob("*")) == before


@pytest.mark.parametrize(
    ("to", "hooks", "message"),
    [
        ("csv", [], "want one of delphi, openai, parquet, got 'csv'"),
        ("openai", [], "openai takes one hook, got 0"),
        ("openai", ["resid"], "no rows of hook 'resid'"),
        ("openai", [HOSTILE], "names none; say which"),
        ("delphi", ["nope"], "no rows of hook 'nope'"),
        ("parquet", [HOOK], "takes everything"),
    ],
)
def test_what_cannot_be_exported_says_why(store, tmp_path, to, hooks, message):
    with pytest.raises(astore.StoreError, match=message):
        export(store, to, tmp_path / "out", hooks)
    assert not (tmp_path / "out").exists()


def test_float16_overflow_is_refused(tmp_path):
    with astore.open(tmp_path / "run", "w") as store:
        with store.writer(rows=[Rows("h", 2, max_density=1.0)], n_ctx=2) as writer:
            zeros = np.zeros((1, 2), np.int64)
            x = np.array([[[1.0, 70_000.0], [0.0, 2.0]]], np.float32)
            writer.add(np.arange(1), zeros, zeros, "train", {"h": x})
        with pytest.raises(astore.ContentError, match="1 activations are beyond the range"):
            export_delphi(store, tmp_path / "out")
