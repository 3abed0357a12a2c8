"""Vectors straight from a model, without a store: rows are run through it as they are needed.

The order is the store's (`activation_store.read.selection`), rows of tokens for its blocks: rows in
random order are cut into pools, and the tokens of a pool are mixed. So a batch depends on the
model, the rows, the settings and its number alone, and any batch can be the first.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from activation_store.read.selection import EpochOrder, MixedTokens, Mixing
from activation_store.read.stream import BUFFER_BYTES
from activation_store.write.recorder import digest as weights_digest
from lmmono.data.tokens import TokenRows
from lmmono.dictionaries.vector_source import Vectors
from lmmono.errors import DictionaryError
from lmmono.models.hooks import bare, hook_width, match_hooks, run_until

FORWARD_TOKENS = 8192
"""Tokens per forward pass."""


def model_vectors(
    model: nn.Module,
    rows: TokenRows | Sequence[TokenRows],
    hooks: str | Sequence[str],
    *,
    batch_tokens: int = 4096,
    seed: int = 0,
    max_tokens: int | None = None,
    buffer_tokens: int | None = None,
) -> Vectors:
    """Return the vectors of a model's hooks on rows of tokens, computed when they are asked for.

    The model runs in evaluation mode without gradients and no further than the last hook; it is
    left in the mode it had, and must not change while the vectors are in use. Vectors are float32
    and where the model is; heads are flattened.

    Args:
        model: Any model of `lmmono.models.hooks`.
        rows: Rows of one split, or of several, all of one length.
        hooks: Names or globs.
        batch_tokens: Vectors per batch; the last batch of an epoch holds what is left.
        seed: Seed of the order, a new one each epoch.
        max_tokens: Tokens per split, whole rows; None takes all.
        buffer_tokens: Tokens whose rows are run and mixed together; by default 128 MiB of vectors.

    Raises:
        ModelError: A hook matches nothing, or has no width per token.
        DataError: `max_tokens` holds no row.
        DictionaryError: A number is below 1, or the rows differ in length.
    """
    given = [rows] if isinstance(rows, TokenRows) else list(rows)
    parts = [part.limit(max_tokens) for part in given]
    if len({part.n_ctx for part in parts}) != 1:
        raise DictionaryError("rows: want rows of one length, of one split or several")
    for name, value in (("batch_tokens", batch_tokens), ("buffer_tokens", buffer_tokens)):
        if value is not None and value < 1:
            raise DictionaryError(f"{name}: want an integer >= 1, got {value}")
    return _ModelVectors(bare(model), parts, hooks, batch_tokens, seed, buffer_tokens)


class _ModelVectors(Vectors):
    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[TokenRows],
        hooks: str | Sequence[str],
        batch_tokens: int,
        seed: int,
        buffer_tokens: int | None,
    ) -> None:
        self._model, self._parts = model, parts
        self.widths = {name: hook_width(model, name) for name in match_hooks(model, hooks)}
        self.n_tokens = sum(part.ids.size for part in parts)
        self.batch_tokens = min(batch_tokens, self.n_tokens)
        pool = buffer_tokens or max(1, BUFFER_BYTES // (4 * sum(self.widths.values())))
        self._n_ctx = parts[0].n_ctx
        self._mixing = Mixing(self.n_tokens, self._n_ctx, pool, seed, shuffle=True)
        corpus = [_rows_digest(part) for part in parts]
        self.facts = {"model_digest": weights_digest(model), "n_ctx": self._n_ctx}
        decides = [self.facts, corpus, list(self.widths), self.batch_tokens, seed, pool]
        self.digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def _batches(self, start: int) -> Iterator[dict[str, Float[Tensor, "n _"]]]:
        number, first = divmod(start, -(-self.n_tokens // self.batch_tokens))
        while True:
            yield from self._epoch(self._mixing.epoch(number), first * self.batch_tokens)
            number, first = number + 1, 0

    def _epoch(self, epoch: EpochOrder, begin: int) -> Iterator[dict[str, Float[Tensor, "n _"]]]:
        """Yield the batches of an epoch from a token on; they reach over the ends of pools."""
        held = {hook: torch.empty(0) for hook in self.widths}
        for number in range(epoch.n_pools):
            start, stop = (int(place) for place in epoch.starts[number : number + 2])
            if stop <= begin:
                continue
            mixed = self._run(epoch.pool(number))
            fresh = {hook: x[max(0, begin - start) :] for hook, x in mixed.items()}
            ready = {
                hook: torch.cat([held[hook], x]) if len(held[hook]) else x
                for hook, x in fresh.items()
            }
            n = len(next(iter(ready.values())))
            n_whole = n if stop == self.n_tokens else n - n % self.batch_tokens
            for at in range(0, n_whole, self.batch_tokens):
                yield {hook: x[at : at + self.batch_tokens] for hook, x in ready.items()}
            held = {hook: x[n_whole:].clone() for hook, x in ready.items()}

    def _run(self, pool: MixedTokens) -> dict[str, Float[Tensor, "n _"]]:
        """Return the vectors of a pool, mixed."""
        ids = self._ids(np.unique(pool.tokens // self._n_ctx))
        batch_rows = max(1, FORWARD_TOKENS // self._n_ctx)
        found: dict[str, list[Tensor]] = {hook: [] for hook in self.widths}
        was_training = self._model.training
        self._model.eval()
        try:
            for first in range(0, len(ids), batch_rows):
                rows = torch.from_numpy(ids[first : first + batch_rows])
                acts = run_until(self._model, rows, list(self.widths))
                for hook, x in acts.items():
                    found[hook].append(x.reshape(-1, self.widths[hook]).float())
        finally:
            self._model.train(was_training)
        device = next(self._model.parameters()).device
        assert pool.order is not None
        order = torch.from_numpy(pool.order).to(device)
        return {hook: torch.cat(parts)[order] for hook, parts in found.items()}

    def _ids(self, numbers: np.ndarray) -> np.ndarray:
        """Return rows of token ids by their numbers over all parts."""
        ends = np.cumsum([len(part) for part in self._parts])
        found: list[np.ndarray] = []
        for part, end in zip(self._parts, ends, strict=True):
            inside = numbers[(numbers >= end - len(part)) & (numbers < end)]
            found.append(part.ids[inside - (end - len(part))].astype(np.int64))
        return np.concatenate(found)


def _rows_digest(part: TokenRows) -> list[str | int]:
    """Return what tells rows from others: their corpus and place in it, or their tokens."""
    if part.corpus is not None:
        return [part.corpus.digest, part.split, part.first_seq_id, len(part)]
    return [hashlib.sha256(part.ids.tobytes()).hexdigest(), len(part)]
