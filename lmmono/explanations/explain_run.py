"""The explanations of a run: what its recipe says of its units, in table `explanations`."""

from collections.abc import Sequence
from typing import Any

import activation_store as astore
from lmmono.explanations.explain import explain
from lmmono.recipe.explain_settings import Explain
from lmmono.records.units import sample
from lmmono.runs.folder import Run
from lmmono.types import Progress, silent


def explain_run(run: Run, *, progress: Progress = silent) -> dict[str, Any]:
    """Explain the units that a captured run's recipe names; return the facts.

    Resumable: units that have a row already are skipped.

    Raises:
        ExplainError: A hook is not stored as rows, or split `explain` was not captured.
        StoreError: The store cannot be read or written.
    """
    settings = run.recipe.explain
    with astore.open(run.store_path, mode="a") as store:
        facts = explain_as(settings, store, settings.hooks, run.recipe.seed, progress)
    return {"n_explained": facts}


def explain_as(
    settings: Explain,
    store: astore.Store,
    hooks: Sequence[str] | None,
    seed: int,
    progress: Progress = silent,
) -> dict[str, int]:
    """Explain units of a store as a recipe says; return how many each explainer explained.

    Raises:
        ExplainError: As `explain` does.
        StoreError: The store cannot be read or written.
    """
    facts = dict[str, int]()
    units = None if settings.units is None else sample(settings.units, seed=seed)
    for explainer in settings.explainers:
        for preset in (None, *settings.presets):
            made = explain(
                store,
                hooks,
                units=units,
                explainer=explainer,
                preset=preset,
                window=settings.window,
                seed=seed,
                progress=progress,
            )
            facts[made.explainer] = made.n_explained
    return facts
