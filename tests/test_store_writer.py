"""Writing: what a store holds after a capture, an interruption, a resumption, or a refusal."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import activation_store as astore
from activation_store import Rows, StoreError, Vectors
from activation_store.shards import encoding
from activation_store.write.writer import Writer

N_CTX = 64


@dataclass
class Stream:
    """A deterministic stream of sequences with one ReLU hook and one residual hook."""

    n: int = 96
    n_ctx: int = N_CTX
    d: int = 70
    seed: int = 0
    tokens: np.ndarray = field(init=False)
    docs: np.ndarray = field(init=False)
    acts: np.ndarray = field(init=False)
    resid: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.tokens = rng.integers(0, 50, (self.n, self.n_ctx))
        starts = rng.random(self.n * self.n_ctx) < 0.02
        self.docs = np.cumsum(starts).reshape(self.n, self.n_ctx)
        x = rng.standard_normal((self.n, self.n_ctx, self.d)) - 1
        self.acts = np.maximum(x, 0).astype(np.float32)
        self.resid = rng.standard_normal((self.n, self.n_ctx, 24)).astype(np.float32)

    def rows(self, **settings: Any) -> Rows:
        return Rows("mlp.hook_post", self.d, **settings)

    def write(self, writer: Writer, batch: int, stop: int | None = None) -> None:
        first = writer.next_seq
        for at in range(first, stop or self.n, batch):
            part = slice(at, min(at + batch, stop or self.n))
            writer.add(
                np.arange(self.n)[part],
                self.tokens[part],
                self.docs[part],
                "val",
                {"mlp.hook_post": self.acts[part], "hook_resid_post": self.resid[part]},
            )


VECTORS = (Vectors("hook_resid_post", 24),)


def opened(path: Path, stream: Stream, **settings: Any) -> Writer:
    mode = "a" if path.exists() else "w"
    with astore.open(path, mode=mode) as store:
        return Writer(
            store.place,
            **{
                "rows": [stream.rows()],
                "vectors": VECTORS,
                "n_ctx": stream.n_ctx,
                "commit_tokens": 2048,
                **settings,
            },
        )


def query(path: Path, sql: str) -> list[tuple]:
    with duckdb.connect(path, read_only=True) as con:
        con.execute("SET file_search_path = $1", [str(path.parent)])
        return con.execute(sql).fetchall()


def acts_of(path: Path) -> np.ndarray:
    rows = query(
        path,
        f"SELECT unit, seq_id, pos, act FROM read_parquet({shards(path, 'acts')}) "
        "ORDER BY unit, seq_id, pos",
    )
    return np.array(rows, dtype=np.float64)


def shards(path: Path, kind: str) -> list[str]:
    files = query(path, f"SELECT file FROM shards WHERE kind = '{kind}' ORDER BY file")
    return [str(path.with_suffix("") / name) for (name,) in files]


def content(path: Path) -> dict[str, Any]:
    """Everything a store holds but its own id and time: table rows, and bytes of the files."""
    store_id = query(path, "SELECT value FROM meta WHERE key = 'store_id'")[0][0]
    tables = {
        table: sorted(repr(row).replace(store_id, "") for row in query(path, f"FROM {table}"))
        for table in ("hooks", "unit_stats", "exemplars", "writer_state")
    }
    listed = query(
        path, "SELECT * REPLACE (replace(file, '" + store_id + "', '') AS file) FROM shards"
    )
    files = {
        file.name.replace(store_id, ""): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.with_suffix("").glob("[!.]*")
    }
    return {**tables, "shards": sorted(map(repr, listed)), "files": files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stream, Path]]:
    stream = Stream()
    path = tmp_path_factory.mktemp("whole") / "store.duckdb"
    with opened(path, stream) as writer:
        stream.write(writer, 7)
    yield stream, path


def test_every_activation_above_the_threshold_is_a_row_and_nothing_else(
    whole: tuple[Stream, Path],
) -> None:
    stream, path = whole
    unit, seq, pos = np.nonzero(stream.acts.transpose(2, 0, 1))
    expected = np.stack([unit, seq, pos, stream.acts[seq, pos, unit]], axis=1)
    np.testing.assert_array_equal(acts_of(path), expected)


def test_each_shard_is_listed_with_its_checksum_size_and_ranges(whole: tuple[Stream, Path]) -> None:
    _, path = whole
    for file, n_bytes, checksum, n_rows in query(
        path, "SELECT file, n_bytes, checksum, n_rows FROM shards"
    ):
        data = (path.with_suffix("") / file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (n_bytes, checksum)
        listing = str(path.with_suffix("") / file)
        assert query(path, f"SELECT count(*) FROM '{listing}'") == [(n_rows,)]
    for file, *ranges in query(
        path, "SELECT file, unit_min, unit_max, seq_min, seq_max FROM shards WHERE kind = 'acts'"
    ):
        listing = str(path.with_suffix("") / file)
        sql = f"SELECT min(unit), max(unit), min(seq_id), max(seq_id) FROM '{listing}'"
        assert query(path, sql) == [tuple(ranges)]


def test_tokens_and_vectors_are_stored_once_each(whole: tuple[Stream, Path]) -> None:
    stream, path = whole
    tokens = query(
        path,
        "SELECT seq_id, pos, doc_id, split, token_id FROM "
        f"read_parquet({shards(path, 'tokens')}) ORDER BY ALL",
    )
    assert tokens == [
        (s, p, stream.docs[s, p], "val", stream.tokens[s, p])
        for s, p in np.ndindex(stream.n, stream.n_ctx)
    ]
    vectors = query(
        path,
        f"SELECT vector FROM read_parquet({shards(path, 'vectors')}) ORDER BY seq_id, pos",
    )
    expected = stream.resid.astype(np.float16).reshape(-1, 24)
    np.testing.assert_array_equal(np.array([v for (v,) in vectors]), expected)


def test_statistics_are_over_all_tokens(whole: tuple[Stream, Path]) -> None:
    stream, path = whole
    flat = stream.acts.reshape(-1, stream.d).astype(np.float64)
    got = np.array(
        query(
            path, "SELECT n_tokens, density, mean, variance, max_act FROM unit_stats ORDER BY unit"
        )
    )
    expected = np.stack(
        [np.full(stream.d, len(flat)), (flat > 0).mean(0), flat.mean(0), flat.var(0), flat.max(0)]
    )
    np.testing.assert_allclose(got.T, expected, rtol=1e-12)


@pytest.mark.parametrize("batch", [1, 32, 96])
def test_the_size_of_the_batches_changes_nothing(
    whole: tuple[Stream, Path], tmp_path: Path, batch: int
) -> None:
    stream, path = whole
    other = tmp_path / "store.duckdb"
    with opened(other, stream) as writer:
        stream.write(writer, batch)
    assert content(other) == content(path)


def test_files_brought_to_the_disk_as_they_grow_have_the_same_bytes(
    whole: tuple[Stream, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, path = whole
    monkeypatch.setattr(encoding, "_SYNC_BYTES", 1000)
    other = tmp_path / "store.duckdb"
    with opened(other, stream) as writer:
        stream.write(writer, 32)
    assert content(other) == content(path)


@given(stops=st.lists(st.integers(1, 95), min_size=1, max_size=3, unique=True))
@settings(max_examples=4, deadline=None)
def test_an_interrupted_capture_ends_as_one_never_interrupted(
    whole: tuple[Stream, Path], tmp_path_factory: pytest.TempPathFactory, stops: list[int]
) -> None:
    stream, path = whole
    other = tmp_path_factory.mktemp("resumed") / "store.duckdb"
    for stop in sorted(stops):
        writer = opened(other, stream)
        with pytest.raises(KeyboardInterrupt), writer:
            if writer.next_seq < stop:
                stream.write(writer, 5, stop)
            raise KeyboardInterrupt
        assert writer.next_seq * N_CTX % 2048 == 0
    with opened(other, stream) as writer:
        stream.write(writer, 11)
    assert content(other) == content(path)


def test_going_on_with_other_settings_is_refused_and_named(
    whole: tuple[Stream, Path], tmp_path: Path
) -> None:
    stream = Stream(n=40)
    path = tmp_path / "store.duckdb"
    with opened(path, stream, model_digest="a" * 64) as writer:
        stream.write(writer, 8)
    before = content(path)
    other = [stream.rows(threshold=0.5)]
    with pytest.raises(StoreError, match="rows mlp.hook_post"), opened(path, stream, rows=other):
        pass
    with pytest.raises(StoreError, match="seed: stored 0, now 3"), opened(path, stream, seed=3):
        pass
    with (
        pytest.raises(StoreError, match="model_digest: the store holds aaaa"),
        opened(path, stream, model_digest="b" * 64),
    ):
        pass
    with pytest.raises(StoreError, match="n_ctx"), opened(path, stream, n_ctx=32):
        pass
    assert content(path) == before


def test_a_second_capture_adds_hooks_over_the_same_tokens_without_repeating_them(
    tmp_path: Path,
) -> None:
    stream = Stream(n=20)
    path = tmp_path / "store.duckdb"
    with opened(path, stream) as writer:
        stream.write(writer, 8)
    latents = Rows("hook_resid_post.hook_sae_acts_post", 24)
    with opened(path, stream, rows=[latents], vectors=()) as writer:
        assert writer.next_seq == 0
        acts = {latents.hook: np.maximum(stream.resid, 0)}
        writer.add(np.arange(20), stream.tokens, stream.docs, "val", acts)
    assert query(path, "SELECT sum(n_rows) FROM shards WHERE kind = 'tokens'") == [(20 * N_CTX,)]
    assert len(query(path, "FROM hooks")) == 3
    again = stream.tokens + 1
    with (
        pytest.raises(StoreError, match="sequence 0: its tokens or documents differ"),
        opened(path, stream, rows=[Rows("third", 24)], vectors=()) as writer,
    ):
        writer.add(np.arange(20), again, stream.docs, "val", {"third": stream.resid})
    with pytest.raises(StoreError, match="already captured"), opened(path, stream, vectors=()):
        pass


def test_a_dense_hook_is_refused_with_its_density_size_and_ways_out(tmp_path: Path) -> None:
    stream = Stream(n=40)
    path = tmp_path / "store.duckdb"
    dense = {"mlp.hook_post": stream.acts + 1, "hook_resid_post": stream.resid}
    said = r"mlp.hook_post: density 1.000 .* at most max_density=0.5.* 0.4 GB per million .*top_p"
    with pytest.raises(StoreError, match=said), opened(path, stream) as writer:
        writer.add(np.arange(40), stream.tokens, stream.docs, "val", dense)
    assert query(path, "SELECT count(*) FROM shards") == [(0,)]
    asked = [stream.rows(max_density=1.0)]
    with opened(path, stream, rows=asked) as writer:
        writer.add(np.arange(40), stream.tokens, stream.docs, "val", dense)
    assert query(path, "SELECT n_acts FROM hooks WHERE kind = 'rows'") == [(40 * N_CTX * stream.d,)]


def test_options_per_hook_units_top_p_and_float16(tmp_path: Path) -> None:
    stream = Stream(n=10)
    path = tmp_path / "store.duckdb"
    units = (3, 40, 69)
    rows = [stream.rows(units=units, dtype="float16", top_p=0.6)]
    with opened(path, stream, rows=rows) as writer:
        stream.write(writer, 10)
    kept = stream.acts[..., units]
    order = np.sort(kept, axis=-1)[..., ::-1]
    before = np.cumsum(order, axis=-1) - order
    cut = np.where(before < 0.6 * order.sum(-1, keepdims=True), order, np.inf).min(-1)
    place, seq, pos = np.nonzero(((kept > 0) & (kept >= cut[..., None])).transpose(2, 0, 1))
    act = kept[seq, pos, place].astype(np.float16)
    expected = np.stack([np.array(units)[place], seq, pos, act.astype(np.float64)], axis=1)
    np.testing.assert_array_equal(acts_of(path), expected)
    assert query(path, "SELECT unit FROM unit_stats ORDER BY unit") == [(u,) for u in units]


def test_odd_activations_are_counted_per_hook_and_stored_nowhere(tmp_path: Path) -> None:
    stream = Stream(n=10)
    stream.acts[0, 0, :3] = [np.nan, np.inf, 1e5]
    stream.resid[1, 2, 3] = np.nan
    stream.resid[1, 3, :2] = [1e5, -np.inf]
    path = tmp_path / "store.duckdb"
    message = r"1 activations are beyond float16.*2 of 640 tokens have no vector.*dtype float32"
    with (
        pytest.warns(astore.DroppedWarning, match=message),
        opened(path, stream, rows=[stream.rows(dtype="float16")]) as writer,
    ):
        stream.write(writer, 10)
    counts = query(path, "SELECT kind, n_nan, n_inf, n_overflow FROM hooks ORDER BY kind")
    assert counts == [("rows", 1, 1, 1), ("vectors", 1, 1, 1)]
    assert np.isfinite(acts_of(path)).all()
    vectors = query(path, f"SELECT seq_id, pos FROM read_parquet({shards(path, 'vectors')})")
    assert len(vectors) == 10 * N_CTX - 2
    assert {(1, 2), (1, 3)}.isdisjoint(vectors)


def test_a_second_capture_adds_what_is_new_whatever_its_order(tmp_path: Path) -> None:
    stream = Stream(n=20)
    path = tmp_path / "store.duckdb"
    rng = np.random.default_rng(0)
    for chosen in (np.arange(8), rng.permutation(20), np.arange(20)):
        with opened(path, stream) as writer:
            arrays = (chosen, stream.tokens[chosen], stream.docs[chosen])
            pending = writer.pending(*arrays)
            some = chosen[pending]
            acts = {"mlp.hook_post": stream.acts[some], "hook_resid_post": stream.resid[some]}
            writer.add(some, stream.tokens[some], stream.docs[some], "val", acts)
    assert not pending.any()
    (n,) = query(path, "SELECT DISTINCT n_tokens FROM unit_stats")[0]
    assert n == stream.tokens.size
    unit, seq, pos = np.nonzero(stream.acts.transpose(2, 0, 1))
    expected = np.stack([unit, seq, pos, stream.acts[seq, pos, unit].astype(float)], axis=1)
    np.testing.assert_array_equal(acts_of(path), expected)
    with opened(path, stream) as writer, pytest.raises(StoreError, match="sequence 0: its tokens"):
        writer.pending(np.arange(2), stream.tokens[:2] + 1, stream.docs[:2])
    with opened(path, stream) as writer, pytest.raises(StoreError, match="another split than 'te"):
        writer.pending(np.arange(2), stream.tokens[:2], stream.docs[:2], "test")


def test_tokens_that_are_skipped_are_in_no_statistic_exemplar_act_or_vector(tmp_path: Path) -> None:
    stream = Stream(n=12)
    stream.docs[3, :5] = -1  # padding is no first position
    stream.tokens[:, 0] = 7
    stream.acts[stream.tokens == 7] += 100
    path = tmp_path / "store.duckdb"
    skip = astore.Skip(token_ids=(7,), first=2)
    with opened(path, stream, skip=skip) as writer:
        stream.write(writer, 5)
    real = stream.docs >= 0
    kept = real & (stream.tokens != 7) & (np.cumsum(real, axis=1) > 2)
    stats = query(path, "SELECT n_tokens, density, max_act, kurtosis FROM unit_stats ORDER BY unit")
    x = stream.acts[kept].astype(np.float64)
    fourth = ((x - x.mean(0)) ** 4).mean(0) / x.var(0) ** 2
    expected = np.stack([np.full(70, kept.sum()), (x > 0).mean(0), x.max(0), fourth], axis=1)
    np.testing.assert_allclose(np.array(stats), expected, rtol=1e-12)
    unit, seq, pos = np.nonzero((stream.acts * kept[..., None]).transpose(2, 0, 1))
    np.testing.assert_array_equal(acts_of(path)[:, :3], np.stack([unit, seq, pos], axis=1))
    for table in (f"read_parquet({shards(path, 'vectors')})", "exemplars"):
        places = query(path, f"SELECT DISTINCT seq_id, pos FROM {table}")
        assert all(kept[place] for place in places) and len(places) > 100
    assert len(query(path, f"FROM read_parquet({shards(path, 'tokens')})")) == real.sum()
    texts = query(path, "SELECT DISTINCT skip::VARCHAR, n_tokens FROM hooks")
    assert texts == [('{"token_ids": [7], "first": 2}', kept.sum())]
    with pytest.raises(StoreError, match="skip: stored"), opened(path, stream):
        pass


@pytest.mark.parametrize("settings", [{"top_p": 0.3}, {"units": (3, 40)}, {"dtype": "float16"}])
def test_statistics_are_over_every_token_whatever_is_kept(tmp_path: Path, settings: dict) -> None:
    stream = Stream(n=10)
    path = tmp_path / "store.duckdb"
    with opened(path, stream, rows=[stream.rows(**settings)]) as writer:
        stream.write(writer, 10)
    x = stream.acts[..., list(settings.get("units", range(70)))].astype(np.float64)
    x = x.reshape(-1, x.shape[-1])
    stats = query(path, "SELECT density, mean, kurtosis FROM unit_stats ORDER BY unit")
    fourth = ((x - x.mean(0)) ** 4).mean(0) / x.var(0) ** 2
    expected = np.stack([(x > 0).mean(0), x.mean(0), fourth], axis=1)
    np.testing.assert_allclose(np.array(stats), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["float64", "bfloat16", "float16"])
def test_torch_tensors_of_any_floating_type_are_taken(tmp_path: Path, kind: str) -> None:
    torch = pytest.importorskip("torch")
    stream = Stream(n=4)
    path = tmp_path / "store.duckdb"
    acts = torch.tensor(stream.acts).to(getattr(torch, kind))
    with opened(path, stream, vectors=()) as writer:
        writer.add(
            torch.arange(4),
            torch.tensor(stream.tokens),
            torch.tensor(stream.docs),
            "val",
            {"mlp.hook_post": acts},
        )
    unit, seq, pos = np.nonzero(acts.float().numpy().transpose(2, 0, 1))
    np.testing.assert_array_equal(acts_of(path)[:, 3], acts.float().numpy()[seq, pos, unit])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"acts": np.zeros((2, N_CTX, 3), np.float32)},
            r"shape \[2, 64, 3\], want .* \[2, 64, 70\]",
        ),
        ({"acts": np.zeros((2, N_CTX, 70), np.int64)}, "type int64, want floating point"),
        ({"seq": [0, 0]}, "sequence 0 was given before"),
        ({"seq": [0, -4]}, "sequence -4 was given before; .* >= 0"),
        ({"tokens": np.zeros((2, 9), int)}, r"token_ids: int64 of shape \[2, 9\], want"),
        ({"missing": True}, "activations of hook_resid_post are missing; got mlp.hook_post"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    stream = Stream(n=2)
    path = tmp_path / "store.duckdb"
    acts = {"mlp.hook_post": change.get("acts", stream.acts)}
    if "missing" not in change:
        acts["hook_resid_post"] = stream.resid
    tokens = change.get("tokens", stream.tokens)
    with pytest.raises(StoreError, match=said), opened(path, stream) as writer:
        writer.add(np.array(change.get("seq", [0, 1])), tokens, stream.docs, "val", acts)
    assert query(path, "SELECT count(*) FROM shards") == [(0,)]


def test_an_error_that_is_swallowed_does_not_commit_half_a_batch(tmp_path: Path) -> None:
    stream = Stream(n=96)
    path = tmp_path / "store.duckdb"
    dense = {"mlp.hook_post": stream.acts + 1, "hook_resid_post": stream.resid}
    with opened(path, stream) as writer:
        stream.write(writer, 8, stop=32)
        with pytest.raises(StoreError, match="sequence 0 was given before"):
            first = {name: x[:8] for name, x in dense.items()}
            writer.add(np.arange(8), stream.tokens[:8], stream.docs[:8], "val", first)
        writer.commit()
        held = content(path)
        part = slice(40, 96)
        broken = {name: x[part] for name, x in dense.items()}
        broken["mlp.hook_post"] = broken["mlp.hook_post"][..., :5]
        with pytest.raises(StoreError, match="want"):
            writer.add(np.arange(40, 96), stream.tokens[part], stream.docs[part], "val", broken)
        writer._spool._threads.shutdown()  # the next block cannot be handed over
        broken = {name: x[part] for name, x in dense.items()}
        with pytest.raises(RuntimeError):
            writer.add(np.arange(40, 96), stream.tokens[part], stream.docs[part], "val", broken)
        with pytest.raises(StoreError, match="stopped at an error .* from sequence 32"):
            writer.commit()
    assert content(path) == held


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    stream = Stream(n=2)
    path = tmp_path / "store.duckdb"
    with (
        opened(path, stream),
        pytest.raises(StoreError, match=r"process \d+ is writing this store"),
        opened(path, stream),
    ):
        pass


def test_the_writer_never_uses_more_memory_for_more_tokens(tmp_path: Path) -> None:
    """The buffers are two sets, whatever the number of blocks."""
    stream = Stream(n=64)
    path = tmp_path / "store.duckdb"
    with opened(path, stream, vectors=()) as writer:
        for turn in range(6):
            writer.add(
                np.arange(64) + 64 * turn,
                stream.tokens,
                stream.docs,
                "val",
                {"mlp.hook_post": stream.acts},
            )
        (hook,) = writer._accumulators
        assert len(hook._sets) == 2


def feed(writer: Writer, stream: Stream, rank: int, start: int, stop: int) -> None:
    """Give a rank some of its sequences: of every sixteen of the stream it has eight."""
    mine = [i for i in range(stream.n) if i // 8 % 2 == rank]
    for at in range(start, stop, 8):
        part = mine[at : min(at + 8, stop)]
        acts = {"mlp.hook_post": stream.acts[part], "hook_resid_post": stream.resid[part]}
        writer.add(np.array(part), stream.tokens[part], stream.docs[part], "val", acts)


def write_ranks(path: Path, stream: Stream) -> None:
    """Two ranks at the same time, each committing in the middle and at the end."""
    first = opened(path, stream, rank=0, world_size=2)
    with first, opened(path, stream, rank=1, world_size=2) as second:
        feed(second, stream, 1, 0, 40)
        feed(first, stream, 0, 0, 48)
        feed(second, stream, 1, 40, 48)


def exact(path: Path) -> dict[str, Any]:
    """What must not depend on how many ranks wrote a store."""
    return {
        "acts": acts_of(path).tolist(),
        "tokens": query(path, f"FROM read_parquet({shards(path, 'tokens')}) ORDER BY ALL"),
        "hooks": query(path, "FROM hooks ORDER BY ALL"),
        "exemplars": query(path, "FROM exemplars ORDER BY ALL"),
        "unit_stats": query(
            path,
            "SELECT * EXCLUDE (mean, variance, skewness, kurtosis) FROM unit_stats ORDER BY unit",
        ),
    }


def test_two_ranks_make_the_store_that_one_makes(
    whole: tuple[Stream, Path], tmp_path: Path
) -> None:
    stream, path = whole
    both = tmp_path / "store.duckdb"
    write_ranks(both, stream)
    assert exact(both) == exact(path)
    moments = "SELECT mean, variance, skewness, kurtosis FROM unit_stats ORDER BY unit"
    np.testing.assert_allclose(query(both, moments), query(path, moments), rtol=1e-12)


def test_a_rank_that_dies_costs_only_what_it_had_not_committed(
    whole: tuple[Stream, Path], tmp_path: Path
) -> None:
    stream, _ = whole
    steady, broken = tmp_path / "a" / "store.duckdb", tmp_path / "b" / "store.duckdb"
    write_ranks(steady, stream)
    with opened(broken, stream, rank=0, world_size=2) as first:
        feed(first, stream, 0, 0, 24)
        with (
            pytest.raises(KeyboardInterrupt),
            opened(broken, stream, rank=1, world_size=2) as second,
        ):
            feed(second, stream, 1, 0, 40)
            raise KeyboardInterrupt
        feed(first, stream, 0, 24, 48)
    # rank 0 has all 48 of its sequences, rank 1 its first commit of 32
    assert query(broken, "SELECT n_tokens FROM hooks") == [((48 + 32) * N_CTX,)] * 2
    assert len(acts_of(broken)) == query(broken, "SELECT max(n_acts) FROM hooks")[0][0]
    with opened(broken, stream, rank=1, world_size=2) as second:
        feed(second, stream, 1, second.next_seq, 48)
    assert content(broken) == content(steady)


def test_ranks_are_refused_what_another_rank_has_and_another_number_of_ranks(
    tmp_path: Path,
) -> None:
    stream = Stream(n=8)
    path = tmp_path / "store.duckdb"
    with opened(path, stream, rank=0, world_size=2) as writer:
        stream.write(writer, 8)
    with (
        pytest.raises(StoreError, match=r"sequence 0 was given to rank 0 too \(8 in all\)"),
        opened(path, stream, rank=1, world_size=2) as writer,
    ):
        stream.write(writer, 8)
    with pytest.raises(StoreError, match="world_size: stored 2, now 1"), opened(path, stream):
        pass
    with pytest.raises(StoreError, match="rank: want 0 to world_size - 1 = 1, got 2"):
        opened(path, stream, rank=2, world_size=2)
