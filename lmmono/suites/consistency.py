"""How well the coordinates of a feature keep to one class: said beside every robustness number.

Semantic consistency of a coordinate is the largest share of a class among the texts on which it is
active (arXiv 2410.21331). Raw, it is large by chance where few texts are, and for a dense code it
is the share of the commonest class; corrected it is (SC - E) / (1 - E), E its mean over shuffled
labels at the same support, so that a dense code has 0.
"""

import numpy as np
from jaxtyping import Bool, Float, Int64

MIN_SUPPORT = 20
"""A coordinate that is active on fewer texts does not count."""

N_SHUFFLES = 20
"""Shuffles of the labels whose mean is chance."""

ACTIVE = 1e-5
"""A coordinate is active where it is larger than this, whatever its sign."""


def semantic_consistency(
    x: Float[np.ndarray, "n d"], labels: Int64[np.ndarray, "n"], *, n_classes: int, seed: int = 0
) -> tuple[float, int]:
    """Return the mean corrected consistency of a feature's coordinates, and how many counted.

    NaN where none did.

    >>> x = np.repeat(np.eye(2), 30, axis=0)  # each coordinate is active on one class alone
    >>> semantic_consistency(x, np.repeat([0, 1], 30), n_classes=2)
    (1.0, 2)
    """
    active = np.abs(x) > ACTIVE
    active = active[:, active.sum(axis=0) >= MIN_SUPPORT]
    if not active.shape[1]:
        return float("nan"), 0
    random = np.random.default_rng((seed, 29))
    shuffles = [random.permutation(labels) for _ in range(N_SHUFFLES)]
    raw = _largest_share(active, labels, n_classes)
    chance = np.mean([_largest_share(active, each, n_classes) for each in shuffles], axis=0)
    room = 1.0 - chance
    corrected = np.where(room > 1e-9, (raw - chance) / np.where(room > 1e-9, room, 1.0), 0.0)
    return float(corrected.mean()), active.shape[1]


def _largest_share(
    active: Bool[np.ndarray, "n d"], labels: Int64[np.ndarray, "n"], n_classes: int
) -> Float[np.ndarray, " d"]:
    """Return the largest share of a class among the active texts of each coordinate."""
    member = np.eye(n_classes, dtype=np.float32)[labels]
    counts = active.T.astype(np.float32) @ member
    return counts.max(axis=1) / active.sum(axis=0)
