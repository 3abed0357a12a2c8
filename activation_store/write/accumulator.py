"""One hook while it is captured as rows: what its tokens added up to, and entries to be written."""

from collections.abc import Sequence
from concurrent.futures import Executor, Future, wait

import numpy as np
from jaxtyping import Float32

from activation_store.errors import ContentError
from activation_store.hooks import LARGEST, Rows
from activation_store.shards.encoding import Part
from activation_store.shards.names import BLOCK_ACTS
from activation_store.write import state
from activation_store.write.exemplars import QUANTILE_BINS, new_draw, new_top
from activation_store.write.kernel import Entries, Seen, Tiles, scan, top_p_cuts
from activation_store.write.ranks import Held
from activation_store.write.sketch import new_sketch
from activation_store.write.statistics import new_moments
from activation_store.write.strips import STRIP
from activation_store.write.summary import RowsTotal

GROUP_TOKENS = 1024
"""Tokens after which a capture looks whether a block or a commit is due; whole sequences."""
MAX_TILES = 8192
"""Tiles after which a block ends, however few entries they hold."""

_RANDOM, _FIRING = 1, 2


def new_seen(rows: Rows, seed: int) -> Seen:
    """Return the state of a hook before its first token."""
    units = rows.kept
    n = len(units)
    return Seen(
        new_moments(n),
        new_sketch(n),
        new_top(n, rows.top_k),
        new_draw(units, rows.random_k, seed, _RANDOM),
        new_draw(units, rows.quantile_k * QUANTILE_BINS, seed, _FIRING),
        np.zeros((n, 3), np.int64),
    )


