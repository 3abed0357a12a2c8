"""Tables of arms that kept steps of their training: at equal tokens, at equal loss, and verdicts.

All differences are of mean scores less those of the same models untrained. Intervals are Student's
t over training seeds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy import ndarray

import activation_store as astore
from lmmono.errors import ExplainError
from lmmono.recipe.registration import ArmTest, Registration, file_sha256, read_registration
from lmmono.registry.scorers import find_scorer
from lmmono.reports.seed_means import over_seeds
from lmmono.reports.table import ReportTable
from lmmono.runs.folder import Run
from lmmono.runs.kept import kept_runs
from lmmono.stats.significance import mean_test
from lmmono.studies.along_training import (
    WAYS,
    KeptModel,
    KeptTraining,
    at_equal_loss,
    at_equal_tokens,
    verdicts,
)
from lmmono.studies.differences import HookUnits, read_units, score_key

ALONG = "Along training"
"""Title of the table that `lmmono.reports.figures.training_figure` draws."""

NEURONS = "blocks.*.mlp.hook_post"

Scored = tuple[str, str, str | None]
"""A scorer, an explainer without its preset, and the preset of both."""

Trainings = Mapping[Scored, Mapping[str, Sequence[KeptTraining]]]
"""By what is scored, then by arm: one training per seed, in the order of seeds."""

VERDICTS = (
    "supported, opposite: p of no difference (two-sided t-test over seeds) after Holm's correction "
    "over the family is below {alpha:g}, and the mean has the sign that was claimed, or the other. "
    "equivalent: the two one-sided tests against the bound of {bound:g} are, after the same "
    "correction. inconclusive: neither, so nothing is known but the interval. not tested: fewer "
    "than two seeds, or a seed without the difference."
)
"""What the words mean, as it stands under every table of them."""


def training_tables(
    arms: Mapping[str, Sequence[Run]],
    pairs: Sequence[tuple[str, str]],
    scored: Sequence[Scored],
) -> list[ReportTable]:
    """Return the tables of arms whose runs kept steps; none where they did not.

    Args:
        arms: Scored runs by arm, in the order of the same seeds.
        pairs: Arms to compare.
        scored: What is compared.

    Raises:
        RunError: A kept step is missing.
        StoreError: A store cannot be read.
        RecipeError: The file of registered tests cannot be read.
    """
    every = [run for runs in arms.values() for run in runs]
    if not all(not run.recipe.is_pretrained and run.recipe.train.kept_steps for run in every):
        return []
    claims = _claims(every)
    keys = list(scored)
    tests = claims[0].tests if claims else ()
    keys += [key for key in map(_key, tests) if key not in keys]
    trainings: dict[Scored, dict[str, list[KeptTraining]]] = {key: {} for key in keys}
    for arm, runs in arms.items():
        for run in runs:
            for key, trained in _read(run, keys).items():
                trainings[key].setdefault(arm, []).append(trained)
    whole = {
        key: by_arm
        for key, by_arm in trainings.items()
        if all(len(by_arm.get(arm, ())) == len(runs) for arm, runs in arms.items())
    }
    tables = [_curves(whole)]
    if pairs:
        tables += [_equal_tokens(pairs, whole), _equal_loss(pairs, whole)]
    if claims:
        tables.append(_registered(claims[0], claims[1], whole))
    return tables


def _key(test: ArmTest) -> Scored:
    return test.scorer, test.explainer, test.preset


def _claims(runs: Sequence[Run]) -> tuple[Registration, str] | None:
    """Return what was registered before the runs, and a sentence on whether that is so."""
    paths = {run.recipe.registered for run in runs}
    if len(paths) != 1 or (path := next(iter(paths))) is None or not Path(path).is_file():
        return None
    digest = file_sha256(path)
    kept = [run.manifest.registered for run in runs]
    n_same = sum(claim is not None and claim["sha256"] == digest for claim in kept)
    words = f"{path}, sha256 {digest[:12]}, stood in the manifest of {n_same} of {len(runs)} runs"
    return read_registration(path), f"{words} before they began."


def _read(run: Run, keys: Sequence[Scored]) -> dict[Scored, KeptTraining]:
    """Return a training for each key that all its kept steps are scored by."""
    runs = {**kept_runs(run), run.recipe.train.last_step: run}
    untrained = run.dir / "untrained" / "store.duckdb"
    hooks: dict[Scored, list[tuple[HookUnits, ...]]] = {key: [] for key in keys}
    paths = [step_run.store_path for step_run in runs.values()]
    for path in [*paths, untrained] if untrained.exists() else paths:
        with astore.open(path) as store:
            for key in list(hooks):
                scorer = find_scorer(key[0])
                stored = score_key(scorer, key[1], key[2], None, run.recipe.seed)
                try:
                    hooks[key].append(tuple(read_units(store, scorer, NEURONS, stored)))
                except ExplainError:  # not scored by it, such as a preset of one explainer
                    del hooks[key]
    trainings: dict[Scored, KeptTraining] = {}
    for key, units in hooks.items():
        models = tuple(
            KeptModel(
                step, int(step_run.model_facts["train_tokens"]), step_run.val_loss, hook_units
            )
            for (step, step_run), hook_units in zip(runs.items(), units, strict=False)
        )
        floor = units[len(runs)] if untrained.exists() else ()
        has_chance = find_scorer(key[0]).chance is not None
        trainings[key] = KeptTraining(models, floor, has_chance)
    return trainings


def _means(trained: KeptTraining, i: int) -> tuple[float, float]:
    """Return the mean score of a kept step, undefined as guessing, and that of the untrained."""
    own, floor = (
        float(np.mean([hook.values.mean() for hook in hooks])) if hooks else np.nan
        for hooks in (trained.models[i].hooks, trained.untrained)
    )
    return own, floor


def _curves(trainings: Trainings) -> ReportTable:
    """Return loss, density and every score at every kept step of every arm."""
    first = next(iter(trainings.values()), {})
    rows: list[tuple[object, ...]] = []
    for arm, of_seeds in first.items():
        for i, model in enumerate(of_seeds[0].models):
            losses = np.array([one.models[i].val_loss for one in of_seeds])
            densities = np.array(
                [
                    np.mean([hook.densities.mean() for hook in one.models[i].hooks])
                    for one in of_seeds
                ]
            )
            scores = [
                np.array([np.subtract(*_means(one, i)) for one in by_arm[arm]])
                for by_arm in trainings.values()
            ]
            cells = [
                over_seeds(losses),
                over_seeds(densities, "density"),
                *map(over_seeds, scores),
            ]
            rows.append((arm, len(of_seeds), f"{model.n_tokens:,}", *cells))
    return ReportTable(
        title=ALONG,
        columns=("arm", "seeds", "tokens", "val loss", "density", *map(_words, trainings)),
        rows=tuple(rows),
        note=(
            "Means over training seeds with 95 % intervals (Student t). val loss: nats per token. "
            "Scores: mean over blocks of means over units, undefined ones as guessing, less the "
            "same of the model untrained."
        ),
    )


def _equal_tokens(pairs: Sequence[tuple[str, str]], trainings: Trainings) -> ReportTable:
    rows: list[tuple[object, ...]] = []
    for a, b in pairs:
        for key, by_arm in trainings.items():
            twins = list(zip(by_arm[a], by_arm[b], strict=True))
            whole = [at_equal_tokens(*pair) for pair in twins]
            before = [at_equal_tokens(*pair, last_block=False) for pair in twins]
            for n_tokens in whole[0]:
                cells = _ways([one[n_tokens] for one in whole], [one[n_tokens] for one in before])
                rows.append((f"{a} - {b}", _words(key), f"{n_tokens:,}", *cells))
    return ReportTable(
        title="At equal tokens",
        columns=("arms", "score", "tokens", *_HEADS),
        rows=tuple(rows),
        note=_NOTE,
    )


def _equal_loss(pairs: Sequence[tuple[str, str]], trainings: Trainings) -> ReportTable:
    rows: list[tuple[object, ...]] = []
    for a, b in pairs:
        for key, by_arm in trainings.items():
            twins = list(zip(by_arm[a], by_arm[b], strict=True))
            whole = [at_equal_loss(*pair) for pair in twins]
            before = [at_equal_loss(*pair, last_block=False) for pair in twins]
            level = over_seeds(one.level for one in whole)
            tokens = np.mean([one.n_tokens for one in whole], axis=0)
            met = " and ".join("-" if np.isnan(n) else f"{n:,.0f}" for n in tokens)
            cells = _ways([one.differences for one in whole], [one.differences for one in before])
            rows.append((f"{a} - {b}", _words(key), level, met, *cells))
    return ReportTable(
        title="At equal loss",
        columns=("arms", "score", "val loss", "tokens", *_HEADS),
        rows=tuple(rows),
        note=(
            f"{_NOTE} val loss: the higher one of both ends, where the other is interpolated "
            "between kept steps; tokens: what each had seen there, mean over seeds."
        ),
    )


_HEADS = ("raw", "without last block", "defined only", "density-matched")

_NOTE = (
    "Differences of mean scores less those of the untrained models, with 95 % intervals over pairs "
    "of training runs (Student t). raw: undefined scores count as guessing; defined only: they are "
    "left out; density-matched: units weighted so that both have the same densities, none below an "
    "overlap of 20 %."
)


def _ways(
    whole: Sequence[Float[ndarray, "3"]], before: Sequence[Float[ndarray, "3"]]
) -> tuple[str, ...]:
    raw, defined, matched = np.array(whole).T
    return tuple(_difference(values) for values in (raw, np.array(before).T[0], defined, matched))


def _registered(claims: Registration, where: str, trainings: Trainings) -> ReportTable:
    """Return the verdict of every registered test, family by family."""
    rows: list[tuple[object, ...]] = []
    for family in claims.families:
        way = WAYS.index(family.way)
        by_test: list[tuple[ndarray, int]] = []
        for test in claims.tests:
            by_arm = trainings.get(_key(test), {})
            twins = zip(by_arm.get(test.a, ()), by_arm.get(test.b, ()), strict=False)
            differences = [
                at_equal_loss(*pair).differences[way]
                if family.at == "equal_loss"
                else [*at_equal_tokens(*pair).values()][-1][way]
                for pair in twins
            ]
            by_test.append((np.array(differences), 1 if test.expected == "higher" else -1))
        words = verdicts(by_test, bound=claims.bound, alpha=claims.alpha)
        for test, verdict in zip(claims.tests, words, strict=True):
            rows.append(
                (
                    f"{family.at}, {family.way}".replace("_", " "),
                    test.name,
                    _words(_key(test)),
                    test.expected,
                    str(verdict.test) if verdict.test.n else "-",
                    _p(verdict.p_holm),
                    _p(verdict.p_equivalent_holm),
                    verdict.word,
                )
            )
    return ReportTable(
        title="Registered tests",
        columns=(
            *("family", "test", "score", "claimed", "difference"),
            *("p (Holm)", "p equivalent (Holm)", "verdict"),
        ),
        rows=tuple(rows),
        note=f"{VERDICTS.format(alpha=claims.alpha, bound=claims.bound)} {where}",
    )


def _p(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2g}"


def _words(key: Scored) -> str:
    scorer, explainer, preset = key
    return f"{scorer} of {explainer}" + (f", {preset}" if preset else "")


def _difference(values: Float[ndarray, " seeds"]) -> str:
    test = mean_test(values, 0.0)
    return "-" if np.isnan(test.mean) else str(test)
