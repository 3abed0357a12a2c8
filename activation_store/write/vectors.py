"""Hooks that are kept whole: one vector per token, buffered until a shard is full.

The rows of all vector hooks are aligned: a token whose vector is not finite (or beyond the range of
the stored type) at one hook is left out at every hook, and counted at the one.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from activation_store.hooks import LARGEST, Vectors
from activation_store.write.ranks import Held
from activation_store.write.summary import VectorsTotal

SHARD_BYTES = 2**26
"""Bytes of the widest hook's vectors after which a shard is written."""


class VectorBlock(NamedTuple):
    """Vectors of all hooks for the same tokens."""

    seq: Int32[np.ndarray, " n"]
    pos: Int32[np.ndarray, " n"]
    vectors: dict[str, np.ndarray]


class VectorLog:
    """Vectors not yet written, and what was seen of each hook."""

    def __init__(self, hooks: Sequence[Vectors]) -> None:
        self.hooks = tuple(hooks)
        self.n_tokens = 0
        self.n_vectors = 0
        self.odd = np.zeros((len(hooks), 3), np.int64)
        """NaN, infinite and overflowing activations per hook."""
        self._waiting: list[VectorBlock] = []
        self._n_bytes = 0

    def add(
        self,
        seq: Int32[np.ndarray, " batch"],
        docs: Int32[np.ndarray, "batch n_ctx"],
        blocks: Mapping[str, Float32[np.ndarray, "batch n_ctx d"]],
    ) -> None:
        """Take a batch; the values are copied."""
        if not self.hooks:
            return
        keep = docs >= 0
        self.n_tokens += int(keep.sum())
        rounded: dict[str, np.ndarray] = {}
        for i, hook in enumerate(self.hooks):
            with np.errstate(over="ignore"):
                rounded[hook.hook] = blocks[hook.hook].astype(hook.dtype)
            if not np.isfinite(rounded[hook.hook]).all():
                keep = keep & self._finite(i, blocks[hook.hook], docs >= 0)
        row, pos = np.nonzero(keep)
        taken = {
            name: x.reshape(-1, x.shape[-1]) if keep.all() else x[keep]
            for name, x in rounded.items()
        }
        self._waiting.append(VectorBlock(seq[row], pos.astype(np.int32), taken))
        self.n_vectors += len(row)
        self._n_bytes += max(x.nbytes for x in taken.values())

    def _finite(self, i: int, x: np.ndarray, real: np.ndarray) -> Bool[np.ndarray, "batch n_ctx"]:
        """Count what cannot be stored of hook i and return which tokens can."""
        values = x[real]
        too_large = np.isfinite(values) & (np.abs(values) > LARGEST[self.hooks[i].dtype])
        self.odd[i] += [np.isnan(values).sum(), np.isinf(values).sum(), too_large.sum()]
        return np.asarray((np.abs(x) <= LARGEST[self.hooks[i].dtype]).all(axis=-1))

    @property
    def is_full(self) -> bool:
        """Whether a shard should be written."""
        return self._n_bytes >= SHARD_BYTES

    def take(self) -> VectorBlock | None:
        """Return what waits, in the order it came."""
        waiting = self._waiting
        self._waiting, self._n_bytes = [], 0
        if not any(len(block.seq) for block in waiting):
            return None
        return VectorBlock(
            np.concatenate([block.seq for block in waiting]),
            np.concatenate([block.pos for block in waiting]),
            {
                hook.hook: np.concatenate([block.vectors[hook.hook] for block in waiting])
                for hook in self.hooks
            },
        )

    def dump(self) -> dict[str, np.ndarray]:
        """Return what must be remembered after a commit."""
        return {
            "vectors.odd": self.odd,
            "vectors.counts": np.array([self.n_tokens, self.n_vectors]),
        }

    def restore(self, held: Held) -> None:
        """Take up what `dump` gave."""
        self.odd[:] = held["vectors.odd"]
        self.n_tokens, self.n_vectors = held["vectors.counts"].tolist()

    def totals(self, others: Sequence[Held | None]) -> list[VectorsTotal]:
        """Return what all ranks have seen together, per hook."""
        states = [self.dump(), *(held for held in others if held is not None)]
        odd = np.sum([held["vectors.odd"] for held in states], axis=0)
        n_tokens, n_vectors = np.sum([held["vectors.counts"] for held in states], axis=0).tolist()
        return [
            VectorsTotal(hook, n_tokens, n_vectors, odd[i]) for i, hook in enumerate(self.hooks)
        ]
