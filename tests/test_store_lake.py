"""One store for many: what is published arrives once, whole, and is there for everyone."""

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import duckdb
import forks
import lake_servers
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

import activation_store as astore
from activation_store.catalog.compaction import Sizes
from activation_store.catalog.tables import SCHEMA_VERSION
from activation_store.lake import lake_place
from activation_store.lake.lake_place import LAKE, extension_files
from lmmono.cli.app import main

N_CTX, D, HOOKS = 16, 8, ("blocks.0.mlp.hook_post", 'it\'s "x"; DROP TABLE shards; --')
N_STORES, SEQS = 4, 2  # every sequence is a commit with shards of its own
SAME_TO_THE_BIT = (
    "FROM acts ORDER BY ALL",
    "FROM token_ids ORDER BY ALL",
    "FROM vectors ORDER BY ALL",
    "FROM activations ORDER BY ALL",
    'SELECT * FROM "exemplars" ORDER BY ALL',
    "FROM hooks ORDER BY ALL",
    "FROM documents ORDER BY ALL",
    "FROM vocabulary ORDER BY ALL",
    "SELECT * EXCLUDE (mean, variance, skewness, kurtosis) FROM unit_stats ORDER BY ALL",
    f"FROM exemplars('{HOOKS[0]}', 3, 5)",
    f"FROM token_profile('{HOOKS[0]}', 2)",
    f"SELECT n_a, n_b, n_both, lift FROM coactivation('{HOOKS[0]}', 1, 2)",
    "FROM excerpt(3, 4)",
)
MOMENTS = "SELECT mean, variance, skewness, kurtosis FROM unit_stats ORDER BY hook, unit"


def capture(
    path: Path,
    seqs: Sequence[int],
    hooks: Sequence[str] = HOOKS,
    *,
    corpus: int = 0,
    top_k: int = 3,
    model: str = "a" * 64,
    mode: str = "w",
) -> Path:
    """Capture activations that depend on the sequence only, so any split of them adds up."""
    rows = [
        astore.Rows(h, D, top_k=top_k, random_k=2, quantile_k=1, max_density=1.0) for h in hooks
    ]
    with astore.open(path, mode) as store:  # type: ignore[call-overload]
        docs = [
            {"doc_id": q, "split": "val", "name": f"d{q}", "text_sha256": f"{corpus}{q:063d}"}
            for q in seqs
        ]
        store.add_documents(docs)
        store.add_vocabulary([f" t{i}" for i in range(10)])
        vectors = [astore.Vectors("resid", 4)] if hooks == HOOKS else []
        with store.writer(
            rows=rows, vectors=vectors, n_ctx=N_CTX, commit_tokens=1, model_digest=model
        ) as writer:
            for q in seqs[writer.next_seq :]:
                rng = np.random.default_rng(q)
                tokens = rng.integers(0, 10, (1, N_CTX)) if not corpus else np.full((1, N_CTX), 7)
                acts = {h: rng.normal(size=(1, N_CTX, D)).astype(np.float32) for h in HOOKS}
                acts["resid"] = rng.normal(size=(1, N_CTX, 4)).astype(np.float32)
                named = {h: acts.get(h, acts[HOOKS[0]]) for h in (*hooks, "resid")}
                writer.add(np.array([q]), tokens, np.full((1, N_CTX), q), "val", named)
    return path


class Stores(NamedTuple):
    parts: list[Path]
    whole: Path


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Stores:
    """Stores of disjoint sequences, and one store of all of them."""
    root = tmp_path_factory.mktemp("stores")
    parts = [capture(root / f"s{i}", range(i * SEQS, (i + 1) * SEQS)) for i in range(N_STORES)]
    return Stores(parts, capture(root / "whole", range(N_STORES * SEQS)))


@pytest.fixture(scope="module")
def server() -> Iterator[lake_servers.Postgres]:
    programs = lake_servers.postgres_programs()
    if programs is None:
        pytest.skip("needs PostgreSQL's programs: apt-get install postgresql")
    with lake_servers.postgres(programs) as running:
        yield running


@pytest.fixture(scope="module")
def s3_address() -> Iterator[str]:
    if (reason := lake_servers.why_no_s3()) is not None:
        pytest.skip(reason)
    with lake_servers.s3() as address:
        yield address


class At(NamedTuple):
    address: str
    data: str

    def open(self, mode: str = "r", **settings) -> astore.Store:
        return astore.open(self.address, mode, data_path=self.data, **settings)  # type: ignore


