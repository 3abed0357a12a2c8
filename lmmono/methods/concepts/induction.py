"""A language model of matches, after Induction-Gram (2411.00066): every word has its grounding.

Three sources of the next token, of which one speaks:
    corpus    the longest suffix of the context that a reference corpus has (infini-gram)
    context   the longest suffix that occurs earlier in the context (exact induction)
    fuzzy     every earlier place, weighted by its likeness to this one (fuzzy induction)
The corpus speaks where it matches more tokens than the context and more than `threshold`; else the
context, where it matches more than that; else fuzzy. Likeness is exp(-(1 - cos) / temperature) of
an encoder's rows, or exp(-JSD) of next-token distributions, with the mixture's JSD, where the
released code has half of the sum of both KL. Their encoder of three layers is distilled from a
large model; here `rows` is any function of ids, such as a hook of a small one, and without one the
longest match speaks. Losses need more than the paper's accuracies do: no token may get 0, so the
speaker is mixed with the corpus' unigrams (`floor`), which is ours.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float64, Int64
from numpy import ndarray

from lmmono.errors import DataError
from lmmono.methods.concepts.suffixes import SuffixIndex

Source = Literal["corpus", "context", "fuzzy", "unigram"]
Ids = Int64[ndarray, "_"]


@dataclass(frozen=True, slots=True)
class Grounding:
    """Why a token is expected: where it was seen, and how much that place counts."""

    source: Source
    n_matched: int
    """Tokens of the suffix that match; 0 for fuzzy and unigram."""
    places: tuple[tuple[int, float, int], ...]
    """Position of the token after each match, in its corpus or context, its weight, and the token:
    the heaviest first, 16 at most."""


@dataclass(frozen=True, slots=True)
class MatchedLoss:
    """How well a model of matches predicts."""

    loss: float
    """Nats per token."""
    accuracy: float
    """Share of tokens that were the likeliest."""
    n_tokens: int
    speakers: dict[str, float]
    """Share of tokens by source."""


class InductionGram:
    """A language model without weights: a corpus in `fit`, ids in `predict`."""

    def __init__(
        self,
        *,
        d_vocab: int,
        threshold: int = 8,
        rows: Callable[[Ids], Float[ndarray, "_ _"]] | None = None,
        likeness: Literal["cosine", "jsd"] = "cosine",
        temperature: float = 0.1,
        floor: float = 0.1,
        max_n: int = 32,
    ) -> None:
        if not 0 < floor < 1 or threshold < 1:
            raise DataError(f"induction: floor {floor}, threshold {threshold}: want 0-1, 1 or more")
        self.d_vocab, self.threshold, self.floor, self.max_n = d_vocab, threshold, floor, max_n
        self._rows, self._likeness, self._temperature = rows, likeness, temperature
        self._corpus: Ids = np.zeros(0, np.int64)
        self._index = SuffixIndex(self._corpus)
        self._unigram = np.full(d_vocab, 1 / d_vocab)

    def fit(self, ids: Ids) -> "InductionGram":
        """Index a reference corpus: its suffix array, and how often each token is there."""
        self._corpus = np.asarray(ids, np.int64)
        if len(ids) and not 0 <= int(self._corpus.min()) <= int(self._corpus.max()) < self.d_vocab:
            raise DataError(f"induction: ids beyond d_vocab {self.d_vocab}; give the tokenizer's")
        self._index = SuffixIndex(self._corpus)
        counts = np.bincount(self._corpus, minlength=self.d_vocab) + 1.0
        self._unigram = counts / counts.sum()
        return self

    def predict(self, ids: Ids) -> tuple[Float64[ndarray, " d_vocab"], Grounding]:
        """Return the distribution of the token after a context, and its grounding."""
        return self._at(np.asarray(ids, np.int64), len(ids), self._encoded(ids))

    def evaluate(self, contexts: Sequence[Ids]) -> MatchedLoss:
        """Return the loss of all tokens but the first of contexts."""
        total, right, speakers = 0.0, 0, Counter[str]()
        for ids in contexts:
            rows = self._encoded(ids)
            for n in range(1, len(ids)):
                p, why = self._at(ids, n, rows)
                total -= float(np.log(p[ids[n]]))
                right += int(p.argmax() == ids[n])
                speakers[why.source] += 1
        n_tokens = sum(speakers.values())
        if not n_tokens:
            raise DataError("induction: contexts of two tokens or more are wanted")
        shares = {name: count / n_tokens for name, count in speakers.items()}
        return MatchedLoss(total / n_tokens, right / n_tokens, n_tokens, shares)

    def _encoded(self, ids: Any) -> Float[ndarray, "_ _"] | None:
        return None if self._rows is None else np.asarray(self._rows(np.asarray(ids)), np.float64)

    def _at(
        self, ids: Ids, n: int, rows: Float[ndarray, "_ _"] | None
    ) -> tuple[Float64[ndarray, " d_vocab"], Grounding]:
        """Return what follows the first n tokens of a context."""
        seen = ids[:n]
        n_corpus, low, high = self._in_corpus(seen)
        n_context, after = self._in_context(seen)
        can_be_fuzzy = rows is not None and n > 1
        least = self.threshold if can_be_fuzzy else 0
        if n_corpus > n_context and n_corpus > least:
            at = self._index.order[low:high] + n_corpus
            at = at[at < len(self._corpus)]
            return self._told("corpus", n_corpus, at, np.ones(len(at)), self._corpus[at])
        if n_context > least:
            return self._told("context", n_context, after, np.ones(len(after)), seen[after])
        if can_be_fuzzy:
            assert rows is not None
            at = np.arange(1, n)
            weights = self._alike(rows[: n - 1], rows[n - 1])
            return self._told("fuzzy", 0, at, weights, seen[at])
        return self._told("unigram", 0, np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))

    def _told(
        self, source: Source, n: int, at: Ids, weights: Any, tokens: Ids
    ) -> tuple[Float64[ndarray, " d_vocab"], Grounding]:
        p, total = self._unigram, float(weights.sum())
        if total > 0:
            spoken = np.bincount(tokens, weights, self.d_vocab) / total
            p = self.floor * self._unigram + (1 - self.floor) * spoken
        best = np.argsort(-weights, kind="stable")[:16].tolist()
        places = tuple((int(at[i]), float(weights[i] / total), int(tokens[i])) for i in best)
        return p, Grounding(source, n, places)

    def _alike(self, others: Any, this: Any) -> Float[ndarray, " _"]:
        if self._likeness == "jsd":
            middle = (others + this) / 2
            logs = [
                np.log(np.clip(distribution, 1e-30, None))
                for distribution in (others, this, middle)
            ]
            both = (others * (logs[0] - logs[2])).sum(1) + (this * (logs[1] - logs[2])).sum(1)
            return np.exp(-both / 2)
        sizes = np.linalg.norm(others, axis=1) * np.linalg.norm(this)
        return np.exp(-(1 - others @ this / np.clip(sizes, 1e-30, None)) / self._temperature)

    def _in_context(self, seen: Ids) -> tuple[int, Ids]:
        """Return the length of the longest suffix that occurs before, and where it goes on."""
        after = np.arange(1, len(seen))
        n = 0
        while n < self.max_n and len(after):
            going = after[(after - n > 0)]
            going = going[seen[going - n - 1] == seen[len(seen) - n - 1]]
            if not len(going):
                break
            after, n = going, n + 1
        return n, after if n else after[:0]

    def _in_corpus(self, seen: Ids) -> tuple[int, int, int]:
        """Return the longest suffix that the corpus goes on after, and its range of suffixes."""
        longest = (0, 0, 0)
        low, high = 1, min(self.max_n, len(seen))
        while low <= high:  # a suffix that is there has all shorter ones there
            n = (low + high) // 2
            where = self._index.range_of(seen[len(seen) - n :])
            begins = self._index.order[slice(*where)]
            if len(begins) and begins.min() + n < len(self._corpus):
                longest, low = (n, *where), n + 1
            else:
                high = n - 1
        return longest
