"""Which choice moves a model's score: corpus half, record draw, explainer, judge, seed, kind.

A model's mean score is measured anew for every combination of the choices, in memory: nothing is
written. Its variance is then taken apart; see `lmmono.stats.variance`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Float
from numpy import ndarray

import activation_store as astore
from lmmono.clients.client import Client
from lmmono.errors import ExplainError
from lmmono.explanations.stored_explanations import (
    explained_units,
    match_stored_hooks,
    read_densities,
    stored_explainer,
)
from lmmono.records.record_reader import RecordReader
from lmmono.records.units import Sample
from lmmono.registry.scorers import find_scorer
from lmmono.scores.score_job import ScoreJob
from lmmono.stats.variance import Component, components
from lmmono.types import Progress, silent

WHOLE_CORPUS = ("population", "anthropic_intervals")
"""Scorers that read every token of the split by themselves, not the excerpts of one half."""


@dataclass(frozen=True, slots=True)
class ScoreVariance:
    """Where the variance of a model's mean score comes from."""

    scorer: str
    """The scorer."""
    components: tuple[Component, ...]
    """A part for each factor that has several levels, and what is left."""
    values: Float[ndarray, "*levels"]
    """Mean score of each combination."""
    factors: tuple[str, ...]
    """Factor of each axis of `values`."""
    fixed: tuple[str, ...]
    """Factors with one level: their part is not known."""
    ci_method: str = "generalised intervals from chi-squared mean squares (Weerahandi 1995)"
    """How the intervals were made."""


def score_variance(
    stores: Mapping[str, Sequence[astore.Store]],
    *,
    scorer: str = "detection",
    explainers: Sequence[str] = ("token_lookup",),
    judges: Sequence[Client | None] = (None,),
    n_draws: int = 3,
    halves: bool = True,
    n_units: int | None = None,
    hooks: str = "blocks.*.mlp.hook_post",
    seed: int = 0,
    progress: Progress = silent,
) -> ScoreVariance:
    """Return the shares of a mean score's variance by the choices behind it.

    Args:
        stores: Stores of each architecture, one per training seed, as many for each.
        scorer: A scorer of explanations.
        explainers: Explainers as stored.
        judges: Language models that judge; None lets programs.
        n_draws: Draws of records, by seed.
        halves: Score each half of the documents by itself.
        n_units: Units of a hook, drawn by seed, the same in every combination; None takes all that
            are explained.
        hooks: Hooks that make up a model's mean.
        seed: First seed of the records, and seed of the drawn units.
        progress: Called with how many combinations are measured.

    Raises:
        ExplainError: Different numbers of seeds, a scorer that reads no excerpts where halves are
            wanted, or every factor has one level.
    """
    record = find_scorer(scorer)
    if not record.reads_explanations or record.per != "unit":
        raise ExplainError(f"{scorer} scores no explanations of units")
    if halves and scorer in WHOLE_CORPUS:
        raise ExplainError(f"{scorer} reads whole splits; pass halves=False")
    sizes = {name: len(arm_stores) for name, arm_stores in stores.items()}
    if not sizes or len(set(sizes.values())) != 1:
        raise ExplainError(f"want as many training seeds of each architecture, got {sizes}")
    levels: dict[str, Sequence[object]] = {
        "architecture": list(stores),
        "training seed": range(next(iter(sizes.values()))),
        "corpus half": range(2) if halves else (None,),
        "record draw": range(n_draws),
        "explainer": list(explainers),
        "judge": list(judges),
    }
    values = np.empty([len(choices) for choices in levels.values()])
    combinations = list(product(*(range(len(choices)) for choices in levels.values())))
    for done, at in enumerate(combinations, start=1):
        arm, which, half, draw, explainer, judge = (
            choices[i] for choices, i in zip(levels.values(), at, strict=True)
        )
        store = stores[str(arm)][which]  # pyright: ignore[reportArgumentType, reportCallIssue]
        reader = RecordReader(
            store,
            seed=seed + draw,  # pyright: ignore[reportOperatorIssue]
            part=None if half is None else (half, 2),  # pyright: ignore[reportArgumentType]
        )
        values[at] = _mean(store, scorer, reader, hooks, str(explainer), judge, n_units, seed)  # pyright: ignore[reportArgumentType]
        progress(f"variance of {scorer}", done, len(combinations))
    varied = tuple(name for name, choices in levels.items() if len(choices) > 1)
    fixed = tuple(name for name in levels if name not in varied)
    values = values.reshape([len(levels[name]) for name in varied])
    both = {"architecture", "training seed"} <= set(varied)
    nested = {"training seed": "architecture"} if both else {}
    parts = components(values, varied, nested=nested, seed=seed)
    return ScoreVariance(scorer, parts, values, varied, fixed)


def _mean(
    store: astore.Store,
    scorer: str,
    reader: RecordReader,
    hooks: str,
    explainer: str,
    judge: Client | None,
    n_units: int | None,
    seed: int,
) -> float:
    """Return the mean over hooks of means over units; a score that is not defined is chance."""
    record, means = find_scorer(scorer), list[float]()
    least = record.least_density
    for hook in match_stored_hooks(store, hooks):
        named = stored_explainer(store, explainer, hook)
        units = explained_units(store, hook, named, reader.seed)
        if n_units is not None:
            units = [units[i] for i in Sample(n_units, seed).draw(hook, len(units))]
        if least is not None and np.isfinite(least):
            densities = read_densities(store, hook)
            units = [unit for unit in units if densities[unit] >= least]
        if not units:
            continue
        job = ScoreJob(store, hook, reader, tuple(units), record.settings, explainer=named,
                       controls=False, seed=reader.seed, client=judge)  # fmt: skip
        rows = record.load()(job)
        values = [row["value"] for row in rows if row["metric"] == record.metrics[0]]
        means.append(float(np.mean([value for value in values if value is not None])))
    if not means:
        raise ExplainError(f"{store.path}: no unit that {scorer} holds for")
    return float(np.mean(means))
