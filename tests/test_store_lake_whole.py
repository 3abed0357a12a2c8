"""Lakes beyond publishing: vectors for training, stores beside them, repair, and the commands."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_store_lake import (  # the fixtures are used by name
    HOOKS,
    N_CTX,
    N_STORES,
    SEQS,
    At,
    assert_same,
    at,
    capture,
    s3_address,
    server,
    stores,
)

import activation_store as astore

__all__ = ["at", "s3_address", "server", "stores"]


def published(at: At, stores, *parts: int) -> astore.Store:
    lake = at.open("w")
    for i in parts:
        lake.publish(stores.parts[i])
    return lake


def batches(source, **settings) -> list[np.ndarray]:
    stream = source.vectors("resid", batch_tokens=32, **settings)
    return [np.array(batch) for batch in stream]


@pytest.mark.parametrize("at", ["sqlite", "sqlite+s3"], indirect=True)
def test_vectors_of_a_lake_are_those_of_the_stores_each_once(at, stores, tmp_path):
    lake = published(at, stores, 0, 1, 2, 3)
    copy = {"copy_to": tmp_path / "copy"} if lake.backend.address.is_remote else {}
    if lake.backend.address.is_remote:
        with pytest.raises(astore.StoreError, match=r"copy_to=.*\d MB|MB.*copy_to="):
            lake.vectors("resid")
    whole = astore.open(stores.whole)
    ours, theirs = (
        np.concatenate(batches(source, seed=1, **more))
        for source, more in ((lake, copy), (whole, {}))
    )
    assert ours.shape == (N_STORES * SEQS * N_CTX, 4)
    assert sorted(map(tuple, ours)) == sorted(map(tuple, theirs))
    assert np.array_equal(ours, np.concatenate(batches(lake, seed=1, prefetch=2, **copy)))
    stream = lake.vectors("resid", batch_tokens=32, seed=1, **copy)
    next(iter(stream))
    rest = batches(lake, seed=1, cursor=json.dumps(stream.cursor), **copy)
    assert np.array_equal(np.concatenate(rest), ours[32:])
    chosen = lake.vectors("resid", split="val", where="doc_id < 3", batch_tokens=8, **copy)
    assert chosen.n_tokens == 3 * N_CTX
    if copy:
        names = {path.name for path in (tmp_path / "copy").iterdir()}
        assert len(names) == N_STORES and all(name.endswith(".parquet") for name in names)


def test_a_cursor_is_refused_once_more_vectors_are_published(at, stores):
    lake = published(at, stores, 0)
    cursor = lake.vectors("resid", batch_tokens=8).cursor
    lake.publish(stores.parts[1])
    with pytest.raises(astore.ContentError, match="of another stream"):
        lake.vectors("resid", batch_tokens=8, cursor=cursor)


def test_a_store_can_be_attached_to_a_lake_and_no_lake_to_anything(at, stores, tmp_path):
    lake = published(at, stores, 0)
    lake.attach(stores.parts[1], "mine")
    query = "SELECT count(*) FROM mine.acts a JOIN acts b USING (hook, unit)"
    assert lake.sql(query).fetchall()[0][0] > 0
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    for query in (f"FROM '{secret}'", "DELETE FROM mine.shards", f"ATTACH '{secret}'"):
        with pytest.raises(astore.QueryError):
            lake.sql(query).fetchall()
    lake.append("all_scores", [{"metric": "m", "metric_version": 1, "value": 1.0}])
    lake.publish(stores.parts[2])
    assert lake.sql("SELECT count(*) FROM mine.all_scores").fetchall()[0] == (0,)
    for name, path in (("mine", stores.parts[2]), ("lake_catalogue", stores.parts[2])):
        with pytest.raises(astore.StoreError, match="want a new name"):
            lake.attach(path, name)
    with pytest.raises(astore.NotAStoreError):
        lake.attach(tmp_path / "nothing", "other")
    assert lake.sql("SELECT count(*) FROM mine.acts").fetchall()[0][0] > 0
    for opened in (lake, astore.open(stores.whole)):
        with pytest.raises(astore.StoreError, match="Open the lake itself"):
            opened.attach("ducklake:postgres:password=sesame", "other")


@pytest.mark.parametrize("at", ["sqlite", "sqlite+s3"], indirect=True)
def test_what_a_repair_drops_comes_back_when_its_store_is_published_again(at, stores):
    lake = published(at, stores, 0, 1, 2)
    assert lake.verify().ok and "ok" in str(lake.verify())
    of_first = "SELECT file FROM shards s JOIN publications USING (file) WHERE kind = 'acts'"
    lost, bad = (file for (file,) in lake.sql(f"{of_first} ORDER BY file LIMIT 2").fetchall())
    rows = lake.sql("SELECT sum(n_acts) FROM hooks").fetchall()[0]
    lake.backend.lake_files.remove(lost)
    with lake.backend.files.fs.open_input_file(lake.backend.files.path(bad)) as file:
        content = bytearray(file.read())
    content[len(content) // 2] ^= 1
    with lake.backend.files.fs.open_output_stream(lake.backend.files.path(bad)) as file:
        file.write(bytes(content))
    found = astore.verify(at.address, data_path=at.data)
    assert not found.ok and len(found.faults) == 2
    assert all(any(name in fault for fault in found.faults) for name in (lost, bad))
    report = astore.verify(at.address, data_path=at.data, repair=True)
    assert report.ok and len(report.dropped) == 2
    assert all("publish store" in line for line in report.dropped)
    lake.refresh()
    assert lake.sql("SELECT sum(n_acts) FROM hooks").fetchall()[0] < rows
    assert lake.sql("SELECT count(*) FROM acts").fetchall()[0][0] > 0
    assert [lake.publish(stores.parts[i]).n_shards for i in (0, 1, 2)].count(0) < 3
    lake.publish(stores.parts[3])
    assert lake.verify().ok
    assert_same(lake, stores.whole)


def test_a_merged_shard_that_is_lost_is_told_apart(at, stores):
    lake = published(at, stores, 0, 1)
    lake.compact(keep_seconds=0.0)
    (file,) = lake.sql("SELECT file FROM shards WHERE kind = 'acts' LIMIT 1").fetchall()[0]
    lake.backend.lake_files.remove(file)
    (line,) = lake.verify(repair=True).dropped
    assert file in line and "publish all stores to a new lake" in line
    with pytest.raises(astore.StoreError, match="mode='a'"):
        at.open().verify(repair=True)


class Said:
    """Exit code and words of one command."""

    def __init__(self, capsys, monkeypatch, *words: str) -> None:
        from lmmono.cli.app import main

        monkeypatch.setattr(sys, "argv", ["lmmono", *words])
        with pytest.raises(SystemExit) as left:
            main()
        self.code = left.value.code or 0
        self.out, self.err = capsys.readouterr()


@pytest.mark.parametrize("at", ["sqlite+s3"], indirect=True)
def test_the_commands_take_a_lake_as_they_take_a_store(at, stores, tmp_path, capsys, monkeypatch):
    def said(*words: object) -> Said:
        return Said(capsys, monkeypatch, *map(str, words))

    where = (at.address, "--data-path", at.data)
    n = published(at, stores, 0, 1).info().n_acts
    query = "SELECT count(*) AS n FROM activations"
    done = said("sql", *where, query, "--json")
    assert (done.code, json.loads(done.out)) == (0, [{"n": n}])
    both = "SELECT count(*) AS n FROM acts JOIN s2.acts USING (hook, unit)"
    assert json.loads(said("sql", *where, stores.parts[2], both, "--json").out)[0]["n"] > 0
    info = json.loads(said("store", "info", *where, "--json").out)
    assert {row["what"]: row["value"] for row in info}["n_acts"] == n
    verified = said("store", "verify", *where)
    assert verified.code == 0 and verified.out.strip().endswith("ok")
    assert "shards became" in said("store", "compact", *where).out
    exported = said("store", "export", *where, "--to", "parquet", "--out", tmp_path / "out")
    assert exported.code == 0
    files = (tmp_path / "out" / "acts").rglob("*.parquet")
    assert sum(pq.read_metadata(file).num_rows for file in files) == n
    wrong = {
        "--data-path": ("sql", at.address, query),
        "no lake there": ("store", "info", f"{at.address}x", "--data-path", at.data),
        "data_path is for a lake": ("sql", stores.parts[0], query, "--data-path", at.data),
        "Open the lake itself": ("sql", stores.parts[0], at.address, query),
        "nonsense": ("sql", *where, "FROM nonsense"),
    }
    for words, command in wrong.items():
        told = said(*command)
        assert told.code == 2 and words in told.err and "Traceback" not in told.err, words


def test_the_commands_verify_and_repair_a_damaged_lake(at, stores, capsys, monkeypatch):
    published(at, stores, 0).close()
    lost = sorted((Path(at.data) / "shards").glob("acts-*"))[0]
    lost.unlink()
    command = ("store", "verify", at.address, "--data-path", at.data)
    found = Said(capsys, monkeypatch, *command)
    assert found.code == 2 and lost.name in found.out
    repaired = Said(capsys, monkeypatch, *command, "--repair")
    assert repaired.code == 0 and f"of {HOOKS[0]}" in repaired.out + HOOKS[1]
    assert Said(capsys, monkeypatch, *command).code == 0


def test_openai_records_of_a_lake_are_those_of_the_store(at, stores, tmp_path):
    store = capture(tmp_path / "plain", range(SEQS), hooks=HOOKS[:1])
    with at.open("w") as lake:
        lake.publish(store)
        for to in ("openai", "delphi"):
            astore.export(lake, to, tmp_path / f"lake-{to}", HOOKS[:1])
            astore.export(astore.open(store), to, tmp_path / f"store-{to}", HOOKS[:1])
    for to, pattern in (("openai", "*/*.json"), ("delphi", "*/*.safetensors")):
        ours = sorted((tmp_path / f"lake-{to}").glob(pattern))
        assert ours
        for path in ours:
            twin = tmp_path / f"store-{to}" / path.relative_to(tmp_path / f"lake-{to}")
            assert path.read_bytes() == twin.read_bytes()
