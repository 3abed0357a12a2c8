"""The vectors that are mixed with each other, in memory: one pool, and the next as it is read."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from activation_store.buffers import Buffers
from activation_store.gathering import gather
from activation_store.mixing import Epoch
from activation_store.selection import Selection, cut

_CHUNKS = 16
"""Pieces at most that a pool is read in by threads, each by one."""
_CHUNK_TOKENS = 256
"""Tokens that a piece has at least, if there are as many."""


class Filled:
    """The vectors of one pool as they are stored, read in chunks, and the order they are given in.

    They are put in order batch by batch: a batch fits in the processor's cache and a pool does not,
    so rows are read at random places and not written there.
    """

    def __init__(
        self,
        selection: Selection,
        epoch: Epoch,
        number: int,
        buffers: Buffers,
        threads: ThreadPoolExecutor | None,
    ) -> None:
        self._selection, self._threads = selection, threads
        self._spans = epoch.spans(number)
        sizes = self._spans[:, 1] - self._spans[:, 0]
        self._begins = np.cumsum(sizes) - sizes
        self.start = int(epoch.starts[number])
        """Tokens of the epoch before this pool."""
        self.stop = int(epoch.starts[number + 1])
        """Tokens of the epoch up to the end of this pool."""
        self._vectors = buffers.take(self.stop - self.start)
        self._jobs: list[Future[None]] = []
        most = 1 if threads is None else _CHUNKS
        self._n_chunks = max(1, min(most, (self.stop - self.start) // _CHUNK_TOKENS))
        self._n_begun = 0
        self._order = Future[np.ndarray]()
        self._begin(partial(self._sort, epoch, number))

    def begin(self, share: float) -> None:
        """Have at least this share of the pool read, or being read by a thread."""
        n, parts = self.stop - self.start, self._n_chunks
        while self._n_begun < min(1.0, share) * parts:
            first, stop = n * self._n_begun // parts, n * (self._n_begun + 1) // parts
            self._n_begun += 1
            self._begin(partial(self._read, first, stop))

    def _begin(self, job: Callable[[], None]) -> None:
        if self._threads is None:
            job()
        else:
            self._jobs.append(self._threads.submit(job))

    def _sort(self, epoch: Epoch, number: int) -> None:
        self._order.set_result(epoch.order(number))

    def _read(self, first: int, stop: int) -> None:
        parts, span = cut(np.array([[first, stop]]), self._begins)
        tokens = parts + (self._spans[:, 0] - self._begins)[span, None]
        for source, runs, into in zip(
            self._selection.sources, self._selection.runs, self._vectors, strict=True
        ):
            source.read(runs.rows(tokens), into[first:stop])

    def give(self, source: int, part: slice, out: np.ndarray) -> None:
        """Put a part of one source in `out` in the order it is given, after waiting for it.

        Jobs begin in the order they are given, so a job that waits here waits for none behind it.

        Raises:
            ShardError: a file of the store is gone or changed.
        """
        for job in self._jobs:
            job.result()
        gather(self._vectors[source], self._order.result()[part], out)


class Part(NamedTuple):
    """Tokens of a batch that come from one pool."""

    pool: Filled
    start: int
    """The first of them, counted within the pool."""
    stop: int

    def give(self, source: int, out: np.ndarray) -> None:
        """Put their vectors of one source in `out` [stop - start, d]."""
        self.pool.give(source, slice(self.start, self.stop), out)


class Pools:
    """The pools of one epoch: the present one and, with threads, the one that is read ahead."""

    def __init__(
        self,
        selection: Selection,
        epoch: Epoch,
        buffers: Buffers,
        threads: ThreadPoolExecutor | None,
        late: int,
    ) -> None:
        """Read nothing yet.

        Args:
            selection: what is read.
            epoch: in which order.
            buffers: memory for pools.
            threads: read ahead, if there are any.
            late: tokens of a pool that are given before the next one is begun.
        """
        self._selection, self._epoch = selection, epoch
        self._buffers, self._threads, self._late = buffers, threads, late
        self._held: dict[int, Filled] = {}
        self._n_expected = 0

    def _pool(self, number: int) -> Filled:
        if number not in self._held:
            while self._n_expected < min(number + 2, self._epoch.n_pools):
                self._expect(max(number, self._n_expected))
            self._held[number] = Filled(
                self._selection, self._epoch, number, self._buffers, self._threads
            )
        return self._held[number]

    def _expect(self, number: int) -> None:
        """Have the system read a pool in whatever order suits the disk, before it is asked for."""
        self._n_expected = number + 1
        places = self._epoch.spans(number)
        for source, runs in zip(self._selection.sources, self._selection.runs, strict=True):
            source.expect(runs.rows(places))

    def parts(self, start: int, stop: int) -> list[Part]:
        """Return where tokens start to stop of the epoch are, and have them read.

        Reads as large a share of the next pool ahead as has been taken of the present one, but
        begins late enough that the memory of the pool before can be used for it.
        """
        starts = self._epoch.starts
        first = int(np.searchsorted(starts, start, "right")) - 1
        end = int(np.searchsorted(starts, stop, "left"))
        found: list[Part] = []
        for number in range(first, end):
            pool = self._pool(number)
            pool.begin(1.0)
            found.append(Part(pool, max(start - pool.start, 0), min(stop, pool.stop) - pool.start))
        if self._threads is not None and end < self._epoch.n_pools:
            size = found[-1].pool.stop - found[-1].pool.start
            late = min(self._late, size // 2)
            if found[-1].stop > late:
                self._pool(end).begin((found[-1].stop - late) / (size - late))
        self._held = {i: pool for i, pool in self._held.items() if pool.stop > stop}
        return found
