"""Compaction: the same rows in fewer shards, in one step, without breaking anyone who reads."""

import shutil
import sys

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from kills import N_KILLS, Kills, remains
from small_store import HOOK, HOSTILE, small_store
from small_store import D as SMALL_D

import activation_store as astore
from activation_store import Rows, compact
from activation_store.catalog import catalogue
from activation_store.catalog.compaction import Sizes, compact_folder
from activation_store.shards.names import listed_names

A, B = "blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"
N, CTX, D = 64, 32, 24
EVERY = "SELECT * FROM acts ORDER BY ALL"


def write(path, mode="w", first=0, n=N, dtype="float32", hooks=(A, B), rank=0, world=1):
    """Write sequences in commits of eight."""
    rng = np.random.default_rng(first)
    acts = np.maximum(rng.normal(size=(len(hooks), n, CTX, D)) - 0.5, 0).astype(np.float32)
    docs = np.arange(n * CTX).reshape(n, CTX) // 20
    rows = [Rows(hook, D, dtype=dtype) for hook in hooks]
    with astore.open(path, mode) as store:
        for begin in range(0, n, 8):
            part = slice(begin, begin + 8)
            with store.writer(rows=rows, n_ctx=CTX) as writer:
                ids = np.arange(begin, begin + 8) + first
                given = {hook: acts[i, part] for i, hook in enumerate(hooks)}
                writer.add(ids, np.zeros((8, CTX), np.int64), docs[part], "train", given)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("compaction") / "run"
    write(path)
    return path


@pytest.fixture
def run(template, tmp_path):
    shutil.copytree(template, tmp_path / "run")
    return tmp_path / "run"


def rows(path) -> list:
    with astore.open(path) as store:
        return store.sql(EVERY).fetchall()


