"""Which sequences a store holds, and the tokens of those that are not written yet.

Several captures of one store, such as neurons first and latents of a dictionary later, run over the
same sequences. Their tokens are written once; later captures are checked against them.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt64

from activation_store.errors import ContentError
from activation_store.write.state import RankState, from_bytes, to_bytes

_CHUNK_BITS = 10  # 1,024 sequences, 8 kB, are looked up together

Ids = Int32[np.ndarray, "batch n_ctx"]
SeqIds = Int64[np.ndarray, " n"]
Ranges = Int64[np.ndarray, "m 2"]


class SequenceTable:
    """A 64-bit number per sequence, 0 for one that is absent; eight bytes each if dense."""

    def __init__(self) -> None:
        self._chunks: dict[int, np.ndarray] = {}

    def get(self, seq_ids: SeqIds) -> UInt64[np.ndarray, " n"]:
        """Return the numbers of some sequences."""
        out = np.zeros(len(seq_ids), np.uint64)
        for chunk in np.unique(seq_ids >> _CHUNK_BITS).tolist():
            numbers = self._chunks.get(chunk)
            if numbers is not None:
                here = seq_ids >> _CHUNK_BITS == chunk
                out[here] = numbers[seq_ids[here] & ((1 << _CHUNK_BITS) - 1)]
        return out

    def put(self, seq_ids: SeqIds, numbers: UInt64[np.ndarray, " n"]) -> None:
        """Set the numbers of some sequences."""
        for chunk in np.unique(seq_ids >> _CHUNK_BITS).tolist():
            stored = self._chunks.setdefault(chunk, np.zeros(1 << _CHUNK_BITS, np.uint64))
            here = seq_ids >> _CHUNK_BITS == chunk
            stored[seq_ids[here] & ((1 << _CHUNK_BITS) - 1)] = numbers[here]

    def items(self) -> tuple[SeqIds, UInt64[np.ndarray, " n"]]:
        """Return the sequences that are present, ascending, and their numbers."""
        seq_ids, numbers = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        for chunk, stored in sorted(self._chunks.items()):
            places = np.flatnonzero(stored)
            seq_ids.append(places + (chunk << _CHUNK_BITS))
            numbers.append(stored[places])
        return np.concatenate(seq_ids), np.concatenate(numbers)


def to_ranges(seq_ids: SeqIds) -> Ranges:
    """Return ascending sequences as ranges [first, last].

    >>> to_ranges(np.array([3, 4, 5, 9])).tolist()
    [[3, 5], [9, 9]]
    """
    if len(seq_ids) == 0:
        return np.zeros((0, 2), np.int64)
    breaks = np.flatnonzero(np.diff(seq_ids) != 1)
    first = seq_ids[np.concatenate([[0], breaks + 1])]
    last = seq_ids[np.concatenate([breaks, [len(seq_ids) - 1]])]
    return np.stack([first, last], axis=1)


def from_ranges(ranges: Ranges) -> SeqIds:
    """Return the sequences of `to_ranges`, ascending."""
    parts = [np.arange(first, last + 1) for first, last in ranges.tolist()]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def shared(one: Ranges, other: Int64[np.ndarray, "k 2"]) -> Int64[np.ndarray, "j 2"]:
    """Return the ranges that lie in both.

    >>> shared(np.array([[0, 5], [8, 9]]), np.array([[4, 8]])).tolist()
    [[4, 5], [8, 8]]
    """
    low = np.searchsorted(other[:, 1], one[:, 0], side="left")
    high = np.searchsorted(other[:, 0], one[:, 1], side="right")
    ranges = [
        (max(one[i, 0], first), min(one[i, 1], last))
        for i in np.flatnonzero(high > low).tolist()
        for first, last in other[low[i] : high[i]].tolist()
    ]
    return np.array(ranges, np.int64).reshape(-1, 2)


def refuse_shared(given: Ranges, others: Sequence[RankState | None]) -> None:
    """Refuse sequences that another rank has committed in the same capture.

    Raises:
        ContentError: a sequence was given to two ranks; names it.
    """
    for rank, state in enumerate(others):
        both = shared(given, state["given"]) if state is not None else given[:0]
        if len(both):
            n = int((both[:, 1] - both[:, 0] + 1).sum())
            raise ContentError(
                f"sequence {both[0, 0]} was given to rank {rank} too ({n} in all); "
                "give each sequence to one rank."
            )


class TokenLog:
    """The tokens of a store: a hash of every sequence it holds, and rows yet to be written."""

    def __init__(self) -> None:
        self._written = SequenceTable()
        self._by_others = SequenceTable()
        self._split = SequenceTable()
        self._given = SequenceTable()
        self._splits: list[str] = []
        self._waiting: list[tuple[np.ndarray, ...]] = []

    def check(self, seq: Int32[np.ndarray, " batch"], tokens: Ids, docs: Ids, split: str) -> None:
        """Refuse sequences that cannot be added; changes nothing.

        Raises:
            ContentError: a sequence that this capture was given before, or whose tokens or split
                differ from those that the store holds.
        """
        names = seq.astype(np.int64)
        repeated = np.ones(len(names), bool)
        repeated[np.unique(names, return_index=True)[1]] = False
        again = repeated | (names < 0) | self.is_given(seq)
        if again.any():
            raise ContentError(
                f"sequence {names[again][0]} was given before; each sequence of a capture has a "
                "number >= 0 of its own. Leave out what the writer's `pending` does not name."
            )
        self.check_same(seq, tokens, docs, split)

    def check_same(
        self, seq: Int32[np.ndarray, " batch"], tokens: Ids, docs: Ids, split: str | None
    ) -> None:
        """Refuse sequences that the store holds with other tokens or, if given, in another split.

        Raises:
            ContentError: there is one; names it.
        """
        names = seq.astype(np.int64)
        stored = self._stored(names)
        other = (stored > 0) & (stored != digests(tokens, docs))
        if other.any():
            raise ContentError(
                f"sequence {names[other][0]}: its tokens or documents differ from those in the "
                "store; a store holds one corpus, and each sequence of it a number of its own. "
                "Number these sequences further on, or write them to another store."
            )
        if split is None:
            return
        in_split = self._split.get(names)
        moved = (in_split > 0) & (in_split != _split_number(split))
        if moved.any():
            raise ContentError(
                f"sequence {names[moved][0]}: the store holds it in another split than {split!r}; "
                "a sequence is of one split. Write it to another store, or leave it out."
            )

    def is_given(self, seq: Int32[np.ndarray, " batch"]) -> Bool[np.ndarray, " batch"]:
        """Return which sequences this capture was given before."""
        return self._given.get(seq.astype(np.int64)) > 0

    def add(self, seq: Int32[np.ndarray, " batch"], tokens: Ids, docs: Ids, split: str) -> None:
        """Note sequences that were checked; their tokens are kept unless the store has them."""
        names = seq.astype(np.int64)
        fresh = self._stored(names) == 0
        self._given.put(names, np.ones(len(names), np.uint64))
        self._written.put(names[fresh], digests(tokens, docs)[fresh])
        self._split.put(names[fresh], np.full(int(fresh.sum()), _split_number(split)))
        if split not in self._splits:
            self._splits.append(split)
        real = (docs >= 0) & fresh[:, None]
        row, pos = np.nonzero(real)
        code = np.full(len(row), self._splits.index(split), np.int32)
        self._waiting.append((seq[row], pos.astype(np.int32), docs[real], code, tokens[real]))

    def _stored(self, names: np.ndarray) -> np.ndarray:
        """Return the digests of sequences that the store holds, 0 for others."""
        return np.maximum(self._written.get(names), self._by_others.get(names))

    def take(self) -> tuple[dict[str, np.ndarray], Sequence[str]] | None:
        """Return the columns of the tokens not written yet, by (seq_id, pos), and the splits."""
        waiting, self._waiting = self._waiting, []
        if not any(len(columns[0]) for columns in waiting):
            return None
        columns = [np.concatenate(parts) for parts in zip(*waiting, strict=True)]
        order = np.lexsort((columns[1], columns[0]))
        names = ("seq_id", "pos", "doc_id", "split", "token_id")
        return dict(zip(names, (c[order] for c in columns), strict=True)), tuple(self._splits)

    @property
    def given(self) -> Ranges:
        """Sequences that this rank was given in this capture."""
        return to_ranges(self._given.items()[0])

    def dump(self) -> bytes:
        """Return the sequences whose tokens this rank has written, after the next commit."""
        names, numbers = self._written.items()
        split = self._split.get(names)
        return to_bytes({"given": to_ranges(names), "digest": numbers, "split": split})

    def restore(self, written: bytes | None, others: Sequence[RankState | None]) -> None:
        """Take up what the store holds: tokens that this rank wrote, and those of the others."""
        if written is not None:
            state = from_bytes(written)
            self._written.put(from_ranges(state["given"]), state["digest"])
            self._put_split(state)
        for state in others:
            if state is not None:
                self._by_others.put(from_ranges(state["given"]), state["digest"])
                self._put_split(state)

    def _put_split(self, state: RankState) -> None:
        if "split" in state:  # stores of before 30 November 2026 do not say it
            self._split.put(from_ranges(state["given"]), state["split"])

    def restore_given(self, given: Ranges) -> None:
        """Take up which sequences this capture was given."""
        names = from_ranges(given)
        self._given.put(names, np.ones(len(names), np.uint64))


def digests(tokens: Ids, docs: Ids) -> UInt64[np.ndarray, " batch"]:
    """Return a 64-bit hash per sequence of its tokens and their documents, never 0.

    Padding has no part in it: the store does not keep what stood there.
    """
    place = np.arange(tokens.shape[1], dtype=np.uint64)
    # splitmix64's multipliers and shifts, over token, document and place, summed over the places
    z = tokens.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z ^= (docs.astype(np.uint64) + place * np.uint64(0xD1B54A32D192ED03)) << np.uint64(1)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = (z ^ (z >> np.uint64(31))) * (docs >= 0)
    return z.sum(axis=1, dtype=np.uint64) | np.uint64(1)  # 0 means absent


def _split_number(split: str) -> np.uint64:
    """Return a 64-bit hash of a split's name, never 0."""
    return np.uint64(int.from_bytes(hashlib.sha256(split.encode()).digest()[:8]) | 1)
