"""token_lookup, simulation_tar and simulation_random for every unit of a 3-layer model.

    python benchmarks/scoring.py [--million 10] [--repeats 3] [--folder FOLDER]

The store has 3 hooks of 512 units at 15 % density on documents of about 400 tokens, half of them
to explain and half to score; a unit's activation is a draw per token plus noise. Every unit gets 20
top and 20 random records of 64 tokens on both sides, intervals, and three controls. Each repeat is
a new process on a copy of the store, timed from the first import to the last row. Prints wall and
processor time, where it went, the largest memory, and as a floor the time to read the same columns
with PyArrow. Processor time is what a busy machine leaves comparable.
Wanted: at most 60 s and 2 GB on two cores.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

import activation_store as astore

N_HOOKS, D, N_CTX, D_VOCAB, DENSITY, CUT = 3, 512, 256, 4096, 0.15, 1.036433
HOOKS = [f"blocks.{i}.mlp.hook_post" for i in range(N_HOOKS)]


def build(folder: Path, n_million: int) -> Path:
    """Return a store of about `n_million` million activations, made if absent."""
    path = folder / f"scoring{n_million}" / "store.duckdb"
    if path.exists():
        return path
    n_seqs = round(n_million * 1e6 / (N_HOOKS * D * DENSITY * N_CTX))
    rng = np.random.default_rng(0)
    means = {hook: rng.normal(0, 0.8, (D_VOCAB, D)).astype(np.float32) for hook in HOOKS}
    frequent = 1 / np.arange(1, D_VOCAB + 1)
    with astore.open(path, mode="w") as store:
        store.add_vocabulary([f" w{i}" for i in range(D_VOCAB)])
        rows = [astore.Rows(hook, D) for hook in HOOKS]
        with store.writer(rows=rows, n_ctx=N_CTX) as writer:
            for first in range(0, n_seqs, 4):
                seq = np.arange(first, min(first + 4, n_seqs))
                shape = (len(seq), N_CTX)
                tokens = rng.choice(D_VOCAB, shape, p=frequent / frequent.sum())
                noise = {h: rng.normal(0, 0.6, (*shape, D)).astype(np.float32) for h in HOOKS}
                acts = {h: means[h][tokens] + noise[h] - np.float32(CUT) for h in HOOKS}
                docs = np.broadcast_to(seq[:, None] * N_CTX // 400, shape)
                split = "explain" if docs.max() < n_seqs * N_CTX // 800 else "score"
                writer.add(seq, tokens, docs + (split == "score") * n_seqs, split, acts)
    return path


def floor(path: Path) -> tuple[float, float]:
    """Return seconds and megabytes of reading unit, seq_id, pos and act of every row once."""
    started, n_bytes = time.perf_counter(), 0
    for file in sorted((path.parent / "store").glob("acts-*.parquet")):
        pq.read_table(file, columns=["unit", "seq_id", "pos", "act"])
        n_bytes += file.stat().st_size
    return time.perf_counter() - started, n_bytes / 1e6


class Clock:
    """Adds up the seconds within functions, and counts their calls."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def on(self, owner: Any, name: str, label: str) -> None:
        """Time a function of a module or class from now on."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[label] += time.perf_counter() - started
                self.calls[label] += 1

        setattr(owner, name, timed)


def run(path: Path) -> None:
    """Explain and score one copy of the store; print what it took as JSON."""
    started = time.perf_counter()
    import lmmono as lm
    from lmmono.explanations import explain as explanations
    from lmmono.explanations import stored_explanations, token_lookup
    from lmmono.records import record_reader as reader
    from lmmono.scores import simulation

    clock = Clock()
    clock.on(reader, "read_records", "read records")
    clock.on(token_lookup, "_explained", "explain")
    clock.on(stored_explanations, "read_explanations", "read explanations")
    clock.on(simulation, "run_programs", "simulate")
    clock.on(simulation, "record_sums", "sums")
    clock.on(simulation, "unit_intervals", "intervals")
    clock.on(astore.Store, "append", "append rows")
    assert explanations
    with astore.open(path, mode="a") as store:
        lm.explain(store)
        explained = time.perf_counter() - started
        scores = lm.score(store, scorer=["simulation_tar", "simulation_random"])
        total = time.perf_counter() - started
        rows = store.sql("SELECT count(*) FROM all_scores").fetchone()
        n_acts = store.info().n_acts
    usage = resource.getrusage(resource.RUSAGE_SELF)
    kilobytes, processor = usage.ru_maxrss, usage.ru_utime + usage.ru_stime
    parts = {name: round(seconds, 2) for name, seconds in clock.seconds.most_common()}
    answer = {"total": total, "explain": explained, "gigabytes": kilobytes / 1e6, "parts": parts}
    answer |= {"reads": clock.calls["read records"], "rows": rows, "n_units": scores.n_units}
    print(json.dumps(answer | {"n_acts": n_acts, "processor": processor}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--million", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lmmono-bench")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run is not None:
        run(given.run)
        return
    path = build(given.folder, given.million)
    seconds, megabytes = floor(path)
    print(f"floor: {megabytes:.0f} MB of acts read by PyArrow in {seconds:.2f} s")
    answers: list[dict[str, Any]] = []
    for _ in range(given.repeats):
        copy = given.folder / "scoring-copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(path.parent, copy)
        command = [sys.executable, __file__, "--run", str(copy / "store.duckdb")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        answers.append(json.loads(done.stdout.splitlines()[-1]))
        shutil.rmtree(copy)
    print(f"{answers[0]['n_acts']:,} acts, {answers[0]['rows'][0]:,} rows of scores written")
    for answer in answers:
        print(
            f"{answer['total']:.1f} s ({answer['explain']:.1f} s of it explain), "
            f"{answer['processor']:.1f} s of processor time, {answer['gigabytes']:.2f} GB, "
            f"records read {answer['reads']} times "
            f"({N_HOOKS} hooks x 2 splits); {answer['parts']}"
        )
    for name in ("total", "processor"):
        print(f"median {name} {statistics.median(a[name] for a in answers):.1f} s")


if __name__ == "__main__":
    main()
