"""The model itself tuned on the draws of noisy labels, beside probes on the same draws.

A tuned model meets the texts, flips and validation labels that probes meet at a seed, so each of
its rows has its pair: the row of a family with the same corruption, level and seed. Probes are
those of the first learner on all coordinates. Column `probe` of a tuned model is its loss.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int64

from lmmono.data.tasks.task import Labelled
from lmmono.errors import ModelError, RobustnessError, TrainError
from lmmono.probes.finetuning import Classifier, FineTuning, LabelledTexts, finetune
from lmmono.probes.probe_jobs import Solver
from lmmono.probes.problems import NO_VALIDATION
from lmmono.recipe.robustness_settings import Tuning
from lmmono.registry.lookup import load
from lmmono.registry.suites import Suite
from lmmono.suites.bench import Bench, Condition, Key, Measurement, Rows, judged_texts
from lmmono.suites.grid import suite_rows
from lmmono.suites.inputs import TEST
from lmmono.suites.results import FINE_TUNING, FULL
from lmmono.suites.suite_draws import SuiteDraw, drawn

SCALE = 2
"""An adapter's alpha over its rank, the same for every rank: so ranks differ in nothing else."""

SPARSITY = "lmmono.methods.adapters:counted_sparsity"
"""Counts zeros of an adapter's codes and updates while it runs; a room above this one."""

_MAPPED = {
    "variant": ("monolora",),
    "k": ("monolora", "topk_lora"),
    "start_std": ("monolora", "two_branch"),
    "anneal_steps": ("topk_lora",),
}
# to other methods these settings are nothing, and must change no digest


