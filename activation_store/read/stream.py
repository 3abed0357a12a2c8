"""Vectors for training: shuffled batches that are the same on every run and can be gone on with.

Each token comes once per epoch. The order depends on the seed and the settings, not on the number
of threads; a cursor says how far a reader has come, and a stream that begins there gives the same
bits as one that was never stopped. See `mixing.py` for how tokens are mixed.
"""

import copy
import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from activation_store.errors import ContentError
from activation_store.hooks import LARGEST, Dtype
from activation_store.read.buffers import Buffers
from activation_store.read.mixing import Mixing
from activation_store.read.pools import Part, Pools
from activation_store.read.selection import Selection, select

if TYPE_CHECKING:
    from activation_store.store import Store
else:  # for annotations only
    Store = object

Array: TypeAlias = Any
"""A numpy array or, with framework="torch", a torch tensor: [n, d]."""

Cursor: TypeAlias = dict[str, Any]
"""A place in a stream, as JSON values: the settings that decide the order, epoch and token."""

BLOCK_BYTES = 2**18
"""Bytes of the widest hook's vectors that are read together unless asked otherwise."""

BUFFER_BYTES = 2**27
"""Bytes of all hooks' vectors, as given, that are mixed together unless asked otherwise."""

PLAIN_BYTES = 2**24
"""Bytes of all hooks' vectors, as given, that are read at once where nothing is mixed."""

Planned: TypeAlias = "tuple[tuple[int, int], partial[Array | dict[str, Array]]]"
"""The place after a batch, epoch and token, and the job that makes the batch."""


