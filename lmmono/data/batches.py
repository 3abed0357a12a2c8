"""The order in which a model sees its rows: endless, seeded, and resumed at any batch."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

from lmmono.data.tokens import TokenRows
from lmmono.errors import DataError

PADDING = -100
"""Stands for padding in batches: what losses of PyTorch ignore as a label."""


def train_batches(
    rows: TokenRows, batch_rows: int, seed: int, start: int = 0
) -> Iterator[Int64[np.ndarray, "batch_rows n_ctx"]]:
    """Yield batches `start`, `start + 1`, ... for ever; batch k depends only on `seed` and k.

    Each epoch is one seeded permutation of the rows; the rows that do not fill its last batch are
    left out of that epoch (another few each time), so every batch is full. Padding is `PADDING`.

    Args:
        rows: The rows to draw from.
        batch_rows: Rows per batch.
        seed: Seed of the order.
        start: Number of batches already seen; nothing is read to skip them.

    Raises:
        DataError: If there are fewer rows than one batch takes (raised at once, not at the first
            batch).
    """
    per_epoch = len(rows) // batch_rows
    if per_epoch == 0:
        raise DataError(
            f"split {rows.split!r} has {len(rows)} rows of {rows.n_ctx} tokens, one batch takes "
            f"{batch_rows} rows: use more documents, a smaller train.batch_tokens or a smaller "
            "data.n_ctx"
        )
    return _batches(rows, batch_rows, seed, start, per_epoch)


def _batches(
    rows: TokenRows, batch_rows: int, seed: int, start: int, per_epoch: int
) -> Iterator[Int64[np.ndarray, "batch_rows n_ctx"]]:
    epoch, index = divmod(start, per_epoch)
    is_padded = rows.corpus is not None and rows.corpus.section.rows == "documents"
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        for at in range(index, per_epoch):
            chosen = order[at * batch_rows : (at + 1) * batch_rows]
            ids = rows.ids[chosen].astype(np.int64)
            if is_padded:
                ids[rows.doc_ids[chosen] < 0] = PADDING
            yield ids
        epoch, index = epoch + 1, 0
