"""Where the vectors come from that dictionaries are fitted on.

`Vectors` gives an endless, seeded order of batches that can be entered at any batch: that is what
makes a stopped fit go on with equal bits. Here are the store's and those of arrays; `live.py` has
those of a model, and `controls.py` those that are shuffled.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import activation_store as astore
from activation_store.read.stream import VectorStream
from lmmono.errors import DictionaryError


class Vectors(ABC):
    """Batches of vectors of one or several hooks, row-aligned, without end.

    Attributes:
        widths: Width of each hook's vectors. Bare arrays have one hook named "".
        n_tokens: Different vectors there are: one epoch.
        batch_tokens: Vectors per batch; the last batch of an epoch may be smaller.
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
                "dictionary per hook in one pass with lm.fit_together"
            )
        return next(iter(self.widths))


class StoreVectors(Vectors):
    """What `store.vectors(...)` reads, epoch after epoch."""

    def __init__(self, stream: VectorStream) -> None:
        self._stream = stream
        self.widths, self.n_tokens = stream.widths, stream.n_tokens
        self.batch_tokens = stream.batch_tokens
        cursor = {k: v for k, v in stream.cursor.items() if k not in ("epoch", "token")}
        self.digest = _digest(repr(sorted(cursor.items())).encode())
        self.facts = {}

    def _batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        epoch, within = divmod(start, self._stream.n_batches)
        cursor = {**self._stream.cursor, "epoch": epoch, "token": within * self.batch_tokens}
        for batch in self._stream.again(cursor=cursor, epochs=None, framework="torch"):
            found = batch if isinstance(batch, dict) else {self.only_hook(): batch}
            yield {hook: x.float() for hook, x in found.items()}


class ArrayVectors(Vectors):
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
        self.digest = _digest(x.numpy().tobytes() + f"{batch_tokens} {seed}".encode())
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


def as_vectors(vectors: Any) -> Vectors:
    """Return anything that holds vectors as `Vectors`.

    Raises:
        DictionaryError: It is none of a vector stream, `Vectors`, an array and a tensor.
    """
    if isinstance(vectors, Vectors):
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


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
