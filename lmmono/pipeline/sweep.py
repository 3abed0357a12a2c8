"""The search for the learning rate of every arm of a study, before its runs.

    runs/x-sweep/crate-lr0.002/    a trial: a run folder like any other, trained and not captured

Two architectures compared at one learning rate are compared at the better rate of one of them, and
the rate decides how dense a code is; so each arm takes its own, by the loss on held-out text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow.compute as pc

from lmmono.errors import TrainError, TrainingDiverged
from lmmono.pipeline.stage_loop import open_for, run_stages
from lmmono.recipe import Recipe
from lmmono.recipe.sections import Keep, Sweep
from lmmono.runs.folder import Run
from lmmono.types import Progress, silent


@dataclass(frozen=True, slots=True)
class Trial:
    """What one learning rate came to in one arm."""

    arm: str
    """Name of the arm; that of the recipe where it has none."""
    lr: float
    """Peak learning rate."""
    val_loss: float
    """Nats per token on held-out documents; infinite where training diverged."""
    val_loss_se: float
    """Its standard error over documents."""
    densities: tuple[float, ...]
    """Share of (token, neuron) pairs above 0 of each layer; none where training diverged."""
    kurtoses: tuple[float, ...]
    """Median kurtosis of each layer's neurons."""
    is_chosen: bool = False
    """It has the least loss of its arm."""
    is_edge: bool = False
    """It is chosen and the smallest or the largest rate: a better one may lie beyond."""


def settled_runs(recipe: Recipe, *, progress: Progress = silent) -> tuple[Recipe, ...]:
    """Return the recipes of a recipe's runs, each with the rate that the sweep chose for its arm.

    Trials that are finished are not made again.

    Raises:
        TrainError: Training diverged at every rate of an arm.
        LmmonoError: What training itself raises.
    """
    runs = recipe.runs()
    if not recipe.sweep.lr:
        return runs
    chosen = {t.arm: t.lr for t in sweep(recipe, progress=progress) if t.is_chosen}
    return tuple(
        run.model_copy(
            update={
                "train": run.train.model_copy(update={"lr": chosen[_arm(run)]}),
                "sweep": Sweep(),
            }
        )
        for run in runs
    )


def sweep(recipe: Recipe, *, progress: Progress = silent) -> list[Trial]:
    """Train every arm at every rate of a recipe's sweep, and return what each came to.

    Raises:
        TrainError: Training diverged at every rate of an arm.
        LmmonoError: What training itself raises.
    """
    firsts: dict[str, Recipe] = {}
    for run in recipe.runs():
        firsts.setdefault(_arm(run), run)
    trials: list[Trial] = []
    for arm, first in firsts.items():
        of_arm = [_trial(arm, first, lr, progress) for lr in recipe.sweep.lr]
        losses = [trial.val_loss for trial in of_arm]
        best = losses.index(min(losses))
        if not math.isfinite(losses[best]):
            raise TrainError(f"{arm}: training diverged at every rate of sweep.lr; lower them")
        is_edge = best in (0, len(of_arm) - 1)
        of_arm[best] = replace(of_arm[best], is_chosen=True, is_edge=is_edge)
        trials += of_arm
    return trials


def trial_recipe(recipe: Recipe, lr: float) -> Recipe:
    """Return the recipe of a trial of a run's arm at a learning rate."""
    steps = recipe.sweep.steps or recipe.train.steps
    train = {"lr": lr, "steps": steps, "keep": Keep()}
    update = {
        "name": f"{recipe.name}-sweep",
        "folder": f"{_arm(recipe)}-lr{lr:g}",
        "seed": recipe.sweep.seed,
        "train": recipe.train.model_copy(update=train),
        "sweep": Sweep(),
    }
    return recipe.model_copy(update=update)


def _arm(recipe: Recipe) -> str:
    return recipe.arm or recipe.name


def _trial(arm: str, recipe: Recipe, lr: float, progress: Progress) -> Trial:
    run = open_for(trial_recipe(recipe, lr))
    try:
        run_stages(run, "train", progress=progress)
    except TrainingDiverged:
        return Trial(arm, lr, math.inf, math.nan, (), ())
    facts = run.model_facts
    densities, kurtoses = (_by_layer(run, metric) for metric in ("density", "kurtosis"))
    return Trial(arm, lr, run.val_loss, float(facts["val_loss_se"]), densities, kurtoses)


def _by_layer(run: Run, metric: str) -> tuple[float, ...]:
    """Return a statistic of each layer at the end of training."""
    table = run.metrics
    is_last = (pc.field("step") == run.recipe.train.last_step) & (pc.field("metric") == metric)
    rows: Sequence[dict[str, float]] = table.filter(is_last).sort_by("layer").to_pylist()
    return tuple(float(row["value"]) for row in rows)
