"""The kept steps of a training: the model of a step is a run folder inside the run.

    runs/x/steps/00640/    the model after 640 steps, its store, explanations and scores

It is a run like any other: its recipe is that of the training, stopped at the step by
`train.until`, and trains the same model again.
"""

from pathlib import Path

from lmmono.recipe import Recipe
from lmmono.recipe.sections import Keep
from lmmono.runs.folder import Run, open_run

STEPS = "steps"
"""Folder of the kept steps in a run folder."""


def kept_dir(run: Run, step: int) -> Path:
    """Return the folder of a kept step; names sort as steps do."""
    return run.dir / STEPS / f"{step:0{max(5, len(str(run.recipe.train.steps)))}d}"


def kept_recipe(recipe: Recipe, step: int) -> Recipe:
    """Return the recipe of a kept step of a run; dictionaries and robustness are of the last."""
    update = {"until": step, "keep": Keep()}
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update=update),
            "dictionary": type(recipe.dictionary)(),
            "robustness": type(recipe.robustness)(),
            "folder": f"{recipe.folder or recipe.name}.step{step}",
        }
    )


def kept_runs(run: Run) -> dict[int, Run]:
    """Return the runs of the kept steps by step, ascending; the last step is the run itself.

    Raises:
        RunError: One is missing or damaged.
    """
    return {step: open_run(kept_dir(run, step)) for step in run.recipe.train.kept_steps}
