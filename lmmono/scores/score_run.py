"""The scores of a run: what `lmmono run` measures on its units and on what is said of them."""

from collections.abc import Iterator, Sequence
from typing import Any

import activation_store as astore
from lmmono.errors import RunError
from lmmono.explanations.protocols import variant
from lmmono.registry.scorers import find_scorer
from lmmono.runs.folder import Run
from lmmono.runs.manifest import STAGES
from lmmono.scores.score import score
from lmmono.scores.untrained_control import add_control, untrained_store
from lmmono.types import Progress, silent

Round = tuple[str, str | None, list[str]]
"""Explainer, preset, and the scorers that share what they read; "" where nothing is explained."""


def score_run(run: Run, *, progress: Progress = silent) -> Run:
    """Score what a run's recipe names on every hook that its store holds as rows, unless done.

    Scorers of explanations score those of each explainer of the recipe, on the hooks that it
    explains. Units that have a row already are left as they are. With controls, where the recipe
    explains and trains, all is done once more on the model untrained: rows of control
    `untrained_model`.

    Raises:
        RunError: The run is not captured yet, or not explained where that is asked for, or another
            process works on it.
        StoreError: The store cannot be read or written.
    """
    if run.is_done("score"):
        return run
    recipe = run.recipe
    for stage, wanted in (("capture", True), ("explain", bool(recipe.explain.explainers))):
        if wanted and not run.is_done(stage):
            done = "captured" if stage == "capture" else "explained"
            raise RunError(f"{run.dir}: not {done} yet; run `lmmono {stage} {run.dir}` first")
    digest = recipe.digest(*STAGES["score"].sections)
    with run.stage("score", digest) as stage, astore.open(run.store_path, mode="a") as store:
        hooks = _score(run, store, run.model, None, recipe.score.controls, progress)
        if recipe.score.controls and recipe.explain.explainers and recipe.train.steps:
            _score_untrained(run, store, progress)
        stage.facts.update(hooks=sorted(hooks))
    return run


def _score(
    run: Run,
    store: astore.Store,
    model: Any,
    hooks: Sequence[str] | None,
    controls: bool,
    progress: Progress,
) -> set[str]:
    """Score as the recipe says; return the hooks. Those given stand in for the recipe's."""
    found = set[str]()
    for explainer, preset, names in _rounds(run):
        needs_model = any("model" in find_scorer(name).needs for name in names)
        made = score(
            store,
            hooks or (run.recipe.explain.hooks if explainer else None),
            scorer=names,
            explainer=explainer or "token_lookup",
            preset=preset,
            controls=controls,
            seed=run.recipe.seed,
            model=model if needs_model else None,
            progress=progress,
        )
        found.update(made.hooks)
    return found


def _score_untrained(run: Run, store: astore.Store, progress: Progress) -> None:
    """Add the rows of the untrained model to the store, then the means that hold them."""
    scorers = [find_scorer(each.name) for each in run.recipe.score.scorers]
    with untrained_store(run, store, progress) as (model, other, hooks):
        if not hooks:
            return
        _score(run, other, model, hooks, False, progress)
        add_control(store, other, scorers)
    _score(run, store, run.model, None, True, progress)


def _rounds(run: Run) -> Iterator[Round]:
    """Yield what is scored together: the same explanations under the same preset."""
    settings, said = run.recipe.score.scorers, run.recipe.explain
    for preset in dict.fromkeys(each.preset for each in settings):
        mine = [each for each in settings if each.preset == preset]
        if alone := [each.name for each in mine if not each.explained]:
            yield "", preset, alone
        if together := [each.name for each in mine if each.explained]:
            changes: dict[str, object] = {} if said.window == 64 else {"window": said.window}
            for explainer in said.explainers:
                own = explainer if preset in said.presets else variant(explainer, None, changes)
                yield str(own), preset, together