def acts_files(path) -> list[str]:
    return sorted(p.name for p in (path / "store").glob("acts-*"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_rows_stay_the_same_to_the_bit(tmp_path, dtype):
    write(tmp_path / "run", n=24, dtype=dtype)
    before = rows(tmp_path / "run")
    assert len(acts_files(tmp_path / "run")) == 6
    done = compact(tmp_path / "run")
    assert (done.merged, done.written, len(done.removed), done.kept) == (6, 2, 6, ())
    assert done.n_rows == len(before)
    assert rows(tmp_path / "run") == before
    assert len(acts_files(tmp_path / "run")) == 2
    assert astore.verify(tmp_path / "run").ok
    assert "6 shards became 2" in str(done)
    schema = pq.read_schema(tmp_path / "run" / "store" / acts_files(tmp_path / "run")[0])
    assert schema.field("act").type == ("halffloat" if dtype == "float16" else "float")


def test_a_block_holds_every_unit_once_and_in_order(run):
    compact(run)
    for name in acts_files(run):
        table = pq.read_table(run / "store" / name)
        keys = [table.column(c).to_numpy().astype(np.int64) for c in ("unit", "seq_id", "pos")]
        place = (keys[0] * 10**6 + keys[1]) * CTX + keys[2]
        assert (np.diff(place) > 0).all()


def test_sizes_can_be_chosen(run):
    before = rows(run)
    done = compact_folder(catalogue.place(run), Sizes(block_acts=8000, shard_acts=10_000))
    assert 2 < done.written < done.merged == 16
    assert rows(run) == before
    assert astore.verify(run).ok


def test_a_new_writer_leaves_what_a_reader_knows(run):
    with astore.open(run) as reader:
        lazy = reader.sql(EVERY)
        compact(run)
        write(run, "a", first=1000, n=8)
        assert len(lazy.fetchall()) == reader.sql("SELECT count(*) FROM acts").fetchall()[0][0]
    write(run, "a", first=2000, n=8)
    assert astore.verify(run).left_over == ()


def test_a_second_run_finds_nothing_to_do(run):
    compact(run)
    again = compact(run)
    assert (again.merged, again.written, again.removed, again.kept) == (0, 0, (), ())


def test_capturing_goes_on_after_it_and_numbers_stay_new(run):
    before = acts_files(run)
    compact(run)
    write(run, "a", first=1000, n=8)
    assert not set(before) & set(acts_files(run))
    assert astore.verify(run).ok
    with astore.open(run) as store:
        assert store.sql("SELECT count(DISTINCT seq_id) FROM acts").fetchall()[0] == (N + 8,)


def test_hostile_hook_names_and_shards_of_other_writers(tmp_path):
    small = small_store(tmp_path / "run")
    before = rows(small.path)
    done = compact(small.path)
    assert (done.merged, done.written) == (4, 2)
    assert rows(small.path) == before
    assert astore.verify(small.path).ok
    with astore.open(small.path) as store:
        for hook in (HOOK, HOSTILE):
            assert len(store.unit(hook, SMALL_D - 1).exemplars()) > 0


def test_a_store_that_is_being_read_keeps_what_its_reader_knows(run):
    with astore.open(run) as reader:
        lazy = reader.sql(EVERY)
        done = compact(run)
        assert done.removed == ()
        assert len(done.kept) == 16
        assert lazy.fetchall() == rows(run) == reader.sql(EVERY).fetchall()
    assert len(compact(run).removed) == 16
    assert astore.verify(run).left_over == ()


def test_a_store_that_is_being_written_is_left_alone(run):
    with (
        catalogue.locked(catalogue.place(run).writer_lock),
        pytest.raises(astore.LockedError, match="is writing this store"),
    ):
        compact(run)


def test_a_damaged_shard_is_named_and_nothing_changes(run):
    before = (run / "store.duckdb").read_bytes()
    shard = run / "store" / acts_files(run)[3]
    shard.write_bytes(shard.read_bytes()[:500])
    with pytest.raises(astore.ShardError, match=f"{shard.name}.*verify --repair"):
        compact(run)
    assert (run / "store.duckdb").read_bytes() == before


KILLED_SIZES = Sizes(block_acts=4000, shard_acts=9000)
KILLED = """
import sys
from activation_store.catalog import catalogue
from activation_store.catalog.compaction import Sizes, compact_folder
print("begin", flush=True)
compact_folder(catalogue.place(sys.argv[1]), Sizes(block_acts=4000, shard_acts=9000))
print("end", flush=True)
"""


def test_a_compaction_killed_at_random_moments_changes_nothing_or_everything(template, tmp_path):
    want, kills = rows(template), Kills("compaction", seed=2)
    shutil.copytree(template, tmp_path / "measured")
    kills.run(["-c", KILLED, str(tmp_path / "measured")])
    for i in range(N_KILLS):
        path = tmp_path / f"run{i}"
        shutil.copytree(template, path)
        kills.kill(["-c", KILLED, str(path)])
        with duckdb.connect(path / "store.duckdb", read_only=True) as con:
            names = listed_names(con)
        n_files = len(acts_files(path))
        kills.saw((len(names), n_files, *remains(path / "store.duckdb", names)))
        assert astore.verify(path).ok
        assert rows(path) == want
        compact_folder(catalogue.place(path), KILLED_SIZES)
        report = astore.verify(path)
        assert report.ok
        assert report.left_over == ()
        assert rows(path) == want
    kills.check(n_states=5)


def test_duckdb_alone_sees_the_new_shards(run, monkeypatch):
    want = rows(run)
    compact(run)
    monkeypatch.chdir(run)
    with duckdb.connect("store.duckdb", read_only=True) as con:
        assert con.execute(EVERY).fetchall() == want


def test_the_command_line_compacts_and_exports(run, tmp_path, capsys, monkeypatch):
    from lmmono.cli.app import main

    for words in (["compact", str(run)], ["export", str(run), "--to", "parquet", "--out", "out"]):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["lmmono", "store", *words])
        with pytest.raises(SystemExit) as left:
            main()
        assert not left.value.code
    assert "16 shards became 2" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "acts").iterdir())) == 2
