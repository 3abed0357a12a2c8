"""Tables of a study: its arms over training seeds, and arms that differ in architecture alone.

Every interval here is Student's t over training seeds. Units and tokens of one network hang
together, so an interval over them says nothing of the next network of the kind.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, combinations
from pathlib import Path

import numpy as np

import activation_store as astore
from lmmono.errors import RunError
from lmmono.recipe import Recipe
from lmmono.recipe.sections import PretrainedModel
from lmmono.registry.scorers import SCORERS, Scorer, find_scorer
from lmmono.reports.seed_means import over_seeds
from lmmono.reports.table import ReportTable
from lmmono.reports.training_tables import Scored, training_tables
from lmmono.runs.folder import Run, find_runs, open_run
from lmmono.studies.differences import Difference, MeanDifference, compare
from lmmono.studies.score_variance import WHOLE_CORPUS, score_variance
from lmmono.types import Progress, silent

Key = tuple[str, str, str]
"""A scorer, the explainer that it scores, as stored, and what the units are: a name of `UNITS`."""

RunScores = dict[Key, dict[str, tuple[float, float]]]
"""A model's mean and its share of undefined units, by scorer, then by control.

Control "" is the score itself, "defined" the mean over units that have one.
"""

UNITS = {
    "neurons": "blocks.*.mlp.hook_post",
    "latents": "blocks.*.mlp.hook_post.hook_sae_acts_post",
}
"""Hooks whose units are compared, all blocks together."""

_DENSITIES = """
SELECT avg(density) AS density, median(kurtosis) AS kurtosis,
    avg((n_active = 0)::INT) AS never, avg((density > 0.99)::INT) AS always
FROM unit_stats WHERE hook LIKE 'blocks.%.mlp.hook_post'
"""

_SCORES = """
SELECT DISTINCT ON (metric, explainer, control, hook)
    metric, explainer, control, hook, value, nan_fraction
FROM all_scores WHERE unit IS NULL AND preset IS NULL AND judge IS NULL AND explainer IS NOT NULL
    AND list_contains($metrics, metric) AND list_contains($hooks, hook)
