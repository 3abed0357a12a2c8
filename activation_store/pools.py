"""The vectors that are mixed with each other, in memory: one pool, and the next as it is read."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from activation_store.buffers import Buffers
from activation_store.mixing import Epoch
from activation_store.scattering import scatter
from activation_store.selection import Selection, Source

_SCRATCH = threading.local()
_CHUNKS = 32
"""Pieces at most that a pool is read in, each by one thread."""
_CHUNK_TOKENS = 256
"""Tokens that a piece has at least, if there are as many."""


class Filled:
    """The vectors of one pool in the order they are given, read in chunks.

    A chunk is put in order as soon as it is read, while it is still in the processor's cache.
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
        self._tokens, order = epoch.pool(number)
        self._places = np.arange(len(self._tokens))
        if order is not None:
            self._places[order] = np.arange(len(order))
        self.start = int(epoch.starts[number])
        """Tokens of the epoch before this pool."""
        self.stop = int(epoch.starts[number + 1])
        """Tokens of the epoch up to the end of this pool."""
        self._vectors = buffers.take(len(self._tokens))
        self._jobs: list[Future[None]] = []
        self._n_chunks = max(1, min(_CHUNKS, len(self._tokens) // _CHUNK_TOKENS))
        self._n_begun = 0

    def begin(self, share: float) -> None:
        """Have at least this share of the pool read, or being read by a thread."""
        n, parts = len(self._tokens), self._n_chunks
        while self._n_begun < min(1.0, share) * parts:
            part = slice(n * self._n_begun // parts, n * (self._n_begun + 1) // parts)
            self._n_begun += 1
            if self._threads is None:
                self._read(part)
            else:
                self._jobs.append(self._threads.submit(self._read, part))

    def _read(self, part: slice) -> None:
        tokens, places = self._tokens[part], self._places[part]
        for source, runs, into in zip(
            self._selection.sources, self._selection.runs, self._vectors, strict=True
        ):
            found = self._scratch(len(tokens), source)
            source.read(runs.rows(tokens), found)
            scatter(found, places, into)

    def _scratch(self, n: int, source: Source) -> np.ndarray:
        """Return room for n vectors as stored; every thread has its own."""
        n_bytes = n * source.d * source.dtype.itemsize
        held: np.ndarray | None = getattr(_SCRATCH, "held", None)
        if held is None or held.nbytes < n_bytes:
            held = _SCRATCH.held = np.empty(n_bytes, np.uint8)
        return held[:n_bytes].view(source.dtype).reshape(n, source.d)

    def vectors(self, source: int) -> np.ndarray:
        """Return what was read of one source, after waiting for it.

        Jobs begin in the order they are given, so a job that waits here waits for none behind it.

        Raises:
            ShardError: a file of the store is gone or changed.
        """
        for job in self._jobs:
            job.result()
        return self._vectors[source]


class Part(NamedTuple):
    """Tokens of a batch that come from one pool."""

    pool: Filled
    start: int
    """The first of them, counted within the pool."""
    stop: int

    def vectors(self, source: int) -> np.ndarray:
        """Return their vectors of one source, as a view."""
        return self.pool.vectors(source)[self.start : self.stop]


class Pools:
    """The pools of one epoch: the present one and, with threads, the one that is read ahead."""

    def __init__(
        self,
        selection: Selection,
        epoch: Epoch,
        buffers: Buffers,
        threads: ThreadPoolExecutor | None,
    ) -> None:
        self._selection, self._epoch = selection, epoch
        self._buffers, self._threads = buffers, threads
        self._held: dict[int, Filled] = {}

    def _pool(self, number: int) -> Filled:
        if number not in self._held:
            self._held[number] = Filled(
                self._selection, self._epoch, number, self._buffers, self._threads
            )
        return self._held[number]

    def parts(self, start: int, stop: int) -> list[Part]:
        """Return where tokens start to stop of the epoch are, and have them read.

        Reads as large a share of the next pool ahead as has been taken of the present one.
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
            share = found[-1].stop / (found[-1].pool.stop - found[-1].pool.start)
            self._pool(end).begin(share)
        self._held = {i: pool for i, pool in self._held.items() if pool.stop > stop}
        return found
