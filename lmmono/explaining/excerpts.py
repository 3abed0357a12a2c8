"""Excerpts: windows of tokens of one document each, cut once per split, the same for all units.

Rows of a store pack several documents. An excerpt never crosses from one into another, two
excerpts of a split never hold the same tokens, and the splits share no document, so that nothing
that explains a unit is ever used to score it.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy import ndarray

import activation_store as astore
from lmmono.errors import ExplainError
from lmmono.types import Split

PADDING = -1
"""Token id after the end of an excerpt that is shorter than the window."""


@dataclass(frozen=True, slots=True)
class Excerpts:
    """The excerpts of one split of a store, in stored order."""

    split: Split
    """Split of the documents."""
    window: int
    """Most tokens per excerpt."""
    token_ids: Int[ndarray, "n window"]
    """int32; `PADDING` after the last token of an excerpt."""
    lengths: Int[ndarray, " n"]
    """Tokens of each excerpt, at most `window`."""
    doc_ids: Int[ndarray, " n"]
    """Document of each excerpt."""
    seq_ids: Int[ndarray, " n"]
    """Row of the store that it was cut from."""
    first_pos: Int[ndarray, " n"]
    """Position in that row of its first token."""
    n_duplicates: int
    """Windows left out because the same tokens came before."""
    n_short: int
    """Windows left out because they had too few tokens."""
    _seqs: Int[ndarray, " n_seqs"]
    _starts: Int[ndarray, " n_seqs"]
    _excerpt_of: Int[ndarray, " n_tokens"]
    _offset_of: Int[ndarray, " n_tokens"]

    def __len__(self) -> int:
        return len(self.lengths)

    def places(
        self, seq_ids: Int[ndarray, " m"], pos: Int[ndarray, " m"]
    ) -> tuple[Int[ndarray, " m"], Int[ndarray, " m"]]:
        """Return the excerpt and the offset in it of tokens; -1 for tokens of no excerpt."""
        rank = np.searchsorted(self._seqs, seq_ids)
        rank = np.minimum(rank, len(self._seqs) - 1)
        known = self._seqs[rank] == seq_ids
        at = np.where(known, self._starts[rank] + pos, 0)
        return np.where(known, self._excerpt_of[at], -1), self._offset_of[at]


def read_excerpts(
    store: astore.Store, split: Split, *, window: int = 64, min_tokens: int = 8
) -> Excerpts:
    """Cut the rows of a split into excerpts.

    Args:
        store: An open store.
        split: Which documents.
        window: Most tokens per excerpt; a row's part of a document is cut from its first token on.
        min_tokens: Shorter excerpts are left out.

    Raises:
        ExplainError: The store has no tokens of that split, or none of enough tokens.
    """
    query = """SELECT seq_id, pos, doc_id, token_id FROM tokens
        WHERE split = $split ORDER BY seq_id, pos"""
    table = store.sql(query, split=split).to_arrow_table()
    if not table.num_rows:
        found = [s for (s,) in store.sql("SELECT DISTINCT split FROM tokens").fetchall()]
        raise ExplainError(
            f"{store.path}: no tokens of split {split!r}; it has {', '.join(sorted(found))}; "
            f"capture that split too (capture.splits)"
        )
    seq, pos, doc, ids = (table[i].to_numpy() for i in range(4))
    starts_piece = _piece_starts(seq, pos, doc, window)
    excerpts = _cut(split, window, min_tokens, seq, pos, doc, ids, starts_piece)
    if not len(excerpts):
        raise ExplainError(
            f"{store.path}: split {split!r} has no excerpt of {min_tokens} tokens or more"
        )
    return excerpts


def _piece_starts(seq: ndarray, pos: ndarray, doc: ndarray, window: int) -> ndarray:
    """Return the indices where a new piece begins: a new row or document, or a full window."""
    n = len(seq)
    new_run = np.ones(n, bool)
    new_run[1:] = (np.diff(seq) != 0) | (np.diff(doc) != 0) | (np.diff(pos) != 1)
    run_start = np.maximum.accumulate(np.where(new_run, np.arange(n), 0))
    return np.flatnonzero((np.arange(n) - run_start) % window == 0)


def _cut(
    split: Split,
    window: int,
    min_tokens: int,
    seq: ndarray,
    pos: ndarray,
    doc: ndarray,
    ids: ndarray,
    starts: ndarray,
) -> Excerpts:
    n, lengths = len(seq), np.diff(starts, append=len(seq))
    columns = np.arange(window)
    inside = columns < lengths[:, None]
    index = np.minimum(starts[:, None] + columns, n - 1)
    token_ids = np.where(inside, ids[index], PADDING).astype(np.int32)
    long_enough = lengths >= min_tokens
    _, first = np.unique(token_ids, axis=0, return_index=True)
    is_first = np.zeros(len(starts), bool)
    is_first[first] = True
    kept = np.flatnonzero(long_enough & is_first)
    number = np.full(len(starts), -1, np.int32)
    number[kept] = np.arange(len(kept), dtype=np.int32)
    piece = np.repeat(np.arange(len(starts)), lengths)
    seqs, seq_starts = np.unique(seq, return_index=True)
    return Excerpts(
        split=split,
        window=window,
        token_ids=token_ids[kept],
        lengths=lengths[kept],
        doc_ids=doc[starts[kept]],
        seq_ids=seq[starts[kept]],
        first_pos=pos[starts[kept]],
        n_duplicates=int((long_enough & ~is_first).sum()),
        n_short=int((~long_enough).sum()),
        _seqs=seqs,
        _starts=seq_starts - pos[seq_starts],
        _excerpt_of=number[piece],
        _offset_of=(np.arange(n) - starts[piece]).astype(np.int32),
    )