@pytest.fixture
def at(request, tmp_path, monkeypatch) -> At:
    """An address for a new lake: the kind of its catalogue, and whether its data is in a bucket."""
    kind, _, remote = getattr(request, "param", "sqlite").partition("+")
    data = str(tmp_path / "data")
    if remote:
        for name, value in {
            "AWS_ENDPOINT_URL": request.getfixturevalue("s3_address"),
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        data = f"s3://acts/{tmp_path.name}"
    if kind != "postgres":
        return At(f"ducklake:{'sqlite:' if kind == 'sqlite' else ''}{tmp_path}/c.{kind}", data)
    server = request.getfixturevalue("server")
    database = "lake_" + hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]
    server.sql(f"CREATE DATABASE {database}")
    return At(server.address(database), data)


def assert_same(lake: astore.Store, store: Path) -> None:
    whole = astore.open(store)
    for query in SAME_TO_THE_BIT:
        assert lake.sql(query).fetchall() == whole.sql(query).fetchall(), query
    ours, theirs = (np.array(s.sql(MOMENTS).fetchall(), float) for s in (lake, whole))
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize("at", ["sqlite", "duckdb", "postgres+s3"], indirect=True)
def test_a_lake_of_all_parts_equals_one_store_of_everything(at, stores):
    with at.open("w") as lake:
        for i in (2, 0, 3, 1):
            done = lake.publish(stores.parts[i])
            assert done.n_shards > 0 and done.n_bytes > 0
        again = lake.publish(stores.parts[3])
        assert (again.n_shards, again.n_bytes) == (0, 0)
        assert_same(lake, stores.whole)
        unit = lake.unit(HOOKS[0], 3)
        assert unit.exemplars(2) == astore.open(stores.whole).exemplars(HOOKS[0], 3, 2)
        info = lake.info()
        assert info.n_tokens == N_STORES * SEQS * N_CTX and info.hooks == tuple(
            sorted((*HOOKS, "resid"))
        )
        assert lake.append("all_scores", [score(1, 0.5)]) == 1
        assert lake.append("all_scores", [score(1, 0.7)]) == 1
        before = info.n_shards
        done = lake.compact(keep_seconds=0.0)
        assert before >= done.merged > done.written and done.removed
        assert_same(lake, stores.whole)
        assert lake.sql("SELECT unit, value FROM all_scores").fetchall() == [(1, 0.7)]
        assert lake.verify().ok
        again = lake.publish(stores.parts[0])
        assert (again.n_shards, again.n_bytes) == (0, 0)
    with at.open() as reader:
        assert_same(reader, stores.whole)
        with pytest.raises(astore.StoreError, match="mode='a'"):
            reader.append("all_scores", [score(2, 0.1)])


def score(unit: int, value: float) -> dict:
    return {"metric": "m", "metric_version": 1, "hook": HOOKS[0], "unit": unit, "value": value}


WRITER = """
import os, sys, time
import activation_store as astore
from activation_store.lake import lake_backend
address, data, store, number, stage, flag = sys.argv[1:]
lake = astore.open(address, "a", data_path=data)

def stop_here(*_):
    open(flag, "w").close()
    time.sleep(600)

if stage == "upload":
    upload = lake.backend.lake_files.upload
    done = []
    files = lake.backend.lake_files
    files.upload = lambda *a: stop_here() if done else (done.append(1), upload(*a))[1]
if stage == "transaction":
    lake_backend.write_views = stop_here
for i in range(2 if stage == "none" else 0):
    row = {"metric": "m", "metric_version": 1, "unit": int(number), "seed": i, "value": 1.0}
    lake.append("all_scores", [row, {**row, "unit": 99, "value": float(number)}])
lake.publish(store)
"""


def start(at: At, store: Path, number: int, stage: str, flag: Path) -> forks.Fork:
    return forks.start("-c", WRITER, at.address, at.data, store, number, stage, flag)


def kill_once_there(fork: forks.Fork, flag: Path) -> None:
    deadline = time.monotonic() + 600
    while not flag.exists():
        assert fork.process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    fork.send(signal.SIGKILL)
    assert fork.wait() == -signal.SIGKILL


