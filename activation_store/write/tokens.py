"""Which sequences a store holds, and the tokens of those that are not written yet.

Several captures of one store, such as neurons first and latents of a dictionary later, run over the
same sequences. Their tokens are written once; later captures are checked against them.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, UInt64

from activation_store.errors import ContentError
from activation_store.write import state
from activation_store.write.ranks import Held
from activation_store.write.sequences import Ranges, SequenceTable, from_ranges, to_ranges

Ids = Int32[np.ndarray, "batch n_ctx"]


class TokenLog:
    """The tokens of a store: a hash of every sequence it holds, and rows yet to be written."""

    def __init__(self) -> None:
        self._written = SequenceTable()
        self._by_others = SequenceTable()
        self._given = SequenceTable()
        self._splits: list[str] = []
        self._waiting: list[tuple[np.ndarray, ...]] = []

    def check(self, seq: Int32[np.ndarray, " batch"], tokens: Ids, docs: Ids) -> None:
        """Refuse sequences that cannot be added; changes nothing.

        Raises:
            ContentError: a sequence that this capture was given before, or whose tokens differ from
                those that the store holds.
        """
        names = seq.astype(np.int64)
        repeated = np.ones(len(names), bool)
        repeated[np.unique(names, return_index=True)[1]] = False
        again = repeated | (names < 0) | (self._given.get(names) > 0)
        if again.any():
            raise ContentError(
                f"sequence {names[again][0]} was given before; each sequence of a capture has a "
                "number >= 0 of its own. After a restart begin at the writer's next_seq."
            )
        known = self._known(names)
        other = (known > 0) & (known != _digests(tokens, docs))
        if other.any():
            raise ContentError(
                f"sequence {names[other][0]}: its tokens or documents differ from those in the "
                "store; a store holds one corpus. Write this capture to another store."
            )

    def add(self, seq: Int32[np.ndarray, " batch"], tokens: Ids, docs: Ids, split: str) -> None:
        """Note sequences that were checked; their tokens are kept unless the store has them."""
        names = seq.astype(np.int64)
        fresh = self._known(names) == 0
        self._given.put(names, np.ones(len(names), np.uint64))
        self._written.put(names[fresh], _digests(tokens, docs)[fresh])
        self._keep(seq, tokens, docs, split, fresh)

    def _known(self, names: np.ndarray) -> np.ndarray:
        return np.maximum(self._written.get(names), self._by_others.get(names))

    def _keep(self, seq: np.ndarray, tokens: Ids, docs: Ids, split: str, fresh: np.ndarray) -> None:
        if split not in self._splits:
            self._splits.append(split)
        real = (docs >= 0) & fresh[:, None]
        row, pos = np.nonzero(real)
        code = np.full(len(row), self._splits.index(split), np.int32)
        columns = (seq[row], pos.astype(np.int32), docs[real], code, tokens[real])
        self._waiting.append(columns)

    def take(self) -> tuple[dict[str, np.ndarray], Sequence[str]] | None:
        """Return the columns of the tokens not written yet, by (seq_id, pos), and the splits."""
        if not any(len(columns[0]) for columns in self._waiting):
            self._waiting = []
            return None
        columns = [np.concatenate(parts) for parts in zip(*self._waiting, strict=True)]
        self._waiting = []
        order = np.lexsort((columns[1], columns[0]))
        names = ("seq_id", "pos", "doc_id", "split", "token_id")
        return dict(zip(names, (c[order] for c in columns), strict=True)), tuple(self._splits)

    @property
    def given(self) -> Ranges:
        """Sequences that this rank was given in this capture."""
        return to_ranges(self._given.items()[0])

    def dump(self) -> bytes:
        """Return the sequences whose tokens this rank has written, after the next commit."""
        names, digests = self._written.items()
        return state.to_bytes({"given": to_ranges(names), "digest": digests})

    def restore(self, written: bytes | None, others: Sequence[Held | None]) -> None:
        """Take up what the store holds: tokens that this rank wrote, and those of the others."""
        if written is not None:
            held = state.from_bytes(written)
            self._written.put(from_ranges(held["given"]), held["digest"])
        for held in others:
            if held is not None:
                self._by_others.put(from_ranges(held["given"]), held["digest"])

    def restore_given(self, given: Ranges) -> None:
        """Take up which sequences this capture was given."""
        names = from_ranges(given)
        self._given.put(names, np.ones(len(names), np.uint64))


def _digests(tokens: Ids, docs: Ids) -> UInt64[np.ndarray, " batch"]:
    """Return a 64-bit hash per sequence of its tokens and their documents, never 0.

    Padding has no part in it: the store does not keep what stood there.
    """
    place = np.arange(tokens.shape[1], dtype=np.uint64)
    z = tokens.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z ^= (docs.astype(np.uint64) + place * np.uint64(0xD1B54A32D192ED03)) << np.uint64(1)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = (z ^ (z >> np.uint64(31))) * (docs >= 0)
    return z.sum(axis=1, dtype=np.uint64) | np.uint64(1)
