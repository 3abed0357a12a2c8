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
from lmmono.records.token_grid import PADDING, TokenGrid, read_grid
from lmmono.types import Split


@dataclass(frozen=True, slots=True)
class Excerpts:
    """The excerpts of one split of a store, in stored order."""

    grid: TokenGrid
    """The tokens that they are cut from."""
    window: int
    """Most tokens per excerpt."""
    first_cells: Int[ndarray, " n"]
    """Cell of the grid that holds the first token of each excerpt; the others follow it."""
    token_ids: Int[ndarray, "n window"]
    """int32; `PADDING` after the last token of an excerpt."""
    n_duplicates: int = 0
    """Windows left out because the same tokens came before."""
    n_short: int = 0
    """Windows left out because they had too few tokens."""

    def __len__(self) -> int:
        return len(self.first_cells)

    @property
    def split(self) -> Split:
        """Split of the documents."""
        return self.grid.split

    @property
    def lengths(self) -> Int[ndarray, " n"]:
        """Tokens of each excerpt, at most `window`."""
        return (self.token_ids != PADDING).sum(axis=1)

    @property
    def doc_ids(self) -> Int[ndarray, " n"]:
        """Document of each excerpt, of its first token."""
        return self.grid.doc_ids[self.first_cells]

    @property
    def seq_ids(self) -> Int[ndarray, " n"]:
        """Row of the store that each was cut from."""
        return self.grid.seq_ids[self.first_cells // self.grid.n_ctx]

    @property
    def first_pos(self) -> Int[ndarray, " n"]:
        """Position in that row of the first token."""
        return self.first_cells % self.grid.n_ctx

    def of_cells(self) -> Int[ndarray, " cells"]:
        """Return the excerpt that each cell of the grid is in; -1 for none."""
        owner = np.full(len(self.grid.token_ids), -1, np.int32)
        number, offset = np.nonzero(self.token_ids != PADDING)
        owner[self.first_cells[number] + offset] = number
        return owner


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
    excerpts = cut(read_grid(store, split), window, min_tokens)
    if not len(excerpts):
        raise ExplainError(
            f"{store.path}: split {split!r} has no excerpt of {min_tokens} tokens or more"
        )
    return excerpts


def cut(grid: TokenGrid, window: int, min_tokens: int) -> Excerpts:
    """Cut a grid into excerpts of one document each, without duplicates and short ones."""
    firsts, lengths = _pieces(grid, window)
    columns = np.arange(window)
    cells = np.minimum(firsts[:, None] + columns, len(grid.token_ids) - 1)
    inside = columns < lengths[:, None]
    token_ids = np.where(inside, grid.token_ids[cells], np.int32(PADDING))
    long_enough = lengths >= min_tokens
    is_first = np.zeros(len(firsts), bool)
    is_first[np.unique(token_ids, axis=0, return_index=True)[1]] = True
    kept = long_enough & is_first
    return Excerpts(
        grid=grid,
        window=window,
        first_cells=firsts[kept],
        token_ids=token_ids[kept],
        n_duplicates=int((long_enough & ~is_first).sum()),
        n_short=int((~long_enough).sum()),
    )


def _pieces(
    grid: TokenGrid, window: int
) -> tuple[Int[ndarray, " pieces"], Int[ndarray, " pieces"]]:
    """Return first cell and length of each piece: a new row, document or full window begins one."""
    doc, cell = grid.doc_ids, np.arange(len(grid.doc_ids))
    new_run = cell % grid.n_ctx == 0
    new_run[1:] |= np.diff(doc) != 0
    run_start = np.maximum.accumulate(np.where(new_run, cell, 0))
    starts = np.flatnonzero((cell - run_start) % window == 0)
    lengths = np.diff(starts, append=len(doc))
    has_tokens = doc[starts] >= 0
    return starts[has_tokens], lengths[has_tokens]
