"""The untrained control of a run: the same recipe without a training step, a run of its own.

    runs/x/untrained/    a run folder like any other; its store says what architecture, tokens and
                         records alone explain (Heap et al. 2025, arXiv 2501.17727)

Unit i of it is no partner of unit i of the trained model: the two are compared as means.
"""

from fnmatch import fnmatchcase
from typing import Any

import activation_store as astore
from activation_store.catalog.catalogue import place
from activation_store.catalog.compaction import drop_acts
from lmmono.files.processes import this_process
from lmmono.models.hooks import match_hooks
from lmmono.pipeline.stage_loop import open_for, run_stages
from lmmono.recipe import Recipe
from lmmono.recipe.sections import Keep, PretrainedModel
from lmmono.runs.folder import Run
from lmmono.types import Progress, silent


def control_run(run: Run, *, progress: Progress = silent) -> dict[str, Any]:
    """Make the untrained control of a run, up to its scores; return the facts."""
    recipe = control_recipe(run)
    if not recipe.capture.hooks:
        return {"hooks": []}
    control = open_for(recipe, run.dir / "untrained")
    n_dropped = do_whole(control, keep_rows=run.recipe.score.step_rows, progress=progress)
    facts: dict[str, Any] = {"hooks": list(recipe.capture.hooks)}
    return facts | ({"dropped_acts": n_dropped} if n_dropped else {})


def do_whole(inner: Run, *, keep_rows: bool, progress: Progress = silent) -> int:
    """Do all stages of a run inside another; return how many activations were dropped at the end.

    Without `keep_rows` those are all that it stored; they are captured again where other settings
    of explanations or scores ask for them.
    """
    is_main = this_process().is_main
    if is_main and not inner.is_done("score") and _is_dropped(inner):
        inner.undo("capture")
    run_stages(inner, progress=progress)
    if keep_rows or not is_main or _is_dropped(inner):
        return 0
    return drop_acts(place(inner.store_path))


def _is_dropped(inner: Run) -> bool:
    if not inner.store_path.exists():
        return False
    query = "SELECT count(*) FROM hooks WHERE kind = 'rows' AND units = []"
    with astore.open(inner.store_path) as store:
        return store.sql(query).fetchall() != [(0,)]


def control_recipe(run: Run) -> Recipe:
    """Return the recipe of a run's untrained control."""
    recipe = of_neurons(run)
    model, train = recipe.model, recipe.train
    if isinstance(model, PretrainedModel):
        # its own architecture, drawn anew: an adapter has nothing to be merged into
        model = model.model_copy(update={"untrained": True, "adapter": None})
    else:
        train = train.model_copy(update={"steps": 0, "warmup_steps": 0, "keep": Keep()})
    changes = {
        "model": model,
        "train": train,
        "score": recipe.score.model_copy(update={"controls": False}),
    }
    return recipe.model_copy(update={**changes, "folder": "untrained"})


def of_neurons(run: Run) -> Recipe:
    """Return the recipe of a run for another model in its place: an untrained one, a kept step.

    Its hooks are those of the model that the run explains: latents have no counterpart there. It
    stores them at any density, since nothing has made an untrained model sparse.
    """
    recipe = run.recipe
    captured = match_hooks(run.model, recipe.capture.hooks) if recipe.capture.hooks else []
    asked = recipe.explain.hooks or ("*",)
    hooks = tuple(h for h in captured if any(fnmatchcase(h, pattern) for pattern in asked))
    changes = {
        "capture": recipe.capture.model_copy(
            update={"hooks": hooks, "vectors": (), "max_density": 1.0}
        ),
        "dictionary": type(recipe.dictionary)(),
        "explain": recipe.explain.model_copy(update={"hooks": hooks}),
        "robustness": type(recipe.robustness)(),
    }
    return recipe.model_copy(update=changes)
