"""Two-sided records: where a unit fires, where its explanation says it does, and anywhere.

Records chosen by what a unit does cannot tell an explanation that says too much: what it adds lies
in records that nobody draws. So a second side is drawn by what the explanation predicts: recall is
measured on the active side, precision on the predicted one.

    side        drawn evenly from the excerpts in which ...
    active      the unit fires
    predicted   the explanation predicts that it fires
    random      there is text

A record can be on several sides. With n_s of N_s excerpts drawn on each side s, a record i is drawn
sum over its sides of n_s / N_s times on average; one over that is its weight, and the weighted sum
over all draws of anything is its sum over all excerpts on any side, without bias (single-frame
estimator of several frames, Bankier 1986; Kalton and Anderson 1986). With side random these are all
excerpts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

import activation_store as astore
from lmmono.records.corpus_excerpts import Excerpts
from lmmono.records.sampler import UnitActs, draw_up_to, filled, sample_windows
from lmmono.records.seeds import stream
from lmmono.records.units import checked_units
from lmmono.registry.scorer_settings import Side


@dataclass(frozen=True, slots=True)
class SidedRecords:
    """Records of each side for some units of a hook, and one explanation of each."""

    excerpts: Excerpts
    """What `index` points into."""
    sides: tuple[Side, ...]
    """The sides, in the order of the second axis."""
    units: Int[ndarray, " units"]
    """The units, ascending."""
    index: Int[ndarray, "units sides n"]
    """Excerpt of each record; -1 where the side has too few."""
    acts: Float[ndarray, "units sides n window"]
    """float32 activations, in units of the hook."""
    sizes: Int[ndarray, "units sides"]
    """Excerpts on each side."""
    is_on: Bool[ndarray, "units sides n sides"]
    """Whether each record is on each side."""

    def weights(self) -> Float[ndarray, "units sides n"]:
        """Return how many excerpts each draw stands for; 0 where there is none."""
        return draw_weights(self.is_on, (self.index >= 0).sum(axis=2), self.sizes)

    def token_ids(self) -> Int[ndarray, "units sides n window"]:
        """Return the tokens of all records; those that there are not are all padding."""
        return self.excerpts.tokens_of(self.index)


def draw_weights(
    is_on: Bool[ndarray, "*units sides n sides"],
    n_drawn: Int[ndarray, "*units sides"],
    sizes: Int[ndarray, "*units sides"],
) -> Float[ndarray, "*units sides n"]:
    """Return one over the mean number of draws of each record; 0 for a record on no side."""
    rates = n_drawn / np.maximum(sizes, 1)
    expected = (is_on * rates[..., None, None, :]).sum(axis=-1)
    return np.where(expected > 0, 1 / np.where(expected > 0, expected, 1.0), 0.0)


def read_sides(
    store: astore.Store,
    hook: str,
    excerpts: Excerpts,
    sides: Sequence[Side],
    n: int,
    predicted: Callable[[int], Sequence[Bool[ndarray, " excerpts"]]],
    *,
    units: Sequence[int] | None = None,
    seed: int = 0,
) -> list[SidedRecords]:
    """Draw up to n records of each side for each unit, and for each explanation of it.

    The records of the active and the random side are the same for all explanations of a unit.

    Args:
        store: An open store.
        hook: A hook captured as rows.
        excerpts: Where records may come from; see `read_excerpts`.
        sides: Which sides.
        n: Most records of a side.
        predicted: Returns, for the number of a unit among `units`, in which excerpts each of its
            explanations predicts firing.
        units: Which units; None takes all of the hook.
        seed: Seed of what is drawn.

    Raises:
        ExplainError: The hook is not stored as rows, or has no such unit.
    """
    wanted = checked_units(store, hook, units)
    row_of = {int(unit): row for row, unit in enumerate(wanted)}
    sizes: dict[tuple[int, int], list[list[int]]] = {}
    is_on: dict[tuple[int, int], ndarray] = {}
    n_said = len(predicted(0)) if len(wanted) else 0

    def choose(unit: UnitActs) -> Int[ndarray, " records"]:
        row, chosen = row_of[unit.unit], list[ndarray]()
        for state, is_predicted in enumerate(predicted(row)):
            frames = {
                "active": unit.largest > 0,
                "predicted": is_predicted,
                "random": np.ones(len(unit.largest), bool),
            }
            drawn: list[ndarray] = []
            for side in sides:
                rng = stream(f"side {side}", seed, hook, excerpts.split, unit.unit)
                drawn.append(filled(draw_up_to(rng, np.flatnonzero(frames[side]), n), n))
            picks = np.stack(drawn)
            sizes[state, row] = [[int(frames[side].sum()) for side in sides]]
            on = np.stack([frames[side][picks] for side in sides], axis=-1)
            is_on[state, row] = on & (picks >= 0)[..., None]
            chosen.append(picks.ravel())
        return np.concatenate(chosen)

    width = n_said * len(sides) * n
    index, acts, _ = sample_windows(
        store, hook, wanted, excerpts.grid, width, choose, excerpts.cells_of, excerpts
    )
    shape = (len(wanted), n_said, len(sides), n)
    index, acts = index.reshape(shape), acts.reshape(*shape, excerpts.window)
    rows = range(len(wanted))
    return [
        SidedRecords(
            excerpts,
            tuple(sides),
            wanted,
            index[:, state],
            acts[:, state],
            np.array([sizes[state, row][0] for row in rows], np.int64).reshape(-1, len(sides)),
            np.stack([is_on[state, row] for row in rows]),
        )
        for state in range(n_said)
    ]
