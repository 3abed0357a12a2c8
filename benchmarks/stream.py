"""Shuffled batches of vectors beside sequential reading, beside Arrow, and beside sae-lens.

    python benchmarks/stream.py [--tokens 262144] [--repeats 5] [--d 384] [--cold] [--peer]

The data are float16 vectors of random numbers in a store, in several commits. Arms run in turn,
repeat after repeat, each over the whole of the data; a reader goes on with its next epoch:

- bytes: the shards read front to back into one buffer of 8 MiB. This is the floor.
- arrow: the shards read front to back by pyarrow, as float16, in stored order.
- plain: `store.vectors(shuffle=False)`, float32.
- shuffled: `store.vectors`, float32, for 0, 1 and 2 threads that read ahead; also as float16.
- sae-lens: `ActivationsStore` over cached activations, the same vectors as the data set that
  `CacheActivationsRunner` writes, float32 batches, its default mixing (`--peer`).

`--cold` drops the files from the page cache before each run, and begins a new stream: what one has
mapped stays. Prints medians: GB/s of stored bytes by the wall clock and by processor time, and the
ratio of wall times to the other arms.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import activation_store as astore
from activation_store import Vectors

HOOK = "blocks.0.hook_resid_post"
N_CTX, BATCH_TOKENS = 128, 4096


def fill(folder: Path, n_tokens: int, d: int) -> None:
    """Write the store."""
    rng = np.random.default_rng(0)
    n, step = n_tokens // N_CTX, 32
    with (
        astore.open(folder, "w") as store,
        store.writer(vectors=[Vectors(HOOK, d)], n_ctx=N_CTX, commit_tokens=131_072) as writer,
    ):
        for first in range(0, n, step):
            seq = np.arange(first, first + step)
            x = rng.standard_normal((step, N_CTX, d), dtype=np.float32)
            docs = np.repeat(seq[:, None], N_CTX, 1)
            writer.add(seq, np.zeros_like(docs), docs, "train", {HOOK: x})


def cache_for_peer(folder: Path, store: astore.Store, d: int, dtype: str) -> None:
    """Write the same vectors as the data set that sae-lens reads."""
    from datasets import Array2D, Dataset, Features, Sequence, Value

    kind = Array2D(shape=(N_CTX, d), dtype=dtype)
    features = Features({HOOK: kind, "token_ids": Sequence(Value("int32"), length=N_CTX)})

    batches = list(store.vectors(HOOK, batch_tokens=N_CTX, shuffle=False, dtype=dtype))
    columns = {HOOK: np.stack(batches), "token_ids": np.zeros((len(batches), N_CTX), np.int32)}
    Dataset.from_dict(columns, features=features).save_to_disk(str(folder / "data"))


def peer(folder: Path, d: int, n_tokens: int) -> Callable[[], None]:
    """Return the pass of sae-lens over its cached activations."""
    import torch
    from sae_lens.training.activations_store import ActivationsStore

    reader = ActivationsStore(
        model=None,
        dataset=None,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=N_CTX,
        d_in=d,
        n_batches_in_buffer=64,
        total_training_tokens=n_tokens,
        store_batch_size_prompts=32,
        train_batch_size_tokens=BATCH_TOKENS,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(folder / "data"),
    )

    def run() -> None:
        done = 0
        while done < n_tokens:
            done += len(next(reader))

    return run


def arms(store: astore.Store, shards: Sequence[Path], cold: bool) -> dict[str, Callable[[], None]]:
    """Return what is measured, by name."""

    def read_bytes() -> None:
        buffer = bytearray(2**23)
        for path in shards:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def read_arrow() -> None:
        for path in shards:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns=["vector"])
                    table.column("vector").combine_chunks().flatten().to_numpy()

    def stream(**settings: object) -> Callable[[], None]:
        def begun() -> tuple[int, Iterator[np.ndarray]]:
            epochs = 1 if cold else None
            vectors = store.vectors(HOOK, batch_tokens=BATCH_TOKENS, epochs=epochs, **settings)
            return vectors.n_batches, iter(vectors)

        held = None if cold else begun()

        def run() -> None:
            n, batches = held or begun()
            for _ in islice(batches, n):
                pass

        return run

    found = {"bytes": read_bytes, "arrow": read_arrow, "plain": stream(shuffle=False)}
    for prefetch in (0, 1, 2):
        found[f"shuffled, {prefetch} threads"] = stream(prefetch=prefetch)
    found["shuffled float16, 1 thread"] = stream(prefetch=1, dtype="float16")
    return found


def drop(files: Sequence[Path]) -> None:
    """Take files out of the page cache."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def main() -> None:
    """Run the arms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--d", type=int, default=384)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--peer-dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        fill(folder / "run", args.tokens, args.d)
        with astore.open(folder / "run") as store:
            shards = sorted((folder / "run" / "store").glob("vectors-*"))
            measured = arms(store, shards, args.cold)
            if args.peer:
                cache_for_peer(folder, store, args.d, args.peer_dtype)
                measured["sae-lens"] = peer(folder, args.d, args.tokens)
            files = [*shards, *folder.glob("data/*.arrow")]
            seconds = {name: list[tuple[float, float]]() for name in measured}
            for repeat in range(args.repeats + 1):  # the first one warms up
                for name, run in measured.items():
                    if args.cold:
                        drop(files)
                    begin, worked = time.perf_counter(), time.process_time()
                    run()
                    if repeat:
                        spent = time.perf_counter() - begin, time.process_time() - worked
                        seconds[name].append(spent)
        show(seconds, args.tokens * args.d * 2)
    finally:
        shutil.rmtree(folder)


def show(seconds: dict[str, list[tuple[float, float]]], n_bytes: int) -> None:
    """Print the medians."""
    wall = {name: statistics.median(t for t, _ in times) for name, times in seconds.items()}
    work = {name: statistics.median(t for _, t in times) for name, times in seconds.items()}
    print(f"{n_bytes / 1e6:,.0f} MB of float16 vectors; load {os.getloadavg()[0]:.1f}")
    for name, taken in wall.items():
        line = (
            f"{name:27} {n_bytes / taken / 1e9:6.2f} GB/s, {n_bytes / work[name] / 1e9:6.2f} by CPU"
        )
        for other in ("bytes", "arrow", "sae-lens"):
            if other in wall:
                line += f"  {wall[other] / taken:5.2f}x {other}"
        print(line)


if __name__ == "__main__":
    main()
