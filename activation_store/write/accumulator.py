"""Hooks while they are captured: what their tokens add up to, and what is to be written of them.

A batch is first brought into the form that the kernel takes: float32 blocks and the tiles in them.
An `Accumulator` takes the blocks of one hook that is kept as rows, a `VectorLog` those of all hooks
that are kept whole.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float32, Int32

from activation_store.errors import ContentError
from activation_store.hooks import LARGEST, NOTHING, Rows, Skip, Vectors
from activation_store.shards.names import BLOCK_ACTS
from activation_store.write.exemplars import QUANTILE_BINS, TOP_SPARE, new_sample, new_top
from activation_store.write.kernel import STRIP, TILE, Entries, Seen, Tiles, scan, top_p_cuts
from activation_store.write.moments import new_moments, new_sketch
from activation_store.write.state import RankState, arrays_to_seen, merge_seen, seen_to_arrays
from activation_store.write.summary import RowsTotal, VectorsTotal

# Tokens after which a capture looks whether a block or a commit is due; whole sequences. The places
# are fixed in the stream, so that files do not depend on how sequences come in batches.
GROUP_TOKENS = 1024
MAX_TILES = 8192
"""Tiles after which a block ends, however few entries they hold: their tables take memory too."""
SHARD_BYTES = 2**26
"""Bytes of the widest hook's vectors after which a shard of vectors is written."""

_RANDOM, _FIRING = 1, 2  # purposes that keep the two samples of a unit independent

Tensor: TypeAlias = Any
"""A numpy array or a torch tensor on any device; torch is never imported for its sake."""


def as_block(hook: str, tensor: Tensor, shape: tuple[int, int, int]) -> Float32[np.ndarray, "..."]:
    """Return activations [batch, n_ctx, d] as C-contiguous float32 in memory; copies if it must.

    Raises:
        ContentError: another shape, or not floating point.
    """
    if tuple(tensor.shape) != shape:
        raise ContentError(
            f"{hook}: activations of shape {list(tensor.shape)}, want [batch, n_ctx, d] = "
            f"{list(shape)}; check the hook's d and the writer's n_ctx."
        )
    if isinstance(tensor, np.ndarray):
        array = tensor
    else:
        moved = tensor.detach().cpu()
        # numpy knows no bfloat16
        array = (moved if moved.dtype.itemsize > 2 else moved.float()).numpy()
    if array.dtype.kind != "f":
        raise ContentError(f"{hook}: activations of type {array.dtype}, want floating point.")
    return np.ascontiguousarray(array, dtype=np.float32)


def as_tokens(name: str, values: Tensor, shape: tuple[int, ...]) -> Int32[np.ndarray, "..."]:
    """Return ids as int32.

    Raises:
        ContentError: another shape, not whole numbers, or a number beyond int32.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.shape != shape or array.dtype.kind not in "iu":
        raise ContentError(
            f"{name}: {array.dtype} of shape {list(array.shape)}, want whole numbers of shape "
            f"{list(shape)}."
        )
    if array.size and (array.max() > 2**31 - 1 or array.min() < -(2**31)):
        raise ContentError(f"{name}: {array.max()} does not fit in 32 bits.")
    return np.ascontiguousarray(array, dtype=np.int32)


def tiles_of(
    seq: Int32[np.ndarray, " batch"],
    doc: Int32[np.ndarray, "batch n_ctx"],
    token: Int32[np.ndarray, "batch n_ctx"],
    keep: Bool[np.ndarray, "batch n_ctx"] | None = None,
) -> Tiles:
    """Return the tiles of a block: runs of tokens that are neither padding nor left out.

    A negative doc_id marks padding; `keep` is false where a token is left out.

    Raises:
        ContentError: padding between tokens of one sequence.
    """
    real = doc >= 0
    is_split = _begins(real).sum(axis=1) > 1
    if is_split.any():
        raise ContentError(
            f"sequence {seq[is_split][0]}: padding (doc_id < 0) between tokens; want it at the "
            "ends only."
        )
    kept = real if keep is None else real & keep
    # a run also ends at the grid of tiles, which is fixed within the sequence
    on_grid = np.arange(doc.shape[1]) % TILE == 0
    row, pos = np.nonzero(_begins(kept) | (kept & on_grid))
    _, last = np.nonzero(_ends(kept) | (kept & np.roll(on_grid, -1)))
    # nonzero returns columns of one array, contiguous only where there is one tile: the kernels
    # would be compiled for both layouts of memory, half a minute each
    pos = np.ascontiguousarray(pos)
    n_ctx = doc.shape[1]
    no_cut = np.empty(0, np.float32)
    flat = doc.reshape(-1), token.reshape(-1), np.zeros(doc.size, np.uint64)
    return Tiles(row * n_ctx + pos, last + 1 - pos, seq[row], pos, *flat, n_ctx, no_cut, no_cut)


def _begins(mask: np.ndarray) -> np.ndarray:
    """Return where runs of a mask [batch, n_ctx] begin."""
    begins = mask.copy()
    begins[:, 1:] &= ~mask[:, :-1]
    return begins


def _ends(mask: np.ndarray) -> np.ndarray:
    """Return where runs of a mask [batch, n_ctx] end."""
    return _begins(mask[:, ::-1])[:, ::-1]


class UnitEntries(NamedTuple):
    """Entries of a range of a hook's units."""

    units: np.ndarray
    entries: Entries


