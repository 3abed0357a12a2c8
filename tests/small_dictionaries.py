"""Dictionaries with given weights, and rows of tokens, for tests that compute the same by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from lmmono.data.tokens import TokenRows
from lmmono.dictionaries.estimator import Dictionary
from lmmono.recipe.dictionary_settings import RawVectors


class Given(Dictionary):
    """A ReLU code with random weights, set by hand: relu(x @ W_enc + b) @ W_dec."""

    kind = "control"
    adapter: TypeAdapter[Any] = TypeAdapter(RawVectors)

    def __init__(self, d_in: int, d_sae: int, seed: int = 0, hook: str | None = None) -> None:
        super().__init__("raw", seed=seed)
        self.hook, self.d_in, self.d_sae = hook, d_in, d_sae
        random = torch.Generator().manual_seed(seed)
        encoder = torch.randn(d_in, d_sae, generator=random)
        self.weights = {
            "W_enc": encoder,
            "W_dec": encoder.T.contiguous() / d_in,
            "b": torch.randn(d_sae, generator=random) - 1.0,
        }
        self.weights["b"][:2] = -1e6  # two latents that never fire

    def tensors(self) -> dict[str, Tensor]:
        return self.weights

    def _fit(self, source, **options) -> None:
        raise AssertionError("its weights are given")

    def _encode(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.weights["W_enc"] + self.weights["b"])

    def _decode(self, acts: Tensor) -> Tensor:
        return acts @ self.weights["W_dec"]

    def _save(self, folder: Path) -> None:
        raise AssertionError("it is for tests only")

    _load = _save


def small_rows(n_rows: int = 9, n_ctx: int = 16, document: int = 11, seed: int = 2) -> TokenRows:
    """Return rows of random tokens, in documents of `document` tokens that cross the rows."""
    ids = np.random.default_rng(seed).integers(0, 40, (n_rows, n_ctx)).astype(np.uint16)
    documents = 5 + np.arange(n_rows * n_ctx, dtype=np.int32).reshape(n_rows, n_ctx) // document
    return TokenRows(ids, documents, first_seq_id=0, split="val")


def as_ids(rows: TokenRows) -> Tensor:
    return torch.from_numpy(rows.ids.astype(np.int64))