class Polling(threading.Thread):
    """A reader that looks all along whether what it sees is whole."""

    QUERY = """
    SELECT
        (SELECT count(*) FROM token_ids), (SELECT count(DISTINCT (seq_id, pos)) FROM token_ids),
        (SELECT max(n_tokens) FROM hooks), (SELECT sum(n_acts) FROM hooks WHERE kind = 'rows'),
        (SELECT count(*) FROM acts)
    """

    def __init__(self, at: At) -> None:
        super().__init__()
        self.at, self.faults, self.seen, self.ended = at, [], set(), threading.Event()

    def run(self) -> None:
        with self.at.open() as lake:
            while not self.ended.wait(0.2):
                try:
                    n, distinct, n_hooks, n_acts, acts = lake.sql(self.QUERY).fetchall()[0]
                except (astore.StoreError, duckdb.Error) as fault:
                    self.faults.append(repr(fault))
                    return
                self.seen.add(n)
                if n != distinct or n % (SEQS * N_CTX):
                    self.faults.append(f"{n} tokens, {distinct} distinct")
                if (n_hooks or 0, n_acts or 0) != (n, acts):
                    self.faults.append(f"hooks: {n_hooks} tokens, {n_acts} acts; {n}, {acts}")


@pytest.mark.parametrize("at", ["sqlite", "postgres"], indirect=True)
def test_four_processes_publish_at_once_one_is_killed_and_a_reader_looks_on(at, stores, tmp_path):
    with at.open("w") as lake:
        polling = Polling(at)
        polling.start()
        victim = start(at, stores.parts[0], 0, "transaction", tmp_path / "flag")
        others = [start(at, stores.parts[i], i, "none", tmp_path / "-") for i in (1, 2, 3)]
        kill_once_there(victim, tmp_path / "flag")
        assert [fork.wait() for fork in others] == [0, 0, 0], [fork.stderr for fork in others]
        seqs = "SELECT DISTINCT seq_id // $n FROM token_ids ORDER BY ALL"
        assert lake.sql(seqs, n=SEQS).fetchall() == [(1,), (2,), (3,)]
        assert start(at, stores.parts[0], 0, "none", tmp_path / "-").wait() == 0
        polling.ended.set()
        polling.join()
        assert polling.faults == [] and 4 * SEQS * N_CTX in polling.seen | {lake.info().n_tokens}
        assert_same(lake, stores.whole)
        # what each wrote is there; of what all wrote under one key, one row is
        rows = lake.sql(
            "SELECT unit, count(*) FROM all_scores GROUP BY unit ORDER BY unit"
        ).fetchall()
        assert rows == [(0, 2), (1, 2), (2, 2), (3, 2), (99, 2)]


def test_a_writer_killed_while_it_copies_leaves_nothing_and_is_repeated(at, stores, tmp_path):
    with at.open("w") as lake:
        lake.publish(stores.parts[1])
        before = lake.info()
        victim = start(at, stores.parts[0], 0, "upload", tmp_path / "flag")
        kill_once_there(victim, tmp_path / "flag")
        assert lake.info() == before
        for part in stores.parts:
            lake.publish(part)
        assert_same(lake, stores.whole)


def test_a_store_that_has_grown_is_published_again(at, stores, tmp_path):
    with at.open("w") as lake:
        capture(tmp_path / "s", range(SEQS))
        lake.publish(tmp_path / "s")
        capture(tmp_path / "s", range(N_STORES * SEQS), mode="a")
        lake.publish(tmp_path / "s")
        assert_same(lake, stores.whole)


def test_a_store_may_be_compacted_between_two_publications(at, stores, tmp_path):

    with at.open("w") as lake:
        capture(tmp_path / "s", range(SEQS))
        capture(tmp_path / "s", range(N_STORES * SEQS), mode="a")
        lake.publish(tmp_path / "s")
        assert astore.compact(tmp_path / "s").merged > 0
        lake.publish(tmp_path / "s")
        assert_same(lake, stores.whole)


def test_captures_of_other_hooks_share_their_tokens(at, stores, tmp_path):
    other = capture(tmp_path / "other", range(1, 1 + SEQS), hooks=("latents",))
    with at.open("w") as lake:
        lake.publish(stores.parts[0])
        lake.publish(other)
        rows = lake.sql("SELECT seq_id, count(*) FROM token_ids GROUP BY ALL ORDER BY ALL")
        assert rows.fetchall() == [(q, N_CTX) for q in range(1 + SEQS)]
        both = lake.sql(
            "SELECT count(DISTINCT (seq_id, pos)) FROM activations WHERE hook = 'latents'"
        )
        assert both.fetchall()[0] == (SEQS * N_CTX,)


