"""Does a scorer rank a true explanation above false ones? Measured where the truth is planted.

Units of known meaning get a true explanation and false ones: of another feature, near misses, too
broad or too narrow; see `planted_units`.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import spearmanr

import activation_store as astore
from lmmono.errors import ExplainError, nearest
from lmmono.registry.scorers import SCORERS, find_scorer
from lmmono.runs.folder import Run, open_run
from lmmono.scores.planted_units import (
    FALSE,
    KnownUnit,
    add_explanations,
    explainer_of,
    write_planted,
    write_trained,
)
from lmmono.scores.score import score
from lmmono.stats.intervals import wilson
from lmmono.types import Progress, silent


@dataclass(frozen=True, slots=True)
class Audit:
    """What a scorer made of true and false explanations."""

    scorer: str
    """Name of the scorer."""
    metric: str
    """Its headline, which is what ranks."""
    rows: tuple[dict[str, Any], ...]
    """`level`, `kind` of feature ("all" for all) and `false` explanation; `ranking`, the share of
    units whose true explanation scores above the false one, ties by half, with `ci_low` and
    `ci_high` (95 %, Wilson over units); for `false` "all" also `calibration`, the mean over units
    of Spearman's correlation of the scores with the F1 of the explanations against the planted
    feature; `n` units."""


def audit_scorer(
    name: str,
    *,
    run: Run | Path | None = None,
    n_documents: int = 600,
    max_tokens: int = 40_000,
    seed: int = 0,
    progress: Progress = silent,
) -> Audit:
    """Score true and false explanations of known units, in a store that is thrown away.

    Args:
        name: A scorer of explanations that needs neither a language model nor labels.
        run: A run on the planted language, or its folder: its neurons that follow a feature; None
            plants units.
        n_documents: Documents of the planted language, half of them for scores; not of a run.
        max_tokens: Tokens of a run's splits `explain` and `score`, the most of each.
        seed: Seed of the language, the noise and the false explanations.
        progress: Called with how far the work is.

    Raises:
        ExplainError: No such scorer, or it scores no explanations, or needs more than a store; or
            no neuron of the run follows a feature.
        DataError: The run's corpus is not a planted one.
    """
    scorer = find_scorer(name)
    if not set(scorer.needs) <= {"explanation", "program"} or not scorer.needs:
        able = [n for n, s in SCORERS.items() if s.needs in (("explanation",), ("program",))]
        raise ExplainError(f"{name} scores no explanations by themselves; {nearest(name, able)}")
    folder = tempfile.TemporaryDirectory()
    with folder as place, astore.open(Path(place) / "audit", mode="w") as store:
        if run is None:
            truth = write_planted(store, n_documents, seed)
        else:
            trained = open_run(run) if isinstance(run, Path) else run
            truth = write_trained(store, trained, max_tokens, seed)
            if not truth.units:
                raise ExplainError(f"{trained.dir}: no neuron follows a feature; train it longer")
        quality = add_explanations(store, truth, seed)
        values = _scores(store, name, scorer.metrics[0], truth.units, progress)
    return Audit(name, scorer.metrics[0], tuple(_rows(truth.units, values, quality)))


def _scores(
    store: astore.Store, name: str, metric: str, units: Sequence[KnownUnit], progress: Progress
) -> Float[ndarray, "units kinds"]:
    """Return the headline of every unit and explanation; 0 where it is not defined."""
    values = np.zeros((len(units), 1 + len(FALSE)))
    query = """SELECT hook, unit, coalesce(value, 0) FROM all_scores WHERE metric = $metric
        AND explainer = $explainer AND control IS NULL AND unit IS NOT NULL"""
    for criterion in dict.fromkeys(unit.criterion for unit in units):
        chosen = {(u.hook, u.unit): i for i, u in enumerate(units) if u.criterion == criterion}
        hooks = sorted({hook for hook, _ in chosen})
        for at, kind in enumerate(("true", *FALSE)):
            explainer = explainer_of(kind, criterion)
            score(store, hooks, scorer=name, explainer=explainer, controls=False)
            rows = store.sql(query, metric=metric, explainer=explainer).fetchall()
            for hook, unit, value in rows:
                values[chosen[hook, unit], at] = value
            progress(f"audit {name}", at + 1, 1 + len(FALSE))
    return values


def _rows(
    units: Sequence[KnownUnit], values: ndarray, quality: ndarray
) -> Iterator[dict[str, Any]]:
    """Yield a row per level, kind of feature and false explanation, those of all together first."""
    above = (values[:, :1] > values[:, 1:]) + 0.5 * (values[:, :1] == values[:, 1:])
    above = np.where(np.isnan(quality[:, 1:]), np.nan, above)
    agreement = np.array([_agreement(v, q) for v, q in zip(values, quality, strict=True)])
    for level in dict.fromkeys(unit.level for unit in units):
        kinds = [unit.kind if unit.level == level else None for unit in units]
        for kind in ("all", *dict.fromkeys(kind for kind in kinds if kind is not None)):
            chosen = np.array([k is not None and kind in ("all", k) for k in kinds])
            key = {"level": level, "kind": kind}
            whole = _ranking(np.nanmean(above[chosen], axis=1))
            yield {**key, "false": "all", **whole, "calibration": float(agreement[chosen].mean())}
            for i, false in enumerate(FALSE):
                yield {**key, "false": false, **_ranking(above[chosen, i]), "calibration": None}


def _agreement(values: ndarray, quality: ndarray) -> float:
    """Return Spearman's correlation of scores and F1; 0 where either is constant."""
    is_false = ~np.isnan(quality)
    values, quality = values[is_false], quality[is_false]
    constant = np.ptp(values) == 0 or np.ptp(quality) == 0
    return 0.0 if constant else float(spearmanr(values, quality)[0])  # pyright: ignore[reportArgumentType]


def _ranking(wins: Float[ndarray, " units"]) -> dict[str, float | None]:
    """Return the share of wins with its interval, among the units that have both explanations.

    Wilson's interval stays open where every unit wins.
    """
    wins = wins[~np.isnan(wins)]
    if not len(wins):
        return {"ranking": None, "ci_low": None, "ci_high": None, "n": 0}
    low, high = wilson(float(wins.sum()), len(wins))
    return {"ranking": float(wins.mean()), "ci_low": low, "ci_high": high, "n": len(wins)}
