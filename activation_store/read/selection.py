"""Which vectors a stream reads: the shards of its hooks, row-aligned, by split and documents.

What is chosen is held as runs of rows, about one per document, so it takes a small and constant
share of what the vectors take.
"""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, NamedTuple

import duckdb
import numpy as np
from jaxtyping import Bool, Int64

from activation_store.catalog.guard import read_only
from activation_store.errors import ContentError, QueryError, StoreError
from activation_store.read.spans import Spans, cut
from activation_store.shards.pages import Placed, VectorFile

if TYPE_CHECKING:
    from activation_store.store import Store
else:  # for annotations only
    Store = object

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


class Source:
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
        found = [file.place(runs) for file, runs in self._by_file(rows)]
        address = np.concatenate([np.zeros(0, np.int64), *(placed.address for placed in found)])
        return Placed(address, tuple(part for placed in found for part in placed.memory))

    def expect(self, rows: Spans) -> None:
        """Have the system begin to read what `place` will be asked for."""
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

    sources: tuple[Source, ...]
    runs: tuple[Runs, ...]
    """The rows of each source; place i of all runs is the same token."""
    n_tokens: int


def select(store: "Store", hooks: Sequence[str], split: str | None, where: str | None) -> Selection:
    """Return the vectors of `hooks` for the tokens of a split and of the documents `where` chooses.

    Memory: about 16 bytes per run of tokens of one document. Where the hooks were not captured
    together, 40 bytes per token besides until this returns.

    Raises:
        ContentError: a hook without vectors, an unknown split, or nothing is chosen.
        QueryError: `where` is no condition on table `documents`, or does more than read.
    """
    sources = tuple(_source(store, hook) for hook in hooks)
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


def _source(store: "Store", hook: str) -> Source:
    kinds = {kind: (d, dtype) for kind, d, dtype in _described(store, hook)}
    if "vectors" not in kinds:
        raise _no_vectors(store, hook, bool(kinds))
    d, dtype = kinds["vectors"]
    listed = store.sql(
        "SELECT file, n_rows FROM vector_shards WHERE hook = $hook AND n_rows > 0"
        " ORDER BY length(file), file",
        hook=hook,
    ).fetchall()
    folder = store.where.folder
    return Source(hook, d, dtype, [VectorFile(folder / name, n, d, dtype) for name, n in listed])


def _described(store: "Store", hook: str) -> list[tuple[str, int, str]]:
    return store.sql("SELECT kind, d, dtype FROM hooks WHERE hook = $hook", hook=hook).fetchall()


def _no_vectors(store: "Store", hook: str, has_rows: bool) -> ContentError:
    found = store.sql("SELECT hook FROM hooks WHERE kind = 'vectors' ORDER BY hook").fetchall()
    known = [name for (name,) in found]
    listing = ", ".join(known) or "none"
    if has_rows:
        return ContentError(
            f"{store.path}: hook {hook!r} was captured as rows only; capture it as vectors too. "
            f"Hooks with vectors: {listing}."
        )
    near = get_close_matches(hook, known, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return ContentError(f"{store.path}: no hook {hook!r}.{guess} Hooks with vectors: {listing}.")


class _Allowed(NamedTuple):
    """Tokens that a filter lets through, as runs of keys."""

    first: Keys
    last: Keys

    def holds(self, keys: Keys) -> Bool[np.ndarray, " n"]:
        """Return which of the keys lie in a run."""
        if not len(self.first):
            return np.zeros(len(keys), bool)
        run = np.searchsorted(self.first, keys, "right") - 1
        return (run >= 0) & (keys <= self.last[np.maximum(run, 0)])


_SPANS = """
SELECT seq_id, min(pos) AS first, max(pos) AS last, count(*) AS n
FROM token_ids
WHERE {condition}
GROUP BY seq_id, doc_id
ORDER BY seq_id, first
"""


def _allowed(store: "Store", split: str | None, where: str | None) -> _Allowed | None:
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
    found = store.sql(_SPANS.format(condition=" AND ".join(conditions)), **params).fetchnumpy()
    if split is not None and not len(found["seq_id"]) and where is None:
        known = store.sql("SELECT DISTINCT split FROM token_ids ORDER BY split").fetchall()
        listing = ", ".join(name for (name,) in known) or "none"
        raise ContentError(f"{store.path}: no split {split!r}; splits: {listing}.")
    seq = np.asarray(found["seq_id"]).astype(np.int64) << 32
    first, last = np.asarray(found["first"]), np.asarray(found["last"])
    if (last - first + 1 != np.asarray(found["n"])).any():
        raise ContentError(
            f"{store.path}: a document is split in pieces within one sequence; choose by split, or "
            "read everything."
        )
    return _Allowed(seq + first, seq + last)


def _check_predicate(store: "Store", where: str) -> None:
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


def _aligned(sources: Sequence[Source], allowed: _Allowed | None) -> tuple[list[Runs], int]:
    """Return runs of each source over the tokens that all have and the filter allows."""
    lead, *others = sources
    if all(_shape(other) == _shape(lead) for other in others):
        found = _together(sources, allowed)
        if found is not None:
            return found
    keys = _keys(lead)
    keep = np.ones(len(keys), bool) if allowed is None else allowed.holds(keys)
    rows = [np.arange(len(keys))]
    for other in others:
        theirs = _keys(other)
        order = np.argsort(theirs, kind="stable")
        at = np.searchsorted(theirs, keys, sorter=order).clip(max=max(len(theirs) - 1, 0))
        rows.append(order[at] if len(theirs) else np.zeros(len(keys), np.int64))
        keep &= theirs[rows[-1]] == keys if len(theirs) else False
    return [_as_runs(part[keep]) for part in rows], int(keep.sum())


def _shape(source: Source) -> list[int]:
    return [file.n_rows for file in source.files]


def _keys(source: Source) -> Keys:
    return np.concatenate([np.zeros(0, np.int64), *(file.keys() for file in source.files)])


def _together(sources: Sequence[Source], allowed: _Allowed | None) -> tuple[list[Runs], int] | None:
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
