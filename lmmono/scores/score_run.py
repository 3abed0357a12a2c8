"""The scores of a run: what `lmmono run` measures on its units and on what is said of them."""

from collections.abc import Iterator, Sequence
from typing import Any

import activation_store as astore
from lmmono.explanations.protocols import variant
from lmmono.registry.scorers import find_scorer
from lmmono.runs.folder import Run
from lmmono.runs.stages import STAGES
from lmmono.scores.score import score
from lmmono.scores.untrained_control import add_control
from lmmono.types import Progress, silent

Round = tuple[str, str | None, list[str]]
"""Explainer, preset, and the scorers that share what they read; "" where nothing is explained."""


def score_run(run: Run, *, progress: Progress = silent) -> dict[str, Any]:
    """Score what a run's recipe names on every hook that its store holds as rows; return the facts.

    Scorers of explanations score those of each explainer of the recipe, on the hooks that it
    explains. Resumable: units that have a row already are skipped. The rows of the untrained
    control, where there is one, are added as rows of control `untrained_model`.

    Raises:
        StoreError: The store cannot be read or written.
    """
    recipe = run.recipe
    with astore.open(run.store_path, mode="a") as store:
        hooks = _score(run, store, run.model, None, recipe.score.controls, progress)
        control = run.dir / "untrained" / "store.duckdb"
        if STAGES["control"].is_asked(recipe) and control.exists():
            with astore.open(control) as other:
                add_control(store, other, [find_scorer(s.name) for s in recipe.score.scorers])
            _score(run, store, run.model, None, True, progress)
    return {"hooks": sorted(hooks)}


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