"""


def study_tables(folders: Sequence[Path], progress: Progress = silent) -> tuple[ReportTable, ...]:
    """Return the tables of a study whose runs are scored.

    Args:
        folders: Folders of runs of one recipe with arms; the seeds of an arm make one row.
        progress: Told which pairs of arms are compared.

    Raises:
        RunError: There is no run, or one is not scored or belongs to no arm.
        StoreError: A store cannot be read.
    """
    arms, left_out = _by_arm([open_run(path) for folder in folders for path in find_runs(folder)])
    with ExitStack() as stack:
        stores = {
            name: [stack.enter_context(astore.open(run.store_path)) for run in runs]
            for name, runs in arms.items()
        }
        scores = {
            name: [_read_scores(store) for store in arm_stores]
            for name, arm_stores in stores.items()
        }
        keys = list(dict.fromkeys(chain(*chain(*scores.values()))))
        tables = [_arm_table(arms, stores, left_out)]
        tables += [_score_table(key, scores) for key in keys]
        tables += [_floor_table(scores)] if keys else []
        pairs = [pair for pair in combinations(arms, 2) if are_twins(*(arms[n] for n in pair))]
        if pairs and keys:
            seeds = {name: [run.recipe.seed for run in runs] for name, runs in arms.items()}
            tables.append(_twin_table(pairs, scores, stores, seeds, progress))
        presets = _preset_keys(next(iter(stores.values()))[0])
    neurons: list[Scored] = [
        (scorer, explainer, None)
        for scorer, explainer, kind in keys
        if kind == "neurons" and ":" not in explainer
    ]
    neurons += presets
    return (*tables, *training_tables(arms, pairs, neurons))


def variance_tables(
    folders: Sequence[Path],
    *,
    scorers: Sequence[str],
    explainers: Sequence[str],
    n_draws: int,
    n_units: int | None,
    progress: Progress = silent,
) -> tuple[ReportTable, ...]:
    """Return, for each scorer, the shares of a model's mean score by the choices behind it.

    Args:
        folders: Folders of runs of one recipe with arms.
        scorers: Scorers of explanations.
        explainers: Explainers whose explanations the runs hold.
        n_draws: Draws of records.
        n_units: Units of each hook; None takes all.
        progress: Told how many combinations are measured.

    Raises:
        RunError: There is no run, or one belongs to no arm or is not captured.
        ExplainError: The arms have different numbers of seeds, or explanations are missing.
    """
    arms = _arms([open_run(path) for folder in folders for path in find_runs(folder)])
    for run in chain(*arms.values()):
        if not run.is_done("capture"):
            raise RunError(f"{run.dir}: not captured yet; run `lmmono score {run.dir}` first")
    tables: list[ReportTable] = []
    with ExitStack() as stack:
        stores = {
            name: [stack.enter_context(astore.open(run.store_path)) for run in runs]
            for name, runs in arms.items()
        }
        for scorer in scorers:
            variance = score_variance(
                stores,
                scorer=scorer,
                explainers=explainers,
                n_draws=n_draws,
                n_units=n_units,
                halves=scorer not in WHOLE_CORPUS,
                progress=progress,
            )
            rows = tuple(
                (
                    part.name,
                    str(part.n_levels),
                    f"{part.share:.1%}",
                    f"[{part.share_low:.1%}, {part.share_high:.1%}]",
                    f"{part.variance**0.5:.4f}",
                )
                for part in variance.components
            )
            tables.append(
                ReportTable(
                    title=f"Variance of {scorer}",
                    columns=("factor", "levels", "share", "95 %", "sd"),
                    rows=rows,
                    note=(
                        "Shares of the variance of a model's mean score over "
                        f"{variance.values.size} combinations; training seeds lie within arms. "
                        "Intervals: "
                        f"{variance.ci_method}. One level, so not known: "
                        f"{', '.join(variance.fixed) or 'none'}."
                    ),
                )
            )
    return tuple(tables)


def are_twins(a: Sequence[Run], b: Sequence[Run]) -> bool:
    """Say whether two arms differ in the kind of model alone, with the same training seeds."""
    first, second = a[0].recipe, b[0].recipe
    seeds = [[run.recipe.seed for run in arm] for arm in (a, b)]
    return (
        seeds[0] == seeds[1]
        and first.model.arch != second.model.arch
        and _around_the_architecture(first) == _around_the_architecture(second)
    )


def _around_the_architecture(recipe: Recipe) -> tuple[object, ...]:
    if isinstance(recipe.model, PretrainedModel):
        return (recipe,)  # is no twin of any: it was trained elsewhere, on other text
    shape = tuple(getattr(recipe.model, name) for name in ("n_layers", "d_model", "n_heads"))
    # each architecture has the learning rate that its own sweep chose
    train = recipe.train.model_copy(update={"lr": 1.0})
    return (*shape, recipe.data, train, recipe.capture, recipe.explain, recipe.score)


def _arms(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of a study by arm, in the order of their seeds."""
    if not runs:
        raise RunError("want the folder of a study whose runs are scored, found no run there")
    arms: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.recipe.seed):
        if run.recipe.arm is None:
            raise RunError(f"{run.dir}: belongs to no arm; want runs of a study with arms")
        arms.setdefault(run.recipe.arm, []).append(run)
    return arms


def _by_arm(runs: Sequence[Run]) -> tuple[dict[str, list[Run]], list[Run]]:
    """Return the scored runs by arm, and those left out: a seed counts when all its runs are done.

    A study that is still being run so has tables of whole seeds.
    """
    arms = _arms(runs)
    unscored = [run for run in runs if not run.is_done("score")]
    begun = {run.recipe.seed for run in unscored}
    left_out = [run for run in runs if run.recipe.seed in begun]
    if len(left_out) == len(runs):
        first = unscored[0]
        raise RunError(f"{first.dir}: not scored yet; run `lmmono score {first.dir}` first")
    kept = {
        arm: [r for r in arm_runs if r.recipe.seed not in begun] for arm, arm_runs in arms.items()
    }
    kept = {arm: arm_runs for arm, arm_runs in kept.items() if arm_runs}
    return kept, left_out


