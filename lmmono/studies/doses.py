"""Is a more monosemantic code a more robust one: gain over dictionaries against a measure of them.

Rows of table `robustness` say how monosemantic the code was that their probe read; scorers say more
of dictionaries, in table `all_scores`. Only dictionaries of one width are held against each other:
width alone changes both sides. A correlation over dictionaries that differ in how sparse they are
is no cause either, so `l0` stands beside the measures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import permutation_test, rankdata, theilslopes

import activation_store as astore
from lmmono.stats.bootstrap import N_RESAMPLES
from lmmono.stats.estimate import LEVEL
from lmmono.stats.intervals import Z
from lmmono.suites.results import FULL, Result

MIN_FOR_INTERVAL = 4
"""Fewer dictionaries have no interval: its variance divides by n - 3."""

CONSISTENCY = "semantic_consistency"
"""Consistency over all texts on which a coordinate is active, corrected for chance; see
`lmmono.suites.bench`."""

STRONGEST_CONSISTENCY = "semantic_consistency_strongest"
"""The measure of H3: the same over the tenth of the texts on which a coordinate is strongest."""

ACTIVE_FRACTION = "active_fraction"
"""Mean share of the texts on which a coordinate is active that counts for `CONSISTENCY`."""

ROW_MEASURES = (STRONGEST_CONSISTENCY, CONSISTENCY, "l0")
"""What rows of table `robustness` say of codes, in `settings`."""

SCORED = ("semantic_consistency_top", "fms_corrected", "mcc")
"""What scorers say of latents or dictionaries, corrected for chance or held against the truth."""

_DOSES = """SELECT d.name AS feature, d.d_sae AS width, s.metric AS measure, s.value
    FROM all_scores s JOIN dictionaries d
        ON s.hook = d.latents_hook OR (s.hook = d.hook AND s.dictionary = d.name)
    WHERE list_contains($measures::VARCHAR[], s.metric) AND s.unit IS NULL AND s.control IS NULL
        AND s.value IS NOT NULL AND (d.hook = $hook OR $hook IS NULL)
    QUALIFY row_number() OVER (
        PARTITION BY d.name, s.metric ORDER BY d.hook, s.preset NULLS FIRST, s.seed) = 1
    ORDER BY ALL"""


@dataclass(frozen=True, slots=True)
class Dose:
    """How monosemantic a dictionary is, by one measure."""

    feature: str
    """Feature family that is the dictionary, or the dictionary's name."""
    width: int
    """Latents."""
    measure: str
    """Name of the measure; chance-corrected where there is such a one."""
    value: float
    """Its mean over latents."""


@dataclass(frozen=True, slots=True)
class DoseResponse:
    """How the gain goes with a measure, over dictionaries of one width."""

    measure: str
    """Name of the measure."""
    width: int
    """Latents of every dictionary."""
    n: int
    """Dictionaries."""
    rho: float
    """Spearman's correlation of measure and gain."""
    ci_low: float
    """Lower end of its 95 % interval; NaN with fewer than 4 dictionaries."""
    ci_high: float
    """Upper end."""
    p: float
    """Two-sided, of dealing the gains out anew."""
    slope: float
    """Median of the slopes of all pairs (Theil and Sen), gain per unit of the measure."""
    slope_low: float
    """Lower end of its 95 % interval."""
    slope_high: float
    """Upper end."""


def doses_of(results: Sequence[Result], measure: str = CONSISTENCY) -> list[Dose]:
    """Return what rows say of the code of each family: the mean over tasks of one measure.

    A family without the measure on a task where others have it is left out: a mean over fewer tasks
    would be another measure.

    Args:
        results: Rows; those with a budget or a further pooling say nothing of dictionaries here.
        measure: One of `ROW_MEASURES`.
    """
    values: dict[str, dict[str, float]] = {}
    widths: dict[str, int] = {}
    for result in results:
        value, width = result.settings.get(measure), result.settings.get("d")
        if is_whole(result) and value is not None and width is not None:
            values.setdefault(result.feature, {})[result.task] = float(value)
            widths[result.feature] = int(width)
    tasks = {task for by_task in values.values() for task in by_task}
    return [
        Dose(feature, widths[feature], measure, float(np.mean(list(by_task.values()))))
        for feature, by_task in sorted(values.items())
        if by_task.keys() == tasks
    ]


