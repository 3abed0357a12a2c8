"""Arms of a study beside its first one: how monosemantic, how accurate, how robust.

Arms are trained apart, each once per seed, so that a difference is taken seed by seed and its
interval is Student's t over training seeds. Every arm meets the same texts, flips and noise.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

import activation_store as astore
from lmmono.reports.seed_means import difference, over_seeds
from lmmono.reports.table import ReportTable
from lmmono.runs.folder import Run
from lmmono.suites.results import APART, REAL, Result, areas_and_starts
from lmmono.suites.robustness_run import run_results

By = dict[tuple[str, str], dict[str, dict[int, float]]]
"""Values by what is measured and of what, then by arm, then by training seed."""

_UNITS = """
SELECT metric, control, avg(value) AS value FROM all_scores
WHERE hook LIKE 'blocks.%.mlp.hook_post' AND value IS NOT NULL AND (
    (metric = 'token_selectivity' AND unit IS NOT NULL)
    OR (metric IN ('feature_decorrelation', 'unit_correlation') AND unit IS NULL))
GROUP BY ALL ORDER BY metric, control NULLS FIRST
"""
"""Means over units and hooks, with their controls."""


def arm_tables(runs: Sequence[Run]) -> list[ReportTable]:
    """Return how the arms' units and their robustness differ from the first arm's.

    Empty where there is one arm. Seeds that an arm lacks yet are left out of its differences.
    """
    done = [run for run in runs if run.recipe.arm is not None and run.is_done("train")]
    # as the recipe lists them: a study trains its arms in that order, seed by seed
    done.sort(key=lambda run: run.manifest.stages["train"].started)
    arms = list(dict.fromkeys(run.recipe.arm for run in done))
    if len(arms) < 2:
        return []
    units: By = {}
    robust: By = {}
    for run in done:
        for target, values in ((units, _of_units(run)), (robust, _of_suites(run))):
            for key, value in values:
                by_seed = target.setdefault(key, {}).setdefault(str(run.recipe.arm), {})
                by_seed[run.recipe.seed] = value
    first, *others = map(str, arms)
    note = (
        f"{first}: mean over training seeds with its 95 % interval (Student t). Other arms: their "
        f"difference from {first}, seed by seed. An interval without 0 tells two arms apart; of "
        "100 such intervals about 5 leave 0 out by chance."
    )
    titles = {
        "Units of each arm": (units, f"{note} sd: deviation of {first} over seeds."),
        "Robustness of each arm": (
            robust,
            f"{note} change: area under the curve over levels of noise, divided by the largest "
            "level, less the value without noise; below 0 noise takes more.",
        ),
    }
    return [
        ReportTable(
            title,
            ("measure", "of", "seeds", first, "sd", *others),
            tuple(_row(key, by_arm, first, others) for key, by_arm in values.items()),
            text,
        )
        for title, (values, text) in titles.items()
        if values
    ]


def _row(
    key: tuple[str, str],
    by_arm: Mapping[str, Mapping[int, float]],
    first: str,
    others: Sequence[str],
) -> tuple[object, ...]:
    ours = by_arm.get(first, {})
    values = np.array(list(ours.values()))
    sd = float(values.std(ddof=1)) if len(values) > 1 else None
    cells = (difference(by_arm.get(arm, {}), ours) for arm in others)
    return (*key, len(values), over_seeds(values), sd, *cells)


def _of_units(run: Run) -> Iterator[tuple[tuple[str, str], float]]:
    yield ("val loss", "model"), run.val_loss
    if not run.is_done("score"):
        return
    with astore.open(run.store_path) as store:
        rows = store.sql(_UNITS).fetchall()
    for metric, control, value in rows:
        yield (str(metric), str(control or "neurons")), float(value)


def _of_suites(run: Run) -> Iterator[tuple[tuple[str, str], float]]:
    """Yield the values of a run's suites, means over the draws of each."""
    if not run.recipe.robustness.suites or not run.is_done("robustness"):
        return
    with astore.open(run.store_path) as store:
        results = [result for result in run_results(run, store) if result.suite not in APART]
    draws: dict[tuple[str, str], list[float]] = {}
    for area, start in areas_and_starts(results):
        clean = math.nan if start is None else start.value
        draws.setdefault((f"{_about(area, None)}, without noise", _entrant(area)), []).append(clean)
        change = (f"{_about(area, area.corruption)}, change", _entrant(area))
        draws.setdefault(change, []).append(area.value - clean)
    for result in results:
        if result.level is None and result.corruption != REAL:
            key = (_about(result, result.corruption), _entrant(result))
            draws.setdefault(key, []).append(result.value)
    for key, values in draws.items():
        defined = [value for value in values if not math.isnan(value)]
        if defined:
            yield key, float(np.mean(defined))


def _about(result: Result, corruption: str | None) -> str:
    shots = "" if result.n_shots is None else f", {result.n_shots} per class"
    split = "" if result.split in (None, "test") else f", {result.split}"
    kind = "" if corruption is None else f", {corruption}"
    return f"{result.task}: {result.suite}{kind}{shots}{split}"


def _entrant(result: Result) -> str:
    return result.feature if result.probe is None else f"{result.feature}, {result.probe}"
