"""The tokens of one split as rows by positions, so that an activation finds its token by a sum."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy import ndarray

import activation_store as astore
from lmmono.errors import ExplainError
from lmmono.types import Split

PADDING = -1
"""Token id where there is no token."""


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """The tokens of one split; cell `row * n_ctx + pos` is the token at a position of a row."""

    split: Split
    """Split of the documents."""
    seq_ids: Int[ndarray, " rows"]
    """Row of the store that each row of the grid is, ascending."""
    n_ctx: int
    """Cells per row."""
    token_ids: Int[ndarray, " cells"]
    """int32; `PADDING` where the store has no token of this split."""
    doc_ids: Int[ndarray, " cells"]
    """Document of each token; -1 where there is none."""


def read_grid(store: astore.Store, split: Split) -> TokenGrid:
    """Read the tokens of a split.

    Raises:
        ExplainError: The store has no tokens of that split.
    """
    query = "SELECT seq_id, pos, doc_id, token_id FROM token_ids WHERE split = $split"
    table = store.sql(query, split=split).to_arrow_table()
    if not table.num_rows:
        query = "SELECT DISTINCT split FROM token_ids ORDER BY split"
        found = ", ".join(str(name) for (name,) in store.sql(query).fetchall()) or "no tokens"
        raise ExplainError(
            f"{store.path}: no tokens of split {split!r}; it has {found}; "
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
