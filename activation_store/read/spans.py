"""Runs of numbers that follow each other, as pairs: the first and the one after the last."""

import numpy as np
from jaxtyping import Int64

Spans = Int64[np.ndarray, "_ 2"]
"""The first of some numbers that follow each other, and the one after the last."""


def cut(spans: Spans, begins: Int64[np.ndarray, " k"]) -> tuple[Spans, Int64[np.ndarray, " m"]]:
    """Return the spans cut where the ranges begin, and the range that each part lies in.

    >>> parts, within = cut(np.array([[1, 5], [7, 8]]), np.array([0, 4, 6]))
    >>> parts.tolist(), within.tolist()
    ([[1, 4], [4, 5], [7, 8]], [0, 1, 2])
    """
    first = np.searchsorted(begins, spans[:, 0], "right") - 1
    n = np.searchsorted(begins, spans[:, 1], "left") - first
    within = np.repeat(first - np.cumsum(n) + n, n) + np.arange(n.sum())
    ends = np.append(begins[1:], np.iinfo(np.int64).max)
    parts = np.repeat(spans, n, axis=0)
    parts[:, 0] = np.maximum(parts[:, 0], begins[within])
    parts[:, 1] = np.minimum(parts[:, 1], ends[within])
    return parts, within