def test_what_does_not_belong_together_is_refused_and_changes_nothing(at, stores, tmp_path):
    beyond = range(100, 102)
    refused = {
        "sequence 0 was published by another store": capture(tmp_path / "twice", range(2)),
        "model_digest": capture(tmp_path / "model", beyond, model="b" * 64),
        "a lake holds one corpus": capture(tmp_path / "text", range(2), ("latents",), corpus=1),
        "capture with the same": capture(tmp_path / "settings", beyond, top_k=9),
    }
    with at.open("w") as lake:
        lake.publish(stores.parts[0])
        before = lake.info()
        for words, store in refused.items():
            with pytest.raises(astore.ContentError, match=words):
                lake.publish(store)
        with pytest.raises(astore.NotAStoreError):
            lake.publish(tmp_path / "nothing")
        damaged = Path(shutil.copytree(stores.parts[1], tmp_path / "damaged"))
        shard = next((damaged / "store").glob("acts*.parquet"))
        shard.write_bytes(shard.read_bytes()[:-9] + b"123456789")
        with pytest.raises(astore.ShardError, match="bytes were changed"):
            lake.publish(damaged)
        with pytest.raises(astore.ContentError, match="did you mean"):
            lake.append("all_scores", [{"metrik": 1}])
        assert lake.info() == before


def test_the_data_is_parquet_for_anyone_and_the_bytes_are_those_of_the_stores(at, stores):
    with at.open("w") as lake:
        lake.publish(stores.parts[0])
        expected = lake.sql("SELECT unit, seq_id, pos, act FROM acts ORDER BY ALL").fetchall()
        rows = lake.sql("SELECT file, checksum FROM shards").fetchall()
    folder = Path(at.data) / "shards"
    assert {path.name for path in folder.iterdir()} == {file for file, _ in rows}
    for file, checksum in rows:
        own = stores.parts[0] / "store" / file
        assert (folder / file).read_bytes() == own.read_bytes()
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == checksum
    names = ["unit", "seq_id", "pos", "act"]
    files = sorted(folder.glob("acts-*.parquet"))
    by_polars = pl.concat([pl.read_parquet(file).select(names) for file in files])
    assert sorted(by_polars.rows()) == expected
    by_arrow = [row for file in files for row in pq.read_table(file).select(names).to_pylist()]
    assert sorted(tuple(row.values()) for row in by_arrow) == expected
    query = f"SELECT unit, seq_id, pos, act FROM '{folder}/acts-*.parquet' ORDER BY ALL"
    assert duckdb.sql(query).fetchall() == expected
    vectors = pl.read_parquet(sorted(folder.glob("vectors-*.parquet")))
    assert vectors.height == SEQS * N_CTX and len(vectors["vector"][0]) == 4


def test_any_ducklake_client_reads_tables_and_shards(at, stores):
    with at.open("w") as lake:
        lake.publish(stores.parts[0])
        n_acts = lake.info().n_acts
    with duckdb.connect() as con:
        for file in extension_files(["ducklake", "sqlite_scanner"]):
            con.execute(f"LOAD '{file}'")
        con.execute(f"ATTACH '{at.address}' AS other (READ_ONLY)")
        assert con.execute("SELECT count(*) FROM other.acts").fetchone() == (n_acts,)
        assert con.execute("SELECT count(*) FROM other.unit_stats").fetchone() == (2 * D,)
        comments = "SELECT count(*) FROM duckdb_columns() WHERE comment IS NOT NULL"
        assert con.execute(comments).fetchone()[0] > 150


@pytest.mark.parametrize("mode", ["r", "a"])
def test_sql_reads_the_lake_and_nothing_else(at, stores, tmp_path, mode):
    at.open("w").publish(stores.parts[0])
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    lake = at.open(mode)
    for query in (
        f"FROM read_csv('{secret}')",
        f"FROM '{secret}'",
        f"ATTACH '{secret}'",
        "INSERT INTO all_scores (metric, metric_version) VALUES ('x', 1)",
        "DELETE FROM shards",
        f"DELETE FROM {LAKE}.shards",
        "CALL ducklake_expire_snapshots('lake_catalogue', older_than => now())",
        f"FROM __ducklake_metadata_{LAKE}.ducklake_metadata",
        f'FROM "__DuckLake_Metadata_{LAKE}".ducklake_metadata',
        "FROM duckdb_secrets()",
        "SET enable_external_access = true",
        "LOAD httpfs",
        "FROM acts; FROM acts",
    ):
        with pytest.raises(astore.QueryError):
            lake.sql(query).fetchall()
    assert lake.sql("SELECT count(*) FROM acts WHERE hook = $h", h=HOOKS[1]).fetchall()[0][0] > 0
    trusted = at.open(mode, trusted=True)
    assert trusted.sql(f"FROM read_csv('{secret}')").fetchall() == [(1,)]


