"""Vectors for training: shuffled batches that are the same on every run and can be resumed.

Each token comes once per epoch. The order depends on the seed and the settings, not on the number
of threads; a cursor says how far a reader has come, and a stream that begins there gives the same
bits as one that was never stopped. See `selection.py` for how tokens are mixed.
"""

import copy
import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from activation_store.errors import ContentError
from activation_store.hooks import LARGEST, Dtype
from activation_store.read.gather import Buffers, gather
from activation_store.read.queried import Queried
from activation_store.read.selection import EpochOrder, Mixing, Selection, select
from activation_store.shards.pages import Placed

Array: TypeAlias = Any
"""A numpy array or, with framework="torch", a torch tensor: [n, d]."""

Cursor: TypeAlias = dict[str, Any]
"""A place in a stream, as JSON values: the settings that decide the order, epoch and token."""

BLOCK_BYTES = 2**18
"""Bytes of the widest hook's vectors that are read together."""

BUFFER_BYTES = 2**27
"""Bytes of all hooks' vectors, as given, that are mixed together unless asked otherwise."""

PLAIN_BYTES = 2**24
"""Bytes of all hooks' vectors, as given, that are read at once where nothing is mixed."""

Planned: TypeAlias = "tuple[tuple[int, int], partial[Array | dict[str, Array]]]"
"""The place after a batch, epoch and token, and the job that makes the batch."""


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """What a stream gives, in which order, and how it is read."""

    batch_tokens: int = 4096
    """Rows per batch; the last batch of an epoch holds what is left."""
    seed: int = 0
    """Seed of the order."""
    split: str | None = None
    """Read only tokens of this split."""
    where: str | None = None
    """SQL condition on table `documents`; reads only tokens of those documents."""
    epochs: int | None = 1
    """How often each token comes; None never ends."""
    prefetch: int = 0
    """Threads that read ahead; 0 reads when a batch is asked for."""
    dtype: Dtype = "float32"
    """Type of the batches."""
    framework: Literal["numpy", "torch"] = "numpy"
    """Whether batches are numpy arrays or torch tensors."""
    shuffle: bool = True
    """False gives the tokens in the order they were captured."""
    buffer_tokens: int | None = None
    """Tokens that are mixed together; by default 128 MiB of vectors."""
    checked: bool = False
    """Compare the bytes of each page with its checksum before it is first used; without it a
    damaged file is found by `Store.verify` only."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be.

        Raises:
            ContentError: a setting is out of its range; names it.
        """
        for name, value, least in (
            ("batch_tokens", self.batch_tokens, 1),
            ("seed", self.seed, 0),
            ("epochs", 1 if self.epochs is None else self.epochs, 1),
            ("prefetch", self.prefetch, 0),
            ("buffer_tokens", 1 if self.buffer_tokens is None else self.buffer_tokens, 1),
        ):
            if value < least:
                raise ContentError(f"{name}: want an integer >= {least}, got {value}.")
        if self.framework not in ("numpy", "torch"):
            raise ContentError(f"framework: want 'numpy' or 'torch', got {self.framework!r}.")