def new_seen(rows: Rows, seed: int) -> Seen:
    """Return the state of a hook before its first token."""
    units = rows.kept
    n = len(units)
    return Seen(
        new_moments(n),
        new_sketch(n),
        new_top(n, rows.top_k * TOP_SPARE),
        new_sample(units, rows.random_k, seed, _RANDOM),
        new_sample(units, rows.quantile_k * QUANTILE_BINS, seed, _FIRING),
        np.zeros((n, 3), np.int64),
    )


class Accumulator:
    """Takes blocks of activations of one hook; hands out entries to be written as a shard.

    Memory is bounded: entries live in two sets of buffers, one that is filled and one that is
    written, and taking one waits until the other is free.
    """

    def __init__(
        self, rows: Rows, seed: int, pool: Executor, n_parts: int, skip: Skip = NOTHING
    ) -> None:
        self.rows = rows
        self.skip = skip
        self.seen = new_seen(rows, seed)
        self.n_tokens = 0
        self.n_acts = 0
        self._pool = pool
        self._seed = seed
        self._floor = np.array(() if rows.cuts is None else rows.cuts, np.float32)
        self._bounds = _unit_ranges(len(rows.kept), n_parts)
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
        tiles = tiles._replace(floor=self._floor)
        largest = np.float32(LARGEST[rows.dtype])
        sets = self._entries(len(x))
        jobs = [
            self._pool.submit(scan, x, tiles, first, last, rows.cutoff, largest, self.seen, entries)
            for (first, last), entries in zip(self._bounds, sets, strict=True)
        ]
        wait(jobs)  # all of them, also where one fails: they work on the caller's arrays
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

    def take(self) -> list[UnitEntries]:
        """Return the entries so far; they stay untouched until the job given to `busy` is done.

        Raises:
            ContentError: the hook is denser than its settings allow; nothing of it was written.
        """
        self._check_density()
        self.n_acts += self.n_buffered
        self._n_buffered_tokens = 0
        units, sets = self.rows.kept, self._entries(0)
        return [
            UnitEntries(units[first:last], entries)
            for (first, last), entries in zip(self._bounds, sets, strict=True)
        ]

    def busy(self, job: "Future[None] | None") -> None:
        """Switch to the other buffers once they are free; the ones taken are in use by `job`."""
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
            # 6 bytes per stored act: 5.5 as measured in docs/results/store.md, rounded up
            per_million = density * len(rows.kept) * 6e6 / 1e9
            raise ContentError(
                f"{rows.hook}: density {density:.3f} above threshold {rows.threshold:g} over "
                f"{self._n_buffered_tokens} tokens, want at most max_density={rows.max_density:g}: "
                f"as rows it would take about {per_million:.1f} GB per million tokens. Raise the "
                "threshold, keep each unit's strongest activations (cuts; acts_per_token of "
                "lmmono) or a share of each token's sum (top_p), raise max_density to store it "
                "anyway, or capture it as vectors."
            )

    def dump(self) -> dict[str, np.ndarray]:
        """Return what must be remembered after a commit, when no entries are left."""
        assert self.n_buffered == 0
        counts = np.array([self.n_tokens, self.n_acts])
        arrays = seen_to_arrays(self.seen) | {"counts": counts}
        return {f"rows {self.rows.hook}:{name}": array for name, array in arrays.items()}

    def restore(self, state: RankState) -> None:
        """Take up what `dump` gave."""
        self.n_tokens, self.n_acts = load_rows(state, self.rows.hook, self.seen)

    def total(self, others: Sequence[RankState | None]) -> RowsTotal:
        """Return what all ranks have seen together; `others` has None in this rank's place."""
        if not any(others):
            return RowsTotal(self.rows, self.seen, self.n_tokens, self.n_acts, self.skip)
        total = new_seen(self.rows, self._seed)
        n_tokens, n_acts = self.n_tokens, self.n_acts
        for state in others:
            seen = self.seen
            if state is not None:
                seen = new_seen(self.rows, self._seed)
                counts = load_rows(state, self.rows.hook, seen)
                n_tokens, n_acts = n_tokens + counts[0], n_acts + counts[1]
            merge_seen(total, seen)
        return RowsTotal(self.rows, total, n_tokens, n_acts, self.skip)


def load_rows(state: RankState, hook: str, into: Seen) -> tuple[int, int]:
    """Put what `Accumulator.dump` gave into a fresh state; return its tokens and stored acts."""
    prefix = f"rows {hook}:"
    arrays = {key[len(prefix) :]: state[key] for key in state if key.startswith(prefix)}
    arrays_to_seen(arrays, into)
    n_tokens, n_acts = arrays["counts"].tolist()
    return n_tokens, n_acts


