"""Units of two runs side by side: for each unit of one the most alike unit of the other.

Alike is the Pearson correlation of activations on the same tokens, a sample of them: a report has
seconds. The SQL macro `twins` takes every token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

import activation_store as astore

SAMPLED_TOKENS = 4_096
"""The standard error of a correlation near 0 is then 0.016."""
N_SPANS = 2
"""Places of the text that the sample is taken from. A span of sequences is read in a ninth of the
time of as many sequences that lie apart, for each unit's acts are in order; one span alone might be
of one document."""

_SIZES = "SELECT seq_id, count(*) AS n FROM token_ids GROUP BY seq_id ORDER BY seq_id"
_TOKENS = "SELECT seq_id, pos, token_id FROM token_ids WHERE seq_id BETWEEN $first AND $last"
_ACTS = """
SELECT unit, seq_id, pos, act FROM acts
WHERE hook = $hook AND seq_id BETWEEN $first AND $last
    AND ($units IS NULL OR list_contains($units, unit))
"""

_Span = tuple[int, int]
"""First and last sequence."""


@dataclass(frozen=True, slots=True)
class Twin:
    """A unit and the unit of another run that fires most like it."""

    hook: str
    unit: int
    twin: int
    """Unit of the same hook of the other run."""
    correlation: float
    """Pearson, over the sampled tokens."""
    second: float
    """Correlation of the runner-up in the other run: what a near miss looks like."""
    chance: float
    """The largest correlation with the other run's units when its tokens are shuffled."""


def best_twins(
    store: astore.Store, other: astore.Store, units: Sequence[tuple[str, int]]
) -> list[Twin]:
    """Return the twins of units in another store; none where the two hold other tokens or hooks.

    Args:
        store: Store of the units.
        other: Store that twins are looked for in.
        units: Hook and index of each.
    """
    spans = _spans(store, other)
    (places, ids), (others, other_ids) = (_tokens(each, spans) for each in (store, other))
    places, mine, theirs = np.intersect1d(places, others, return_indices=True)
    if not len(places) or not np.array_equal(ids[mine], other_ids[theirs]):
        return []
    found: list[Twin] = []
    for hook in dict.fromkeys(hook for hook, _ in units):
        mine = [unit for each, unit in units if each == hook]
        here = _standardised(store, hook, spans, places, mine)
        there = _standardised(other, hook, spans, places)
        if here is None or there is None:
            continue
        mine = [unit for unit in mine if unit < len(here)]
        chosen = here[mine]
        correlations = chosen @ there.T
        order = np.random.default_rng(0).permutation(there.shape[1])
        chance = (chosen[:, order] @ there.T).max(axis=1)
        for unit, row, floor in zip(mine, correlations, chance, strict=True):
            best = np.argsort(-row)[:2]
            second = float(row[best[1]]) if len(best) > 1 else float("nan")
            twin = Twin(hook, unit, int(best[0]), float(row[best[0]]), second, float(floor))
            found.append(twin)
    return found


def _spans(store: astore.Store, other: astore.Store) -> list[_Span]:
    """Return where both stores hold sequences of the same lengths, about `SAMPLED_TOKENS` long."""
    found, others = (each.sql(_SIZES).fetchnumpy() for each in (store, other))
    shared, here, there = np.intersect1d(found["seq_id"], others["seq_id"], return_indices=True)
    sizes = found["n"][here]
    is_same = sizes == others["n"][there]
    rng = np.random.default_rng(0)
    spans: list[_Span] = []
    for part in np.array_split(np.flatnonzero(is_same), N_SPANS):
        if not len(part):
            continue
        ends = np.cumsum(sizes[part])
        # starts that leave enough to its right; all of the part where it is too short
        room = int(np.searchsorted(ends, ends[-1] - SAMPLED_TOKENS / N_SPANS, side="right"))
        first = int(rng.integers(max(1, room)))
        stop = int(np.searchsorted(ends - ends[first] + sizes[part[first]],
                                   SAMPLED_TOKENS / N_SPANS))  # fmt: skip
        last = part[min(stop, len(part) - 1)]
        spans.append((int(shared[part[first]]), int(shared[last])))
    return spans


def _tokens(store: astore.Store, spans: Sequence[_Span]) -> tuple[ndarray, ndarray]:
    """Return the places of the tokens in some spans, and their ids."""
    rows = [store.sql(_TOKENS, first=first, last=last).fetchnumpy() for first, last in spans]
    if not rows:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    places = np.concatenate([_places(each) for each in rows])
    return places, np.concatenate([each["token_id"] for each in rows])


def _places(rows: dict[str, ndarray]) -> ndarray:
    """Return a number for the sequence and position of each row."""
    return (rows["seq_id"].astype(np.int64) << 32) + rows["pos"]


def _standardised(
    store: astore.Store,
    hook: str,
    spans: Sequence[_Span],
    places: ndarray,
    units: list[int] | None = None,
) -> Float[ndarray, "units tokens"] | None:
    """Return activations less their mean, of length 1 for each unit; silent units are zeros."""
    widths = store.sql("SELECT d FROM hooks WHERE hook = $hook AND kind = 'rows'", hook=hook)
    found = widths.fetchall()
    if not found:
        return None
    acts = np.zeros((found[0][0], len(places)), np.float32)
    seqs, pos = places >> 32, places & (2**32 - 1)
    for first, last in spans:
        rows = store.sql(_ACTS, hook=hook, first=first, last=last, units=units).fetchnumpy()
        # a table instead of a search for each of a million acts; tokens that one store lacks are -1
        columns = np.full((last - first + 1, 1 + rows["pos"].max(initial=pos.max())), -1)
        here = np.flatnonzero((first <= seqs) & (seqs <= last))
        columns[seqs[here] - first, pos[here]] = here
        of_act = columns[rows["seq_id"] - first, rows["pos"]]
        if of_act.min(initial=0) < 0:
            rows = {name: values[of_act >= 0] for name, values in rows.items()}
            of_act = of_act[of_act >= 0]
        acts[rows["unit"], of_act] = rows["act"]
    acts -= acts.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(acts, axis=1, keepdims=True)
    return np.divide(acts, norms, out=np.zeros_like(acts), where=norms > 0)
