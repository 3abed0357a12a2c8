"""Queries of one unit over a lake, beside the same rows in one store.

Run: python benchmarks/lake.py [--stores 16] [--postgres "dbname=... host=..."]

Several stores are captured and published, then the lake is compacted. Each query runs on every
store in turn, so all see the same load; medians of ten, in milliseconds. The last line is the same
scan over DuckLake's own table of the same files, without our list of shards.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import duckdb
import numpy as np

import activation_store as astore
from activation_store.lake.lake_place import LAKE, attach_lake, lake_place

N_CTX, D, DENSITY_CUT, SEQS = 128, 1024, 1.2816, 40
QUERIES = {
    "top 20 by scan": "SELECT token, act, doc_id FROM activations"
    " WHERE hook = 'h' AND unit = {unit} ORDER BY act DESC LIMIT 20",
    "exemplars(20)": "FROM exemplars('h', {unit}, 20)",
    "statistics of all units": "SELECT unit, density, max_act FROM unit_stats WHERE hook = 'h'",
    "acts of one token": "SELECT unit, act FROM activations WHERE token_id = {unit}",
}


def capture(path: Path, seqs: range) -> None:
    with astore.open(path, "w") as store:
        with store.writer(rows=[astore.Rows("h", D, top_k=20)], n_ctx=N_CTX) as writer:
            for first in range(seqs.start, seqs.stop, 8):
                names = np.arange(first, first + 8)
                rng = np.random.default_rng(first)
                acts = rng.normal(size=(8, N_CTX, D)).astype(np.float32) - DENSITY_CUT
                tokens = rng.integers(0, 5000, (8, N_CTX))
                docs = np.repeat(names[:, None], N_CTX, 1)
                writer.add(names, tokens, docs, "val", {"h": np.maximum(acts, 0)})
        store.add_vocabulary([f" t{i}" for i in range(5000)])


def medians(run, queries: dict[str, str], what: dict) -> None:
    for name, query in queries.items():
        times: dict[str, list[float]] = {key: [] for key in what}
        for i in range(12):
            for key, store in what.items():
                start = time.perf_counter()
                run(store, query.format(unit=i * 37 % D))
                times[key].append(1e3 * (time.perf_counter() - start))
        shown = {key: round(statistics.median(values[2:]), 1) for key, values in times.items()}
        print(f"  {name}: {shown}")


def native_table(root: Path) -> duckdb.DuckDBPyConnection:
    place = lake_place(f"ducklake:sqlite:{root}/native.sqlite", root / "native")
    con = attach_lake(place, read_only=False, is_shut=False)
    con.execute(f"USE {LAKE}")
    con.execute(
        "CREATE TABLE acts (hook VARCHAR, unit INTEGER, seq_id INTEGER, pos INTEGER, act FLOAT)"
    )
    for file in root.glob("store-*/store/acts*.parquet"):
        con.execute(f"CALL ducklake_add_data_files('{LAKE}', 'acts', '{file}')")
    return con


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--stores", type=int, default=16)
    arguments.add_argument("--postgres", help="connection string of an empty database")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for i in range(given.stores):
            capture(root / f"store-{i}", range(i * SEQS, (i + 1) * SEQS))
        capture(root / "whole", range(given.stores * SEQS))
        stores: dict = {"one store": astore.open(root / "whole")}
        print(stores["one store"].info())
        addresses = {"sqlite": f"sqlite:{root}/lake.sqlite", "duckdb": f"{root}/lake.ducklake"}
        if given.postgres:
            addresses["postgres"] = f"postgres:{given.postgres}"
        for kind, address in addresses.items():
            lake = astore.open(f"ducklake:{address}", "w", data_path=root / kind)
            stores[kind] = lake
            times = []
            for i in range(given.stores):
                start = time.perf_counter()
                lake.publish(root / f"store-{i}")
                times.append(time.perf_counter() - start)
            print(f"{kind}: publish, median {statistics.median(times):.2f} s")
        print("as published")
        medians(lambda store, query: store.sql(query).fetchall(), QUERIES, stores)
        for kind in addresses:
            start = time.perf_counter()
            done = stores[kind].compact(keep_seconds=0.0)
            print(f"{kind}: {done} in {time.perf_counter() - start:.1f} s")
        print("compacted")
        medians(lambda store, query: store.sql(query).fetchall(), QUERIES, stores)
        scan = "SELECT * FROM acts WHERE hook = 'h' AND unit = {unit} ORDER BY act DESC LIMIT 20"
        native = {"DuckLake's own table": native_table(root)}
        medians(lambda con, query: con.execute(query).fetchall(), {"top 20 by scan": scan}, native)


if __name__ == "__main__":
    main()
