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

_SHARED = (
    "SELECT seq_id, pos, token_id FROM token_ids WHERE seq_id IN (SELECT unnest($s::BIGINT[]))"
)
_ACTS = """
SELECT unit, seq_id, pos, act FROM acts
WHERE hook = $hook AND seq_id IN (SELECT unnest($seqs::BIGINT[]))
"""


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
    seqs = _shared_sequences(store, other)
    if not seqs:
        return []
    found: list[Twin] = []
    for hook in dict.fromkeys(hook for hook, _ in units):
        mine = [unit for each, unit in units if each == hook]
        matrices = [_standardised(each, hook, seqs) for each in (store, other)]
        if any(matrix is None for matrix in matrices):
            continue
        here, there = (matrix for matrix in matrices if matrix is not None)
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


def _shared_sequences(store: astore.Store, other: astore.Store) -> list[int]:
    """Return sequences that both stores hold, as long as every token of them is the same."""
    query = "SELECT seq_id, count(*) FROM token_ids GROUP BY seq_id"
    sizes, others = (dict(each.sql(query).fetchall()) for each in (store, other))
    shared = sorted(seq for seq, size in sizes.items() if others.get(seq) == size)
    if not shared:
        return []
    drawn = np.random.default_rng(0).permutation(shared)
    n_drawn = 1 + int(np.searchsorted(np.cumsum([sizes[seq] for seq in drawn]), SAMPLED_TOKENS))
    chosen = sorted(drawn[:n_drawn].tolist())
    rows = [each.sql(_SHARED, s=chosen).fetchnumpy() for each in (store, other)]
    keys = [np.lexsort((each["pos"], each["seq_id"])) for each in rows]
    same = all(
        np.array_equal(rows[0][name][keys[0]], rows[1][name][keys[1]])
        for name in ("seq_id", "pos", "token_id")
    )
    return chosen if same else []


def _standardised(
    store: astore.Store, hook: str, seqs: Sequence[int]
) -> Float[ndarray, "units tokens"] | None:
    """Return activations less their mean, of length 1 for each unit; silent units are zeros."""
    widths = store.sql("SELECT d FROM hooks WHERE hook = $hook AND kind = 'rows'", hook=hook)
    found = widths.fetchall()
    if not found:
        return None
    rows = store.sql(_ACTS, hook=hook, seqs=list(seqs)).fetchnumpy()
    size = store.sql("SELECT max(pos) + 1 FROM token_ids").fetchall()[0][0]
    acts = np.zeros((found[0][0], len(seqs) * size), np.float32)
    acts[rows["unit"], np.searchsorted(seqs, rows["seq_id"]) * size + rows["pos"]] = rows["act"]
    acts -= acts.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(acts, axis=1, keepdims=True)
    return np.divide(acts, norms, out=np.zeros_like(acts), where=norms > 0)
