"""Activation records: the excerpts chosen for each unit, by kind, with the unit's activations.

All activations of a hook are read once; every unit's records of all kinds come from that pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

import activation_store as astore
from lmmono.records.exemplar_records import Excerpts
from lmmono.records.token_grid import PADDING
from lmmono.records.unit_rows import UnitRows, checked_units, read_unit_rows

Kind = Literal["top", "quantile", "random", "firing", "near_miss"]
"""How a record was chosen.

top: the largest maximum, one per document. quantile: drawn from equally wide bins of the maximum,
among firing excerpts. random: uniform over all excerpts, firing or not. firing: uniform over firing
excerpts. near_miss: silent excerpts that hold the token on which the unit fires most in all.
"""

KINDS: tuple[Kind, ...] = get_args(Kind)

CELLS_AT_ONCE = 64_000_000
"""Maxima per unit and excerpt held in memory together: 0.25 GB."""

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

    def kinds(self) -> tuple[Kind, ...]:
        """Return the kind of each record of a unit."""
        return tuple(kind for kind in KINDS for _ in range(getattr(self, kind)))

    def total(self) -> int:
        """Return the records per unit."""
        return len(self.kinds())


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

    def take(self, columns: Sequence[int] | Int[ndarray, " columns"]) -> "Records":
        """Return the same units with some columns only, in the order given."""
        columns = np.asarray(columns, np.int64)
        kinds = tuple(self.kinds[column] for column in columns)
        index, acts = self.index[:, columns], self.acts[:, columns]
        return Records(self.hook, self.excerpts, self.units, kinds, index, acts, self.max_act)

    def n_records(self, *kinds: Kind) -> Int[ndarray, " units"]:
        """Return how many records of some kinds each unit has; all kinds if none is named."""
        columns = self.columns(*(kinds or KINDS))
        return (self.index[:, columns] >= 0).sum(axis=1)

    def all_token_ids(self) -> Int[ndarray, "units records window"]:
        """Return the tokens of all units' records; records that are not there are all padding."""
        there = (self.index >= 0)[:, :, None]
        return np.where(there, self.excerpts.token_ids[self.index], np.int32(PADDING))

    def token_ids(self, unit_row: int) -> Int[ndarray, "records window"]:
        """Return the tokens of one unit's records; rows without a record are all padding."""
        index = self.index[unit_row]
        there = (index >= 0)[:, None]
        return np.where(there, self.excerpts.token_ids[index], np.int32(PADDING))

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

    The draws depend on the seed, the hook, the unit and the kind alone, so that a unit gets the
    same records whichever other units or kinds are asked for.

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
    chosen = checked_units(store, hook, units)
    owner, at_once = excerpts.of_cells(), max(1, CELLS_AT_ONCE // len(excerpts))
    shape = (len(chosen), counts.total())
    index, max_act = np.full(shape, -1), np.zeros(len(chosen), np.float32)
    acts = np.zeros((*shape, excerpts.window), np.float32)
    done = 0
    for rows in read_unit_rows(store, hook, chosen, excerpts.grid, units_at_once=at_once):
        mine = slice(done, done + len(rows.units))
        largest = rows.largest(owner, len(excerpts))
        max_act[mine] = largest.max(axis=1)
        index[mine] = _choose(excerpts, counts, rows, largest, (seed, *hook.encode()))
        acts[mine] = _gathered(excerpts, rows, index[mine])
        done = mine.stop
    return Records(hook, excerpts, chosen, counts.kinds(), index, acts, max_act)


def _gathered(
    excerpts: Excerpts, rows: UnitRows, index: Int[ndarray, "units records"]
) -> Float[ndarray, "units records window"]:
    first = np.where(index >= 0, excerpts.first_cells[index], -1)
    acts = rows.gather(first, excerpts.window, len(excerpts.grid.token_ids))
    # a window may run on into the next document; what lies there is not this excerpt's
    acts[excerpts.token_ids[index] == PADDING] = 0
    return acts


def _choose(
    excerpts: Excerpts,
    counts: Counts,
    rows: UnitRows,
    largest: Float[ndarray, "units excerpts"],
    seed: tuple[int, ...],
) -> Int[ndarray, "units records"]:
    """Return the excerpts of each unit's records, by kind; -1 where there are too few."""
    choices = _Choices(excerpts)
    index = np.full((len(rows.units), counts.total()), -1)
    for i, unit in enumerate(rows.units):
        first = 0
        for number, kind in enumerate(KINDS):
            if n := getattr(counts, kind):
                rng = np.random.default_rng((*seed, int(unit), number))
                found = getattr(choices, kind)(n, rng, largest[i], *rows.of(i))
                index[i, first : first + len(found)] = found
                first += n
    return index


class _Choices:
    """How the records of one unit are chosen: a method per kind."""

    def __init__(self, excerpts: Excerpts) -> None:
        self._excerpts = excerpts
        self._doc_ids = excerpts.doc_ids

    def top(self, n: int, _rng: np.random.Generator, largest: ndarray, *_: ndarray) -> ndarray:
        n_firing, n_near = int(np.count_nonzero(largest)), 8 * n
        while True:
            strongest = _strongest(largest, min(n_near, n_firing))
            first = np.unique(self._doc_ids[strongest], return_index=True)[1]
            if len(first) >= n or n_near >= n_firing:
                return strongest[np.sort(first)][:n]
            n_near *= 8

    def quantile(self, n: int, rng: np.random.Generator, largest: ndarray, *_: ndarray) -> ndarray:
        firing = np.flatnonzero(largest)
        top = largest.max(initial=0.0)
        bins = np.minimum((largest[firing] / top * N_BINS).astype(int), N_BINS - 1)
        shares = [len(part) for part in np.array_split(np.arange(n), N_BINS)]
        drawn = [
            _drawn(rng, firing[bins == b], share)
            for b, share in zip(range(N_BINS)[::-1], shares, strict=True)
        ]
        return np.concatenate(drawn)

    def random(self, n: int, rng: np.random.Generator, largest: ndarray, *_: ndarray) -> ndarray:
        return _drawn(rng, np.arange(len(largest)), n)

    def firing(self, n: int, rng: np.random.Generator, largest: ndarray, *_: ndarray) -> ndarray:
        return _drawn(rng, np.flatnonzero(largest), n)

    def near_miss(
        self, n: int, rng: np.random.Generator, largest: ndarray, cells: ndarray, acts: ndarray
    ) -> ndarray:
        if not len(acts):
            return np.zeros(0, np.int64)
        favourite = np.bincount(self._excerpts.grid.token_ids[cells], acts).argmax()
        holds = (self._excerpts.token_ids == favourite).any(axis=1)
        return _drawn(rng, np.flatnonzero(holds & (largest == 0)), n)


def _strongest(values: ndarray, n: int) -> ndarray:
    """Return the indices of the n largest values, largest first, of equals the first."""
    if n == 0:
        return np.zeros(0, np.int64)
    least = values[np.argpartition(-values, n - 1)[:n]].min()
    among = np.flatnonzero(values >= least)
    return among[np.argsort(-values[among], kind="stable")][:n]


def _drawn(rng: np.random.Generator, among: ndarray, n: int) -> ndarray:
    return rng.choice(among, min(n, len(among)), replace=False)
