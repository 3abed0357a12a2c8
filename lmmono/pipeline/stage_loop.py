"""One loop over the stages of a run: what is finished is skipped, and imports nothing heavy."""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import cast

from lmmono.errors import RecipeError, RunError
from lmmono.files.processes import alone, this_process
from lmmono.recipe import SECTIONS, Recipe
from lmmono.registry.lookup import load
from lmmono.runs.folder import Run, open_run
from lmmono.runs.manifest import Manifest
from lmmono.runs.stages import STAGES, Stage
from lmmono.types import Progress, silent

POLL_SECONDS = 0.1  # far below the seconds that a process takes to import torch


def run_stages(run: Run, *verbs: str, progress: Progress = silent) -> Run:
    """Do the stages of some verbs, or all that the run's recipe asks for.

    A stage is done once: the manifest says so by the hash of all settings that decide its result.
    What is finished stays when a later stage fails; the same call resumes there. Under
    `accelerate launch` every process comes here: all train and capture, the main one does the rest
    while the others wait, and all go on to the next stage together.

    Args:
        run: As `open_for` or `Run.create` returns it.
        verbs: Such as "capture"; see `lmmono.runs.stages.STAGES`. None means all.
        progress: Called with what is done.

    Raises:
        RecipeError: The recipe asks for nothing that the verb does.
        RunError: A stage before it is not done yet, or another process works on the run.
        LmmonoError: What the stage itself raises.
    """
    here = this_process()
    if here.is_main:
        run.require_same_texts()
    for stage in STAGES.values() if here.is_main else ():
        is_due = not verbs or (stage.verb or stage.name) in verbs
        if stage.inputs and is_due and stage.is_asked(run.recipe) and not run.is_done(stage.name):
            load(stage.inputs)(run.recipe)
    for stage in STAGES.values():
        verb = stage.verb or stage.name
        if verbs and verb not in verbs:
            continue
        if not stage.is_asked(run.recipe):
            if verbs and stage.wants:
                raise RecipeError([f"{run.dir}: {stage.wants}"])
            continue
        if not here.is_main:
            _follow(run, stage)
            continue
        if run.is_done(stage.name):
            if stage.name == run.model_stage:
                run.require_same_model()
            continue
        _require(run, stage)
        # what the main process does by itself must not share itself out, nor wait for the others
        with run.stage(stage.name) as facts, nullcontext() if stage.is_shared else alone():
            facts |= run.text_facts(stage)
            facts |= load(stage.run)(run, progress=progress)
    return run


def train(recipe: Recipe, *, progress: Progress = silent) -> Run:
    """Train the model of a recipe and return its run; a finished one is returned as it is.

    Works alone and under `accelerate launch`. The model appears in the run folder only when it is
    whole; an interrupted training leaves a checkpoint, from which the same call resumes to the same
    bits (CPU, fp32).

    Args:
        recipe: One run; of a study with several, choose one by an override.
        progress: Called with steps done, loss and tokens per second.

    Raises:
        RecipeError: It is no recipe, stands for several runs, or does not fit the number of
            processes.
        DataError: The corpus cannot be read or is too small.
        TrainError: The loss became NaN or diverged, or a checkpoint cannot be used.
        TrainingStopped: SIGTERM arrived; everything is saved.
        KeyboardInterrupt: Ctrl-C arrived; everything is saved.
    """
    if not isinstance(cast("object", recipe), Recipe):  # a path, mostly
        message = f"want a recipe, got {recipe!r:.60}; lm.Recipe.load(path) reads one from a file"
        raise RecipeError([message])
    return run_stages(open_for(recipe), "train", progress=progress)


def open_for(recipe: Recipe, folder: Path | None = None) -> Run:
    """Open the run folder of a recipe; of several processes the main one makes it, others wait.

    Args:
        recipe: One run.
        folder: The run folder, where it is not that of the recipe's `out` and `name`.

    Raises:
        RecipeError: The recipe stands for several runs.
        RunError: As `Run.create`.
    """
    if this_process().is_main:
        return Run.create(recipe, folder)
    recipe = recipe.only()
    # polled, because a barrier here would open a process group before Accelerate chooses its kind;
    # the launcher ends this process if the main one fails
    place = folder or recipe.dir
    while not _is_ready(place, recipe):
        time.sleep(POLL_SECONDS)
    return open_run(place)


def _follow(run: Run, stage: Stage) -> None:
    """Take part in a stage of which the main process decides, and return when it is finished.

    The main process checks, locks and writes the manifest for all, and the others read there what
    it does: a barrier would time out in a collective of hours. If the main one fails, the launcher
    ends the others.
    """
    digest = run.recipe.digest(*stage.sections)
    has_done_its_share = False
    while True:
        run.manifest = Manifest.read(run.dir)
        record = run.manifest.stages.get(stage.name)
        if record is not None and record.digest == digest:
            if record.state == "finished":
                return
            if stage.is_shared and not has_done_its_share:
                load(stage.run)(run, progress=silent)
                has_done_its_share = True
                continue
        time.sleep(POLL_SECONDS)


def _is_ready(folder: Path, recipe: Recipe) -> bool:
    """Say whether the folder holds this recipe; the manifest is written after everything else."""
    if not (folder / "manifest.json").is_file():
        return False
    return Manifest.read(folder).recipe_digest == recipe.digest(*SECTIONS)


def _require(run: Run, stage: Stage) -> None:
    """Refuse a stage whose input is not there yet, or was damaged since."""
    for name in stage.below:  # the first that is missing is the one to do first
        if STAGES[name].is_asked(run.recipe) and not run.is_done(name):
            verb = STAGES[name].verb or name
            done = {
                "train": "trained",
                "open": "captured",
                "capture": "captured",
                "explain": "explained",
            }
            what = f"not {done[name]}" if name in done else f"no {name}"
            raise RunError(f"{run.dir}: {what} yet; run `lmmono {verb} {run.dir}` first")
    for name in stage.needs:
        run.require_whole(name)
