"""Writing scores killed at random moments: each batch is there whole or not at all."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import activation_store as astore

KILLS = int(os.environ.get("STORE_KILLS", "3"))
N_UNITS = 500

PROGRAM = """
import sys
import activation_store as astore
path, first, n_units = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with astore.open(path, mode="a") as store:
    print("ready", flush=True)
    for seed in range(first, first + 100_000):
        rows = [{"metric": "m", "metric_version": 1, "hook": "h", "unit": unit, "seed": seed,
                 "value": unit + seed} for unit in range(n_units)]
        store.append("scores", rows)
"""


def test_scores_killed_at_random_moments_are_whole_batches(tmp_path: Path) -> None:
    path = tmp_path / "store.duckdb"
    astore.open(path, mode="w").close()
    moments, done = random.Random(1), 0
    for _ in range(KILLS):
        command = [sys.executable, "-c", PROGRAM, str(path), str(done), str(N_UNITS)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(moments.uniform(0, 1.0))
            process.send_signal(signal.SIGKILL)
        assert astore.verify(path).ok
        with astore.open(path) as store:
            found = store.sql("SELECT seed, count(*), sum(value) FROM scores GROUP BY 1").fetchall()
        total = sum(range(N_UNITS))
        assert all(n == N_UNITS and s == total + N_UNITS * seed for seed, n, s in found)
        assert sorted(seed for seed, _, _ in found) == list(range(len(found)))
        assert len(found) >= done, "what was committed stays"
        done = len(found)
    assert done > 0
