"""The explanations of a run: what its recipe says of its units, in table `explanations`."""

from collections.abc import Sequence

import activation_store as astore
from lmmono.errors import RunError
from lmmono.explanations.explain import explain
from lmmono.recipe.explain_settings import Explain
from lmmono.records.units import sample
from lmmono.runs.folder import Run
from lmmono.runs.manifest import STAGES
from lmmono.types import Progress, silent


def explain_run(run: Run, *, progress: Progress = silent) -> Run:
    """Explain the units that a run's recipe names, unless that is done or it names no explainer.

    Units that have a row already are left as they are, so the same call goes on where it stopped.

    Raises:
        RunError: The run is not captured yet, or another process works on it.
        ExplainError: A hook is not stored as rows, or split `explain` was not captured.
        StoreError: The store cannot be read or written.
    """
    settings = run.recipe.explain
    if not settings.explainers or run.is_done("explain"):
        return run
    if not run.is_done("capture"):
        raise RunError(f"{run.dir}: not captured yet; run `lmmono capture {run.dir}` first")
    digest = run.recipe.digest(*STAGES["explain"].sections)
    with run.stage("explain", digest) as stage, astore.open(run.store_path, mode="a") as store:
        facts = explain_as(settings, store, settings.hooks, run.recipe.seed, progress)
        stage.facts.update(n_explained=facts)
    return run


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
