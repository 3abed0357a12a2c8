"""The scores of a run: what `lmmono run` measures on its units and on what is said of them."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import activation_store as astore
from lmmono.explanations.protocols import variant
from lmmono.registry.scorers import find_scorer
from lmmono.runs.folder import Run
from lmmono.runs.stages import STAGES
from lmmono.scores.score import Controls, score
from lmmono.types import Progress, silent

UNTRAINED = "untrained_model"
"""Name of the untrained control in table `all_scores`."""

Round = tuple[str, str | None, dict[str, Any], list[str]]
"""Explainer, preset, changed settings, and the scorers that share what they read; the explainer is
"" where nothing is explained."""


def score_run(run: Run, *, progress: Progress = silent) -> dict[str, Any]:
    """Score what a run's recipe names on every hook that its store holds as rows; return the facts.

    Scorers of explanations score those of each explainer of the recipe, on the hooks that it
    explains. Resumable: units that have a row already are skipped. The scores of the untrained
    control, where there is one, become rows of control `untrained_model`.

    Raises:
        StoreError: The store cannot be read or written.
    """
    recipe, hooks = run.recipe, set[str]()
    with ExitStack() as stack:
        store = stack.enter_context(astore.open(run.store_path, mode="a"))
        controls: Controls = recipe.score.controls
        control_path = run.dir / "untrained" / "store.duckdb"
        if STAGES["control"].is_asked(recipe) and control_path.exists():
            controls = {UNTRAINED: stack.enter_context(astore.open(control_path))}
        for explainer, preset, settings, names in _rounds(run):
            needs_model = any("model" in find_scorer(name).needs for name in names)
            scores = score(
                store,
                recipe.explain.hooks if explainer else None,
                scorer=names,
                explainer=explainer or "token_lookup",
                preset=preset,
                controls=controls,
                seed=recipe.seed,
                model=run.model if needs_model else None,
                progress=progress,
                **settings,
            )
            hooks.update(scores.hooks)
    return {"hooks": sorted(hooks)}


def _rounds(run: Run) -> Iterator[Round]:
    """Yield what is scored together: the same explanations under the same preset and settings."""
    scorings, section = run.recipe.score.scorers, run.recipe.explain
    # settings are dicts, which no set takes; recipes have few scorers
    kinds: list[tuple[str | None, dict[str, Any]]] = []
    for scoring in scorings:
        if (kind := (scoring.preset, scoring.settings)) not in kinds:
            kinds.append(kind)
    for preset, settings in kinds:
        alike = [s for s in scorings if (s.preset, s.settings) == (preset, settings)]
        if alone := [scoring.name for scoring in alike if not scoring.explained]:
            yield "", preset, settings, alone
        if together := [scoring.name for scoring in alike if scoring.explained]:
            changes: dict[str, object] = {} if section.window == 64 else {"window": section.window}
            for explainer in section.explainers:
                is_preset = preset in section.presets
                name = explainer if is_preset else variant(explainer, None, changes)
                yield str(name), preset, settings, together
