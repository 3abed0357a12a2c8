"""Where the vectors come from that dictionaries are fitted on.

`VectorSource` gives an endless, seeded order of batches that can be entered at any batch; that is
what makes a stopped fit resume with equal bits. There are four kinds: of a store, of an array, of a
model that runs as batches are asked for, and of any of these with its structure shuffled away.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor, nn

import activation_store as astore
from activation_store.read.selection import EpochOrder, MixedTokens, Mixing
from activation_store.read.stream import BUFFER_BYTES, VectorStream
from activation_store.write.recorder import digest as weights_digest
from lmmono.data.tokens import TokenRows
from lmmono.errors import DictionaryError
from lmmono.models.hooks import bare, hook_width, match_hooks, run_until

FORWARD_TOKENS = 8192
"""Tokens per forward pass of a model; sets the memory, not the result."""

TokenMask = Bool[ndarray, "n_rows n_ctx"]
LeftOut = astore.Skip | TokenMask | Callable[[TokenRows], TokenMask]
"""Tokens that do not count: by id and place, as a mask of some rows, or as a function that gives
one of any rows."""


class VectorSource(ABC):
    """Batches of vectors of one or several hooks, row-aligned, without end.

    Attributes:
        widths: Width of each hook's vectors. Bare arrays have one hook named "".
        n_tokens: Different vectors there are: one epoch.
        batch_tokens: VectorSource per batch; the last batch of an epoch may be smaller.
        digest: Hash of which vectors come in which order.
        facts: What else is known of them, such as `model_digest`; goes into the dictionary.
    """

    widths: dict[str, int]
    n_tokens: int
    batch_tokens: int
    digest: str
    facts: dict[str, Any]

    @abstractmethod
    def _batches(self, start: int) -> Iterator[dict[str, Float[Tensor, "n _"]]]: ...

    def batches(self, start: int = 0) -> Iterator[dict[str, Float[Tensor, "n _"]]]:
        """Yield float32 batches for ever, from batch number `start` on.

        Raises:
            DictionaryError: A batch holds NaN or infinite values.
        """
        for number, batch in enumerate(self._batches(start), start=start):
            for hook, x in batch.items():
                if not torch.isfinite(x).all():
                    bad = int((~torch.isfinite(x)).any(-1).sum())
                    raise DictionaryError(
                        f"{hook or 'vectors'}: {bad} of {len(x)} vectors of batch {number} are NaN "
                        "or infinite; look for the tokens they come from, or capture in float32"
                    )
            yield batch

    def first(self, max_tokens: int) -> dict[str, Float[Tensor, "n _"]]:
        """Return the first vectors of the seeded order, at most one epoch of them.

        Raises:
            DictionaryError: A batch holds NaN or infinite values.
        """
        n = min(max_tokens, self.n_tokens)
        batches, n_read = [], 0
        for batch in self.batches():
            batches.append(batch)
            n_read += len(next(iter(batch.values())))
            if n_read >= n:
                break
        return {hook: torch.cat([batch[hook] for batch in batches])[:n] for hook in self.widths}

    def only_hook(self) -> str:
        """Return the name of the only hook.

        Raises:
            DictionaryError: There are several.
        """
        if len(self.widths) > 1:
            raise DictionaryError(
                f"vectors: want one hook, got {', '.join(self.widths)}; choose one, or fit one "
                "dictionary per hook in one pass with lm.dictionaries.fit_together"
            )
        return next(iter(self.widths))


class StoreVectors(VectorSource):
    """What `store.vectors(...)` reads, epoch after epoch."""

    def __init__(self, stream: VectorStream) -> None:
        self._stream = stream
        self.widths, self.n_tokens = stream.widths, stream.n_tokens
        self.batch_tokens = stream.batch_tokens
        cursor = {k: v for k, v in stream.cursor.items() if k not in ("epoch", "token")}
        self.digest = hashlib.sha256(repr(sorted(cursor.items())).encode()).hexdigest()
        self.facts = {}

    def _batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        epoch, within = divmod(start, self._stream.n_batches)
        cursor = {**self._stream.cursor, "epoch": epoch, "token": within * self.batch_tokens}
        for batch in self._stream.again(cursor=cursor, epochs=None, framework="torch"):
            by_hook = batch if isinstance(batch, dict) else {self.only_hook(): batch}
            yield {hook: x.float() for hook, x in by_hook.items()}


class ArrayVectors(VectorSource):
    """An array [n, d_in] in memory, in a new seeded order each epoch."""

    def __init__(
        self, array: Any, *, batch_tokens: int = 4096, seed: int = 0, hook: str = ""
    ) -> None:
        x = torch.as_tensor(array).float()
        if x.ndim != 2 or not len(x):
            raise DictionaryError(f"vectors: want an array [n, d_in], got shape {tuple(x.shape)}")
        self._x, self._seed = x, seed
        self.widths, self.n_tokens = {hook: x.shape[1]}, len(x)
        self.batch_tokens = min(batch_tokens, len(x))
        order = f"{batch_tokens} {seed}".encode()
        self.digest = hashlib.sha256(x.numpy().tobytes() + order).hexdigest()
        self.facts = {}

    def _batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        n_batches = -(-self.n_tokens // self.batch_tokens)
        epoch, first = divmod(start, n_batches)
        while True:
            order = torch.from_numpy(
                np.random.default_rng((self._seed, epoch)).permutation(self.n_tokens)
            )
            for number in range(first, n_batches):
                rows = order[number * self.batch_tokens : (number + 1) * self.batch_tokens]
                yield {self.only_hook(): self._x[rows]}
            epoch, first = epoch + 1, 0


class _ModelVectors(VectorSource):
    """Rows of tokens run through a model as batches are asked for.

    The order is the store's (`activation_store.read.selection`), rows of tokens for its blocks:
    rows in random order are cut into pools, and the tokens of a pool are mixed. So a batch depends
    on the model, the rows, the settings and its number alone, and any batch can be the first.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[TokenRows],
        hooks: str | Sequence[str],
        batch_tokens: int,
        seed: int,
        buffer_tokens: int | None,
        skip: LeftOut | None,
    ) -> None:
        self._model, self._parts = model, parts
        self.widths = {name: hook_width(model, name) for name in match_hooks(model, hooks)}
        self._counted = np.concatenate([counted_tokens(part, skip) for part in parts])
        self.n_tokens = int(self._counted.sum())
        if self.n_tokens == 0:
            raise DictionaryError("rows: no token is left: all are padding or skipped")
        self.batch_tokens = min(batch_tokens, self.n_tokens)
        pool = buffer_tokens or max(1, BUFFER_BYTES // (4 * sum(self.widths.values())))
        self._n_ctx = parts[0].n_ctx
        self._mixing = Mixing(self._counted.size, self._n_ctx, pool, seed, shuffle=True)
        # what tells rows from others: their corpus and place in it, or else their tokens
        rows = [
            [part.corpus.digest, hashlib.sha256(part.seq_ids.tobytes()).hexdigest()]
            if part.corpus is not None
            else [hashlib.sha256(part.ids.tobytes()).hexdigest(), len(part)]
            for part in parts
        ]
        self.facts = {"model_digest": weights_digest(model), "n_ctx": self._n_ctx}
        decides: list[Any] = [self.facts, rows, list(self.widths), self.batch_tokens, seed, pool]
        if self.n_tokens < self._counted.size:
            decides.append(hashlib.sha256(self._counted.tobytes()).hexdigest())
        self.digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def _batches(self, start: int) -> Iterator[dict[str, Float[Tensor, "n _"]]]:
        number, first = divmod(start, -(-self.n_tokens // self.batch_tokens))
        while True:
            yield from self._epoch(self._mixing.epoch(number), first * self.batch_tokens)
            number, first = number + 1, 0

    def _epoch(self, epoch: EpochOrder, begin: int) -> Iterator[dict[str, Float[Tensor, "n _"]]]:
        """Yield the batches of an epoch from a token on; they reach over the ends of pools."""
        rest = {hook: torch.empty(0) for hook in self.widths}
        in_rows = self._counted.sum(axis=1)[epoch.blocks]
        starts = np.concatenate([[0], np.cumsum(in_rows)])[epoch.cuts].tolist()
        for number, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
            if stop <= begin:
                continue  # a pool before the first batch is never run
            ready = {
                hook: torch.cat([rest[hook], x[max(0, begin - start) :]])
                if len(rest[hook])
                else x[max(0, begin - start) :]
                for hook, x in self._run(epoch.pool(number)).items()
            }
            n = len(next(iter(ready.values())))
            n_whole = n if stop == self.n_tokens else n - n % self.batch_tokens
            for at in range(0, n_whole, self.batch_tokens):
                yield {hook: x[at : at + self.batch_tokens] for hook, x in ready.items()}
            # a copy, so that the pool's memory is free before the next one is run
            rest = {hook: x[n_whole:].clone() for hook, x in ready.items()}

    def _run(self, pool: MixedTokens) -> dict[str, Float[Tensor, "n _"]]:
        """Return the vectors of a pool, mixed."""
        numbers = np.unique(pool.tokens // self._n_ctx)
        ends = np.cumsum([len(part) for part in self._parts])
        rows_of = [
            (part, numbers[(numbers >= end - len(part)) & (numbers < end)] - end + len(part))
            for part, end in zip(self._parts, ends, strict=True)
        ]
        ids = np.concatenate([part.ids[rows] for part, rows in rows_of]).astype(np.int64)
        is_token = np.concatenate([part.doc_ids[rows] >= 0 for part, rows in rows_of])
        batch_rows = max(1, FORWARD_TOKENS // self._n_ctx)
        parts: dict[str, list[Tensor]] = {hook: [] for hook in self.widths}
        was_training = self._model.training
        self._model.eval()
        try:
            for first in range(0, len(ids), batch_rows):
                some = slice(first, first + batch_rows)
                rows, real = torch.from_numpy(ids[some]), torch.from_numpy(is_token[some])
                for hook, x in run_until(self._model, rows, list(self.widths), real).items():
                    parts[hook].append(x.reshape(-1, self.widths[hook]).float())
        finally:
            self._model.train(was_training)
        counted = self._counted.ravel()[pool.tokens]
        order = torch.from_numpy(pool.order[counted[pool.order]])
        # on the device of the hook: a model may be spread over several
        return {hook: torch.cat(x)[order.to(x[0].device)] for hook, x in parts.items()}


class _Shuffled(VectorSource):
    def __init__(self, source: VectorSource, seed: int) -> None:
        self._source, self._seed = source, seed
        self.widths, self.n_tokens = source.widths, source.n_tokens
        self.batch_tokens = source.batch_tokens
        self.digest = hashlib.sha256(
            json.dumps(["shuffled", seed, source.digest]).encode()
        ).hexdigest()
        self.facts = {**source.facts, "control": "shuffled", "control_seed": seed}

    def _batches(self, start: int) -> Iterator[dict[str, Float[Tensor, "n _"]]]:
        for number, batch in enumerate(self._source.batches(start), start=start):
            random = np.random.default_rng((self._seed, number))
            yield {
                hook: torch.from_numpy(random.permuted(x.cpu().numpy(), axis=0)).to(x.device)
                for hook, x in batch.items()
            }


def as_vectors(vectors: Any) -> VectorSource:
    """Return anything that holds vectors as `VectorSource`.

    Raises:
        DictionaryError: It is none of a vector stream, `VectorSource`, an array and a tensor.
    """
    if isinstance(vectors, VectorSource):
        return vectors
    if isinstance(vectors, VectorStream):
        return StoreVectors(vectors)
    if isinstance(vectors, np.ndarray | Tensor):
        return ArrayVectors(vectors)
    if isinstance(vectors, astore.Store):
        raise DictionaryError("vectors: got a store; say which hook: store.vectors(hook)")
    raise DictionaryError(
        "vectors: want store.vectors(hook), lm.model_vectors(...), an array or a tensor "
        f"[n, d_in], got {type(vectors).__name__}"
    )


def model_vectors(
    model: nn.Module,
    rows: TokenRows | Sequence[TokenRows],
    hooks: str | Sequence[str],
    *,
    batch_tokens: int = 4096,
    seed: int = 0,
    max_tokens: int | None = None,
    buffer_tokens: int | None = None,
    skip: LeftOut | None = None,
) -> VectorSource:
    """Return the vectors of a model's hooks on rows of tokens, computed when they are asked for.

    The model runs in evaluation mode without gradients and no further than the last hook; it is
    left in the mode it had, and must not change while the vectors are in use. Vectors are float32
    and where the model is; heads are flattened.

    Args:
        model: Any model of `lmmono.models.hooks`.
        rows: Rows of one split, or of several, all of one length.
        hooks: Names or globs.
        batch_tokens: VectorSource per batch; the last batch of an epoch holds what is left.
        seed: Seed of the order, a new one each epoch.
        max_tokens: Tokens per split, whole rows drawn by the seed; None takes all.
        buffer_tokens: Tokens whose rows are run and mixed together; by default 128 MiB of
            vectors.
        skip: Which tokens have no vector, besides padding (documents below 0): `astore.Skip`, a
            mask of the rows [n_rows, n_ctx], or a function that gives one; None skips none.

    Raises:
        ModelError: A hook matches nothing, or has no width per token.
        DataError: `max_tokens` holds no row.
        DictionaryError: A number is below 1, or the rows differ in length.
    """
    splits = [rows] if isinstance(rows, TokenRows) else list(rows)
    parts = [part.limit(max_tokens, seed=seed) for part in splits]
    if len({part.n_ctx for part in parts}) != 1:
        raise DictionaryError("rows: want rows of one length, of one split or several")
    for name, value in (("batch_tokens", batch_tokens), ("buffer_tokens", buffer_tokens)):
        if value is not None and value < 1:
            raise DictionaryError(f"{name}: want an integer >= 1, got {value}")
    return _ModelVectors(bare(model), parts, hooks, batch_tokens, seed, buffer_tokens, skip)


def counted_tokens(rows: TokenRows, skip: LeftOut | None) -> Bool[ndarray, "n_rows n_ctx"]:
    """Return which tokens of some rows count: those that are neither padding nor skipped.

    Raises:
        DictionaryError: A mask is not one of the rows.
    """
    is_token = np.asarray(rows.doc_ids) >= 0
    if skip is None:
        return is_token
    if isinstance(skip, astore.Skip):
        return is_token & ~skip.mask(rows.ids, rows.doc_ids)
    mask = np.asarray(skip(rows) if callable(skip) else skip)
    if mask.shape != rows.ids.shape or mask.dtype != bool:
        raise DictionaryError(
            f"skip: want a mask of bools {list(rows.ids.shape)}, one per token of the rows in use, "
            f"got {mask.dtype} {list(mask.shape)}; a function of the rows fits any limit"
        )
    return is_token & ~mask


def shuffled(vectors: Any, seed: int = 0) -> VectorSource:
    """Return vectors whose every coordinate is permuted over the tokens of its batch.

    Each coordinate keeps its own distribution and no coordinate knows of another, nor one hook of
    another. Batch k depends on the vectors, the seed and k alone.

    Args:
        vectors: What `Dictionary.fit` takes.
        seed: Seed of the permutations.

    Raises:
        DictionaryError: These are no vectors.
    """
    return _Shuffled(as_vectors(vectors), seed)
