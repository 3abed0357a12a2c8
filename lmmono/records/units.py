"""Which units of a hook are looked at: some by index, a few drawn by seed, or all."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy import ndarray

import activation_store as astore
from lmmono.errors import ExplainError
from lmmono.records.seeds import stream


@dataclass(frozen=True, slots=True)
class Sample:
    """A number of units of each hook, drawn by seed; made by `sample`."""

    n: int
    """Units per hook; all where it has no more."""
    seed: int
    """Seed of the draw."""

    def draw(self, hook: str, d: int) -> list[int]:
        """Return the units drawn from units 0 to d - 1 of a hook, ascending."""
        drawn = stream("units", self.seed, hook).choice(d, min(self.n, d), replace=False)
        return sorted(drawn.tolist())


def sample(n: int, *, seed: int) -> Sample:
    """Return a draw of n units of each hook, for `units=`.

    >>> sample(3, seed=0).draw("blocks.0.mlp.hook_post", 512)
    [22, 32, 139]
    """
    return Sample(n, seed)


Units = Sequence[int] | Sample | None
"""Units of every hook: by index, drawn, or None for all."""


def checked_units(
    store: astore.Store, hook: str, units: Sequence[int] | None
) -> Int[ndarray, " units"]:
    """Return units of a hook, ascending, without repeats; None takes all.

    Raises:
        ExplainError: The hook is not stored as rows, or has no such unit.
    """
    query = "SELECT d, units FROM hooks WHERE hook = $hook AND kind = 'rows'"
    rows = store.sql(query, hook=hook).fetchall()
    if not rows:
        query = "SELECT hook FROM hooks WHERE kind = 'rows' ORDER BY hook"
        names = ", ".join(name for (name,) in store.sql(query).fetchall()) or "none"
        raise ExplainError(f"{store.path}: {hook!r} is not stored as rows; stored so: {names}")
    ((d, stored),) = rows
    if stored == []:
        raise ExplainError(
            f"{store.path}: the activations of {hook} were dropped once they were scored "
            "(score.step_rows); capture them again"
        )
    chosen = np.arange(d) if units is None else np.unique(np.asarray(units, np.int64))
    if len(chosen) and not 0 <= chosen[0] <= chosen[-1] < d:
        raise ExplainError(f"{hook}: want units 0 to {d - 1}, got {chosen[0]} to {chosen[-1]}")
    return chosen


def units_of(store: astore.Store, hook: str, units: Units) -> list[int]:
    """Return the units of a hook that are meant, ascending.

    Raises:
        ExplainError: The hook is not stored as rows, or has no such unit.
    """
    if isinstance(units, Sample):
        return units.draw(hook, len(checked_units(store, hook, None)))
    return checked_units(store, hook, units).tolist()