def test_small_shards_are_merged_into_blocks_and_old_ones_stay_for_their_readers(
    at, stores, monkeypatch
):
    n_acts = sum(astore.open(part).info().n_acts for part in stores.parts)
    sizes = Sizes(block_acts=n_acts // 4, shard_acts=n_acts // 4, shard_tokens=SEQS * N_CTX * 2)
    with at.open("w") as lake:
        for part in stores.parts:
            lake.publish(part)
        files = {path.name for path in (Path(at.data) / "shards").iterdir()}
        done = lake.compact(sizes=sizes)
        assert done.removed == () and done.written < done.merged == len(done.kept)
        n_rows = lake.sql("SELECT n_rows FROM shards WHERE kind = 'acts'").fetchall()
        assert len(n_rows) > 2 and max(n_rows)[0] < n_acts // 2
        assert files < {path.name for path in (Path(at.data) / "shards").iterdir()}
        assert_same(lake, stores.whole)
        assert len(lake.compact(keep_seconds=0.0, sizes=sizes).removed) >= len(done.kept)
        listed = {file for (file,) in lake.sql("SELECT file FROM shards").fetchall()}
        assert {path.name for path in (Path(at.data) / "shards").iterdir()} == listed
        assert_same(lake, stores.whole)


def test_a_shard_that_is_gone_is_named_with_a_way_out(at, stores):
    with at.open("w") as lake:
        lake.publish(stores.parts[0])
        gone = next((Path(at.data) / "shards").glob("tokens-*"))
        gone.unlink()
        assert any(gone.name in fault for fault in lake.verify().faults)
        with pytest.raises(astore.ShardError, match="publish the store"):
            lake.sql("SELECT count(*) FROM token_ids WHERE pos = $p", p=3)


def test_a_lake_that_cannot_be_opened_says_why(at, tmp_path, monkeypatch):
    with pytest.raises(astore.NotAStoreError, match="no such folder"):
        at.open()
    os.makedirs(f"{at.data}/shards")
    with pytest.raises(astore.NotAStoreError, match="mode='w'"):
        at.open()
    with pytest.raises(astore.StoreError, match="where the data of the lake lies"):
        astore.open(at.address)
    with pytest.raises(astore.StoreError, match="data_path is for a lake"):
        astore.open(tmp_path, data_path=tmp_path)  # type: ignore[call-overload]
    with pytest.raises(astore.StoreError, match="want ducklake:sqlite:FILE"):
        astore.open("ducklake:", data_path=tmp_path)
    with pytest.raises(astore.StoreError, match="not overwritten"):
        astore.open(at.address, "w", overwrite=True, data_path=at.data)  # type: ignore
    at.open("w").close()
    with pytest.raises(astore.StoreError, match="there is a lake already"):
        at.open("w")
    other = tmp_path / "other"
    (other / "shards").mkdir(parents=True)
    with pytest.raises(astore.StoreError, match="its data lies elsewhere"):
        astore.open(at.address, data_path=other)
    far = At(f"ducklake:sqlite:{tmp_path}/none/c.sqlite", at.data)
    with pytest.raises(astore.StoreError, match="none"):
        far.open("w")
    bad = tmp_path / "bad.sqlite"
    bad.write_text("not a database, but long enough to be read as one" * 20)
    with pytest.raises(astore.StoreError, match="cannot open the catalogue"):
        At(f"ducklake:sqlite:{bad}", at.data).open()
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if "duckdb_extension" in n else found(n)
    )
    with pytest.raises(astore.StoreError, match=r"pip install 'lmmono\[lake\]'"):
        at.open()


def test_a_lake_of_a_newer_schema_is_refused(at):
    at.open("w").close()
    place = lake_place.lake_place(at.address, at.data)
    with lake_place.attach_lake(place, read_only=False, is_shut=False) as con:
        newer = str(SCHEMA_VERSION + 1)
        con.execute(f"UPDATE {LAKE}.meta SET value = $1 WHERE key = 'schema_version'", [newer])
    with pytest.raises(astore.SchemaError, match=f"version {newer}.*upgrade"):
        at.open()