def is_whole(result: Result) -> bool:
    """Say whether a row is of all coordinates, pooled as the first pooling does.

    Further poolings of a dictionary are the same dictionary, and it must not count twice.
    """
    return result.budget == FULL and ":" not in result.feature


def read_doses(
    store: astore.Store, measures: Sequence[str] = (CONSISTENCY,), hook: str | None = None
) -> list[Dose]:
    """Return the measures of every dictionary that was scored: by name, or by its latents.

    Args:
        store: Open store.
        measures: Metrics of table `all_scores`.
        hook: Hook of the dictionaries; None takes the first of each name.
    """
    rows = store.sql(_DOSES, measures=list(measures), hook=hook).to_arrow_table().to_pylist()
    return [Dose(**row) for row in rows]


def dose_responses(
    doses: Sequence[Dose], gains: Mapping[str, float], *, seed: int = 0
) -> list[DoseResponse]:
    """Return how gains go with each measure at each width, over dictionaries that have both.

    The interval of rho is Bonett and Wright's (2000): normal on the scale of atanh, with variance
    (1 + rho^2 / 2) / (n - 3). A width with fewer than 3 dictionaries, or a measure that is the same
    in all, is left out.

    Args:
        doses: Measures of dictionaries.
        gains: Mean gain over the baseline by feature family.
        seed: Seed of the permutations.
    """
    responses: list[DoseResponse] = []
    for measure, width in sorted({(dose.measure, dose.width) for dose in doses}):
        here = [d for d in doses if (d.measure, d.width) == (measure, width) and d.feature in gains]
        x = np.array([dose.value for dose in here])
        y = np.array([gains[dose.feature] for dose in here])
        if len(here) >= 3 and np.ptp(x) > 0 and np.ptp(y) > 0:
            responses.append(_response(x, y, measure, width, seed))
    return responses


def _response(
    x: Float[ndarray, " n"], y: Float[ndarray, " n"], measure: str, width: int, seed: int
) -> DoseResponse:
    ranks = [_standard(rankdata(values)) for values in (x, y)]
    rho = float(np.clip(ranks[0] @ ranks[1], -1, 1))

    def of_dealt(dealt: Float[ndarray, "..."], axis: int = -1) -> Float[ndarray, "..."]:
        return np.asarray(np.moveaxis(dealt, axis, -1) @ ranks[1])

    permuted = permutation_test(
        (ranks[0],),
        of_dealt,
        permutation_type="pairings",
        vectorized=True,
        n_resamples=N_RESAMPLES,
        batch=2_000,
        rng=np.random.default_rng(seed),
    )
    low, high = spearman_interval(rho, len(x))
    slope: Any = theilslopes(y, x, alpha=LEVEL)
    slopes = (float(slope.slope), float(slope.low_slope), float(slope.high_slope))
    return DoseResponse(measure, width, len(x), rho, low, high, float(permuted.pvalue), *slopes)


def _standard(ranks: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
    centred = ranks - ranks.mean()
    return centred / np.sqrt((centred**2).sum())


def spearman_interval(rho: float, n: int) -> tuple[float, float]:
    """Return Bonett and Wright's interval of Spearman's correlation over n pairs."""
    if n < MIN_FOR_INTERVAL:
        return math.nan, math.nan
    # atanh of 1 is infinite
    inside = float(np.clip(rho, -1 + 1e-9, 1 - 1e-9))
    half = Z * math.sqrt((1 + inside**2 / 2) / (n - 3))
    centre = math.atanh(inside)
    return math.tanh(centre - half), math.tanh(centre + half)
