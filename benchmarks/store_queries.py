"""Queries on one store of 10 M and one of 100 M activations, warm, through the locked Python API.

    python benchmarks/store_queries.py [--acts 10 100] [--repeats 60] [--cold] [--folder FOLDER]

The stores have 6 hooks of 1,536 units at 15 % density, written by the package's own writer from
random numbers. Their files are read once before, unless `--cold`: the writer leaves most of them
out of the system's cache. Prints the median and the smallest wall time of each query in
milliseconds, the size per stored activation, and as a floor the time to read the same Parquet row
groups with PyArrow.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import activation_store as astore

N_HOOKS, D, N_CTX, D_VOCAB, DENSITY = 6, 1536, 256, 4096, 0.15
CUT = 1.036433  # a standard normal is above this with probability 0.15
HOOKS = [f"blocks.{i}.mlp.hook_post" for i in range(N_HOOKS)]


def build(folder: Path, n_million: int) -> Path:
    """Return a store of about `n_million` million activations, made if absent."""
    path = folder / f"acts{n_million}" / "store.duckdb"
    if path.exists():
        return path
    n_seqs = round(n_million * 1e6 / (N_HOOKS * D * DENSITY * N_CTX))
    rng = np.random.default_rng(0)
    with astore.open(path, mode="w") as store:
        store.add_vocabulary([f" w{i}" for i in range(D_VOCAB)])
        rows = [astore.Rows(hook, D) for hook in HOOKS]
        with store.writer(rows=rows, n_ctx=N_CTX) as writer:
            for first in range(0, n_seqs, 4):
                seq = np.arange(first, min(first + 4, n_seqs))
                shape = (len(seq), N_CTX)
                acts = {
                    hook: rng.standard_normal((*shape, D), dtype=np.float32) - np.float32(CUT)
                    for hook in HOOKS
                }
                tokens = rng.integers(0, D_VOCAB, shape)
                writer.add(seq, tokens, np.broadcast_to(seq[:, None], shape), "score", acts)
    return path


def queries(store: astore.Store) -> dict[str, Callable[[], object]]:
    """Return the timed queries, each with units and tokens drawn anew."""
    draw = random.Random(0)
    bounds = store.sql("SELECT min(seq_id), max(seq_id) FROM token_ids").fetchall()[0]

    def ask(query: str, **params: object) -> Callable[[], object]:
        def run() -> object:
            chosen = {name: made() if callable(made) else made for name, made in params.items()}
            return store.sql(query, **chosen).fetchall()

        return run

    hook, unit = lambda: draw.choice(HOOKS), lambda: draw.randrange(D)
    seq, pos = lambda: draw.randint(*bounds), lambda: draw.randrange(N_CTX)
    top = "FROM activations WHERE hook = $hook AND unit = $unit ORDER BY act DESC LIMIT 20"
    strongest = "FROM exemplars WHERE kind = 'top' AND rank <= 10"
    return {
        "exemplars(hook, unit, 20)": ask("FROM exemplars($h, $u, 20)", h=hook, u=unit),
        "top 20 of activations": ask(top, hook=hook, unit=unit),
        "all of one token": ask("FROM acts WHERE seq_id = $s AND pos = $p", s=seq, p=pos),
        "coactivation": ask("FROM coactivation($h, $a, $b)", h=hook, a=unit, b=unit),
        "token_profile": ask("FROM token_profile($h, $u)", h=hook, u=unit),
        "density, max of every unit": lambda: store.sql(
            "SELECT hook, unit, density, max_act FROM unit_stats"
        ).to_arrow_table(),
        "top 10 of every unit": lambda: store.sql(strongest).to_arrow_table(),
    }


def floor(store: astore.Store) -> Callable[[], object]:
    """Return the reading of one unit's row groups of one hook with PyArrow, files opened anew."""
    listed = store.sql("SELECT file FROM shards WHERE kind = 'acts' AND hook = $h", h=HOOKS[0])
    files = [store.path.parent / "store" / name for (name,) in listed.fetchall()]
    draw = random.Random(0)

    def read() -> object:
        unit = draw.randrange(D)
        return [pq.read_table(file, filters=[("unit", "=", unit)]) for file in files]

    return read


def milliseconds(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return the median and the least wall time after three warm-up calls."""
    for _ in range(3):
        run()
    times: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times), min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--acts", type=int, nargs="+", default=[10, 100], help="millions")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--cold", action="store_true", help="files as the writer left them")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        for n_million in options.acts:
            path = build(options.folder or Path(made), n_million)
            if not options.cold:
                for file in path.with_suffix("").iterdir():
                    file.read_bytes()
            with astore.open(path) as store:
                info = store.info()
                size = store.sql("SELECT sum(n_bytes) FROM shards WHERE kind = 'acts'").fetchall()[
                    0
                ]
                print(f"{info.n_acts / 1e6:.1f} M acts, {size[0] / info.n_acts:.2f} bytes each")
                timed = {**queries(store), "floor: pyarrow reads one unit": floor(store)}
                for name, run in timed.items():
                    middle, least = milliseconds(run, options.repeats)
                    print(f"  {name:32s} median {middle:7.1f} ms, least {least:7.1f} ms")


if __name__ == "__main__":
    main()