def _read_scores(store: astore.Store) -> RunScores:
    scores: RunScores = {}
    names = {scorer.metrics[0]: scorer.name for scorer in _scorers()}
    metrics = [*names, *(f"{name}_defined" for name in names)]
    kinds = {hook: kind for kind, hook in UNITS.items()}
    rows = store.sql(_SCORES, hooks=list(kinds), metrics=metrics).fetchall()
    for metric, explainer, control, hook, value, undefined in rows:
        headline = metric.removesuffix("_defined")
        if value is None or (metric != headline and control is not None):
            continue
        column = "defined" if metric != headline else control or ""
        key = (names[headline], explainer, kinds[hook])
        scores.setdefault(key, {})[column] = (float(value), float(undefined or 0.0))
    order = [*names.values(), *UNITS]
    return dict(
        sorted(scores.items(), key=lambda item: (*map(order.index, item[0][::2]), item[0][1]))
    )


def _preset_keys(store: astore.Store) -> list[Scored]:
    """Return the scorers of neurons' explanations that are stored under a preset."""
    names = {scorer.metrics[0]: scorer.name for scorer in _scorers()}
    query = """SELECT DISTINCT metric, explainer, preset FROM hook_scores
        WHERE hook = $hook AND preset IS NOT NULL AND judge IS NULL AND explainer IS NOT NULL
            AND list_contains($metrics, metric) ORDER BY ALL"""
    rows = store.sql(query, hook=UNITS["neurons"], metrics=list(names)).fetchall()
    # the name of an explainer says its protocol too, which the preset says again
    return [
        (names[metric], explainer.partition(":")[0], preset) for metric, explainer, preset in rows
    ]


def _scorers() -> Iterator[Scorer]:
    """Yield the scorers of explanations; means of statistics of units say little: heavy tails."""
    for scorer in SCORERS.values():
        if scorer.per == "unit" and {"explanation", "program"} & set(scorer.needs):
            yield scorer


def _arm_table(
    arms: dict[str, list[Run]], stores: dict[str, list[astore.Store]], left_out: Sequence[Run]
) -> ReportTable:
    rows: list[tuple[object, ...]] = []
    for name, runs in arms.items():
        facts = [store.sql(_DENSITIES).fetchall()[0] for store in stores[name]]
        density, kurtosis, never, always = np.array(facts, np.float64).T
        n_parameters = runs[0].model_facts["n_parameters"]
        losses = np.array([run.val_loss for run in runs])
        numbers = [
            over_seeds(losses),
            over_seeds(density, "density"),
            over_seeds(kurtosis, "unit_kurtosis"),
        ]
        shares = (f"{never.mean():.1%}", f"{always.mean():.1%}")
        rate = "-" if runs[0].recipe.is_pretrained else f"{runs[0].recipe.train.lr:g}"
        rows.append((name, str(len(runs)), f"{n_parameters:,}", rate, *numbers, *shares))
    return ReportTable(
        title="Arms",
        columns=(
            "arm",
            "seeds",
            "parameters",
            "lr",
            "val loss",
            "density",
            "kurtosis",
            "never",
            "always",
        ),
        rows=tuple(rows),
        note=(
            "Means over training seeds with 95 % intervals (Student t over seeds). val loss: nats "
            "per token. density: share of pairs (token, neuron) above the threshold, all layers. "
            "kurtosis: median over neurons. never, always: neurons above the threshold on no "
            "token, and on more than 99 % of them."
            + (
                f" {len(left_out)} runs are left out: their seed is not scored in all arms yet."
                if left_out
                else ""
            )
        ),
    )


