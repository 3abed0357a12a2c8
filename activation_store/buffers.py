"""Memory for pools of vectors, used again when nobody holds a part of it any more.

Fresh memory has to be cleared by the system before it is written: for vectors read from the page
cache that costs a third of the whole.
"""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from activation_store.hooks import Dtype

_KEPT = 3
"""Buffers remembered: what is given out, what is read ahead, and what was given before."""


class _Buffer(NamedTuple):
    memory: np.ndarray
    """The bytes themselves; nothing outside refers to this array."""
    given: weakref.ref[np.ndarray]
    """The array over them that all parts given out refer to; dead when no part is left."""


class Buffers:
    """Arrays [up to n_rows, width] of one type for each of some widths."""

    def __init__(self, n_rows: int, widths: Sequence[int], dtype: Dtype) -> None:
        self._n_rows, self._widths, self._dtype = n_rows, tuple(widths), np.dtype(dtype)
        self._held: list[list[_Buffer]] = [[] for _ in widths]

    def take(self, n: int) -> list[np.ndarray]:
        """Return an array [n, width] per width; what is in it is not defined."""
        return [self._take(i, n) for i in range(len(self._widths))]

    def _take(self, i: int, n: int) -> np.ndarray:
        free = [buffer.memory for buffer in self._held[i] if buffer.given() is None]
        n_bytes = self._n_rows * self._widths[i] * self._dtype.itemsize
        memory = free[0] if free else np.empty(n_bytes, np.uint8)
        # through a memoryview, so that parts refer to this array and not to the memory
        given = np.frombuffer(memory.data, self._dtype)
        others = [buffer for buffer in self._held[i] if buffer.memory is not memory]
        self._held[i] = [*others, _Buffer(memory, weakref.ref(given))][-_KEPT:]
        return given[: n * self._widths[i]].reshape(n, self._widths[i])
