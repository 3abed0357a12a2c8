"""Writing scores killed at random moments: each batch is there whole or not at all."""

from pathlib import Path

from kills import N_KILLS, Kills, remains

import activation_store as astore

N_UNITS, N_BATCHES = 200, 20
EVERY = "SELECT * EXCLUDE (created_at) FROM all_scores ORDER BY ALL"

PROGRAM = """
import sys
import activation_store as astore
path, n_batches, n_units = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with astore.open(path, mode="a") as store:
    done = store.sql("SELECT count(DISTINCT seed) FROM all_scores").fetchall()[0][0]
    print("begin", flush=True)
    for seed in range(done, n_batches):
        rows = [{"metric": "m", "metric_version": 1, "hook": "h", "unit": unit, "seed": seed,
                 "value": unit + seed} for unit in range(n_units)]
        store.append("all_scores", rows)
print("end", flush=True)
"""


def fresh(path: Path) -> list[str]:
    """Make an empty store and return the arguments of Python that fill it."""
    astore.open(path, mode="w").close()
    return ["-c", PROGRAM, str(path), str(N_BATCHES), str(N_UNITS)]


def test_scores_killed_at_random_moments_are_whole_batches(tmp_path: Path) -> None:
    kills, done = Kills("scores", seed=1), 0
    kills.run(fresh(tmp_path / "steady" / "store.duckdb"))
    with astore.open(tmp_path / "steady") as store:
        want = store.sql(EVERY).fetchall()
    path = tmp_path / "0" / "store.duckdb"
    command = fresh(path)
    for kill in range(N_KILLS):
        kills.kill(command, kills.seconds / 3)
        with astore.open(path) as store:
            found = store.sql(
                "SELECT seed, count(*), sum(value) FROM all_scores GROUP BY 1"
            ).fetchall()
            rows = store.sql(EVERY).fetchall()
        kills.saw((len(found), *remains(path, set())))
        assert astore.verify(path).ok
        total = sum(range(N_UNITS))
        assert all(n == N_UNITS and s == total + N_UNITS * seed for seed, n, s in found)
        assert sorted(seed for seed, _, _ in found) == list(range(len(found)))
        assert len(found) >= done, "what was committed stays"
        done = len(found)
        if done == N_BATCHES:
            assert rows == want
            path, done = tmp_path / str(kill + 1) / "store.duckdb", 0
            command = fresh(path)
    kills.run(command)
    with astore.open(path) as store:
        assert store.sql(EVERY).fetchall() == want
    kills.check(n_states=10)
