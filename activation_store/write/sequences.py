"""A number for each of many sequences, and sets of sequences as ranges; both stay small."""

import numpy as np
from jaxtyping import Int64, UInt64

_CHUNK_BITS = 10

Names = Int64[np.ndarray, " n"]
Ranges = Int64[np.ndarray, "m 2"]


class SequenceTable:
    """A 64-bit number per sequence, 0 for one that is not there; eight bytes each if dense."""

    def __init__(self) -> None:
        self._chunks: dict[int, np.ndarray] = {}

    def get(self, names: Names) -> UInt64[np.ndarray, " n"]:
        """Return the numbers of some sequences."""
        out = np.zeros(len(names), np.uint64)
        for chunk in np.unique(names >> _CHUNK_BITS).tolist():
            held = self._chunks.get(chunk)
            if held is not None:
                here = names >> _CHUNK_BITS == chunk
                out[here] = held[names[here] & ((1 << _CHUNK_BITS) - 1)]
        return out

    def put(self, names: Names, numbers: UInt64[np.ndarray, " n"]) -> None:
        """Set the numbers of some sequences."""
        for chunk in np.unique(names >> _CHUNK_BITS).tolist():
            held = self._chunks.setdefault(chunk, np.zeros(1 << _CHUNK_BITS, np.uint64))
            here = names >> _CHUNK_BITS == chunk
            held[names[here] & ((1 << _CHUNK_BITS) - 1)] = numbers[here]

    def items(self) -> tuple[Names, UInt64[np.ndarray, " n"]]:
        """Return the sequences that are there, ascending, and their numbers."""
        names, numbers = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        for chunk, held in sorted(self._chunks.items()):
            places = np.flatnonzero(held)
            names.append(places + (chunk << _CHUNK_BITS))
            numbers.append(held[places])
        return np.concatenate(names), np.concatenate(numbers)


def to_ranges(names: Names) -> Ranges:
    """Return ascending sequences as ranges [first, last].

    >>> to_ranges(np.array([3, 4, 5, 9])).tolist()
    [[3, 5], [9, 9]]
    """
    if len(names) == 0:
        return np.zeros((0, 2), np.int64)
    breaks = np.flatnonzero(np.diff(names) != 1)
    first = names[np.concatenate([[0], breaks + 1])]
    last = names[np.concatenate([breaks, [len(names) - 1]])]
    return np.stack([first, last], axis=1)


def from_ranges(ranges: Ranges) -> Names:
    """Return the sequences of `to_ranges`, ascending."""
    parts = [np.arange(first, last + 1) for first, last in ranges.tolist()]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def shared(one: Ranges, other: Int64[np.ndarray, "k 2"]) -> Int64[np.ndarray, "j 2"]:
    """Return the ranges that lie in both.

    >>> shared(np.array([[0, 5], [8, 9]]), np.array([[4, 8]])).tolist()
    [[4, 5], [8, 8]]
    """
    low = np.searchsorted(other[:, 1], one[:, 0], side="left")
    high = np.searchsorted(other[:, 0], one[:, 1], side="right")
    found = [
        (max(one[i, 0], first), min(one[i, 1], last))
        for i in np.flatnonzero(high > low).tolist()
        for first, last in other[low[i] : high[i]].tolist()
    ]
    return np.array(found, np.int64).reshape(-1, 2)
