"""What a writer must remember to resume after a commit, and how several ranks add up.

The state of a capture is the statistics, sketch and exemplars of each hook, the counts, and the
sequences that were given, as the bytes of an `.npz` file next to the shards (`shards.names`).

Several processes can capture into one store. Every rank takes its share of the sequences, writes
shards of its own and commits them by itself, in turn with the others. A commit stores the rank's
state and rewrites the tables from the committed states of all ranks, merged in the order of the
ranks. So at any moment the store holds exactly what is committed, and a rank that dies costs only
what it had not committed.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import duckdb
import numpy as np

from activation_store.catalog.catalogue import Place, unread
from activation_store.errors import ContentError, ShardError
from activation_store.shards.names import (
    NUMBERS_PER_RANK,
    file_number,
    listed_names,
    load_state,
    unlisted,
)
from activation_store.write.exemplars import TokenSample, Top, merge_samples, merge_tops
from activation_store.write.kernel import Seen
from activation_store.write.moments import Moments, merge_moments

RankState: TypeAlias = Mapping[str, np.ndarray]
"""The state of one rank's capture."""


def to_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the arrays as the bytes of an `.npz` file; the same arrays give the same bytes."""
    file = io.BytesIO()
    write_arrays(file, arrays.items())
    return file.getvalue()


def write_arrays(file: io.BufferedIOBase, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write an `.npz` file one array after the other, so that no two need be in memory.

    numpy's `savez` takes them all at once: of a model with a million units those are gigabytes.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def from_bytes(data: bytes) -> dict[str, np.ndarray]:
    """Return the arrays that `to_bytes` wrote.

    Raises:
        ShardError: the bytes are something else, as a store made by others may hold.
    """
    with understood(), np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@contextmanager
def understood() -> Generator[None]:
    """Tell what the state of a writer raises that is not what a writer left.

    Raises:
        ShardError: the state is damaged, or made by others.
    """
    try:
        yield
    except _GARBAGE as fault:
        raise ShardError(
            f"a writer's state in table writer_state cannot be read ({type(fault).__name__}: "
            f"{fault}); `lmmono store verify --repair` drops it, and what it captured stays."
        ) from fault


_GARBAGE = (
    ArithmeticError,
    AttributeError,
    zipfile.BadZipFile,
    EOFError,
    LookupError,
    MemoryError,  # an array that says it is larger than the machine
    NotImplementedError,  # a compression of zip files that Python has not
    OSError,
    RecursionError,
    TypeError,
    ValueError,
    zlib.error,
)
"""What NumPy, zipfile and JSON raise of bytes that are no state."""


def seen_to_arrays(seen: Seen) -> dict[str, np.ndarray]:
    """Return the state of a hook as named arrays; the sketch without its empty buckets."""
    # a part of the units at a time: the whole table is mostly memory that was never touched
    parts = [seen.sketch[i : i + 4096] for i in range(0, len(seen.sketch), 4096)]
    counts = np.concatenate([part[part != 0] for part in parts])
    narrow = counts.size == 0 or int(counts.max()) < 2**16
    arrays = {
        "odd": seen.odd,
        "sketch.filled": np.concatenate([np.packbits(part != 0, axis=1) for part in parts]),
        "sketch.counts": counts.astype(np.uint16) if narrow else counts,
    }
    for name in ("moments", "top", "random", "firing"):
        part = getattr(seen, name)
        arrays |= {f"{name}.{field}": getattr(part, field) for field in part._fields}
    return arrays


def arrays_to_seen(arrays: Mapping[str, np.ndarray], into: Seen) -> None:
    """Put the arrays of `seen_to_arrays` into a fresh state of the same settings."""
    n_buckets = into.sketch.shape[1]
    is_filled = np.unpackbits(arrays["sketch.filled"], axis=1, count=n_buckets).astype(bool)
    into.sketch[is_filled] = arrays["sketch.counts"]
    into.odd[:] = arrays["odd"]
    parts: dict[str, Moments | Top | TokenSample] = {
        "moments": into.moments,
        "top": into.top,
        "random": into.random,
        "firing": into.firing,
    }
    for name, part in parts.items():
        for field in part._fields:
            getattr(part, field)[...] = arrays[f"{name}.{field}"]


def merge_seen(into: Seen, other: Seen) -> None:
    """Take the state of other tokens of the same hook and settings into `into`."""
    merge_moments(into.moments, other.moments)
    np.add(into.sketch, other.sketch, out=into.sketch)
    merge_tops(into.top, other.top)
    merge_samples(into.random, other.random)
    merge_samples(into.firing, other.firing)
    np.add(into.odd, other.odd, out=into.odd)


def read(con: duckdb.DuckDBPyConnection, key: str) -> bytes | None:
    """Return what is stored under `key`, or None."""
    rows = con.execute("SELECT value FROM writer_state WHERE key = $1", [key]).fetchall()
    return bytes(rows[0][0]) if rows else None


def write(con: duckdb.DuckDBPyConnection, key: str, value: bytes) -> None:
    """Store `value` under `key` in place of what was there."""
    con.execute("DELETE FROM writer_state WHERE key = $1", [key])
    con.execute("INSERT INTO writer_state VALUES ($1, $2)", [key, value])


def pin(con: duckdb.DuckDBPyConnection, name: str, value: str) -> None:
    """Note a fact in table `meta` in place of what was there."""
    con.execute("DELETE FROM meta WHERE key = $1", [name])
    con.execute("INSERT INTO meta VALUES ($1, $2)", [name, value])


def settings_difference(stored: str, wanted: Mapping[str, Any]) -> list[str]:
    """Return, one line each, which settings differ from those stored as JSON."""
    # tuples become lists on their way through JSON, on both sides
    before, now = json.loads(stored), json.loads(json.dumps(wanted))
    return [
        f"{name}: stored {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


@dataclass(frozen=True, slots=True)
class Rank:
    """One of the processes of a capture."""

    rank: int
    world_size: int

    def __post_init__(self) -> None:
        """Refuse a rank outside the world.

        Raises:
            ContentError: rank is not between 0 and world_size - 1.
        """
        if not 0 <= self.rank < self.world_size:
            raise ContentError(
                f"rank: want 0 to world_size - 1 = {self.world_size - 1}, got {self.rank}."
            )

    @property
    def suffix(self) -> str:
        """What sets this rank's names apart; nothing for the first."""
        return f" rank {self.rank}" if self.rank else ""

    def lock(self, where: Place) -> Path:
        """Return the lock that keeps a second process from writing as this rank."""
        lock = where.writer_lock
        return lock.with_name(f"{lock.name}-{self.rank}") if self.rank else lock

    def next_number(self, names: Iterable[str]) -> int:
        """Return the number of this rank's next shard or state, given the names of those listed."""
        numbers = [number for number in map(file_number, names) if self._owns(number)]
        return max(numbers, default=self.rank * NUMBERS_PER_RANK - 1) + 1

    def _owns(self, number: int) -> bool:
        return number // NUMBERS_PER_RANK == self.rank

    def sweep(self, where: Place, con: duckdb.DuckDBPyConnection) -> None:
        """Remove the files that this rank wrote and never committed, unless the store is read.

        A reader may still know of shards that a compaction has replaced.
        """
        names = listed_names(con)
        with unread(where.folder) as is_unread:
            for path in list(unlisted(where, names)) if is_unread else ():
                if self.world_size == 1 or self._owns(file_number(path.name)):
                    path.unlink()

    def others(
        self, where: Place, con: duckdb.DuckDBPyConnection, key: str
    ) -> list[RankState | None]:
        """Return the committed states under `key` by rank; None for this one and the unborn."""
        states: list[RankState | None] = []
        for rank in range(self.world_size):
            value = None
            if rank != self.rank:
                value = read(con, key + Rank(rank, self.world_size).suffix)
            loaded = None if value is None else from_bytes(load_state(value, where.folder))
            states.append(loaded)
        return states
