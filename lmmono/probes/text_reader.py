"""Texts to token ids as probes and tuned models read them: after a BOS or end-of-text, cut."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lmmono.data.framing import text_start
from lmmono.data.tokenizing import plain_encoder
from lmmono.errors import RobustnessError


class TextReader:
    """A tokenizer with the bounds of its model.

    A text stands after what documents stand after in training: the BOS that the tokenizer adds, or
    else an end-of-text token.

    Attributes:
        tokenizer: The tokenizer.
        first: Id of the token before each text.
        n_ctx: Most tokens of a text, that one included; None where the model has no limit.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Take the given tokenizer, or the model's own.

        Raises:
            RobustnessError: There is no tokenizer.
        """
        tokenizer = tokenizer or getattr(model, "tokenizer", None)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise RobustnessError(
                "texts need the model's tokenizer: pass tokenizer=, a fast one of transformers"
            )
        config: Any = getattr(model, "config", None)
        start = text_start(tokenizer)
        self.tokenizer, self._tokenize = tokenizer, plain_encoder(tokenizer)
        self.first = 0 if start is None else start
        self.n_ctx: int | None = getattr(config, "max_position_embeddings", None)
        self._d_vocab: int | None = getattr(config, "vocab_size", None)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that decides the ids of a text."""
        backend = self.tokenizer.backend_tokenizer.to_str()
        return hashlib.sha256(f"{self.first} {self.n_ctx} {backend}".encode()).hexdigest()

    def read(self, texts: Sequence[str]) -> tuple[list[Int64[np.ndarray, " pos"]], int, int]:
        """Return the token ids of texts, how many texts were cut, and how many have no token.

        Raises:
            RobustnessError: An id is beyond the model's vocabulary.
        """
        most = None if self.n_ctx is None else self.n_ctx - 1
        tokens = self._tokenize(list(texts)) if texts else []
        first = np.array([self.first], np.int64)
        ids = [np.concatenate([first, row[:most].astype(np.int64)]) for row in tokens]
        largest = max((int(row.max()) for row in ids), default=0)
        if self._d_vocab is not None and largest >= self._d_vocab:
            raise RobustnessError(
                f"texts: the tokenizer gives id {largest}, the model has {self._d_vocab} tokens; "
                "pass the tokenizer that the model was trained with"
            )
        n_truncated = 0 if most is None else sum(len(row) > most for row in tokens)
        return ids, n_truncated, sum(not len(row) for row in tokens)

    def block(self, ids: Sequence[Int64[np.ndarray, "_"]]) -> Int64[Tensor, "batch pos"]:
        """Return ids in one block, padded at the end: a causal model's tokens see nothing of it."""
        padded = np.full((len(ids), max(map(len, ids))), self.first, np.int64)
        for row, text in zip(padded, ids, strict=True):
            row[: len(text)] = text
        return torch.from_numpy(padded)
