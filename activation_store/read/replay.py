"""A hook's stored vectors once more as whole sequences, in the order they were captured.

What is computed from the vectors, such as the latents of a dictionary, can so be captured into the
store as if the model had given it: the same sequences, tokens and order, by the same writer.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32

from activation_store.errors import ContentError
from activation_store.read.gather import gather
from activation_store.read.queried import Queried
from activation_store.read.selection import select


@runtime_checkable
class VectorStore(Queried, Protocol):
    """A store whose vectors lie in a folder of this machine."""

    def shard_folder(self, hooks: Sequence[str], /) -> Path:
        """Return the folder that holds the shards of these hooks."""
        ...


Pending: TypeAlias = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Says of sequences, given their numbers, token ids and document ids, which are wanted."""


class StoredSequences(NamedTuple):
    """Whole sequences of one split: the arguments of `Writer.add`."""

    seq_ids: Int32[np.ndarray, " batch"]
    token_ids: Int32[np.ndarray, "batch n_ctx"]
    """0 where there is no token."""
    doc_ids: Int32[np.ndarray, "batch n_ctx"]
    """-1 where there is no token."""
    split: str
    vectors: Float32[np.ndarray, "batch n_ctx d"]
    """NaN where no vector is stored: padding, and values that were not finite."""


class Replay:
    """The sequences that hold vectors of one hook.

    Attributes:
        hook: name of the tensor.
        d: width of its vectors.
        n_ctx: tokens per sequence.
        n_tokens: vectors there are.
    """

    def __init__(self, store: VectorStore, hook: str) -> None:
        """Look up the shards; no vector is read yet.

        Raises:
            ContentError: the hook has no vectors, or the store does not say how long its sequences
                are.
        """
        self.hook, self._store = hook, store
        self._source = select(store, store.shard_folder([hook]), [hook], None, None).sources[0]
        self.d, self.n_tokens = self._source.d, self._source.n_rows
        rows = store.sql("SELECT value FROM meta WHERE key = 'n_ctx'").fetchall()
        if not rows:
            raise ContentError(
                f"{store.path}: table meta has no n_ctx, which every capture writes; capture the "
                "hook again."
            )
        self.n_ctx = int(rows[0][0])

    def batches(
        self,
        pending: Pending | None = None,
        batch_tokens: int = 8192,
        max_tokens: int | None = None,
    ) -> Iterator[StoredSequences]:
        """Yield the sequences in the order they were captured.

        Args:
            pending: says which sequences are wanted, given their numbers, tokens and documents: a
                `Writer.pending`. None takes all.
            batch_tokens: tokens per batch, about; at least one sequence.
            max_tokens: vectors of all sequences together, unwanted ones included, at most.

        Raises:
            ShardError: a file is gone or changed.
            ContentError: a sequence whose tokens the store does not hold.
        """
        limit = self.n_tokens if max_tokens is None else max_tokens
        at_once = max(1, batch_tokens // self.n_ctx)
        begin = 0
        for file in self._source.files:
            keys = file.keys()
            first = np.flatnonzero(np.diff(keys >> 32, prepend=-1) != 0)  # where a sequence begins
            stop = np.append(first[1:], len(keys))
            wanted = np.flatnonzero(begin + stop <= limit)
            if len(wanted):
                tokens = self._tokens(keys[first[wanted]] >> 32)
                if pending is not None:
                    mask = np.asarray(pending(tokens.seq, tokens.ids, tokens.docs))
                    wanted, tokens = wanted[mask], _TokenArrays(*(part[mask] for part in tokens))
                for part in _parts(tokens, wanted, at_once):
                    start, end = int(first[wanted[part.start]]), int(stop[wanted[part.stop - 1]])
                    yield self._sequences(tokens, part, keys[start:end], begin + start)
            if begin + stop[-1] > limit:
                return
            begin += len(keys)

    def _sequences(
        self, tokens: "_TokenArrays", part: slice, keys: np.ndarray, first_row: int
    ) -> StoredSequences:
        """Return sequences with the vectors that lie from a row on."""
        stored = np.empty((len(keys), self.d), self._source.dtype)
        placed = self._source.place(np.array([[first_row, first_row + len(keys)]]))
        gather(placed.address, self._source.dtype, stored)
        seq = tokens.seq[part]
        vectors = np.full((len(seq), self.n_ctx, self.d), np.nan, np.float32)
        row = np.cumsum(np.diff(keys >> 32, prepend=keys[0] >> 32) != 0)
        vectors[row, keys & 0xFFFFFFFF] = stored
        return StoredSequences(
            seq, tokens.ids[part], tokens.docs[part], str(tokens.splits[part.start]), vectors
        )

    def _tokens(self, seq: np.ndarray) -> "_TokenArrays":
        """Return the tokens of sequences, in the order asked for."""
        columns = self._store.sql(
            "SELECT t.seq_id, t.pos, t.doc_id, t.token_id, t.split::VARCHAR AS split"
            " FROM token_ids t JOIN (SELECT unnest($seq::INTEGER[]) AS seq_id) s"
            " ON s.seq_id = t.seq_id WHERE t.seq_id BETWEEN $low AND $high",
            seq=seq.tolist(),
            low=int(seq.min()),
            high=int(seq.max()),
        ).to_arrow_table()
        names = ("seq_id", "pos", "doc_id", "token_id")
        seq_id, at, doc_id, token_id = (columns[name].to_numpy() for name in names)
        order = np.argsort(seq)
        row = order[np.searchsorted(seq, seq_id, sorter=order)]
        shape = (len(seq), self.n_ctx)
        ids, docs = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        docs[row, at], ids[row, at] = doc_id, token_id
        splits = np.full(len(seq), "", object)
        splits[row] = columns["split"].to_numpy()
        if (splits == "").any():
            raise ContentError(
                f"{self._store.path}: sequence {seq[splits == ''][0]} has vectors of {self.hook} "
                "but no tokens; a repair may have dropped them. Capture it again."
            )
        return _TokenArrays(seq.astype(np.int32), ids, docs, splits)


class _TokenArrays(NamedTuple):
    seq: np.ndarray
    ids: np.ndarray
    docs: np.ndarray
    splits: np.ndarray


def _parts(tokens: _TokenArrays, places: np.ndarray, at_once: int) -> Iterator[slice]:
    """Cut the sequences into batches of one split each, whose `places` follow each other."""
    n = len(tokens.seq)
    is_new = (tokens.splits[1:] != tokens.splits[:-1]) | (np.diff(places) != 1)
    change = np.flatnonzero(is_new) + 1
    cuts = sorted({*range(0, n, at_once), *change.tolist(), n})
    for start, stop in zip(cuts, cuts[1:], strict=False):
        yield slice(start, stop)
