"""The stages of a run, in their order: what each needs, what it makes, and which function does it.

A new stage is one entry here and one function `(run, *, progress) -> facts`; the loop is
`lmmono.pipeline.stage_loop.run_stages`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lmmono.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a run."""

    name: str
    """Its key in the manifest."""
    run: str
    """What does it, as `module:function`: takes the run and `progress`, returns facts for the
    manifest; imported only when there is something to do."""
    needs: tuple[str, ...] = ()
    """Stages that come first, as far as the recipe asks for them."""
    reads: tuple[str, ...] = ()
    """Parts of the recipe that it reads itself; see `sections`."""
    makes: tuple[str, ...] = ()
    """Files and folders in the run folder that leave with it when its settings change."""
    verb: str = ""
    """The verb that does it, where that is not its name."""
    is_asked: Callable[[Recipe], bool] = lambda _: True
    """Whether a recipe asks for it at all."""
    wants: str = ""
    """What to tell who names the verb where the recipe does not ask for it."""
    is_additive: bool = False
    """Its rows lie in the store under the names of their settings, beside those of others: it is
    done once for each, whatever came between."""
    inputs: str = ""
    """What reads the files that a user brings to it, as `module:function` of the recipe: it does so
    before the first stage of a call, so that no work is lost to a misspelt column."""
    is_shared: bool = False
    """Every process of `accelerate launch` takes part; other stages are the main process' alone."""

    @property
    def below(self) -> tuple[str, ...]:
        """All stages that come before it, the first one first."""
        names = {name for need in self.needs for name in (*STAGES[need].below, need)}
        return tuple(name for name in STAGES if name in names)

    @property
    def sections(self) -> tuple[str, ...]:
        """Parts of the recipe that decide its result, those of the stages it needs included."""
        above = [part for name in self.needs for part in STAGES[name].sections]
        return tuple(dict.fromkeys((*above, *self.reads)))


def _learns(recipe: Recipe) -> bool:
    return bool(recipe.dictionary.learn)


def _explains(recipe: Recipe) -> bool:
    return bool(recipe.explain.explainers)


def _keeps_steps(recipe: Recipe) -> bool:
    return not recipe.is_pretrained and bool(recipe.train.kept_steps)


def _is_kept_step(recipe: Recipe) -> bool:
    return not recipe.is_pretrained and recipe.train.until is not None


def _is_tested(recipe: Recipe) -> bool:
    return bool(recipe.robustness.suites)


def _files(name: str) -> tuple[str, ...]:
    """Return the files of a store: catalogue, its write-ahead log, shards."""
    return f"{name}.duckdb", f"{name}.duckdb.wal", name


_LIST = (
    Stage(
        "train",
        "lmmono.training.loop:train_run",
        reads=("data", "model", "train"),
        # features of tasks' texts are a cache of what the model says: they leave with the model
        makes=(
            *("model", "steps", "metrics.parquet"),
            *("checkpoint", "checkpoint.old", "checkpoint.tmp"),
            *_files("features"),
        ),
        is_asked=lambda recipe: not recipe.is_pretrained,
        wants="model.arch: a pretrained model is not trained; go on with `lmmono capture`",
        is_shared=True,
    ),
    Stage(
        "open",
        "lmmono.training.pretrained_run:open_pretrained",
        reads=("data", "model"),
        makes=_files("features"),
        verb="capture",
        is_asked=lambda recipe: recipe.is_pretrained,
    ),
    Stage(
        "capture",
        "lmmono.captures.capture:capture_run",
        needs=("train", "open"),
        reads=("capture",),
        makes=_files("store"),
        is_shared=True,
    ),
    Stage(
        "steps",
        "lmmono.pipeline.kept_steps:capture_steps",
        needs=("capture",),
        verb="capture",  # of runs in `steps/`, which set aside by themselves
        is_additive=True,
        is_shared=True,
        is_asked=_keeps_steps,
    ),
    Stage(
        "vectors",
        "lmmono.dictionaries.dictionary_run:vectors_run",
        needs=("train", "open"),
        reads=("dictionary.hooks", "dictionary.max_tokens", "dictionary.skip"),
        makes=_files("vectors"),
        verb="dictionary",
        is_asked=lambda recipe: _learns(recipe) and recipe.dictionary.source == "store",
    ),
    Stage(
        "dictionary",
        "lmmono.dictionaries.dictionary_run:dictionary_run",
        needs=("capture", "vectors"),
        reads=("dictionary",),
        makes=("dictionaries",),
        is_asked=_learns,
        wants="dictionary.learn: want a dictionary to learn, got none",
    ),
    # the stages from here on add rows to the store that `capture` has made
    Stage(
        "explain",
        "lmmono.explanations.explain:explain_run",
        needs=("capture", "dictionary"),
        reads=("explain",),
        is_additive=True,
        is_asked=_explains,
        wants="explain.explainers: want an explainer; see `lmmono ls explainers`",
    ),
    Stage(
        "control",
        "lmmono.pipeline.control:control_run",
        needs=("explain",),
        reads=("score",),
        verb="score",  # makes a run folder `untrained/`, which sets aside by itself
        is_additive=True,
        is_shared=True,
        is_asked=lambda r: (
            # the run that kept a step has the control of all its steps
            r.score.controls and _explains(r) and r.has_learned and not _is_kept_step(r)
        ),
    ),
    Stage(
        "step_scores",
        "lmmono.pipeline.kept_steps:score_steps",
        needs=("steps", "explain"),
        reads=("score",),
        verb="score",
        is_additive=True,
        is_shared=True,
        is_asked=_keeps_steps,
    ),
    Stage(
        "score",
        "lmmono.scores.score_run:score_run",
        needs=("capture", "dictionary", "explain", "control"),
        reads=("explain", "score"),
        is_additive=True,
    ),
    Stage(
        "promotes",
        "lmmono.scores.promotes:promotes_run",
        needs=("capture", "dictionary"),
        is_additive=True,
        # untrained directions are random ones, and a kept step is looked at by its scores
        is_asked=lambda recipe: recipe.has_learned and not _is_kept_step(recipe),
        wants="train.steps: want a trained model, got an untrained one",
    ),
    Stage(
        "robustness",
        "lmmono.suites.robustness_run:robustness_run",
        needs=("capture", "dictionary"),
        reads=("robustness",),
        inputs="lmmono.data.tasks.reading:require_own_tasks",
        is_asked=_is_tested,
        wants="robustness.suites: want a suite such as noisy_labels, got none",
    ),
    Stage(
        "figures",
        "lmmono.reports.robustness_figures:figures_run",
        needs=("robustness",),
        makes=("robustness",),
        verb="robustness",
        is_asked=_is_tested,
    ),
)

STAGES = {stage.name: stage for stage in _LIST}
"""The stages by name, in their order."""
