"""Activation records: the excerpts chosen for each unit, by kind, with the unit's activations.

All activations of a hook are read once; every unit's records of all kinds come from that pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

import activation_store as astore
from lmmono.errors import ExplainError
from lmmono.explaining.excerpts import Excerpts

Kind = Literal["top", "quantile", "random", "firing", "near_miss"]
"""How a record was chosen.

top: the largest maximum, one per document. quantile: drawn from equally wide bins of the maximum,
among firing excerpts. random: uniform over all excerpts, firing or not. firing: uniform over firing
excerpts. near_miss: silent excerpts that hold the token on which the unit fires most in all.
"""

KINDS: tuple[Kind, ...] = get_args(Kind)

ROWS_AT_ONCE = 4_000_000
"""Stored activations held in memory together, about 0.2 GB with what is made of them."""

N_BINS = 10
"""Bins of kind quantile, equally wide between 0 and the unit's maximum."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How many records of each kind a unit gets, where there are so many."""

    top: int = 0
    quantile: int = 0
    """Over all bins, shared out evenly, the strongest bins first."""
    random: int = 0
    firing: int = 0
    near_miss: int = 0

    def total(self) -> int:
        """Return the records per unit."""
        return sum(getattr(self, kind) for kind in KINDS)


@dataclass(frozen=True, slots=True)
class Records:
    """Records of several units of one hook; column r of all units has the same kind."""

    hook: str
    """Hook of the units."""
    excerpts: Excerpts
    """What `index` points into."""
    units: Int[ndarray, " units"]
    """The units, ascending."""
    kinds: tuple[Kind, ...]
    """Kind of each column; within a kind, columns are in rank order (top: strongest first)."""
    index: Int[ndarray, "units records"]
    """Excerpt of each record; -1 where the unit has too few of that kind."""
    acts: Float[ndarray, "units records window"]
    """float32 activations, 0 where none is stored, in units of the hook."""
    max_act: Float[ndarray, " units"]
    """Largest stored activation of each unit in these excerpts; 0 where it is silent."""

    def columns(self, *kinds: Kind) -> Int[ndarray, " columns"]:
        """Return the columns of some kinds, in order."""
        return np.array([i for i, kind in enumerate(self.kinds) if kind in kinds], np.int64)

    def n_records(self, *kinds: Kind) -> Int[ndarray, " units"]:
        """Return how many records of some kinds each unit has; all kinds if none is named."""
        columns = self.columns(*(kinds or KINDS))
        return (self.index[:, columns] >= 0).sum(axis=1)

    def token_ids(self, unit_row: int) -> Int[ndarray, "records window"]:
        """Return the tokens of one unit's records; rows without a record are all padding."""
        index = self.index[unit_row]
        return np.where((index >= 0)[:, None], self.excerpts.token_ids[index], -1)

    def is_token(self, unit_row: int) -> Bool[ndarray, "records window"]:
        """Return where one unit's records have tokens."""
        return self.token_ids(unit_row) >= 0


def read_records(
    store: astore.Store,
    hook: str,
    excerpts: Excerpts,
    counts: Counts,
    *,
    units: Sequence[int] | None = None,
    seed: int = 0,
) -> Records:
    """Choose the records of units from the excerpts of one split.

    The draws of a unit depend on the seed, the hook and the unit alone, so that a unit gets the
    same records whichever others are asked for.

    Args:
        store: An open store.
        hook: A hook captured as rows.
        excerpts: Where records may come from; see `read_excerpts`.
        counts: Records per kind.
        units: Which units; None takes all of the hook.
        seed: Seed of what is drawn.

    Raises:
        ExplainError: The hook is not stored as rows, or has no such unit.
    """
    chosen = _checked_units(store, hook, units)
    rows = [
        _UnitRows(excerpts, counts, (seed, *hook.encode(), int(unit))).choose(*found)
        for unit, found in zip(chosen, _rows(store, hook, chosen, excerpts), strict=True)
    ]
    return Records(
        hook=hook,
        excerpts=excerpts,
        units=chosen,
        kinds=tuple(kind for kind in KINDS for _ in range(getattr(counts, kind))),
        index=np.stack([index for index, _, _ in rows]),
        acts=np.stack([acts for _, acts, _ in rows]),
        max_act=np.array([largest for _, _, largest in rows], np.float32),
    )


def _checked_units(
    store: astore.Store, hook: str, units: Sequence[int] | None
) -> Int[ndarray, " units"]:
    found = store.sql("SELECT d FROM hooks WHERE hook = $hook AND kind = 'rows'", hook=hook)
    row = found.fetchone()
    if row is None:
        known = store.sql("SELECT hook FROM hooks WHERE kind = 'rows' ORDER BY hook").fetchall()
        names = ", ".join(name for (name,) in known) or "none"
        raise ExplainError(f"{store.path}: {hook!r} is not stored as rows; stored so: {names}")
    chosen = np.arange(row[0]) if units is None else np.unique(np.asarray(units, np.int64))
    if len(chosen) and not 0 <= chosen[0] <= chosen[-1] < row[0]:
        raise ExplainError(f"{hook}: want units 0 to {row[0] - 1}, got {chosen[0]} to {chosen[-1]}")
    return chosen


