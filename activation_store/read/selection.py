"""What a stream reads, and in which order: the shards of its hooks, and tokens in mixed order.

A selection holds the rows of the hooks, row-aligned, by split and documents, as runs of rows, about
one per document, so it takes a small and constant share of what the vectors take.

A shuffled epoch permutes blocks of tokens and mixes them pool by pool:

    tokens   | block 0 | block 1 | block 2 | ...         neighbours lie in one block
    epoch    | block 7 | block 2 | ... || block 0 | ...  blocks in random order, cut into pools
    pool     every token of its blocks in random order

The order depends on the seed, the epoch and the sizes alone, and any place of it is found without
going through those before. It comes from a hash, not from a library's generator, so it stays the
same with every version of every library.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
from jaxtyping import Bool, Int64, UInt64

from activation_store.catalog.door import read_only
from activation_store.errors import ContentError, QueryError, StoreError
from activation_store.read.queried import Queried
from activation_store.shards.pages import Placed, Spans, VectorFile, cut

Keys = Int64[np.ndarray, " n"]


class Runs(NamedTuple):
    """Rows of a hook, in order: run i holds the rows from `row[i]` on."""

    first: Int64[np.ndarray, " runs"]
    """How many chosen rows lie before the run."""
    row: Int64[np.ndarray, " runs"]
    """Number of its first row among all rows of the hook."""

    def rows(self, places: Spans) -> Spans:
        """Return the rows at places of the selection.

        >>> Runs(np.array([0, 2]), np.array([5, 9])).rows(np.array([[0, 4]])).tolist()
        [[5, 7], [9, 11]]
        """
        parts, run = cut(places, self.first)
        return parts + (self.row - self.first)[run, None]


class HookVectors:
    """All vectors of one hook: its shards one after the other, in the order they were written."""

    def __init__(self, hook: str, d: int, dtype: str, files: Sequence[VectorFile]) -> None:
        self.hook, self.d, self.dtype = hook, d, np.dtype(dtype)
        self.files = tuple(files)
        self._begins = np.cumsum([0, *(file.n_rows for file in files)], dtype=np.int64)

    @property
    def n_rows(self) -> int:
        """Vectors of the hook."""
        return int(self._begins[-1])

    def place(self, rows: Spans) -> Placed:
        """Bring the vectors at `rows` to memory and say where they are.

        Raises:
            ShardError: a file is gone or changed.
        """
        parts = [file.place(runs) for file, runs in self._by_file(rows)]
        address = np.concatenate([np.zeros(0, np.int64), *(part.address for part in parts)])
        return Placed(address, tuple(memory for part in parts for memory in part.memory))

    def keys(self) -> Keys:
        """Return, row by row, which token it is; see `VectorFile.keys`."""
        return np.concatenate([np.zeros(0, np.int64), *(file.keys() for file in self.files)])

    def expect(self, rows: Spans) -> None:
        """Prefetch: have the operating system begin to read what `place` will be asked for."""
        for file, runs in self._by_file(rows):
            file.expect(runs)

    def _by_file(self, rows: Spans) -> Iterator[tuple[VectorFile, Spans]]:
        """Yield the files that rows lie in, one after the other, and which of their rows."""
        parts, number = cut(rows, self._begins[:-1])
        parts = parts - self._begins[number, None]
        start = 0
        for stop in [*(np.flatnonzero(np.diff(number)) + 1).tolist(), len(parts)]:
            yield self.files[int(number[start])], parts[start:stop]
            start = stop


class Selection(NamedTuple):
    """Vectors of some hooks for the same tokens."""

    sources: tuple[HookVectors, ...]
    runs: tuple[Runs, ...]
    """The rows of each source; place i of all runs is the same token."""
    n_tokens: int


def select(
    store: Queried,
    folder: Path,
    hooks: Sequence[str],
    split: str | None,
    where: str | None,
    *,
    checked: bool = False,
) -> Selection:
    """Return the vectors of `hooks` for the tokens of a split and of the documents `where` chooses.

    `folder` is where the shards lie; `checked` compares pages with their CRC-32 when they are read.

    Memory: about 16 bytes per run of tokens of one document. Where the hooks were not captured
    together, 40 bytes per token besides until this returns.

    Raises:
        ContentError: a hook without vectors, an unknown split, or nothing is chosen.
        QueryError: `where` is no condition on table `documents`, or does more than read.
    """
    sources = tuple(_hook_vectors(store, folder, hook, checked) for hook in hooks)
    allowed = _allowed(store, split, where)
    lead = sources[0]
    if len(sources) == 1 and allowed is None:
        runs, n_tokens = [Runs(np.zeros(1, np.int64), np.zeros(1, np.int64))], lead.n_rows
    else:
        runs, n_tokens = _aligned(sources, allowed)
    if not n_tokens:
        raise ContentError(
            f"{store.path}: no vectors of {', '.join(hooks)} with split={split!r}, where={where!r}."
        )
    return Selection(sources, tuple(runs), n_tokens)


def _hook_vectors(store: Queried, folder: Path, hook: str, checked: bool) -> HookVectors:
    rows = store.sql("SELECT kind, d, dtype FROM hooks WHERE hook = $hook", hook=hook).fetchall()
    shapes = {kind: (d, dtype) for kind, d, dtype in rows}
    if "vectors" not in shapes:
        raise _no_vectors(store, hook, bool(shapes))
    d, dtype = shapes["vectors"]
    files = store.sql(
        "SELECT file, n_rows FROM vector_shards WHERE hook = $hook AND n_rows > 0"
        " ORDER BY length(file), file",  # by number, also beyond six digits
        hook=hook,
    ).fetchall()
    shards = [VectorFile(folder / name, n, d, dtype, checked=checked) for name, n in files]
    return HookVectors(hook, d, dtype, shards)


def _no_vectors(store: Queried, hook: str, has_rows: bool) -> ContentError:
    rows = store.sql("SELECT hook FROM hooks WHERE kind = 'vectors' ORDER BY hook").fetchall()
    hooks = [name for (name,) in rows]
    listing = ", ".join(hooks) or "none"
    if has_rows:
        return ContentError(
            f"{store.path}: hook {hook!r} was captured as rows only; capture it as vectors too. "
            f"Hooks with vectors: {listing}."
        )
    near = get_close_matches(hook, hooks, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return ContentError(f"{store.path}: no hook {hook!r}.{guess} Hooks with vectors: {listing}.")


class _AllowedTokens(NamedTuple):
    """Tokens that a filter lets through, as runs of keys."""

    first: Keys
    last: Keys

    def holds(self, keys: Keys) -> Bool[np.ndarray, " n"]:
        """Return which of the keys lie in a run."""
        if not len(self.first):
            return np.zeros(len(keys), bool)
        run = np.searchsorted(self.first, keys, "right") - 1
        return (run >= 0) & (keys <= self.last[np.maximum(run, 0)])


_DOCUMENT_RUNS = """
SELECT seq_id, min(pos) AS first, max(pos) AS last, count(*) AS n
FROM token_ids
WHERE {condition}
GROUP BY seq_id, doc_id
ORDER BY seq_id, first
"""


def _allowed(store: Queried, split: str | None, where: str | None) -> _AllowedTokens | None:
    if split is None and where is None:
        return None
    conditions: list[str] = []
    params: dict[str, str] = {}
    if split is not None:
        conditions.append("split = $split")
        params["split"] = split
    if where is not None:
        _check_predicate(store, where)
        conditions.append(f"doc_id IN (SELECT doc_id FROM documents WHERE ({where}\n))")
    query = _DOCUMENT_RUNS.format(condition=" AND ".join(conditions))
    columns = store.sql(query, **params).fetchnumpy()
    if split is not None and not len(columns["seq_id"]) and where is None:
        splits = store.sql("SELECT DISTINCT split FROM token_ids ORDER BY split").fetchall()
        listing = ", ".join(name for (name,) in splits) or "none"
        raise ContentError(f"{store.path}: no split {split!r}; splits: {listing}.")
    seq = np.asarray(columns["seq_id"]).astype(np.int64) << 32
    first, last = np.asarray(columns["first"]), np.asarray(columns["last"])
    if (last - first + 1 != np.asarray(columns["n"])).any():
        raise ContentError(
            f"{store.path}: a document is split in pieces within one sequence; choose by split, or "
            "read everything."
        )
    return _AllowedTokens(seq + first, seq + last)


def _check_predicate(store: Queried, where: str) -> None:
    """Refuse a predicate that is none, or that could do more than read, also in trusted stores."""
    query = f"SELECT doc_id FROM documents WHERE ({where}\n) LIMIT 0"
    try:
        with duckdb.connect(":memory:") as parser:
            read_only(parser, query)
        store.sql(query).fetchall()
    except StoreError as fault:
        raise QueryError(
            f"where={where!r}: want an SQL condition on table documents (doc_id, split, name, "
            f"text_sha256, n_tokens), such as \"name LIKE 'a%'\": {fault}"
        ) from fault


def _as_runs(rows: Int64[np.ndarray, " n"]) -> Runs:
    starts = np.concatenate([[0], np.flatnonzero(np.diff(rows) != 1) + 1])[: len(rows)]
    return Runs(starts.astype(np.int64), rows[starts])


def _aligned(
    sources: Sequence[HookVectors], allowed: _AllowedTokens | None
) -> tuple[list[Runs], int]:
    """Return runs of each source over the tokens that all have and the filter allows."""
    lead, *others = sources
    shapes = [[file.n_rows for file in source.files] for source in sources]
    if all(shape == shapes[0] for shape in shapes):
        together = _together(sources, allowed)
        if together is not None:
            return together
    keys = lead.keys()
    keep = np.ones(len(keys), bool) if allowed is None else allowed.holds(keys)
    rows = [np.arange(len(keys))]
    for other in others:
        theirs = other.keys()
        order = np.argsort(theirs, kind="stable")
        at = np.searchsorted(theirs, keys, sorter=order).clip(max=max(len(theirs) - 1, 0))
        rows.append(order[at] if len(theirs) else np.zeros(len(keys), np.int64))
        keep &= theirs[rows[-1]] == keys if len(theirs) else False
    return [_as_runs(part[keep]) for part in rows], int(keep.sum())


def _together(
    sources: Sequence[HookVectors], allowed: _AllowedTokens | None
) -> tuple[list[Runs], int] | None:
    """Return the runs of sources captured together, file by file; None where they were not."""
    lead, *others = sources
    parts: list[Runs] = []
    begin = n_tokens = 0
    for number, file in enumerate(lead.files):
        keys = file.keys()
        if any(not np.array_equal(keys, other.files[number].keys()) for other in others):
            return None
        keep = np.ones(len(keys), bool) if allowed is None else allowed.holds(keys)
        rows = np.flatnonzero(keep)
        runs = _as_runs(rows)
        parts.append(Runs(runs.first + n_tokens, runs.row + begin))
        n_tokens += len(rows)
        begin += file.n_rows
    first = np.concatenate([np.zeros(0, np.int64), *(part.first for part in parts)])
    row = np.concatenate([np.zeros(0, np.int64), *(part.row for part in parts)])
    return [Runs(first, row)] * len(sources), n_tokens


class MixedTokens(NamedTuple):
    """Tokens that are mixed with each other."""

    tokens: Int64[np.ndarray, " n"]
    """Places of the tokens in stored order, block by block in the order they are read."""
    order: Int64[np.ndarray, " n"]
    """Which of them comes first, second, ..."""


@dataclass(frozen=True, slots=True)
class Mixing:
    """How `n_tokens` tokens are shuffled."""

    n_tokens: int
    block_tokens: int
    """Tokens that are read together."""
    pool_tokens: int
    """Tokens that are mixed together, up to a block more or less."""
    seed: int
    shuffle: bool

    def epoch(self, number: int) -> "EpochOrder":
        """Return the order of one epoch."""
        n_blocks = -(-self.n_tokens // self.block_tokens)
        blocks = np.arange(n_blocks)
        if self.shuffle:
            blocks = np.argsort(_random_numbers(n_blocks, self.seed, number, 0))
        n_pools = min(n_blocks, -(-self.n_tokens // self.pool_tokens))
        cuts = np.arange(n_pools + 1) * n_blocks // n_pools
        sizes = np.minimum((blocks + 1) * self.block_tokens, self.n_tokens)
        sizes -= blocks * self.block_tokens
        starts = np.concatenate([[0], np.cumsum(sizes)])[cuts]
        return EpochOrder(self, number, blocks, cuts, starts)


class EpochOrder(NamedTuple):
    """The order of one epoch."""

    mixing: Mixing
    number: int
    blocks: Int64[np.ndarray, " blocks"]
    cuts: Int64[np.ndarray, " pools+1"]
    """First block of each pool."""
    starts: Int64[np.ndarray, " pools+1"]
    """Tokens before each pool."""

    @property
    def n_pools(self) -> int:
        """Pools of the epoch."""
        return len(self.cuts) - 1

    def pool(self, number: int) -> MixedTokens:
        """Return the tokens of a pool and their order."""
        spans = self.spans(number)
        tokens = np.concatenate([np.arange(start, stop) for start, stop in spans.tolist()])
        return MixedTokens(tokens, self.order(number))

    def spans(self, number: int) -> Int64[np.ndarray, "spans 2"]:
        """Return the tokens of a pool in the order they are read: first and after the last."""
        size = self.mixing.block_tokens
        # sorted: the order within a pool does not depend on that of its blocks, and files are
        # read ahead front to back
        blocks = np.sort(self.blocks[self.cuts[number] : self.cuts[number + 1]])
        first = blocks[np.diff(blocks, prepend=-2) != 1]
        last = blocks[np.diff(blocks, append=-2) != 1]
        return np.stack([first * size, np.minimum((last + 1) * size, self.mixing.n_tokens)], axis=1)

    def order(self, number: int) -> Int64[np.ndarray, " n"]:
        """Return which token of a pool comes first, second, ...; counted as `spans` lists them."""
        n = int(self.starts[number + 1] - self.starts[number])
        if not self.mixing.shuffle:
            return np.arange(n)
        return np.argsort(_random_numbers(n, self.mixing.seed, self.number, number + 1))


def _random_numbers(n: int, seed: int, epoch: int, purpose: int) -> UInt64[np.ndarray, " n"]:
    """Return n different random numbers: splitmix64, a bijection, over a salted counter."""
    salt = np.zeros(1, np.uint64)
    for part in (seed, epoch, purpose):
        salt = _mixed(salt + np.uint64(part % 2**64) + np.uint64(0x9E3779B97F4A7C15))
    return _mixed(salt + np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mixed(z: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
