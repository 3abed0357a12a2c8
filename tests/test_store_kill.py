"""A capture killed at random moments, a full disk, readers beside a writer, ranks in processes.

Run as a program, this file is the capture that gets killed: `python test_store_kill.py STORE RANK
WORLD`. `STORE_KILLS` sets how often it is; `make soak` does it 50 times.
"""

import errno
import hashlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import forks
import numpy as np
import pytest
from kills import N_KILLS, Kills, remains

import activation_store as astore
from activation_store import Rows, StoreError, Vectors
from activation_store.shards import encoding as encoding_module
from activation_store.shards.names import listed_names
from activation_store.write.writer import Writer

N, N_CTX, D = 400, 64, 70


def batch(first: int, n: int) -> dict[str, Any]:
    """Return some sequences of a stream that is the same in every process."""
    parts: list[dict[str, np.ndarray]] = []
    for seq in range(first, min(first + n, N)):
        rng = np.random.default_rng(seq)
        acts = np.maximum(rng.standard_normal((N_CTX, D)) - 1, 0).astype(np.float32)
        resid = rng.standard_normal((N_CTX, 8)).astype(np.float32)
        tokens = rng.integers(0, 50, N_CTX)
        parts.append({"hook": acts, "resid": resid, "tokens": tokens})
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def opened(path: Path, rank: int = 0, world_size: int = 1) -> Writer:
    where = astore.open(path, mode="a" if path.exists() else "w").place
    return Writer(
        where,
        rows=[Rows("hook", D)],
        vectors=[Vectors("resid", 8)],
        n_ctx=N_CTX,
        commit_tokens=1024,
        rank=rank,
        world_size=world_size,
    )


def write(writer: Writer, rank: int = 0, world_size: int = 1) -> None:
    """Give a rank its batches of ten, from the first that is not committed."""
    firsts = range(10 * rank, N, 10 * world_size)
    for i, first in enumerate(firsts):
        skip = max(0, writer.next_seq - 10 * i)
        if skip < 10:
            given = batch(first + skip, 10 - skip)
            seq = np.arange(first + skip, first + 10)
            docs = np.repeat(seq[:, None] // 4, N_CTX, 1)
            writer.add(seq, given["tokens"], docs, "val", given)


def listed(path: Path) -> set[str]:
    with duckdb.connect(path, read_only=True) as con:
        return listed_names(con)


def content(path: Path) -> dict[str, Any]:
    """Everything a store holds but its own id and time."""
    with astore.open(path) as store:
        store_id = store.info().store_id
        queries = {
            table: f"FROM {table} ORDER BY ALL" for table in ("hooks", "unit_stats", "exemplars")
        }
        queries["shards"] = (
            f"SELECT * REPLACE (replace(file, '{store_id}', '') AS file) FROM shards ORDER BY ALL"
        )
        tables = {name: store.sql(query).fetchall() for name, query in queries.items()}
    names = listed(path)
    folder = path.with_suffix("")
    assert {file.name for file in folder.glob("[!.]*")} == names, "no file is left over"
    files = {n.replace(store_id, ""): (folder / n).read_bytes() for n in sorted(names)}
    return {**tables, "files": {n: hashlib.sha256(b).hexdigest() for n, b in files.items()}}


def command(path: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    return [__file__, str(path), str(rank), str(world_size)]


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("steady") / "store.duckdb"
    with opened(path) as writer:
        write(writer)
    return path


def test_a_capture_killed_at_random_moments_ends_as_one_never_killed(
    steady: Path, tmp_path: Path
) -> None:
    kills = Kills("capture", seed=0)
    kills.run(command(tmp_path / "measured" / "store.duckdb"))
    want, n_stores = content(steady), 0
    path = tmp_path / "0" / "store.duckdb"
    for _ in range(N_KILLS):
        inside = kills.kill(command(path), kills.seconds / 3)
        with astore.open(path) as store:
            kills.saw((store.info().n_tokens, *remains(path, listed(path))))
            assert store.verify().ok, "what is committed is whole"
            held = store.sql("SELECT n_tokens, n_acts FROM hooks WHERE kind = 'rows'").fetchall()
            assert [(store.info().n_tokens, store.info().n_acts)] == (held or [(0, 0)])
        if not inside:  # done before it was killed: begin another
            assert content(path) == want
            n_stores += 1
            path = tmp_path / str(n_stores) / "store.duckdb"
    kills.run(command(path))
    assert content(path) == want
    kills.check(n_states=10)


def test_two_processes_capture_into_one_store_while_a_third_reads(
    steady: Path, tmp_path: Path
) -> None:
    path = tmp_path / "store.duckdb"
    astore.open(path, mode="w").close()
    ranks = [forks.start(*command(path, rank, 2)) for rank in (0, 1)]
    seen: list[int] = []
    while any(rank.process.is_alive() for rank in ranks):
        with astore.open(path) as store:
            n_acts = store.sql("SELECT count(*) FROM activations").fetchall()[0][0]
            held = store.sql("SELECT max(n_acts) FROM hooks").fetchall()[0][0] or 0
            assert n_acts == held, "a reader sees the rows of one commit, all of them"
            seen.append(n_acts)
        time.sleep(0.05)
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]
    assert seen == sorted(seen)
    one, two = content(steady), content(path)
    assert two["exemplars"] == one["exemplars"]
    assert two["hooks"] == one["hooks"]
    query = "SELECT unit, seq_id, pos, act, doc_id, token_id FROM activations ORDER BY ALL"
    with astore.open(steady) as left, astore.open(path) as right:
        assert left.sql(query).fetchall() == right.sql(query).fetchall()


def test_a_full_disk_is_said_so_and_leaves_the_last_commit(
    steady: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store.duckdb"
    left = [400]
    real = encoding_module._HashedFile.write

    def write_until_full(self: Any, data: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(encoding_module._HashedFile, "write", write_until_full)
    said = r"\.parquet: cannot write: the disk is full; free some"
    with pytest.raises(StoreError, match=said), opened(path) as writer:
        write(writer)
    monkeypatch.undo()
    with astore.open(path) as store:
        assert store.verify().ok
    with opened(path) as writer:
        assert 0 < writer.next_seq < N
        write(writer)
    assert content(path) == content(steady)


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True
    )
    if mount.returncode:
        pytest.skip("needs the right to mount a tmpfs of 3 MB")
    try:
        path = disk / "store.duckdb"
        with pytest.raises(StoreError, match="disk is full"), opened(path) as writer:
            write(writer)
        with astore.open(path) as store:
            assert store.verify().ok
    finally:
        subprocess.run(["umount", str(disk)], check=True)


if __name__ == "__main__":
    given_path, given_rank, given_world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with opened(given_path, given_rank, given_world) as given_writer:
        sys.stdout.write("begin\n")
        sys.stdout.flush()
        write(given_writer, given_rank, given_world)
    sys.stdout.write("end\n")
