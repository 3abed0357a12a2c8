"""Several processes that capture into one store: who writes which files, and what they add up to.

Every rank takes its share of the sequences, writes shards of its own and commits them by itself, in
turn with the others. A commit stores the rank's state and rewrites the tables from the committed
states of all ranks, merged in the order of the ranks. So at any moment the store holds exactly what
is committed, and a rank that dies costs only what it had not committed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np

from activation_store.catalog.catalogue import Place
from activation_store.catalog.presence import unread
from activation_store.errors import ContentError
from activation_store.shards.names import unlisted
from activation_store.write import state, state_files
from activation_store.write.sequences import Ranges, shared

NUMBERS_PER_RANK = 10**7
"""Shards that one rank may number: rank r has the numbers from r times this on."""

Held = Mapping[str, np.ndarray]
"""The state of one rank's capture."""


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
        numbers = [number for number in map(_number, names) if self._owns(number)]
        return max(numbers, default=self.rank * NUMBERS_PER_RANK - 1) + 1

    def _owns(self, number: int) -> bool:
        first = self.rank * NUMBERS_PER_RANK
        return first <= number < first + NUMBERS_PER_RANK

    def sweep(self, where: Place, con: duckdb.DuckDBPyConnection) -> None:
        """Remove the files that this rank wrote and never committed, unless the store is read.

        A reader may still know of shards that a compaction has replaced.
        """
        names = state_files.all_names(con)
        with unread(where.folder) as alone:
            for path in list(unlisted(where, names)) if alone else ():
                if self.world_size == 1 or self._owns(_number(path.name)):
                    path.unlink()

    def others(self, where: Place, con: duckdb.DuckDBPyConnection, key: str) -> list[Held | None]:
        """Return the committed states under `key` by rank; None for this one and the unborn."""
        held: list[Held | None] = []
        for rank in range(self.world_size):
            stored = None
            if rank != self.rank:
                stored = state.read(con, key + Rank(rank, self.world_size).suffix)
            if stored is not None:
                stored = state_files.load(stored, where.folder)
            held.append(None if stored is None else state.from_bytes(stored))
        return held


def _number(name: str) -> int:
    return int(name.split(".")[0].rsplit("-", 1)[1])


def refuse_shared(given: Ranges, others: Sequence[Held | None]) -> None:
    """Refuse sequences that another rank has committed in the same capture.

    Raises:
        ContentError: a sequence was given to two ranks; names it.
    """
    for rank, held in enumerate(others):
        both = shared(given, held["given"]) if held is not None else given[:0]
        if len(both):
            n = int((both[:, 1] - both[:, 0] + 1).sum())
            raise ContentError(
                f"sequence {both[0, 0]} was given to rank {rank} too ({n} in all); "
                "give each sequence to one rank."
            )
