"""The untrained control: the same explainers and scorers on a model that has learned nothing.

What explanations of its units score is owed to architecture, tokens and records alone (Heap et al.
2025, arXiv 2501.17727). Unit i of it is no partner of unit i: the two are compared as means.
"""

import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import activation_store as astore
from lmmono.captures.capture import capture
from lmmono.explanations.explain_run import explain_as
from lmmono.models.hooks import match_hooks
from lmmono.models.untrained import untrained
from lmmono.registry.scorers import Scorer
from lmmono.runs.folder import Run
from lmmono.types import Progress

CONTROL = "untrained_model"
"""Name of the control in table `scores`."""


@contextmanager
def untrained_store(
    run: Run, store: astore.Store, progress: Progress
) -> Generator[tuple[Any, astore.Store, list[str]]]:
    """Give a run's model untrained, a store of it with explanations, and the hooks that it has.

    The hooks are those of the model of which the run's store has explanations: latents have no
    untrained counterpart. The store has the same tokens and the settings of the recipe, but takes
    hooks of any density, and is removed when the block ends.
    """
    recipe = run.recipe
    rows = store.sql("SELECT DISTINCT hook FROM explanations ORDER BY hook").fetchall()
    own = set(match_hooks(run.model, recipe.capture.hooks)) if recipe.capture.hooks else set[str]()
    hooks = [str(hook) for (hook,) in rows if hook in own]
    model, folder = untrained(run.model, recipe.seed), run.dir / "untrained"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with astore.open(folder / "store.duckdb", mode="w") as other:
            if hooks:
                kept = recipe.capture.model_dump(exclude={"hooks", "vectors", "splits"})
                settings: dict[str, Any] = {**kept, "max_density": 1.0}
                capture(
                    model,
                    [run.tokens(split) for split in recipe.capture.splits],
                    hooks=hooks,
                    into=other,
                    seed=recipe.seed,
                    progress=progress,
                    **settings,
                )
                explain_as(recipe.explain, other, hooks, recipe.seed, progress)
            yield model, other, hooks
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def add_control(store: astore.Store, other: astore.Store, scorers: Sequence[Scorer]) -> None:
    """Copy the scores of units, and those that are of hooks alone, as rows of the control."""
    query = """FROM scores WHERE control IS NULL
        AND (unit IS NOT NULL OR list_contains($of_hooks, metric))"""
    of_hooks = [metric for each in scorers if each.per == "hook" for metric in each.metrics]
    rows = other.sql(query, of_hooks=of_hooks).to_arrow_table().to_pylist()
    store.append("scores", [row | {"control": CONTROL} for row in rows])
