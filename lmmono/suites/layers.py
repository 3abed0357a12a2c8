"""The one hook that probes read: chosen once on clean validation texts, before anything is noisy.

Every stream is tried with the rows as they are and the first pooling; the one whose probe is right
most often on clean validation texts, on average over the tasks, is taken for all families and all
conditions. What each gave is a row of suite `layers`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lmmono.data.tasks.task import Task
from lmmono.probes.probing import Solve
from lmmono.recipe.robustness_settings import Robustness
from lmmono.registry.robustness import Suite
from lmmono.suites.bench import METRIC, Bench, Encode, Key
from lmmono.suites.feature_families import FeatureFamily
from lmmono.suites.grid import Ground, Work, said
from lmmono.suites.suite import Draw, drawn
from lmmono.suites.text_codes import Encoder, Feature, streams

VAL = "val"


LAYERS = Suite(
    "layers",
    "which stream tells clean validation texts apart best",
    "lmmono.suites.suite:clean_draws",
)


@dataclass(frozen=True, slots=True)
class Choice:
    """The hook that was chosen."""

    hook: str
    rows: list[dict[str, Any]]
    """Rows of table `robustness`, one per hook and task, of those that were not there."""


def choose_hook(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Task],
    settings: Robustness,
    *,
    encode: Encode,
    solve: Solve,
    there: Mapping[Key, tuple[str, float | None]],
) -> Choice:
    """Return the stream that is best on clean validation texts, on average; the lower of equals.

    Args:
        model: The model.
        tokenizer: Its tokenizer, or None where the model has it.
        tasks: Tasks that count alike.
        settings: Says how many texts are used, and the pooling.
        encode: How texts are encoded.
        solve: How probes are fitted.
        there: Digest and value of the rows that exist, by key.
    """
    hooks, rows = streams(model), list[dict[str, Any]]()
    totals = dict.fromkeys(hooks, 0.0)
    for task in tasks:
        bench = _bench(model, tokenizer, task, hooks, settings, encode)
        values, fresh = _values(bench, there, solve)
        rows += fresh
        totals = {hook: total + values[hook] for hook, total in totals.items()}
    return Choice(max(hooks, key=totals.__getitem__), rows)


def _bench(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    hooks: Sequence[str],
    settings: Robustness,
    encode: Encode,
) -> Bench:
    pooling = settings.poolings[0]
    features = [Feature(hook, FeatureFamily("raw"), hook, pooling) for hook in hooks]
    encoder = Encoder(model, tokenizer, features).fit(task.part("train").texts)
    once = settings.model_copy(update={"learners": ("logistic",), "budgets": ()})
    return Bench(task, encoder, once, encode)


def _values(
    bench: Bench, there: Mapping[Key, tuple[str, float | None]], solve: Solve
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the accuracy of each hook on one task, and the rows that are new."""
    task, settings = bench.task, bench.settings
    train, val = drawn(task, "train", settings.n_train), drawn(task, VAL, settings.n_val)
    labels, val_labels = task.part("train").labels[train], task.part(VAL).labels[val]
    draw = Draw(0, train, labels, val, val_labels)
    judged = said(VAL, val)
    found: dict[str, float] = {}
    lacking = list(bench.arms)
    for arm in bench.arms:
        key = (LAYERS.name, task.name, arm.label, None, None, arm.learner, None, 0, VAL, METRIC)
        digest, value = there.get(key, ("", None))
        if digest == bench.digest(arm, draw, judged) and value is not None:
            found[arm.feature.hook] = value
            lacking.remove(arm)
    rows: list[dict[str, Any]] = []
    if lacking:
        ground = Ground.of(bench, [draw])
        jobs = (ground.job(Work(arm, [draw]), {VAL: ground.val_texts}) for arm in lacking)
        for arm, solved in zip(lacking, solve(jobs), strict=True):
            rows.append(
                bench.row(
                    LAYERS,
                    arm,
                    draw,
                    VAL,
                    digest=bench.digest(arm, draw, judged),
                    n_right=solved.n_right[VAL][0],
                    n=len(val),
                    failure=solved.probes.failures[0],
                    seconds=solved.seconds,
                )
            )
            found[arm.feature.hook] = rows[-1]["value"] or 0.0
    return found, rows