class Accumulator:
    """Takes blocks of activations of one hook; hands out entries to be written as a shard.

    Memory is bounded: entries live in two sets of buffers, one that is filled and one that is
    written, and taking one waits until the other is free.
    """

    def __init__(self, rows: Rows, seed: int, pool: Executor, parts: int) -> None:
        self.rows = rows
        self.seen = new_seen(rows, seed)
        self.n_tokens = 0
        self.n_acts = 0
        self._pool = pool
        self._seed = seed
        self._bounds = _split(len(rows.kept), parts)
        self._sets: list[list[Entries]] = []
        self._busy: list[Future[None] | None] = [None, None]
        self._filling = 0
        self._n_buffered_tokens = 0

    def add(self, x: Float32[np.ndarray, "tokens d"], tiles: Tiles) -> None:
        """Take a block of at most `GROUP_TOKENS` tokens, or one longer sequence."""
        rows = self.rows
        if rows.units is not None:
            x = np.ascontiguousarray(x[:, rows.kept])
        if rows.top_p is not None:
            tiles = tiles._replace(cut=top_p_cuts(x, rows.cutoff, rows.top_p))
        largest = np.float32(LARGEST[rows.dtype])
        sets = self._entries(len(x))
        jobs = [
            self._pool.submit(scan, x, tiles, first, last, rows.cutoff, largest, self.seen, entries)
            for (first, last), entries in zip(self._bounds, sets, strict=True)
        ]
        wait(jobs)
        for job in jobs:
            job.result()
        self.n_tokens += int(tiles.length.sum())
        self._n_buffered_tokens += int(tiles.length.sum())

    def _entries(self, n_tokens: int) -> list[Entries]:
        """Return the buffers being filled, with room for `n_tokens` tokens whatever fires."""
        if len(self._sets) <= self._filling:
            group = max(n_tokens, GROUP_TOKENS)
            self._sets.append([_new_entries(last - first, group) for first, last in self._bounds])
        return self._sets[self._filling]

    @property
    def n_buffered(self) -> int:
        """Entries not yet handed out."""
        if len(self._sets) <= self._filling:
            return 0
        return sum(int(entries.used[0]) for entries in self._sets[self._filling])

    @property
    def n_tiles(self) -> int:
        """Tiles not yet handed out."""
        if len(self._sets) <= self._filling:
            return 0
        return int(self._sets[self._filling][0].used[1])

    def take(self) -> list[Part]:
        """Return the entries so far; they stay untouched until the job given to `busy` is done.

        Raises:
            ContentError: the hook is denser than its settings allow; nothing of it was written.
        """
        self._check_density()
        self.n_acts += self.n_buffered
        self._n_buffered_tokens = 0
        units, sets = self.rows.kept, self._entries(0)
        return [
            Part(units[first:last], entries)
            for (first, last), entries in zip(self._bounds, sets, strict=True)
        ]

    def busy(self, job: "Future[None] | None") -> None:
        """Go on with the other buffers once they are free; the ones taken are in use by `job`."""
        self._busy[self._filling] = job
        self._filling = 1 - self._filling
        other = self._busy[self._filling]
        if other is not None:
            wait([other])
        if len(self._sets) > self._filling:
            for entries in self._sets[self._filling]:
                entries.used[:] = 0

    def _check_density(self) -> None:
        """Refuse a dense hook when it would first be written."""
        rows = self.rows
        n_values = self._n_buffered_tokens * len(rows.kept)
        if self.n_acts or not n_values:
            return
        density = self.n_buffered / n_values
        if density > rows.max_density:
            per_million = density * len(rows.kept) * 6e6 / 1e9
            raise ContentError(
                f"{rows.hook}: density {density:.3f} above threshold {rows.threshold:g} over "
                f"{self._n_buffered_tokens} tokens, want at most max_density={rows.max_density:g}: "
                f"as rows it would take about {per_million:.1f} GB per million tokens. Raise the "
                "threshold, keep a share of each token's sum with top_p, raise max_density to "
                "store it anyway, or capture it as vectors."
            )

    def dump(self) -> dict[str, np.ndarray]:
        """Return what must be remembered after a commit, when no entries are left."""
        assert self.n_buffered == 0
        name = f"rows {self.rows.hook}"
        counts = np.array([self.n_tokens, self.n_acts])
        held = state.seen_to_arrays(self.seen) | {"counts": counts}
        return {f"{name}:{part}": array for part, array in held.items()}

    def restore(self, held: Held) -> None:
        """Take up what `dump` gave."""
        self.n_tokens, self.n_acts = self._load(held, self.seen)

    def _load(self, held: Held, into: Seen) -> tuple[int, int]:
        name = f"rows {self.rows.hook}:"
        ours = {key[len(name) :]: held[key] for key in held if key.startswith(name)}
        state.arrays_to_seen(ours, into)
        n_tokens, n_acts = ours["counts"].tolist()
        return n_tokens, n_acts

    def total(self, others: Sequence[Held | None]) -> RowsTotal:
        """Return what all ranks have seen together; `others` has None in this rank's place."""
        if not any(others):
            return RowsTotal(self.rows, self.seen, self.n_tokens, self.n_acts)
        total = new_seen(self.rows, self._seed)
        n_tokens, n_acts = self.n_tokens, self.n_acts
        for held in others:
            seen = self.seen
            if held is not None:
                seen = new_seen(self.rows, self._seed)
                counts = self._load(held, seen)
                n_tokens, n_acts = n_tokens + counts[0], n_acts + counts[1]
            state.merge_seen(total, seen)
        return RowsTotal(self.rows, total, n_tokens, n_acts)


def _split(n_units: int, parts: int) -> list[tuple[int, int]]:
    """Cut the units into ranges of whole strips, about equal."""
    strips = -(-n_units // STRIP)
    parts = max(1, min(parts, strips))
    ends = [min(n_units, STRIP * (strips * i // parts)) for i in range(parts + 1)]
    return list(zip(ends[:-1], [*ends[1:-1], n_units], strict=True))


def _new_entries(n_units: int, group: int) -> Entries:
    # address space only: the system gives memory to the pages that are written
    room = BLOCK_ACTS + group * n_units
    tiles = MAX_TILES + group
    return Entries(
        np.empty(room, np.uint16),
        np.empty(room, np.float32),
        np.empty((tiles, n_units), np.uint8),
        np.empty(tiles, np.int32),
        np.empty((tiles, -(-n_units // STRIP)), np.int64),
        np.zeros(2, np.int64),
    )


def is_block(hooks: Sequence[Accumulator]) -> bool:
    """Tell whether the hooks hold a block, the entries that are sorted and written together."""
    return bool(hooks) and (
        sum(hook.n_buffered for hook in hooks) >= BLOCK_ACTS or hooks[0].n_tiles >= MAX_TILES
    )
