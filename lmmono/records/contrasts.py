"""Records in which a unit fires beside records in which it does not.

`exact` takes a record as firing where any token has a stored activation, and as silent where none
has. A unit that fires on a third of all tokens has no silent record; `ranked` takes the tenth of
the records with the largest maxima as firing and those at or below the median as silent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from lmmono.records.exemplar_records import Excerpts
from lmmono.records.record import CELLS_AT_ONCE
from lmmono.records.token_grid import PADDING
from lmmono.records.unit_rows import checked_units, read_unit_rows
from lmmono.scores.scorer_registry import Job
from lmmono.types import Split

Class = Literal["firing", "silent", "near_miss", "more_firing"]
"""firing, more_firing: two draws without a record in common. near_miss: silent, but holds the token
on which the unit fires most in all."""

CLASSES: tuple[Class, ...] = ("firing", "silent", "near_miss", "more_firing")

MARKED_SHARE = 0.3
"""A token of a record fires where its activation is this share of the record's maximum."""


@dataclass(frozen=True, slots=True)
class Contrasts:
    """Records of each class for some units of a hook."""

    excerpts: Excerpts
    """What `index` points into."""
    units: Int[ndarray, " units"]
    """The units, ascending."""
    index: Int[ndarray, "units classes n"]
    """Excerpt of each record by class; -1 where the unit has too few."""
    acts: Float[ndarray, "units classes n window"]
    """float32 activations, in units of the hook."""

    def token_ids(self, classes: Sequence[Class]) -> Int[ndarray, "units records window"]:
        """Return the tokens of the records of some classes, one class after the other."""
        index = self.of(classes)
        return np.where(index[..., None] >= 0, self.excerpts.token_ids[index], np.int32(PADDING))

    def of(self, classes: Sequence[Class]) -> Int[ndarray, "units records"]:
        """Return the excerpts of the records of some classes."""
        return self.index[:, [CLASSES.index(each) for each in classes]].reshape(len(self.units), -1)

    def marks(self, of: Class) -> Bool[ndarray, "units n window"]:
        """Return the tokens on which the unit fires in its records of a class."""
        acts = self.acts[:, CLASSES.index(of)]
        return (acts > 0) & (acts >= MARKED_SHARE * acts.max(axis=2, keepdims=True))


def read_contrasts(job: Job, split: Split, n: int, window: int, ranked: bool = False) -> Contrasts:
    """Draw up to n records of each class for each unit of a job.

    The draws depend on the job's seed, the hook, the split and the unit alone.

    Raises:
        ExplainError: The split has no excerpts, or the hook no such units.
    """
    excerpts = job.reader.excerpts(split, window)
    units = checked_units(job.store, job.hook, job.units)
    owner, at_once = excerpts.of_cells(), max(1, CELLS_AT_ONCE // len(excerpts))
    index = np.full((len(units), len(CLASSES), n), -1)
    acts = np.zeros((*index.shape, window), np.float32)
    done, seed = 0, (job.seed, *job.hook.encode(), *split.encode())
    for rows in read_unit_rows(
        job.store, job.hook, units, excerpts.grid, units_at_once=min(at_once, 512)
    ):
        largest = rows.largest(owner, len(excerpts))
        mine = slice(done, done + len(rows.units))
        for i, unit in enumerate(rows.units):
            rng = np.random.default_rng((*seed, int(unit), 11))
            for at, found in enumerate(_drawn(excerpts, largest[i], *rows.of(i), n, rng, ranked)):
                index[done + i, at, : len(found)] = found
        flat = index[mine].reshape(len(rows.units), -1)
        first = np.where(flat >= 0, excerpts.first_cells[flat], -1)
        found_acts = rows.gather(first, window, len(excerpts.grid.token_ids))
        found_acts[excerpts.token_ids[flat] == PADDING] = 0
        acts[mine] = found_acts.reshape(acts[mine].shape)
        done = mine.stop
    return Contrasts(excerpts, units, index, acts)


def _drawn(
    excerpts: Excerpts,
    largest: Float[ndarray, " excerpts"],
    cells: Int[ndarray, " rows"],
    acts: Float[ndarray, " rows"],
    n: int,
    rng: np.random.Generator,
    ranked: bool,
) -> list[Int[ndarray, " drawn"]]:
    """Return the records of each class, in the order of `CLASSES`."""
    fires, quiet = largest > 0, largest == 0
    if ranked:
        fires &= largest >= np.quantile(largest, 0.9)
        quiet = largest <= np.median(largest)
        quiet &= ~fires
    near = np.zeros_like(quiet)
    if len(acts):
        favourite = np.bincount(excerpts.grid.token_ids[cells], acts).argmax()
        near = quiet & (excerpts.token_ids == favourite).any(axis=1)
    firing = rng.permutation(np.flatnonzero(fires))
    silent = rng.permutation(np.flatnonzero(quiet))[:n]
    near[silent] = False  # no record twice
    near_miss = rng.permutation(np.flatnonzero(near))[:n]
    return [firing[:n], silent, near_miss, firing[n : 2 * n]]
