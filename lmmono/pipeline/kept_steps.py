"""The kept steps of a run, each captured on the same tokens, explained and scored as the run is.

What lies where:

    runs/x/steps/00640/    a run folder like any other; see `lmmono.runs.kept`
    runs/x/store.duckdb    tables `unit_steps` and `unit_lives`: the lives of its units
"""

from typing import Any

import activation_store as astore
from lmmono.captures.lives import life_rows, live, sum_units
from lmmono.files.processes import best_device, this_process
from lmmono.models.hooks import match_hooks
from lmmono.pipeline.control import do_whole, of_neurons
from lmmono.pipeline.stage_loop import open_for, run_stages
from lmmono.recipe import Recipe
from lmmono.runs.folder import Run
from lmmono.runs.kept import kept_dir, kept_recipe, kept_runs
from lmmono.types import Progress, silent


def capture_steps(run: Run, *, progress: Progress = silent) -> dict[str, Any]:
    """Capture the models of the kept steps on the tokens of the run; return the facts.

    The lives of the units, their births and deaths, go into the store of the run.
    """
    for kept in _opened(run):
        run_stages(kept, "capture", progress=progress)
    if not this_process().is_main or not run.recipe.capture.hooks:
        return {}
    return {"steps": list(run.recipe.train.kept_steps)} | _write_lives(run, progress)


def score_steps(run: Run, *, progress: Progress = silent) -> dict[str, Any]:
    """Explain and score the units of the kept steps; return the facts.

    Without `score.step_rows` their activations are dropped then, one step after the other.
    """
    facts: dict[str, Any] = {"steps": list(run.recipe.train.kept_steps)}
    keep_rows = run.recipe.score.step_rows
    dropped = [do_whole(one, keep_rows=keep_rows, progress=progress) for one in _opened(run)]
    return facts | ({"dropped_acts": sum(dropped)} if any(dropped) else {})


def _opened(run: Run) -> list[Run]:
    """Return the runs of the kept steps, with the settings that the run has now."""
    recipe: Recipe = of_neurons(run)
    if not recipe.capture.hooks:
        return []
    steps = run.recipe.train.kept_steps
    return [open_for(kept_recipe(recipe, step), kept_dir(run, step)) for step in steps]


def _write_lives(run: Run, progress: Progress) -> dict[str, Any]:
    """Compare the units of each step with those of the last; return how many units there are."""
    recipe, settings, device = run.recipe, run.recipe.capture, best_device()
    runs = {**kept_runs(run), recipe.train.last_step: run}
    hooks = match_hooks(run.model, settings.hooks)
    parts = [
        run.tokens(split).limit(settings.max_tokens, seed=recipe.seed) for split in settings.splits
    ]
    models: dict[int, Any] = {step: one.model for step, one in runs.items()}
    for model in models.values():
        model.to(device)
    n_documents = sum(part.n_documents for part in parts)  # splits share none
    digests = {step: str(one.model_facts["model_digest"]) for step, one in runs.items()}
    rows: dict[str, list[dict[str, Any]]] = {"unit_steps": [], "unit_lives": []}
    for hook, sums in sum_units(models, parts, hooks, settings, progress).items():
        lives = live(sums, n_documents=n_documents, seed=recipe.seed)
        for table, fresh in life_rows(hook, lives, int(sums.n.sum()), digests).items():
            rows[table] += fresh
    with astore.open(run.store_path, mode="a") as store:
        store.append_all(rows)
    return {"n_units": len(rows["unit_lives"]), "n_documents": n_documents}