class VectorStream:
    """Batches of vectors; made by `Store.vectors`.

    Every `for` loop begins at the cursor that the stream was made with. `cursor` is the place after
    the batch that was yielded last.

    Memory: some batches; vectors are used where the operating system caches the files, which are
    mapped and must not be truncated meanwhile. A batch is an array that nothing else uses while you
    hold it: keep it or change it as you like.
    """

    def __init__(
        self,
        store: Queried,
        folder: Path,
        hooks: str | Sequence[str],
        *,
        cursor: Cursor | str | None = None,
        **settings: Any,
    ) -> None:
        """Look up what is to be read; no vector is read before the first batch is asked for.

        Args:
            store: an open store; it may be closed once the stream is made.
            folder: where its shards of vectors lie.
            hooks: one hook for batches that are arrays; a list of hooks for batches that are dicts
                of arrays whose rows belong to the same tokens.
            cursor: where to begin, as `cursor` gave it, or its JSON text.
            settings: of `StreamSettings`.

        Raises:
            ContentError: a hook without vectors, a setting out of its range, nothing to read, or a
                cursor of another store or other settings.
            QueryError: `where` is no condition on table `documents`.
        """
        self.hooks = (hooks,) if isinstance(hooks, str) else tuple(hooks)
        self._single = isinstance(hooks, str)
        if not self.hooks or len(set(self.hooks)) < len(self.hooks):
            raise ContentError(f"hooks: want one or several different hooks, got {hooks!r}.")
        self.settings = chosen = StreamSettings(**settings)
        self._selection = select(
            store, folder, self.hooks, chosen.split, chosen.where, checked=chosen.checked
        )
        self._check_settings()
        self._mixing = self._mixed()
        self._order = self._described(store)
        self._begin = self._place(cursor)
        self._now = self._begin

    @property
    def batch_tokens(self) -> int:
        """Rows per batch."""
        return self.settings.batch_tokens

    @property
    def n_tokens(self) -> int:
        """Rows that one epoch gives."""
        return self._selection.n_tokens

    @property
    def n_batches(self) -> int:
        """Batches that one epoch gives."""
        return -(-self.n_tokens // self.batch_tokens)

    @property
    def widths(self) -> dict[str, int]:
        """Width of each hook's vectors."""
        return {source.hook: source.d for source in self._selection.sources}

    @property
    def d(self) -> int:
        """Width of the vectors of the one hook.

        Raises:
            ContentError: the stream has several hooks.
        """
        if len(self.hooks) > 1:
            raise ContentError(f"d: the stream has {len(self.hooks)} hooks; see its `widths`.")
        return self._selection.sources[0].d

    @property
    def cursor(self) -> Cursor:
        """The place after the last batch yielded, to begin another stream at."""
        epoch, token = self._now
        return {**self._order, "epoch": epoch, "token": token}

    def again(
        self,
        cursor: Cursor | str | None = None,
        *,
        epochs: int | None,
        framework: Literal["numpy", "torch"],
    ) -> "VectorStream":
        """Return a stream of the same vectors in the same order that begins at another place.

        Raises:
            ContentError: the cursor is of another stream.
        """
        stream = copy.copy(self)
        stream.settings = replace(self.settings, epochs=epochs, framework=framework)
        stream._begin = stream._now = stream._place(cursor)
        return stream

    def __repr__(self) -> str:
        widths = ", ".join(f"{hook} [{d}]" for hook, d in self.widths.items())
        return (
            f"VectorStream({widths}: {self.n_tokens:,} tokens, {self.n_batches:,} batches per "
            f"epoch, at epoch {self._now[0]} token {self._now[1]:,})"
        )

    def __iter__(self) -> Iterator[Array | dict[str, Array]]:
        """Yield batches from the cursor on that the stream was made with.

        Yields:
            [n, d] of `dtype`; with a list of hooks a dict of them, row-aligned.

        Raises:
            ShardError: a file of the store is gone or changed.
        """
        self._now = self._begin
        with ThreadPoolExecutor(max(1, self.settings.prefetch)) as threads:
            try:
                for place, batch in _ahead(self._plan(threads), threads, self.settings.prefetch):
                    self._now = place
                    yield batch
            finally:
                threads.shutdown(wait=True, cancel_futures=True)

    def _plan(self, threads: ThreadPoolExecutor) -> Iterator[Planned]:
        """Yield, batch by batch, the place after it and the job that makes it."""
        number, begin = self._begin
        sources = self._selection.sources
        # those read ahead, the one that is worked on, and the one yielded before
        kept = self.settings.prefetch + 3
        batches = Buffers(self.batch_tokens, [(s.d, self.settings.dtype) for s in sources], kept)
        while self.settings.epochs is None or number < self.settings.epochs:
            epoch = self._mixing.epoch(number)
            pools = EpochPools(self._selection, epoch, threads if self.settings.prefetch else None)
            for start in range(begin, self.n_tokens, self.batch_tokens):
                stop = min(start + self.batch_tokens, self.n_tokens)
                is_last = stop == self.n_tokens
                place = (number + 1, 0) if is_last else (number, stop)
                parts, room = pools.parts(start, stop), batches.take(stop - start)
                yield place, partial(self._batch, parts, room)
            number, begin = number + 1, 0

    def _batch(
        self, parts: Sequence["PoolPart"], room: Sequence[np.ndarray]
    ) -> Array | dict[str, Array]:
        """Return the rows of the parts one after the other, in `room`: an array per hook."""
        batches: dict[str, Array] = {}
        for i, (hook, batch) in enumerate(zip(self.hooks, room, strict=True)):
            at = 0
            for part in parts:
                end = at + part.stop - part.start
                part.give(i, batch[at:end])
                at = end
            if self.settings.framework == "numpy":
                batches[hook] = batch
            else:
                import torch  # only for who asks for tensors

                batches[hook] = torch.from_numpy(batch)
        return batches[self.hooks[0]] if self._single else batches

    def _check_settings(self) -> None:
        n, dtype = self.n_tokens, self.settings.dtype
        if self.batch_tokens > n:
            raise ContentError(
                f"batch_tokens: {self.batch_tokens} rows of the {n} there are; want at most {n}."
            )
        for source in self._selection.sources:
            if dtype not in LARGEST or dtype not in ("float32", source.dtype):
                raise ContentError(
                    f"dtype: {source.hook} is stored as {source.dtype}; want 'float32', or "
                    f"'float16' where it is stored so; got {dtype!r}."
                )

    def _mixed(self) -> Mixing:
        settings, sources = self.settings, self._selection.sources
        n_bytes = sum(source.d for source in sources) * np.dtype(settings.dtype).itemsize
        pool = settings.buffer_tokens or max(1, BUFFER_BYTES // n_bytes)
        if not settings.shuffle:
            pool = min(pool, max(1, PLAIN_BYTES // n_bytes))
        # at least 16 blocks per pool: small buffers still mix tokens of different places
        widest = max(source.d * source.dtype.itemsize for source in sources)
        block = max(1, min(BLOCK_BYTES // widest, pool // 16))
        return Mixing(self.n_tokens, block, pool, settings.seed, settings.shuffle)

    def _described(self, store: Queried) -> Cursor:
        """Return what decides the order, which a cursor must agree with."""
        return {
            "data": _digest(store, self._selection),
            "hooks": list(self.hooks),
            "split": self.settings.split,
            "where": self.settings.where,
            "n_tokens": self.n_tokens,
            "batch_tokens": self.batch_tokens,
            "seed": self.settings.seed,
            "shuffle": self._mixing.shuffle,
            "block_tokens": self._mixing.block_tokens,
            "buffer_tokens": self._mixing.pool_tokens,
        }

    def _place(self, cursor: Cursor | str | None) -> tuple[int, int]:
        """Return epoch and token of a cursor.

        Raises:
            ContentError: it is none, or of another stream; says which settings differ.
        """
        if cursor is None:
            return (0, 0)
        place = _as_cursor(cursor)
        differences = [
            f"{name}: cursor {place.get(name)!r}, stream {value!r}"
            for name, value in self._order.items()
            if place.get(name) != value
        ]
        if differences:
            raise ContentError(
                f"this cursor is of another stream: {'; '.join(differences)}. Use the same store "
                "and settings, or begin without a cursor."
            )
        epoch, token = place.get("epoch"), place.get("token")
        if not (isinstance(epoch, int) and isinstance(token, int)):
            raise ContentError(f"cursor: want whole numbers epoch and token, got {cursor!r}.")
        if epoch < 0 or not 0 <= token < self.n_tokens or token % self.batch_tokens:
            raise ContentError(f"cursor: epoch {epoch}, token {token} is no end of a batch.")
        return epoch, token


def _ahead(
    plan: Iterator[Planned], threads: ThreadPoolExecutor, prefetch: int
) -> Iterator[tuple[tuple[int, int], Array | dict[str, Array]]]:
    """Yield the results of the plan in order, up to `prefetch` of them made ahead by threads."""
    if not prefetch:
        for place, job in plan:
            yield place, job()
        return
    waiting: deque[tuple[tuple[int, int], Future[Array | dict[str, Array]]]] = deque()
    for place, job in plan:
        waiting.append((place, threads.submit(job)))
        if len(waiting) > prefetch:
            place, batch = waiting.popleft()
            yield place, batch.result()
    while waiting:
        place, batch = waiting.popleft()
        yield place, batch.result()


def _digest(store: Queried, selection: Selection) -> str:
    """Return a short hash of which bytes the selection reads."""
    names = [file.path.name for source in selection.sources for file in source.files]
    checksums = store.sql(
        "SELECT file, checksum FROM vector_shards WHERE file IN (SELECT unnest($names::VARCHAR[]))"
        " ORDER BY file",
        names=names,
    ).fetchall()
    return hashlib.sha256(json.dumps(checksums).encode()).hexdigest()[:16]


def _as_cursor(cursor: Cursor | str) -> Cursor:
    """Return a cursor from its JSON text.

    Raises:
        ContentError: it is no JSON object.
    """
    try:
        place: object = json.loads(cursor) if isinstance(cursor, str) else cursor
    except ValueError as fault:
        raise ContentError(f"cursor: want a stream's `cursor`, got {cursor!r}: {fault}") from fault
    if not isinstance(place, dict):
        raise ContentError(f"cursor: want a stream's `cursor`, got {cursor!r}.")
    return dict(place)


class MappedPool:
    """The vectors of one pool, in the files as they are mapped, and the order they come in."""

    def __init__(
        self,
        selection: Selection,
        epoch: EpochOrder,
        number: int,
        threads: ThreadPoolExecutor | None,
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

    def _place(self, epoch: EpochOrder, number: int) -> list[Placed]:
        """Return where the vectors of each source are, in the order they come."""
        spans, order = epoch.spans(number), epoch.order(number)
        parts: list[Placed] = []
        for source, runs in zip(self._selection.sources, self._selection.runs, strict=True):
            address, memory = source.place(runs.rows(spans))
            parts.append(Placed(address[order], memory))
        return parts

    def give(self, source: int, part: slice, out: np.ndarray) -> None:
        """Put a part of one source in `out` in the order of the pool, after waiting for it.

        Jobs begin in the order they are submitted, so a job that waits here waits for none behind
        it: no deadlock, however few threads there are.

        Raises:
            ShardError: a file of the store is gone or changed.
        """
        placed = self._placed.result()[source]
        gather(placed.address[part], self._selection.sources[source].dtype, out)


class PoolPart(NamedTuple):
    """Tokens of a batch that come from one pool."""

    pool: MappedPool
    start: int
    """The first of them, counted within the pool."""
    stop: int

    def give(self, source: int, out: np.ndarray) -> None:
        """Put their vectors of one source in `out` [stop - start, d]."""
        self.pool.give(source, slice(self.start, self.stop), out)


class EpochPools:
    """The pools of one epoch: the present one and, with threads, the one that comes next."""

    def __init__(
        self, selection: Selection, epoch: EpochOrder, threads: ThreadPoolExecutor | None
    ) -> None:
        """Read nothing yet; `threads` read ahead, if there are any."""
        self._selection, self._epoch, self._threads = selection, epoch, threads
        self._pools: dict[int, MappedPool] = {}
        self._n_expected = 0

    def _pool(self, number: int) -> MappedPool:
        """Return a pool; at first have the operating system prefetch it and the next one.

        It then reads in whatever order suits the disk, before the vectors are asked for.
        """
        if number not in self._pools:
            end = min(number + 2, self._epoch.n_pools)
            for coming in range(max(number, self._n_expected), end):
                spans = self._epoch.spans(coming)
                for source, runs in zip(self._selection.sources, self._selection.runs, strict=True):
                    source.expect(runs.rows(spans))
            self._n_expected = max(self._n_expected, end)
            self._pools[number] = MappedPool(self._selection, self._epoch, number, self._threads)
        return self._pools[number]

    def parts(self, start: int, stop: int) -> list[PoolPart]:
        """Return where tokens start to stop of the epoch are, and have them brought to memory.

        The next pool is begun when half of the present one is taken.
        """
        starts = self._epoch.starts
        first = int(np.searchsorted(starts, start, "right")) - 1
        end = int(np.searchsorted(starts, stop, "left"))
        parts: list[PoolPart] = []
        for number in range(first, end):
            pool = self._pool(number)
            parts.append(
                PoolPart(pool, max(start - pool.start, 0), min(stop, pool.stop) - pool.start)
            )
        last = parts[-1].pool
        is_late = stop > (last.start + last.stop) // 2
        if self._threads is not None and is_late and end < self._epoch.n_pools:
            self._pool(end)
        self._pools = {i: pool for i, pool in self._pools.items() if pool.stop > stop}
        return parts
