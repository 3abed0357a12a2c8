"""Which sequences a store holds, and the tokens of those that are not written yet.

Several captures of one store, such as neurons first and latents of a dictionary later, run over the
same sequences. Their tokens are written once; later captures are checked against them.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from activation_store import state
from activation_store.errors import ContentError
from activation_store.ranks import Held

Ids = Int32[np.ndarray, "batch n_ctx"]


class TokenLog:
    """The tokens of a store: a hash of every sequence it holds, and rows yet to be written."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self._written: dict[int, int] = {}
        self._given: set[int] = set()
        self._splits: list[str] = []
        self._waiting: list[tuple[np.ndarray, ...]] = []

    def add(self, seq: Int32[np.ndarray, " batch"], tokens: Ids, docs: Ids, split: str) -> None:
        """Note the tokens of a batch, or check those that the store holds already.

        Raises:
            ContentError: a sequence that this capture was given before, or whose tokens differ from
                those that the store holds.
        """
        if split not in self._splits:
            self._splits.append(split)
        fresh = np.ones(len(seq), bool)
        for i, (name, digest) in enumerate(zip(seq.tolist(), _digests(tokens, docs), strict=True)):
            if name < 0 or name in self._given:
                raise ContentError(
                    f"sequence {name} was given before; each sequence of a capture has a number "
                    ">= 0 of its own. After a restart begin at the writer's next_seq."
                )
            self._given.add(name)
            fresh[i] = name not in self._known
            if fresh[i]:
                self._written[name] = digest
            if self._known.setdefault(name, digest) != digest:
                raise ContentError(
                    f"sequence {name}: its tokens or documents differ from those in the store; a "
                    "store holds one corpus. Write this capture to another store."
                )
        self._keep(seq, tokens, docs, split, fresh)

    def _keep(self, seq: np.ndarray, tokens: Ids, docs: Ids, split: str, fresh: np.ndarray) -> None:
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
    def given(self) -> Int32[np.ndarray, " n"]:
        """Sequences that this rank was given in this capture, ascending."""
        return np.array(sorted(self._given), np.int32)

    def dump(self) -> bytes:
        """Return the sequences whose tokens this rank has written, after the next commit."""
        seq = np.array(sorted(self._written), np.int32)
        digests = [self._written[name] for name in seq.tolist()]
        return state.to_bytes({"given": seq, "digest": np.array(digests, np.uint64)})

    def restore(self, written: bytes | None, others: Sequence[Held | None]) -> None:
        """Take up what the store holds: tokens that this rank wrote, and those of the others."""
        if written is not None:
            self._written = _as_dict(state.from_bytes(written))
        self._known = dict(self._written)
        for held in others:
            if held is not None:
                self._known |= _as_dict(held)

    def restore_given(self, given: Int32[np.ndarray, " n"]) -> None:
        """Take up which sequences this capture was given."""
        self._given = set(given.tolist())


def _as_dict(held: Held) -> dict[int, int]:
    return dict(zip(held["given"].tolist(), held["digest"].tolist(), strict=True))


def _digests(tokens: Ids, docs: Ids) -> list[int]:
    """Return a 64-bit hash per sequence of its tokens and their documents."""
    place = np.arange(tokens.shape[1], dtype=np.uint64)
    z = tokens.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z ^= (docs.astype(np.uint64) + place * np.uint64(0xD1B54A32D192ED03)) << np.uint64(1)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))).sum(axis=1, dtype=np.uint64).tolist()
