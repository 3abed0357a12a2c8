"""Memory for vectors, used again when nobody holds a part of it any more.

Fresh memory has to be cleared by the system before it is written, and what was used a moment ago is
still in the processor's cache.
"""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from activation_store.hooks import Dtype

Kind = Dtype | np.dtype[Any]


class _Buffer(NamedTuple):
    memory: np.ndarray
    """The bytes themselves; nothing outside refers to this array."""
    given: weakref.ref[np.ndarray]
    """The array over them that all parts given out refer to; dead when no part is left."""


class Buffers:
    """Arrays [up to n_rows, width], one for each of some widths and types."""

    def __init__(self, n_rows: int, kinds: Sequence[tuple[int, Kind]], kept: int) -> None:
        """Remember the sizes; memory is taken when it is asked for.

        Args:
            n_rows: rows at most.
            kinds: width and type of each array.
            kept: arrays of each kind that are remembered, to be used again.
        """
        self._n_rows, self._kept = n_rows, kept
        self._kinds = [(width, np.dtype(dtype)) for width, dtype in kinds]
        self._held: list[list[_Buffer]] = [[] for _ in kinds]

    def take(self, n: int) -> list[np.ndarray]:
        """Return an array [n, width] of each kind; what is in it is not defined."""
        return [self._take(i, n) for i in range(len(self._kinds))]

    def _take(self, i: int, n: int) -> np.ndarray:
        width, dtype = self._kinds[i]
        free = [buffer.memory for buffer in self._held[i] if buffer.given() is None]
        memory = free[-1] if free else np.empty(self._n_rows * width * dtype.itemsize, np.uint8)
        # through a memoryview, so that parts refer to this array and not to the memory
        given = np.frombuffer(memory.data, dtype)
        others = [buffer for buffer in self._held[i] if buffer.memory is not memory]
        self._held[i] = [*others, _Buffer(memory, weakref.ref(given))][-self._kept :]
        return given[: n * width].reshape(n, width)
