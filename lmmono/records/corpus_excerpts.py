"""Excerpts: windows of tokens of one document each, cut once per split, the same for all units.

Rows of a store pack several documents. An excerpt never crosses from one into another, two
excerpts of a split never hold the same tokens, and the splits share no document, so that nothing
that explains a unit is ever used to score it.

    row 0   | document 3 . . . . . . . . . . | document 7 . . . . . |
    cell      0                                                  n_ctx - 1
    excerpts  [--- window ---][--- window ---] [--- window ---][--]    the last one may be too short
"""

import json
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

import activation_store as astore
from lmmono.errors import ExplainError
from lmmono.types import Split

PADDING = -1
"""Token id where there is no token."""


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """Tokens of a store; cell `row * n_ctx + pos` is the token at a position of a row."""

    split: Split | None
    """Split of the documents; None where they are of all splits."""
    seq_ids: Int[ndarray, " rows"]
    """Row of the store that each row of the grid is, ascending."""
    n_ctx: int
    """Cells per row."""
    token_ids: Int[ndarray, " cells"]
    """int32; `PADDING` where the store has no token of this split."""
    doc_ids: Int[ndarray, " cells"]
    """Document of each token; -1 where there is none."""

    def tokens_at(self, cells: Int[ndarray, "*shape"]) -> Int[ndarray, "*shape"]:
        """Return the tokens in some cells; `PADDING` for cell -1."""
        return np.where(cells >= 0, self.token_ids[cells], np.int32(PADDING))


def read_grid(store: astore.Store, split: Split | None) -> TokenGrid:
    """Read the tokens of a split; None reads those of all splits.

    Raises:
        ExplainError: The store has no tokens of that split.
    """
    query = """SELECT seq_id, pos, doc_id, token_id FROM token_ids
        WHERE $split IS NULL OR split = $split"""
    table = store.sql(query, split=split).to_arrow_table()
    if not table.num_rows:
        query = "SELECT DISTINCT split FROM token_ids ORDER BY split"
        splits = ", ".join(str(name) for (name,) in store.sql(query).fetchall()) or "no tokens"
        raise ExplainError(
            f"{store.path}: no tokens of split {split!r}; it has {splits}; "
            f"capture that split too (capture.splits)"
        )
    seq, pos, doc, ids = (table[i].to_numpy() for i in range(4))
    seq_ids, row = np.unique(seq, return_inverse=True)
    n_ctx = int(pos.max()) + 1
    token_ids = np.full(len(seq_ids) * n_ctx, PADDING, np.int32)
    doc_ids = np.full(len(token_ids), -1, np.int64)
    cell = row * n_ctx + pos
    token_ids[cell], doc_ids[cell] = ids, doc
    return TokenGrid(split, seq_ids, n_ctx, token_ids, doc_ids)


def left_out_cells(
    store: astore.Store, hook: str, grid: TokenGrid
) -> Bool[ndarray, " cells"] | None:
    """Return which cells hold tokens that the capture of a hook left out; None where there is none.

    Nothing is stored of them, which is not to be read as silence: see `capture.skip`.
    """
    query = "SELECT any_value(skip) FROM hooks WHERE hook = $hook AND kind = 'rows'"
    ((skipped,),) = store.sql(query, hook=hook).fetchall()
    if skipped is None:
        return None
    left_out, shape = json.loads(skipped), (-1, grid.n_ctx)
    skip = astore.Skip(tuple(left_out["token_ids"]), left_out["first"])
    return skip.mask(grid.token_ids.reshape(shape), grid.doc_ids.reshape(shape)).ravel()


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

    def __len__(self) -> int:
        return len(self.first_cells)

    @property
    def split(self) -> Split:
        """Split of the documents."""
        assert self.grid.split is not None, "excerpts are cut from one split"
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

    def tokens_of(self, index: Int[ndarray, "*shape"]) -> Int[ndarray, "*shape window"]:
        """Return the tokens of some excerpts; all padding for index -1."""
        return np.where((index >= 0)[..., None], self.token_ids[index], np.int32(PADDING))

    def cells_of(self, index: Int[ndarray, "*shape"]) -> Int[ndarray, "*shape window"]:
        """Return the cells of some excerpts; -1 where there is no token, and for index -1."""
        cells = self.first_cells[index][..., None] + np.arange(self.window)
        return np.where(self.tokens_of(index) != PADDING, cells, -1)

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
            64 as in Bills et al. 2023.
        min_tokens: Shorter excerpts are left out: they show too little of what stands around.

    Raises:
        ExplainError: The store has no tokens of that split, or none of enough tokens.
    """
    excerpts = cut(read_grid(store, split), window, min_tokens)
    if not len(excerpts):
        raise ExplainError(
            f"{store.path}: split {split!r} has no excerpt of {min_tokens} tokens or more"
        )
    return excerpts


def cut(grid: TokenGrid, window: int, min_tokens: int, *, repeats: bool = False) -> Excerpts:
    """Cut a grid into excerpts of one document each, without duplicates and short ones.

    Args:
        grid: The tokens.
        window: Most tokens of an excerpt.
        min_tokens: Shorter ones are left out.
        repeats: Keep the same tokens again, for what counts every token.
    """
    # a new row, a new document or a full window begins a piece
    doc, cell = grid.doc_ids, np.arange(len(grid.doc_ids))
    begins_run = cell % grid.n_ctx == 0
    begins_run[1:] |= np.diff(doc) != 0
    run_start = np.maximum.accumulate(np.where(begins_run, cell, 0))
    starts = np.flatnonzero((cell - run_start) % window == 0)
    lengths = np.diff(starts, append=len(doc))
    has_tokens = doc[starts] >= 0
    starts, lengths = starts[has_tokens], lengths[has_tokens]

    columns = np.arange(window)
    cells = np.minimum(starts[:, None] + columns, len(grid.token_ids) - 1)
    token_ids = np.where(columns < lengths[:, None], grid.token_ids[cells], np.int32(PADDING))
    is_first = np.full(len(starts), repeats)
    if not repeats:
        is_first[np.unique(token_ids, axis=0, return_index=True)[1]] = True
    kept = (lengths >= min_tokens) & is_first
    return Excerpts(grid, window, starts[kept], token_ids[kept])