def _score_table(key: Key, scores: dict[str, list[RunScores]]) -> ReportTable:
    """Return one scorer of one explainer and kind of unit: every arm, with its controls."""
    scorer, explainer, kind = key
    by_arm = {
        arm: [by_key[key] for by_key in per_seed if key in by_key]
        for arm, per_seed in scores.items()
        if any(key in by_key for by_key in per_seed)
    }
    columns = sorted(
        set(chain(*chain(*by_arm.values()))),
        key=lambda column: (column != "", column != "defined", column),
    )
    metric, chance = find_scorer(scorer).metrics[0], find_scorer(scorer).chance
    rows: list[tuple[object, ...]] = []
    for arm, per_seed in by_arm.items():
        undefined = [by_control[""][1] for by_control in per_seed if "" in by_control]
        cells = (over_seeds((s[c][0] for s in per_seed if c in s), metric) for c in columns)
        shown = (mean or "-" for mean in cells)
        rows.append((arm, f"{np.mean(undefined or [np.nan]):.1%}", *shown))
    return ReportTable(
        title=f"{scorer} of {explainer}, {kind}",
        columns=("arm", "undefined", *("score" if c == "" else c for c in columns)),
        rows=tuple(rows),
        note=(
            f"{find_scorer(scorer).about}"
            + ("." if chance is None else f"; guessing gets {chance:g}.")
            + " Means over training seeds, with 95 % intervals (Student t). score: mean over "
            "layers of means over units, those without a value counting as guessing; "
            "defined: mean over the units with a value, all layers together. The other columns are "
            "controls of the same units."
        ),
    )


def _floor_table(scores: dict[str, list[RunScores]]) -> ReportTable:
    """Return every score less each of its floors, arm by arm."""
    every = [*chain(*scores.values())]
    keys = list(dict.fromkeys(chain(*every)))
    columns = {column for by_key in every for column in chain(*by_key.values())}
    floors = sorted(columns - {"", "defined"})
    rows: list[tuple[object, ...]] = []
    for arm, per_seed in scores.items():
        for key in keys:
            whole = [by_key[key] for by_key in per_seed if key in by_key and "" in by_key[key]]
            if not whole:
                continue
            cells = [
                over_seeds(s[""][0] - s[floor][0] for s in whole if floor in s) or "-"
                for floor in floors
            ]
            rows.append((arm, f"{key[0]} of {key[1]}", key[2], *cells))
    return ReportTable(
        title="Above the floors",
        columns=("arm", "score", "units", *(f"less {name}" for name in floors)),
        rows=tuple(rows),
        note=(
            "Score less the same of a control, seed by seed; means over training seeds with 95 % "
            "intervals (Student t). untrained_model: the same model before training; the others "
            "are explanations of other units, of units of like density, and shuffled pairs."
        ),
    )


def _twin_table(
    pairs: Sequence[tuple[str, str]],
    scores: dict[str, list[RunScores]],
    stores: dict[str, list[astore.Store]],
    seeds: dict[str, list[int]],
    progress: Progress,
) -> ReportTable:
    """Return the differences of arms that differ in architecture alone."""
    rows: list[tuple[str, ...]] = []
    for done, (a, b) in enumerate(pairs, start=1):
        every = [*scores[a], *scores[b]]
        for key in (key for key in every[0] if all(key in by_key for by_key in every)):
            scorer, explainer, kind = key
            difference = compare(
                stores[a],
                stores[b],
                scorer=scorer,
                hooks=UNITS[kind],
                explainer=explainer,
                seed=seeds[a],
            )
            rows.append((f"{a} - {b}", kind, scorer, explainer, *_cells(difference)))
        progress(f"compare {a} - {b}", done, len(pairs))
    return ReportTable(
        title="Twins",
        columns=(
            "arms",
            "units",
            "scorer",
            "explainer",
            "raw",
            "defined only",
            "density-matched",
            "overlap",
            "left out",
        ),
        rows=tuple(rows),
        note=(
            "Differences of model means, with 95 % intervals over pairs of training runs (Student "
            "t); an interval that holds 0 tells nothing apart. density-matched: units weighted so "
            "that both models have the same densities; overlap: share of densities that both "
            "have. left out: share of the units of each arm that fire more rarely than the scorer "
            "holds for (`lmmono ls scorers`)."
        ),
    )


def _cells(difference: Difference) -> tuple[str, ...]:
    return (
        _estimate(difference.raw),
        _estimate(difference.defined),
        _estimate(difference.density_matched),
        f"{difference.overlap:.0%}",
        f"{difference.below[0]:.0%}, {difference.below[1]:.0%}",
    )


def _estimate(estimate: MeanDifference) -> str:
    if np.isnan(estimate.difference):  # a model without a defined unit has no mean
        return "-"
    interval = (
        "" if np.isnan(estimate.ci_low) else f" [{estimate.ci_low:+.3f}, {estimate.ci_high:+.3f}]"
    )
    return f"{estimate.difference:+.3f}{interval}"
