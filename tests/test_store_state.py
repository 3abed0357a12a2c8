"""What a writer goes on from: a file that a commit lists, checked, and never more than the last."""

import re
from pathlib import Path

import duckdb
import numpy as np
import pytest

import activation_store as astore
from activation_store import Rows
from activation_store.catalog import catalogue
from activation_store.shards import names

N, N_CTX, D = 12, 16, 8


def capture(path: Path, stop: int = N, mode: str = "a") -> None:
    """Capture sequences up to `stop`, a commit every four."""
    with astore.open(path, mode) as store, store.writer(rows=[Rows("h", D)], n_ctx=N_CTX) as writer:
        for first in range(writer.next_seq, stop, 4):
            seq = np.arange(first, first + 4)
            rng = np.random.default_rng(first)
            acts = np.maximum(rng.normal(size=(4, N_CTX, D)) - 1, 0).astype(np.float32)
            docs = np.repeat(seq[:, None], N_CTX, 1)
            writer.add(seq, docs, docs, "val", {"h": acts})
            writer.commit()


def states(path: Path) -> list[Path]:
    return sorted((path / "store").glob("state-*"))


def rows(path: Path, value: str) -> list:
    with duckdb.connect(path / "store.duckdb", read_only=True) as con:
        return con.execute(f"SELECT key, {value} FROM writer_state ORDER BY key").fetchall()


@pytest.fixture
def run(tmp_path) -> Path:
    capture(tmp_path / "run", 8, "w")
    return tmp_path / "run"


def test_only_the_last_state_is_kept_and_the_catalogue_stays_small(run):
    (file,) = states(run)
    (key, n_bytes), (tokens, _) = rows(run, "octet_length(value)")
    assert key.startswith("capture") and tokens == "tokens"
    assert n_bytes < 300 < file.stat().st_size
    report = astore.verify(run)
    assert report.ok and report.left_over == ()
    assert report.n_bytes == sum(f.stat().st_size for f in (run / "store").glob("*.parquet"))
    capture(run)
    assert len(states(run)) == 1 and states(run) != [file]


@pytest.mark.parametrize(
    "value",
    [b"garbage", b"{" + b'"a":[' * 180, b"PK\x03\x04" + bytes(99), b"\x80\x04.", b""],
    ids=["text", "deep JSON", "half a zip file", "a pickle", "nothing"],
)
def test_a_state_that_others_made_up_is_one_message(run, value):
    with catalogue.commit(catalogue.place(run)) as con:
        con.execute("UPDATE writer_state SET value = $1 WHERE key LIKE 'capture%'", [value])
    assert not astore.verify(run).ok
    with pytest.raises(astore.ShardError, match="state in table writer_state cannot be read"):
        capture(run)


def test_a_state_that_lies_in_the_catalogue_is_gone_on_from_too(run, tmp_path):
    (file,) = states(run)
    with catalogue.commit(catalogue.place(run)) as con:
        update = "UPDATE writer_state SET value = $1 WHERE key LIKE 'capture%'"
        con.execute(update, [file.read_bytes()])
    file.unlink()
    assert astore.verify(run).ok
    capture(run)
    capture(tmp_path / "whole", mode="w")
    (ours,), (theirs,) = states(run), states(tmp_path / "whole")
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("damage", ["missing", "shorter", "changed"])
def test_a_damaged_state_is_named_and_a_repair_says_what_it_costs(run, tmp_path, damage):
    (file,) = states(run)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data if damage == "changed" else data[:-1])
    if damage == "missing":
        file.unlink()
    assert len(astore.open(run).sql("SELECT DISTINCT seq_id FROM acts").fetchall()) == 8
    with pytest.raises(astore.ShardError, match=f"{re.escape(file.name)}.*verify --repair"):
        capture(run)
    with (
        astore.open(f"ducklake:{tmp_path}/c", "w", data_path=tmp_path / "lake") as lake,
        pytest.raises(astore.ShardError, match=re.escape(file.name)),
    ):
        lake.publish(run)
    report = astore.verify(run)
    assert not report.ok and len(report.faults) == 1 and file.name in report.faults[0]
    report = astore.verify(run, repair=True)
    assert report.ok and "cannot be resumed" in report.dropped[0]
    with pytest.raises(astore.ContentError, match="already captured"):
        capture(run)


def test_what_a_killed_writer_left_is_not_part_of_the_store(run):
    with duckdb.connect(run / "store.duckdb", read_only=True) as con:
        (listed,) = names.listed_states(con).values()
        store_id = con.execute("SELECT value FROM meta WHERE key = 'store_id'").fetchone()[0]
    left = names.write_state(run / "store", store_id, 77, lambda file: file.write(b"never listed"))
    assert left != listed
    assert astore.verify(run).left_over == (left.file,)
    capture(run)
    assert astore.verify(run).left_over == () and astore.verify(run).ok