@dataclass(frozen=True, slots=True)
class Tuner:
    """One way to tune the model."""

    how: FineTuning
    """Its settings but the learning rate."""
    rates: tuple[float, ...]
    """Learning rates; the best on noisy validation labels is taken."""
    objective_set: str = ""
    """Name of its list of objectives, where a recipe has several."""

    @property
    def label(self) -> str:
        """Name in tables: tuned-full, tuned-lora-8 with the rank, tuned-monolora-relu_both-8.

        A set of objectives is named behind a `+`.
        """
        how = self.how
        variant = f"-{how.variant}" if how.method == "monolora" else ""
        rank = "" if how.method == "full" else f"-{how.rank}"
        objectives = f"+{self.objective_set}" if self.objective_set else ""
        return f"tuned-{how.method}{variant}{rank}{objectives}"

    @property
    def learner(self) -> str:
        """Its loss."""
        return self.how.loss

    @property
    def identity(self) -> tuple[list[Any], list[Any]]:
        """What it reads is the model; how it learns are its settings."""
        how = self.how.identity
        for name, methods in _MAPPED.items():
            if self.how.method not in methods:
                del how[name]
        return [FINE_TUNING], [how, list(self.rates)]

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says of it."""
        how = self.how
        facts: dict[str, Any] = {"budget": FULL, "mode": how.method, "pooling": how.pooling}
        if how.method != "full":
            facts["rank"] = how.rank
        if how.method == "monolora":
            facts["variant"] = how.variant
        return facts


def tuners(settings: Tuning) -> list[Tuner]:
    """Return the ways to tune that a recipe names."""
    ways: list[Tuner] = []
    for name, objectives in (settings.objective_sets or {"": settings.objectives}).items():
        plain = FineTuning(
            loss=settings.loss,
            epochs=settings.epochs,
            steps=settings.steps,
            batch_texts=settings.batch_texts,
            pooling=settings.pooling,
            k=settings.k,
            objectives=objectives,
        )
        for mode in settings.modes:
            if mode == "full":
                ways.append(Tuner(replace(plain, method=mode), settings.full_lr, name))
                continue
            for variant in settings.variants if mode == "monolora" else (plain.variant,):
                ways += [
                    Tuner(
                        replace(plain, method=mode, variant=variant, rank=rank, alpha=SCALE * rank),
                        settings.lora_lr,
                        name,
                    )
                    for rank in settings.ranks
                ]
    return ways


def tuned_rows(
    bench: Bench, suite: Suite, stored: Mapping[Key, str], solve: Solver
) -> Iterator[Rows]:
    """Yield the rows of probes and of the tuned model that are not stored yet, fit by fit."""
    first = bench.settings.learners[0]
    arms = [arm for arm in bench.arms if arm.budget is None and arm.learner == first]
    yield from suite_rows(bench.with_arms(arms), suite, stored, solve)
    indices = drawn(bench.task, TEST, bench.settings.n_test)
    judged, test = judged_texts(TEST, indices), _texts(bench.task.part(TEST), indices)
    for draw in suite.load()(bench.task, bench.settings):
        for tuner in tuners(bench.settings.fine_tuning):
            about = Condition(suite, tuner, draw, TEST, judged, draw.corruption, draw.level)
            if bench.lacks(about, stored):
                yield [bench.row(about, _measured(bench, tuner, draw, test))]


def _texts(part: Labelled, indices: Int64[np.ndarray, " n"]) -> LabelledTexts:
    return LabelledTexts([part.texts[i] for i in indices.tolist()], part.labels[indices])


def _measured(bench: Bench, tuner: Tuner, draw: SuiteDraw, test: LabelledTexts) -> Measurement:
    """Tune the model on a draw and return what it has right, or why it could not be tuned."""
    began, n = time.perf_counter(), len(test.labels)
    try:
        if draw.failure is not None:
            raise RobustnessError(draw.failure)
        classifier, lr = tuned_classifier(bench, tuner, draw)
    except (RobustnessError, ModelError, TrainError) as fault:
        return Measurement(n=n, failure=str(fault), seconds=time.perf_counter() - began)
    best = classifier.best
    facts: dict[str, Any] = {
        "lr": lr,
        "n_trained": classifier.n_trained,
        "epoch": classifier.chosen_epoch + 1,
        "train_loss": round(best.train_loss, 6),
        "val_accuracy": round(best.val_accuracy, 6),
        "n_truncated": classifier.n_truncated,
        **{f"objective/{name}": round(value, 6) for name, value in best.terms.items()},
    }
    if tuner.how.method == "full":
        n_right = round(classifier.accuracy(test) * n) if n else 0
    else:
        with load(SPARSITY)(classifier.network) as sparsity:
            n_right = round(classifier.accuracy(test) * n) if n else 0
        facts |= {"code_zeros": round(sparsity.code, 6), "update_zeros": round(sparsity.update, 6)}
    return Measurement(n_right, n, None, time.perf_counter() - began, facts)


def tuned_classifier(bench: Bench, tuner: Tuner, draw: SuiteDraw) -> tuple[Classifier, float]:
    """Return the tuned model that is best on given validation labels, and its learning rate.

    Raises:
        RobustnessError: The draw cannot be learned from, or no learning rate gives a number.
        ModelError: The settings do not fit the adapter.
        TrainError: An objective does not fit the model.
    """
    if not len(draw.val):
        raise RobustnessError(NO_VALIDATION)
    train, val = (
        LabelledTexts(_texts(bench.task.part(part), indices).texts, labels)
        for part, indices, labels in (
            ("train", draw.train, draw.labels),
            ("val", draw.val, draw.val_labels),
        )
    )
    candidates: list[tuple[Classifier, float]] = []
    faults: list[RobustnessError | ModelError | TrainError] = []
    for lr in tuner.rates:
        try:
            classifier = finetune(
                bench.encoder.model,
                train,
                val,
                n_classes=bench.task.n_classes,
                seed=draw.seed,
                settings=replace(tuner.how, lr=lr),
                tokenizer=bench.encoder.reader.tokenizer,
            )
        except (RobustnessError, ModelError, TrainError) as fault:
            faults.append(fault)
        else:
            candidates.append((classifier, lr))
    if not candidates:
        raise faults[0]
    return max(candidates, key=lambda pair: pair[0].best.val_accuracy)
