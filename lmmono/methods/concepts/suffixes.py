"""Where a run of token ids occurs in a corpus: a suffix array and a search in it."""

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

Ids = Int64[ndarray, "_"]


class SuffixIndex:
    """The suffixes of ids in their order.

    Attributes:
        order: Where each begins.
    """

    def __init__(self, ids: Ids) -> None:
        self._ids, self.order = ids, suffix_array(ids)

    def range_of(self, pattern: Ids) -> tuple[int, int]:
        """Return the range of `order` whose suffixes begin with a pattern."""
        wanted, ends = pattern.tolist(), list[int]()
        for past_equals in (False, True):
            low, high = 0, len(self.order)
            while low < high:
                middle = (low + high) // 2
                at = int(self.order[middle])
                here = self._ids[at : at + len(wanted)].tolist()
                if here < wanted or (past_equals and here == wanted):
                    low = middle + 1
                else:
                    high = middle
            ends.append(low)
        return ends[0], ends[1]


def suffix_array(ids: Ids) -> Ids:
    """Return where the suffixes of ids begin, in their order; by doubling.

    >>> suffix_array(np.array([2, 1, 2, 1])).tolist()
    [3, 1, 2, 0]
    """
    n = len(ids)
    if not n:
        return np.zeros(0, np.int64)
    rank = np.unique(ids, return_inverse=True)[1].astype(np.int64)
    width = 1
    while True:
        behind = np.full(n, -1, np.int64)
        behind[: max(0, n - width)] = rank[width:]
        order = np.lexsort((behind, rank))
        changed = (np.diff(rank[order]) != 0) | (np.diff(behind[order]) != 0)
        rank[order] = np.concatenate([[0], np.cumsum(changed)])
        if rank[order[-1]] == n - 1 or width >= n:
            return order.astype(np.int64)
        width *= 2
