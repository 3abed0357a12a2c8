"""Semantic consistency: how well a unit keeps to one concept among the items on which it fires.

SC of a unit is the largest share of a concept among the items on which it fires (arXiv 2410.21331).
Raw, it is large by chance where the unit fires rarely or a concept is common; corrected it is
(SC - E) / (1 - E), E being the mean SC over shuffled labels at the same support, so that a unit
which fires everywhere has 0.
"""

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

FIRES = 1e-5
"""A unit fires where its activation is larger than this, whatever the sign: codes that are not
rectified (PCA, residual streams) have concepts on both sides, and rounding leaves no zero exact."""

MIN_SUPPORT = 20
"""Items on which a unit fires, the fewest: below, most of a share is chance and E is near 1."""

N_SHUFFLES = 20
"""Shuffles of the labels whose mean is E."""


def fires(acts: Float[ndarray, "*shape"]) -> Bool[ndarray, "*shape"]:
    """Return where units fire."""
    return np.abs(acts) > FIRES


def consistency(
    firing: Bool[ndarray, "items units"], labels: Bool[ndarray, "items concepts"]
) -> Float[ndarray, " units"]:
    """Return SC of each unit; NaN of one that never fires.

    >>> firing = np.array([[True], [True], [True], [False]])
    >>> labels = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    >>> consistency(firing, labels).round(3)
    array([0.667])
    """
    counts = firing.T.astype(np.float32) @ labels.astype(np.float32)
    support = firing.sum(axis=0)
    return np.where(support > 0, counts.max(axis=1) / np.maximum(support, 1), np.nan)


def beyond_chance(
    raw: Float[ndarray, "*shape"], chance: Float[ndarray, "*#shape"]
) -> Float[ndarray, "*shape"]:
    """Return (SC - E) / (1 - E); NaN where E is 1, such as where all items have one concept.

    >>> beyond_chance(np.array([0.75, 1.0]), np.array([0.5, 1.0]))
    array([0.5, nan])
    """
    has_room = chance < 1 - 1e-9  # E is a mean of float32 shares: 1 up to rounding
    return np.where(has_room, (raw - chance) / np.where(has_room, 1 - chance, 1.0), np.nan)
