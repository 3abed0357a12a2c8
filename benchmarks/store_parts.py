"""The parts of a capture of rows, each alone: the pass, the encoding, the writing of files.

    python benchmarks/store_parts.py [--repeats 5] [--folder FOLDER]

- The pass over activations at hand on one core, 1,536 units that fire on 15 % of made-up tokens:
  nanoseconds of processor time per activation over the first 24,576 tokens, when nearly every token
  is an exemplar of something, and over those from 49,152 to 73,728.
- One row group of 131,000 acts into memory: `ActsWriter`, and PyArrow with the same encodings and
  statistics.
- 512 MB into a new file, synced every 16 MiB: its pages kept in the system's cache, and let go.

Prints the least of the repeats, arms in turn.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from activation_store.hooks import Rows
from activation_store.shards.names import ACTS, BLOCK_ACTS
from activation_store.shards.parquet import ActsWriter, RowGroup
from activation_store.write.accumulator import Accumulator, tiles_of

D, N_CTX, GROUP, CUT = 1536, 128, 8, 1.04
N_BYTES, CHUNK = 2**29, 2**24


def spent(run: Callable[[], object]) -> float:
    """Return the processor time of a call, all threads."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def scan_times() -> tuple[float, float]:
    """Return the nanoseconds per activation at first and later."""
    rng = np.random.default_rng(0)
    shape = (GROUP * N_CTX, D)
    blocks = [np.maximum(rng.standard_normal(shape, np.float32) - CUT, 0) for _ in range(24)]
    times: list[float] = []
    with ThreadPoolExecutor(1) as pool:
        hook = Accumulator(Rows("hook", D), 0, pool, 1)
        for i in range(3 * len(blocks)):
            seq = np.arange(i * GROUP, (i + 1) * GROUP, dtype=np.int32)
            docs = np.repeat(seq[:, None], N_CTX, 1)
            tiles = tiles_of(seq, docs, docs + np.arange(N_CTX, dtype=np.int32))
            block = blocks[i % len(blocks)]
            times.append(spent(lambda block=block, tiles=tiles: hook.add(block, tiles)))
            if hook.n_buffered > BLOCK_ACTS // 2:
                hook.take()
                hook.busy(None)
    n = len(blocks)
    first, later = (sum(part) / (n * blocks[0].size) * 1e9 for part in (times[:n], times[-n:]))
    return first, later


def row_group() -> RowGroup:
    """Return the rows of 600 units over 1,400 tokens."""
    rng = np.random.default_rng(0)
    fires = rng.random((600, 1400)) < 0.155
    token = np.nonzero(fires)[1].astype(np.int32)
    return RowGroup(
        np.arange(600, dtype=np.int32),
        fires.sum(axis=1),
        token // N_CTX + 1000,
        token % N_CTX,
        rng.random(len(token), dtype=np.float32),
    )


def ours(rows: RowGroup) -> Callable[[], object]:
    """Return the encoding by the store's own writer."""
    writer = ActsWriter("hook", "float32", len)
    return lambda: writer.append(rows)


def by_arrow(rows: RowGroup) -> Callable[[], object]:
    """Return the encoding of the same columns by PyArrow."""
    name = ACTS.field("hook").with_type(pa.dictionary(pa.int8(), pa.string()))
    schema = pa.schema([each.with_nullable(False) for each in (name, *list(ACTS)[1:])])
    sink = pa.BufferOutputStream()
    writer = pq.ParquetWriter(
        sink,
        schema,
        use_dictionary=["hook", "unit"],  # pyright: ignore[reportArgumentType]
        column_encoding=dict.fromkeys(("seq_id", "pos"), "DELTA_BINARY_PACKED"),
        write_statistics=["hook", "unit", "seq_id"],  # pyright: ignore[reportArgumentType]
        data_page_size=2**23,
        compression="none",
    )

    def run() -> None:
        n = len(rows.act)
        places = pa.array(np.zeros(n, np.int8))
        columns = [
            pa.DictionaryArray.from_arrays(places, pa.array(["hook"])),
            pa.array(np.repeat(rows.units, rows.runs)),
            pa.array(rows.seq_id),
            pa.array(rows.pos),
            pa.array(rows.act),
        ]
        writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=n)

    return run


def write(folder: Path, let_go: bool) -> None:
    """Write a file that stays, as those of a capture do."""
    data = np.random.default_rng(0).bytes(CHUNK)
    with tempfile.NamedTemporaryFile(dir=folder, buffering=0, delete=False) as file:
        for _ in range(N_BYTES // CHUNK):
            file.write(data)
            os.fsync(file.fileno())
            if let_go:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def least(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the least processor time of each, run in turn after a first round."""
    times = [{name: spent(run) for name, run in runs.items()} for _ in range(repeats + 1)]
    return {name: min(each[name] for each in times[1:]) for name in runs}


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    scan_times()
    passes = [min(times) for times in zip(*(scan_times() for _ in range(3)), strict=True)]
    print("pass: first 24,576 tokens {:.2f} ns per activation, later {:.2f}".format(*passes))
    rows = row_group()
    encoders = {"ActsWriter": ours(rows), "PyArrow": by_arrow(rows)}
    for name, seconds in least(encoders, 4 * arguments.repeats).items():
        print(f"encoding by {name}: {seconds / len(rows.act) * 1e9:.1f} ns per act")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        arms = {
            "kept in the cache": lambda: write(Path(folder), False),
            "let go": lambda: write(Path(folder), True),
        }
        for name, seconds in least(arms, arguments.repeats).items():
            print(f"writing 512 MB, pages {name}: {seconds:.2f} s")


if __name__ == "__main__":
    main()