class VectorStream:
    """Batches of vectors; made by `Store.vectors`.

    Every `for` loop begins at the cursor that the stream was made with. `cursor` is the place after
    the batch that was given last.

    Memory: some batches; vectors are used where the system holds the files, which are mapped and
    must not be shortened meanwhile. A batch is an array that nothing else uses while you hold it:
    keep it or change it as you like.
    """

    def __init__(
        self,
        store: "Store",
        hooks: str | Sequence[str],
        *,
        batch_tokens: int = 4096,
        seed: int = 0,
        cursor: Cursor | str | None = None,
        split: str | None = None,
        where: str | None = None,
        epochs: int | None = 1,
        prefetch: int = 0,
        dtype: Dtype = "float32",
        framework: Literal["numpy", "torch"] = "numpy",
        shuffle: bool = True,
        buffer_tokens: int | None = None,
    ) -> None:
        """Look up what is to be read; no vector is read before the first batch is asked for.

        Args:
            store: an open store; it may be closed once the stream is made.
            hooks: one hook for batches that are arrays; a list of hooks for batches that are dicts
                of arrays whose rows belong to the same tokens.
            batch_tokens: rows per batch; the last batch of an epoch holds what is left.
            seed: seed of the order.
            cursor: where to begin, as `cursor` gave it, or its JSON text.
            split: read only tokens of this split.
            where: SQL condition on table `documents`; reads only tokens of those documents.
            epochs: how often each token comes; None goes on without end.
            prefetch: threads that read ahead; 0 reads when a batch is asked for.
            dtype: type of the batches.
            framework: numpy arrays or torch tensors.
            shuffle: False gives the tokens in the order they were captured.
            buffer_tokens: tokens that are mixed together; by default 128 MiB of vectors.

        Raises:
            ContentError: a hook without vectors, a setting out of its range, nothing to read, or a
                cursor of another store or other settings.
            QueryError: `where` is no condition on table `documents`.
        """
        self.hooks = (hooks,) if isinstance(hooks, str) else tuple(hooks)
        self._single = isinstance(hooks, str)
        if not self.hooks or len(set(self.hooks)) < len(self.hooks):
            raise ContentError(f"hooks: want one or several different hooks, got {hooks!r}.")
        self.batch_tokens, self.seed, self.epochs = batch_tokens, seed, epochs
        self.prefetch, self.framework = prefetch, framework
        self.dtype: Dtype = dtype
        self._selection = select(store, self.hooks, split, where)
        self._check_settings()
        self._mixing = self._mixed(shuffle, buffer_tokens)
        self._settings = self._described(store, split, where)
        self._begin = self._place(cursor)
        self._now = self._begin

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
        """The place after the last batch given, to begin another stream at."""
        epoch, token = self._now
        return {**self._settings, "epoch": epoch, "token": token}

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
        stream.epochs, stream.framework = epochs, framework
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
        with ThreadPoolExecutor(max(1, self.prefetch)) as threads:
            try:
                for place, batch in _ahead(self._plan(threads), threads, self.prefetch):
                    self._now = place
                    yield batch
            finally:
                threads.shutdown(wait=True, cancel_futures=True)

    def _plan(self, threads: ThreadPoolExecutor) -> Iterator[Planned]:
        """Yield, batch by batch, the place after it and the job that makes it."""
        number, begin = self._begin
        sources = self._selection.sources
        # those read ahead, the one that is worked on, and the one given before
        kept = self.prefetch + 3
        batches = Buffers(self.batch_tokens, [(s.d, self.dtype) for s in sources], kept)
        while self.epochs is None or number < self.epochs:
            epoch = self._mixing.epoch(number)
            pools = Pools(self._selection, epoch, threads if self.prefetch else None)
            for start in range(begin, self.n_tokens, self.batch_tokens):
                stop = min(start + self.batch_tokens, self.n_tokens)
                is_last = stop == self.n_tokens
                place = (number + 1, 0) if is_last else (number, stop)
                parts, room = pools.parts(start, stop), batches.take(stop - start)
                yield place, partial(self._batch, parts, room)
            number, begin = number + 1, 0

    def _batch(self, parts: Sequence[Part], room: Sequence[np.ndarray]) -> Array | dict[str, Array]:
        """Return the rows of the parts one after the other, in `room`: an array per hook."""
        found: dict[str, Array] = {}
        for i, (hook, batch) in enumerate(zip(self.hooks, room, strict=True)):
            at = 0
            for part in parts:
                end = at + part.stop - part.start
                part.give(i, batch[at:end])
                at = end
            found[hook] = batch if self.framework == "numpy" else _as_torch(batch)
        return found[self.hooks[0]] if self._single else found

    def _check_settings(self) -> None:
        n = self.n_tokens
        for name, value, least in (
            ("batch_tokens", self.batch_tokens, 1),
            ("seed", self.seed, 0),
            ("epochs", 1 if self.epochs is None else self.epochs, 1),
            ("prefetch", self.prefetch, 0),
        ):
            if value < least:
                raise ContentError(f"{name}: want an integer >= {least}, got {value}.")
        if self.batch_tokens > n:
            raise ContentError(
                f"batch_tokens: {self.batch_tokens} rows of the {n} there are; want at most {n}."
            )
        if self.framework not in ("numpy", "torch"):
            raise ContentError(f"framework: want 'numpy' or 'torch', got {self.framework!r}.")
        for source in self._selection.sources:
            fits = self.dtype == "float32" or self.dtype == source.dtype
            if self.dtype not in LARGEST or not fits:
                raise ContentError(
                    f"dtype: {source.hook} is stored as {source.dtype}; want 'float32', or "
                    f"'float16' where it is stored so; got {self.dtype!r}."
                )

    def _mixed(self, shuffle: bool, buffer_tokens: int | None) -> Mixing:
        widths = [source.d * source.dtype.itemsize for source in self._selection.sources]
        given = sum(source.d for source in self._selection.sources) * np.dtype(self.dtype).itemsize
        pool = max(1, BUFFER_BYTES // given) if buffer_tokens is None else buffer_tokens
        if pool < 1:
            raise ContentError(f"buffer_tokens: want an integer >= 1, got {pool}.")
        if not shuffle:
            pool = min(pool, max(1, PLAIN_BYTES // given))
        # small buffers still hold some blocks from different places
        block = max(1, min(BLOCK_BYTES // max(widths), pool // 16))
        return Mixing(self.n_tokens, block, pool, self.seed, shuffle)

    def _described(self, store: "Store", split: str | None, where: str | None) -> Cursor:
        """Return what decides the order, which a cursor must agree with."""
        return {
            "data": _digest(store, self._selection),
            "hooks": list(self.hooks),
            "split": split,
            "where": where,
            "n_tokens": self.n_tokens,
            "batch_tokens": self.batch_tokens,
            "seed": self.seed,
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
        given = _as_cursor(cursor)
        differences = [
            f"{name}: cursor {given.get(name)!r}, stream {value!r}"
            for name, value in self._settings.items()
            if given.get(name) != value
        ]
        if differences:
            raise ContentError(
                f"this cursor is of another stream: {'; '.join(differences)}. Use the same store "
                "and settings, or begin without a cursor."
            )
        epoch, token = given.get("epoch"), given.get("token")
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
            place, made = waiting.popleft()
            yield place, made.result()
    while waiting:
        place, made = waiting.popleft()
        yield place, made.result()


def _digest(store: "Store", selection: Selection) -> str:
    """Return a short hash of which bytes the selection reads."""
    names = [file.path.name for source in selection.sources for file in source.files]
    listed = store.sql(
        "SELECT file, checksum FROM vector_shards WHERE file IN (SELECT unnest($names::VARCHAR[]))"
        " ORDER BY file",
        names=names,
    ).fetchall()
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def _as_cursor(cursor: Cursor | str) -> Cursor:
    """Return a cursor from its JSON text.

    Raises:
        ContentError: it is no JSON object.
    """
    try:
        given: object = json.loads(cursor) if isinstance(cursor, str) else cursor
    except ValueError as fault:
        raise ContentError(f"cursor: want a stream's `cursor`, got {cursor!r}: {fault}") from fault
    if not isinstance(given, dict):
        raise ContentError(f"cursor: want a stream's `cursor`, got {cursor!r}.")
    return dict(given)


def _as_torch(array: np.ndarray) -> Array:
    import torch

    return torch.from_numpy(array)