@pytest.mark.parametrize("at", ["sqlite"], indirect=True)
def test_a_view_in_place_of_a_lakes_table_is_never_run(at):
    at.open("w").close()
    place = lake_place.lake_place(at.address, at.data)
    with lake_place.attach_lake(place, read_only=False, is_shut=False) as con:
        con.execute(f"DROP TABLE {LAKE}.all_scores")
        con.execute(f"CREATE VIEW {LAKE}.all_scores AS SELECT error('it ran') AS metric")
    for mode in ("r", "a"):
        with pytest.raises(astore.NotAStoreError, match="holds a view 'all_scores', .* as a table"):
            at.open(mode)


def test_a_ducklake_of_others_is_left_alone(at):
    place = lake_place.lake_place(at.address, at.data)
    with lake_place.attach_lake(place, read_only=False, is_shut=False) as con:
        con.execute(f"CREATE TABLE {LAKE}.theirs (x INTEGER)")
    with pytest.raises(astore.NotAStoreError, match="theirs"):
        at.open("w")


@pytest.mark.parametrize("at", ["sqlite", "postgres"], indirect=True)
def test_a_writer_whose_turn_never_comes_gives_up(at, monkeypatch):
    lake = at.open("w")
    monkeypatch.setattr(lake_place, "TURN_WAIT_SECONDS", 0.3)
    with lake_place.turn(lake.backend.address), pytest.raises(astore.LockedError):
        lake.append("all_scores", [score(1, 0.5)])
    assert lake.append("all_scores", [score(1, 0.5)]) == 1


@pytest.mark.parametrize("at", ["postgres"], indirect=True)
def test_a_password_is_used_and_never_shown(at, server, stores, monkeypatch):
    lake = at.open("w")
    lake.publish(stores.parts[0])
    shown = [repr(lake), repr(lake.backend.address), str(lake.path), str(lake.info())]
    for query in ("FROM duckdb_databases()", "FROM duckdb_settings()", "FROM meta"):
        shown.append(str(lake.sql(query).fetchall()))
    database = lake.backend.address.catalogue.split()[0].removeprefix("dbname=")
    dump = "SELECT string_agg(m::text, ' ') FROM ducklake_metadata m"
    shown.append(server.sql(dump, database))
    for address, words in (
        (server.address(database, "wrong word"), "refused the user or the password"),
        (server.address(database, port=lake_servers.free_port()), "cannot open the catalogue"),
    ):
        with pytest.raises(astore.StoreError, match=words) as told:
            astore.open(address, data_path=at.data)
        shown.append(str(told.value))
    assert not any("sesame" in text or "wrong word" in text for text in shown), shown
    monkeypatch.setenv("PGPASSWORD", lake_servers.PASSWORD)
    assert astore.open(server.address(database, None), data_path=at.data).info() == lake.info()


@pytest.mark.parametrize("at", ["sqlite+s3"], indirect=True)
def test_a_bucket_that_is_not_there_is_named(at, monkeypatch):
    with pytest.raises(astore.StoreError, match="s3://none: no such bucket"):
        At(at.address, "s3://none/prefix").open("w")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{lake_servers.free_port()}")
    with pytest.raises(astore.StoreError, match="cannot reach it"):
        at.open("w")


def test_the_guide_runs_as_it_is_written(at, stores, monkeypatch, capsys):
    text = (Path(__file__).parents[1] / "docs" / "lake.md").read_text()
    (python,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (sql,) = re.findall(r"^```sql\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for written, here in (
        ("ducklake:postgres:dbname=acts host=db user=lab", at.address),
        ("s3://bucket/acts", at.data),
        ("runs/mine", str(stores.parts[0])),
    ):
        assert python.count(f'"{written}"') == 1, written
        python = python.replace(f'"{written}"', repr(here))
    names: dict = {}
    exec(python, names)
    assert names["lake"].info().n_tokens == SEQS * N_CTX
    (bash,) = re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    commands = [shlex.split(line) for line in bash.splitlines()]
    assert len(commands) == 2
    here = {"ducklake:sqlite:/shared/acts.sqlite": at.address, "/shared/acts": at.data}
    for command in commands:
        monkeypatch.setattr(sys, "argv", [here.get(word, word) for word in command])
        with pytest.raises(SystemExit) as left:
            main()
        assert not left.value.code, capsys.readouterr().err
    with duckdb.connect() as con:
        for file in extension_files(["ducklake", "sqlite_scanner"]):
            con.execute(f"LOAD '{file}'")
        assert "ducklake:sqlite:/shared/acts.sqlite" in sql
        con.execute(sql.replace("ducklake:sqlite:/shared/acts.sqlite", at.address))
        assert len(con.fetchall()) == D
