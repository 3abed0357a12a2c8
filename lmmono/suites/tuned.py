"""The model itself tuned on the draws of noisy labels, beside probes on the same draws.

A tuned model meets the texts, flips and validation labels that probes meet at a seed, so each of
its rows has its pair: the row of a family with the same corruption, level and seed. Probes are
those of the first learner on all coordinates. Column `probe` of a tuned model is its loss.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int64

from lmmono.data.tasks.task import Labelled
from lmmono.errors import RobustnessError
from lmmono.probes.finetuning import Classifier, FineTuning, Texts, finetune
from lmmono.probes.probing import Solve
from lmmono.probes.problems import NO_VALIDATION
from lmmono.recipe.robustness_settings import Tuning
from lmmono.registry.robustness import Suite
from lmmono.suites.bench import METRIC, Bench, Key
from lmmono.suites.grid import Rows, said, suite_rows
from lmmono.suites.robustness_rows import FINE_TUNING, FULL
from lmmono.suites.suite import Draw, drawn

TEST = "test"
SCALE = 2
"""LoRA's alpha over its rank."""


@dataclass(frozen=True, slots=True)
class Tuner:
    """One way to tune the model."""

    how: FineTuning
    """Its settings but the learning rate."""
    rates: tuple[float, ...]
    """Learning rates; the best on noisy validation labels is taken."""

    @property
    def label(self) -> str:
        """Name in tables: tuned-full, or tuned-lora-8 with the rank."""
        rank = f"-{self.how.rank}" if self.how.method == "lora" else ""
        return f"tuned-{self.how.method}{rank}"

    @property
    def learner(self) -> str:
        """Its loss."""
        return self.how.loss

    @property
    def identity(self) -> tuple[list[Any], list[Any]]:
        """What it reads is the model; how it learns are its settings."""
        return [FINE_TUNING], [asdict(self.how), list(self.rates)]

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says of it."""
        lora = {"rank": self.how.rank} if self.how.method == "lora" else {}
        return {"budget": FULL, "mode": self.how.method, "pooling": self.how.pooling, **lora}


def tuners(settings: Tuning) -> list[Tuner]:
    """Return the ways to tune that a recipe names."""
    found: list[Tuner] = []
    for mode in settings.modes:
        for rank in settings.ranks if mode == "lora" else settings.ranks[:1]:
            how = FineTuning(
                method=mode,
                loss=settings.loss,
                epochs=settings.epochs,
                steps=settings.steps,
                batch_texts=settings.batch_texts,
                pooling=settings.pooling,
            )
            if mode == "lora":  # to a whole model a rank is nothing, and must change no digest
                how = replace(how, rank=rank, alpha=SCALE * rank)
            rates = settings.full_lr if mode == "full" else settings.lora_lr
            found.append(Tuner(how, rates))
    return found


def tuned_rows(
    bench: Bench, suite: Suite, there: Mapping[Key, str], solve: Solve
) -> Iterator[Rows]:
    """Yield the rows of probes and of the tuned model that are not there yet, fit by fit."""
    first = bench.settings.learners[0]
    arms = [arm for arm in bench.arms if arm.budget is None and arm.learner == first]
    yield from suite_rows(bench.with_arms(arms), suite, there, solve)
    indices = drawn(bench.task, TEST, bench.settings.n_test)
    judged, test = said(TEST, indices), _texts(bench.task.part(TEST), indices)
    for draw in suite.load()(bench.task, bench.settings):
        for tuner in tuners(bench.settings.fine_tuning):
            about = (draw.corruption, draw.level, tuner.learner, draw.n_shots, draw.seed)
            key = (suite.name, bench.task.name, tuner.label, *about, TEST, METRIC)
            digest = bench.digest(tuner, draw, judged)
            if there.get(key) != digest:
                yield [_row(bench, suite, tuner, draw, digest, test)]


def _texts(part: Labelled, indices: Int64[np.ndarray, " n"]) -> Texts:
    return Texts([part.texts[i] for i in indices.tolist()], part.labels[indices])


def _row(
    bench: Bench, suite: Suite, tuner: Tuner, draw: Draw, digest: str, test: Texts
) -> dict[str, Any]:
    """Tune the model on a draw and return what it has right, or why it could not be tuned."""
    began, n_right, facts, failure = time.perf_counter(), 0, dict[str, Any](), draw.failure
    if failure is None:
        try:
            classifier, lr = _tuned(bench, tuner, draw)
        except RobustnessError as fault:
            failure = str(fault)
        else:
            n_right = round(classifier.accuracy(test) * len(test.labels)) if test.texts else 0
            facts = _facts(classifier, lr)
    return bench.row(
        suite,
        tuner,
        draw,
        TEST,
        digest=digest,
        n_right=n_right,
        n=len(test.labels),
        failure=failure,
        seconds=time.perf_counter() - began,
        facts=facts,
    )


def _tuned(bench: Bench, tuner: Tuner, draw: Draw) -> tuple[Classifier, float]:
    """Return the tuned model that is best on given validation labels, and its learning rate.

    Raises:
        RobustnessError: The draw cannot be learned from, or no learning rate gives a number.
    """
    if not len(draw.val):
        raise RobustnessError(NO_VALIDATION)
    train, val = (
        Texts(_texts(bench.task.part(part), indices).texts, labels)
        for part, indices, labels in (
            ("train", draw.train, draw.labels),
            ("val", draw.val, draw.val_labels),
        )
    )
    found: list[tuple[Classifier, float]] = []
    faults: list[RobustnessError] = []
    for lr in tuner.rates:
        try:
            classifier = finetune(
                bench.encoder.model,
                train,
                val,
                n_classes=bench.task.n_classes,
                seed=draw.seed,
                settings=replace(tuner.how, lr=lr),
                tokenizer=bench.encoder.tokenizer,
            )
        except RobustnessError as fault:
            faults.append(fault)
        else:
            found.append((classifier, lr))
    if not found:
        raise faults[0]
    return max(found, key=lambda each: each[0].best.val_accuracy)


def _facts(classifier: Classifier, lr: float) -> dict[str, Any]:
    """Return what a row says of a tuned model."""
    best = classifier.best
    return {
        "lr": lr,
        "n_trained": classifier.n_trained,
        "epoch": classifier.chosen_epoch + 1,
        "train_loss": round(best.train_loss, 6),
        "val_accuracy": round(best.val_accuracy, 6),
        "n_truncated": classifier.n_truncated,
    }
