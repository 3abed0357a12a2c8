"""The words that FLINT's decoder tells: content tokens of the training texts, with their frequency.

Words are tokens, so that counting needs the ids alone and any tokenizer will do: a piece of a word
counts as one where a tokenizer cuts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from lmmono.errors import RobustnessError


@dataclass(frozen=True, slots=True, eq=False)
class ContentWords:
    """Tokens that a decoder tells apart."""

    token_ids: Int64[np.ndarray, " word"]
    """Their ids, the most frequent first."""
    log_frequency: Float32[np.ndarray, " word"]
    """Log of each one's share of all of them, one added to every count."""
    idf: Float32[np.ndarray, " word"]
    """log((1 + texts) / (1 + texts that have it)) + 1, as scikit-learn smooths it."""

    def __len__(self) -> int:
        return len(self.token_ids)


def content_words(
    ids: Sequence[Int64[np.ndarray, "_"]],
    tokenizer: Any,
    *,
    n_words: int,
    min_documents: int,
) -> ContentWords:
    """Return the content tokens of texts: no stop word, no mark, in enough texts.

    Raises:
        RobustnessError: No token is in enough texts.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    size = 1 + max((int(row.max()) for row in ids if len(row)), default=0)
    counts, n_texts = np.zeros(size, np.int64), np.zeros(size, np.int64)
    for row in ids:
        counts += np.bincount(row, minlength=size)
        n_texts[np.unique(row)] += 1
    frequent = np.flatnonzero(n_texts >= min_documents)
    special = set(tokenizer.all_special_ids)
    texts = [tokenizer.decode([i]).strip().lower() for i in frequent.tolist()]
    is_content = [
        token_id not in special
        and len(text) > 1
        and text.isalnum()
        and not text.isdigit()
        and text not in ENGLISH_STOP_WORDS
        for token_id, text in zip(frequent.tolist(), texts, strict=True)
    ]
    chosen = frequent[np.array(is_content, bool)]
    if not len(chosen):
        raise RobustnessError(
            f"decoder bow: no content word is in {min_documents} of the {len(ids)} training texts; "
            "lower min_documents, or take decoder: token"
        )
    chosen = chosen[np.argsort(-counts[chosen], kind="stable")][:n_words]
    shares = (counts[chosen] + 1) / (counts[chosen] + 1).sum()
    idf = np.log((1 + len(ids)) / (1 + n_texts[chosen])) + 1
    return ContentWords(chosen, np.log(shares).astype(np.float32), idf.astype(np.float32))


def count_words(
    ids: Int64[Tensor, "batch pos"],
    used: Bool[Tensor, "batch pos"],
    column: Int64[Tensor, " d_vocab"],
    n_words: int,
) -> Float[Tensor, "batch word"]:
    """Return how often each text has each word; `column` is of a token, `n_words` if none."""
    columns = torch.where(used, column[ids], n_words)
    counts = torch.zeros(len(ids), n_words + 1, device=ids.device)
    return counts.scatter_add_(1, columns, torch.ones_like(columns, dtype=counts.dtype))[:, :-1]
