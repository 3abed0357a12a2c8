"""Entropies of token rows by counting: what a model gains by knowing more than frequencies."""

import numpy as np
from jaxtyping import UInt


def unigram_entropy(ids: UInt[np.ndarray, "n_rows n_ctx"]) -> float:
    """Return the entropy of the token frequencies in nats per token.

    H = -sum_a p(a) ln p(a), the plug-in estimate: the loss of a model that knows frequencies only.
    """
    return _entropy(np.bincount(ids.ravel()))


def bigram_entropy(ids: UInt[np.ndarray, "n_rows n_ctx"]) -> float:
    """Return the entropy of a token given the one before it in its row, in nats per token.

    H = -sum_ab p(a, b) ln p(b | a), the plug-in estimate: the loss of a model that sees one token
    back. It is too low where pairs are many and rows few (by about pairs / 2 tokens).
    """
    before, after = ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64)
    pairs = np.unique(before * (int(ids.max()) + 1) + after, return_counts=True)[1]
    return _entropy(pairs) - _entropy(np.bincount(before.ravel()))


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