def is_block(hooks: Sequence[Accumulator]) -> bool:
    """Tell whether the hooks hold a block, the entries that are sorted and written together."""
    return bool(hooks) and (
        sum(hook.n_buffered for hook in hooks) >= BLOCK_ACTS or hooks[0].n_tiles >= MAX_TILES
    )


def _unit_ranges(n_units: int, n_parts: int) -> list[tuple[int, int]]:
    """Cut the units into ranges of whole strips, about equal."""
    strips = -(-n_units // STRIP)
    n_parts = max(1, min(n_parts, strips))
    ends = [min(n_units, STRIP * (strips * i // n_parts)) for i in range(n_parts + 1)]
    return list(zip(ends[:-1], [*ends[1:-1], n_units], strict=True))


def _new_entries(n_units: int, group: int) -> Entries:
    # address space only: the operating system gives memory to the pages that are written
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


class VectorBlock(NamedTuple):
    """Vectors of all hooks for the same tokens."""

    seq: Int32[np.ndarray, " n"]
    pos: Int32[np.ndarray, " n"]
    vectors: dict[str, np.ndarray]


class VectorLog:
    """Hooks that are kept whole: vectors not yet written, and what was seen of each hook.

    The rows of all vector hooks are aligned: a token whose vector is not finite (or beyond the
    range of the stored type) at one hook is left out at every hook, and counted at the one.
    """

    def __init__(self, hooks: Sequence[Vectors], skip: Skip = NOTHING) -> None:
        self.hooks, self.skip = tuple(hooks), skip
        self.n_tokens = 0
        self.n_vectors = 0
        self.odd = np.zeros((len(hooks), 3), np.int64)
        """NaN, infinite and overflowing activations per hook."""
        self._waiting: list[VectorBlock] = []
        self._n_bytes = 0

    def add(
        self,
        seq: Int32[np.ndarray, " batch"],
        real: Bool[np.ndarray, "batch n_ctx"],
        blocks: Mapping[str, Float32[np.ndarray, "batch n_ctx d"]],
    ) -> None:
        """Take a batch, of which the tokens in `real` count; the values are copied."""
        if not self.hooks:
            return
        keep = real
        self.n_tokens += int(keep.sum())
        rounded: dict[str, np.ndarray] = {}
        for i, hook in enumerate(self.hooks):
            with np.errstate(over="ignore"):
                rounded[hook.hook] = blocks[hook.hook].astype(hook.dtype)
            if not np.isfinite(rounded[hook.hook]).all():
                keep = keep & self._finite(i, blocks[hook.hook], real)
        row, pos = np.nonzero(keep)
        vectors = {
            name: x.reshape(-1, x.shape[-1]) if keep.all() else x[keep]
            for name, x in rounded.items()
        }
        self._waiting.append(VectorBlock(seq[row], pos.astype(np.int32), vectors))
        self.n_vectors += len(row)
        self._n_bytes += max(x.nbytes for x in vectors.values())

    def _finite(self, i: int, x: np.ndarray, real: np.ndarray) -> Bool[np.ndarray, "batch n_ctx"]:
        """Count what cannot be stored of hook i and return which tokens can."""
        values = x[real]
        too_large = np.isfinite(values) & (np.abs(values) > LARGEST[self.hooks[i].dtype])
        self.odd[i] += [np.isnan(values).sum(), np.isinf(values).sum(), too_large.sum()]
        return np.asarray((np.abs(x) <= LARGEST[self.hooks[i].dtype]).all(axis=-1))

    @property
    def is_full(self) -> bool:
        """Whether a shard should be written."""
        return self._n_bytes >= SHARD_BYTES

    def take(self) -> VectorBlock | None:
        """Return what waits, in the order it came."""
        waiting = self._waiting
        self._waiting, self._n_bytes = [], 0
        if not any(len(block.seq) for block in waiting):
            return None
        return VectorBlock(
            np.concatenate([block.seq for block in waiting]),
            np.concatenate([block.pos for block in waiting]),
            {
                hook.hook: np.concatenate([block.vectors[hook.hook] for block in waiting])
                for hook in self.hooks
            },
        )

    def dump(self) -> dict[str, np.ndarray]:
        """Return what must be remembered after a commit."""
        return {
            "vectors.odd": self.odd,
            "vectors.counts": np.array([self.n_tokens, self.n_vectors]),
        }

    def restore(self, state: RankState) -> None:
        """Take up what `dump` gave."""
        self.odd[:] = state["vectors.odd"]
        self.n_tokens, self.n_vectors = state["vectors.counts"].tolist()

    def totals(self, others: Sequence[RankState | None]) -> list[VectorsTotal]:
        """Return what all ranks have seen together, per hook."""
        states = [self.dump(), *(state for state in others if state is not None)]
        odd = np.sum([state["vectors.odd"] for state in states], axis=0)
        n_tokens, n_vectors = np.sum([state["vectors.counts"] for state in states], axis=0).tolist()
        return [
            VectorsTotal(hook, n_tokens, n_vectors, odd[i], self.skip)
            for i, hook in enumerate(self.hooks)
        ]