def _rows(
    store: astore.Store, hook: str, units: Int[ndarray, " units"], excerpts: Excerpts
) -> Iterator[tuple[ndarray, ndarray, ndarray]]:
    """Yield (excerpt, offset, act) of each unit's activations within the excerpts, unit by unit."""
    counts = dict(
        store.sql("SELECT unit, n_active FROM unit_stats WHERE hook = $hook", hook=hook).fetchall()
    )
    query = """SELECT unit, seq_id, pos, act FROM acts
        WHERE hook = $hook AND unit BETWEEN $low AND $high AND act > 0"""
    for first, last in _chunks([counts.get(int(u), 0) for u in units]):
        low, high = int(units[first]), int(units[last - 1])
        table = store.sql(query, hook=hook, low=low, high=high).to_arrow_table()
        unit, seq, pos, act = (table[i].to_numpy() for i in range(4))
        excerpt, offset = excerpts.places(seq, pos)
        kept = np.flatnonzero(excerpt >= 0)
        order = kept[np.lexsort((offset[kept], excerpt[kept], unit[kept]))]
        bounds = np.searchsorted(unit[order], np.append(units[first:last], high + 1))
        stops = np.searchsorted(unit[order], units[first:last], side="right")
        for start, stop in zip(bounds[:-1], stops, strict=True):
            mine = order[start:stop]
            yield excerpt[mine], offset[mine], act[mine]


def _chunks(n_active: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield [first, last) ranges of units that together fit in memory; at least one unit each."""
    first, held = 0, 0
    for i, n in enumerate(n_active):
        if i > first and held + n > ROWS_AT_ONCE:
            yield first, i
            first, held = i, 0
        held += n
    if first < len(n_active):
        yield first, len(n_active)


class _UnitRows:
    """The choice of one unit's records."""

    def __init__(self, excerpts: Excerpts, counts: Counts, seed: tuple[int, ...]) -> None:
        self._excerpts, self._counts = excerpts, counts
        self._rng = np.random.default_rng(seed)

    def choose(
        self, excerpt: ndarray, offset: ndarray, act: ndarray
    ) -> tuple[ndarray, ndarray, float]:
        """Return excerpt indices [records], activations [records, window] and the maximum."""
        largest = np.zeros(len(self._excerpts), np.float32)
        np.maximum.at(largest, excerpt, act)
        columns = [
            _padded(getattr(self, f"_{kind}")(largest, excerpt, offset, act), n)
            for kind in KINDS
            if (n := getattr(self._counts, kind))
        ]
        index = np.concatenate([*columns, np.zeros(0, np.int64)])
        dense = np.zeros((len(self._excerpts), self._excerpts.window), np.float32)
        dense[excerpt, offset] = act
        acts = np.where((index >= 0)[:, None], dense[index], np.float32(0))
        return index, acts, float(largest.max(initial=0.0))

    def _top(self, largest: ndarray, *_: ndarray) -> ndarray:
        strongest = np.argsort(-largest, kind="stable")[: np.count_nonzero(largest)]
        _, first = np.unique(self._excerpts.doc_ids[strongest], return_index=True)
        return strongest[np.sort(first)][: self._counts.top]

    def _quantile(self, largest: ndarray, *_: ndarray) -> ndarray:
        firing = np.flatnonzero(largest)
        top = largest.max(initial=0.0)
        bins = np.minimum((largest[firing] / top * N_BINS).astype(int), N_BINS - 1)
        shares = [len(part) for part in np.array_split(np.arange(self._counts.quantile), N_BINS)]
        drawn = [
            self._draw(firing[bins == b], n)
            for b, n in zip(range(N_BINS)[::-1], shares, strict=True)
        ]
        return np.concatenate(drawn)

    def _random(self, largest: ndarray, *_: ndarray) -> ndarray:
        return self._draw(np.arange(len(largest)), self._counts.random)

    def _firing(self, largest: ndarray, *_: ndarray) -> ndarray:
        return self._draw(np.flatnonzero(largest), self._counts.firing)

    def _near_miss(
        self, largest: ndarray, excerpt: ndarray, offset: ndarray, act: ndarray
    ) -> ndarray:
        if not len(act):
            return np.zeros(0, np.int64)
        tokens = self._excerpts.token_ids[excerpt, offset]
        favourite = np.bincount(tokens, act).argmax()
        holds = (self._excerpts.token_ids == favourite).any(axis=1)
        return self._draw(np.flatnonzero(holds & (largest == 0)), self._counts.near_miss)

    def _draw(self, among: ndarray, n: int) -> ndarray:
        return self._rng.permutation(among)[:n]


def _padded(index: ndarray, n: int) -> ndarray:
    """Return n indices: those found, then -1."""
    return np.concatenate([index, np.full(n - len(index), -1)]).astype(np.int64)
