"""The scores of a run: what `lmmono run` measures on its units and on what is said of them."""

from collections.abc import Iterator

import activation_store as astore
from lmmono.errors import RunError
from lmmono.explaining.protocols import variant
from lmmono.manifest import STAGES
from lmmono.run import Run
from lmmono.scoring.registry import find_scorer
from lmmono.scoring.scores import score
from lmmono.types import Progress, silent

Round = tuple[str, str | None, list[str]]
"""Explainer, preset, and the scorers that share what they read; "" where nothing is explained."""


def score_run(run: Run, *, progress: Progress = silent) -> Run:
    """Score what a run's recipe names on every hook that its store holds as rows, unless done.

    Scorers of explanations score those of each explainer of the recipe, on the hooks that it
    explains. Units that have a row already are left as they are.

    Raises:
        RunError: The run is not captured yet, or not explained where that is asked for, or another
            process works on it.
        StoreError: The store cannot be read or written.
    """
    if run.is_done("score"):
        return run
    for stage, wanted in (("capture", True), ("explain", bool(run.recipe.explain.explainers))):
        if wanted and not run.is_done(stage):
            done = "captured" if stage == "capture" else "explained"
            raise RunError(f"{run.dir}: not {done} yet; run `lmmono {stage} {run.dir}` first")
    digest, seed = run.recipe.digest(*STAGES["score"].sections), run.recipe.seed
    controls, hooks = run.recipe.score.controls, set[str]()
    with run.stage("score", digest) as stage, astore.open(run.store_path, mode="a") as store:
        for explainer, preset, names in _rounds(run):
            needs_model = any("model" in find_scorer(name).needs for name in names)
            made = score(
                store,
                run.recipe.explain.hooks if explainer else None,
                scorer=names,
                explainer=explainer or "token_lookup",
                preset=preset,
                controls=controls,
                seed=seed,
                model=run.model if needs_model else None,
                progress=progress,
            )
            hooks.update(made.hooks)
        stage.facts.update(hooks=sorted(hooks))
    return run


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
