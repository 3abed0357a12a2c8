"""The vectors that are mixed with each other: where one pool lies in memory, and the next one."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from activation_store.read.gathering import gather
from activation_store.read.mixing import Epoch
from activation_store.read.selection import Selection
from activation_store.shards.pages import Placed


class MappedPool:
    """The vectors of one pool, in the files as they are mapped, and the order they are given in."""

    def __init__(
        self, selection: Selection, epoch: Epoch, number: int, threads: ThreadPoolExecutor | None
    ) -> None:
        """Bring them to memory, in a thread if there are any."""
        self._selection = selection
        self.start = int(epoch.starts[number])
        """Tokens of the epoch before this pool."""
        self.stop = int(epoch.starts[number + 1])
        """Tokens of the epoch up to the end of this pool."""
        self._placed = Future[list[Placed]]()
        if threads is None:
            self._placed.set_result(self._place(epoch, number))
        else:
            self._placed = threads.submit(self._place, epoch, number)

    def _place(self, epoch: Epoch, number: int) -> list[Placed]:
        """Return where the vectors of each source are, in the order they are given."""
        spans, order = epoch.spans(number), epoch.order(number)
        found: list[Placed] = []
        for source, runs in zip(self._selection.sources, self._selection.runs, strict=True):
            address, memory = source.place(runs.rows(spans))
            found.append(Placed(address[order], memory))
        return found

    def give(self, source: int, part: slice, out: np.ndarray) -> None:
        """Put a part of one source in `out` in the order it is given, after waiting for it.

        Jobs begin in the order they are given, so a job that waits here waits for none behind it.

        Raises:
            ShardError: a file of the store is gone or changed.
        """
        placed = self._placed.result()[source]
        gather(placed.address[part], self._selection.sources[source].dtype, out)


class Part(NamedTuple):
    """Tokens of a batch that come from one pool."""

    pool: MappedPool
    start: int
    """The first of them, counted within the pool."""
    stop: int

    def give(self, source: int, out: np.ndarray) -> None:
        """Put their vectors of one source in `out` [stop - start, d]."""
        self.pool.give(source, slice(self.start, self.stop), out)


class Pools:
    """The pools of one epoch: the present one and, with threads, the one that comes next."""

    def __init__(
        self, selection: Selection, epoch: Epoch, threads: ThreadPoolExecutor | None
    ) -> None:
        """Read nothing yet; `threads` read ahead, if there are any."""
        self._selection, self._epoch, self._threads = selection, epoch, threads
        self._held: dict[int, MappedPool] = {}
        self._n_expected = 0

    def _pool(self, number: int) -> MappedPool:
        if number not in self._held:
            for coming in range(
                max(number, self._n_expected), min(number + 2, self._epoch.n_pools)
            ):
                self._expect(coming)
            self._held[number] = MappedPool(self._selection, self._epoch, number, self._threads)
        return self._held[number]

    def _expect(self, number: int) -> None:
        """Have the system read a pool in whatever order suits the disk, before it is asked for."""
        self._n_expected = number + 1
        places = self._epoch.spans(number)
        for source, runs in zip(self._selection.sources, self._selection.runs, strict=True):
            source.expect(runs.rows(places))

    def parts(self, start: int, stop: int) -> list[Part]:
        """Return where tokens start to stop of the epoch are, and have them brought to memory.

        The next pool is begun when half of the present one is taken.
        """
        starts = self._epoch.starts
        first = int(np.searchsorted(starts, start, "right")) - 1
        end = int(np.searchsorted(starts, stop, "left"))
        found: list[Part] = []
        for number in range(first, end):
            pool = self._pool(number)
            found.append(Part(pool, max(start - pool.start, 0), min(stop, pool.stop) - pool.start))
        last = found[-1].pool
        is_late = stop > (last.start + last.stop) // 2
        if self._threads is not None and is_late and end < self._epoch.n_pools:
            self._pool(end)
        self._held = {i: pool for i, pool in self._held.items() if pool.stop > stop}
        return found
