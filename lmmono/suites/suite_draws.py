"""The suites: which learning problems each poses, the same for every family at a seed.

A `SuiteDraw` says which texts with which labels a probe may learn from. Nothing in it comes from a
feature family, so families meet the same subsets, flips and noise. What cannot be drawn (a class
with too few texts, a rate that flips nothing) is a draw with its failure, and becomes a row.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from lmmono.data.corruption.label_noise import (
    NoisyLabels,
    Opinions,
    corrupt_labels,
    rate_at_margin,
    signal_margin,
    weak_opinions,
)
from lmmono.data.tasks.task import OOD, Task
from lmmono.errors import DataError
from lmmono.recipe.robustness_settings import Robustness
from lmmono.registry.suites import Suite

# far from any number of repetitions, so that no validation set gets a training set's noise
VALIDATION_STREAM = 1_000_003
"""Added to a seed for the noise of validation labels."""

FEW = 64
"""Labelled examples, in all, up to which a draw is repeated `resamples` times."""


@dataclass(frozen=True, slots=True, eq=False)
class SuiteDraw:
    """One learning problem."""

    seed: int
    """Seed of everything drawn."""
    train: Int64[np.ndarray, " n"]
    """Texts of part `train` to learn from."""
    labels: Int64[np.ndarray, " n"]
    """Their labels, noisy where the suite says so."""
    val: Int64[np.ndarray, " m"]
    """Texts of part `val` to choose settings on."""
    val_labels: Int64[np.ndarray, " m"]
    """Their labels, as noisy."""
    corruption: str | None = None
    """Kind of label noise."""
    level: float | None = None
    """Rate of label noise."""
    n_shots: int | None = None
    """Examples per class, where the suite says how many."""
    failure: str | None = None
    """Why there is nothing to learn."""
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What a row says of the draw beside its key."""


def judged_parts(suite: Suite, task: Task) -> tuple[str, ...]:
    """Return the parts that the probes of a suite are judged on."""
    return ("test", *task.ood) if suite.elsewhere else ("test",)


def drawn(task: Task, part: str, n: int | None, *, seed: int = 0) -> Int64[np.ndarray, " n"]:
    """Return texts of a part in its own shares; all of them in order where it has no more."""
    size = len(task.part(part))
    if n is None or n >= size:
        return np.arange(size)
    n_present = len(np.unique(task.part(part).labels))
    return np.sort(task.draw(part, max(n, n_present), seed=seed, balanced=False))


def rates(settings: Robustness, n_classes: int) -> list[float]:
    """Return the rates of label noise: those of equal margins, and those given as they are."""
    equal = (rate_at_margin(margin, n_classes) for margin in settings.margins)
    return sorted({*equal, *settings.rates})


def clean_draws(task: Task, settings: Robustness) -> Iterator[SuiteDraw]:
    """Yield one draw per seed with clean labels."""
    for seed in range(settings.seeds):
        yield _whole(task, settings, seed)


def _whole(task: Task, settings: Robustness, seed: int) -> SuiteDraw:
    train = drawn(task, "train", settings.n_train, seed=seed)
    val = drawn(task, "val", settings.n_val)
    labels, val_labels = task.part("train").labels[train], task.part("val").labels[val]
    return SuiteDraw(seed, train, labels, val, val_labels)


def noisy_label_draws(task: Task, settings: Robustness) -> Iterator[SuiteDraw]:
    """Yield draws of each kind and rate of label noise."""
    for seed in range(settings.seeds):
        clean = _whole(task, settings, seed)
        noisy = _NoisyDraws(task, clean)
        for kind in settings.label_noise:
            if kind == "real":
                yield from noisy.real()
                continue
            for rate in rates(settings, task.n_classes):
                yield noisy.at(kind, rate)


class _NoisyDraws:
    """The noisy versions of one draw."""

    def __init__(self, task: Task, clean: SuiteDraw) -> None:
        self._task, self._clean = task, clean
        self._opinions = cache(self._judge)

    def at(self, kind: Any, rate: float) -> SuiteDraw:
        """Return the draw with noise of a rate in training and validation labels."""
        facts = {"rho": signal_margin(rate, self._task.n_classes)}
        if _hopeless(kind, rate, self._task.n_classes):
            return self._draw(kind, rate, facts, failure=f"unlearnable: {kind} noise of {rate:g}")
        val_rate = rate if round(rate * len(self._clean.val)) else 0.0  # too few to flip one
        try:
            train = self._corrupted(kind, rate, 0)
            val = self._corrupted(kind, val_rate, 1)
        except DataError as fault:
            return self._draw(kind, rate, facts, failure=str(fault))
        return self._draw(kind, rate, facts, train, val)

    def real(self) -> Iterator[SuiteDraw]:
        """Yield the draw with clean labels, and with those that were really given."""
        parts = (self._task.part("train"), self._task.part("val"))
        yield self._draw("real", 0.0, {"rho": 1.0})
        train_noisy, val_noisy = (part.noisy for part in parts)
        if train_noisy is None:
            yield self._draw("real", None, {}, failure="the task has no real noisy labels")
            return
        noisy = train_noisy[self._clean.train]
        val = self._clean.val_labels if val_noisy is None else val_noisy[self._clean.val]
        rate = float((noisy != self._clean.labels).mean())
        facts = {
            "rho": signal_margin(rate, self._task.n_classes),
            "n_flipped": int((noisy != self._clean.labels).sum()),
            "validation": "clean" if val_noisy is None else "noisy",
        }
        yield SuiteDraw(
            **self._shared(),
            labels=noisy,
            val_labels=val,
            corruption="real",
            level=rate,
            facts=facts,
        )

    def _corrupted(self, kind: Any, rate: float, part: int) -> NoisyLabels:
        clean = self._clean
        labels = (clean.labels, clean.val_labels)[part]
        inputs: dict[str, Any] = {}
        if not rate:
            kind = "symmetric"  # nothing is flipped: no opinion is needed
        elif kind in ("instance", "annotator", "matrix"):
            opinions = self._opinions()
            inputs = {
                "instance": {"margins": opinions[part].margins, "second": opinions[part].second},
                "annotator": {"second": opinions[part].second},
                "matrix": {"matrix": _confusion(opinions[0], clean.labels, self._task.n_classes)},
            }[kind]
        return corrupt_labels(
            labels,
            kind,
            rate,
            n_classes=self._task.n_classes,
            seed=clean.seed + part * VALIDATION_STREAM,
            **inputs,
        )

    def _judge(self) -> tuple[Opinions, Opinions]:
        """Return what a weak model thinks of the training and of the validation texts."""
        clean = self._clean
        train, val = (
            weak_opinions(
                tuple(self._task.part(part).texts[i] for i in chosen.tolist()),
                labels,
                n_classes=self._task.n_classes,
                seed=clean.seed,
            )
            for part, chosen, labels in (
                ("train", clean.train, clean.labels),
                ("val", clean.val, clean.val_labels),
            )
        )
        return train, val

    def _draw(
        self,
        kind: str,
        rate: float | None,
        facts: dict[str, Any],
        train: NoisyLabels | None = None,
        val: NoisyLabels | None = None,
        *,
        failure: str | None = None,
    ) -> SuiteDraw:
        if train is not None:
            n_flipped = int(train.flipped.sum())
            # a loader that ignores its noise would show here
            assert kind == "matrix" or n_flipped == round((rate or 0.0) * len(train.labels))
            facts = {**facts, "n_flipped": n_flipped, "learnable": train.learnable}
        return SuiteDraw(
            **self._shared(),
            labels=self._clean.labels if train is None else train.labels,
            val_labels=self._clean.val_labels if val is None else val.labels,
            corruption=kind,
            level=rate,
            failure=failure,
            facts=facts,
        )

    def _shared(self) -> dict[str, Any]:
        return {"seed": self._clean.seed, "train": self._clean.train, "val": self._clean.val}


def _confusion(
    opinions: Opinions, labels: Int64[np.ndarray, " n"], n_classes: int
) -> Float64[np.ndarray, "c c"]:
    """Return how often a weak model takes each class (row) for each class (column)."""
    counts = np.eye(n_classes)  # one text of each class that is right: no row is empty
    np.add.at(counts, (labels, np.where(opinions.margins < 0, opinions.second, labels)), 1)
    return counts / counts.sum(axis=1, keepdims=True)


def tuning_draws(task: Task, settings: Robustness) -> Iterator[SuiteDraw]:
    """Yield the draws of noisy labels, of fewer rates and seeds: tuning costs more than probing."""
    how = settings.fine_tuning
    changed = {"margins": how.margins, "rates": how.rates, "seeds": how.seeds or settings.seeds}
    yield from noisy_label_draws(task, settings.model_copy(update=changed))


def _hopeless(kind: str, rate: float, n_classes: int) -> bool:
    """Say whether another class is as likely as the true one, whatever is drawn."""
    limit = {"symmetric": (n_classes - 1) / n_classes, "pair_flip": 0.5}.get(kind)
    return limit is not None and rate >= limit - 1e-12  # (c - 1) / c is rounded


def few_shot_draws(task: Task, settings: Robustness) -> Iterator[SuiteDraw]:
    """Yield draws of so many texts per class."""
    for k in settings.shots:
        repeats = settings.seeds
        if k * task.n_classes <= FEW:
            repeats = max(repeats, settings.resamples)
        for seed in range(repeats):
            yield _shots(task, k, seed)


def _shots(task: Task, k: int, seed: int) -> SuiteDraw:
    """Return k texts of each class to learn from, and as many, where there are, to choose on."""
    nothing = np.zeros(0, np.int64)
    counts = np.bincount(task.part("val").labels, minlength=task.n_classes)
    k_val = min(k, int(counts[counts > 0].min(initial=k)))
    try:
        train = task.draw("train", k * task.n_classes, seed=seed)
        n_val = k_val * int((counts > 0).sum())
        val = task.draw("val", n_val, seed=seed) if n_val else nothing
    except DataError as fault:
        return SuiteDraw(seed, nothing, nothing, nothing, nothing, n_shots=k, failure=str(fault))
    labels, val_labels = task.part("train").labels[train], task.part("val").labels[val]
    return SuiteDraw(seed, train, labels, val, val_labels, n_shots=k)


def other_domain_draws(task: Task, settings: Robustness) -> Iterator[SuiteDraw]:
    """Yield draws of several sizes: baselines of different accuracy make the line at home."""
    for seed in range(settings.seeds):
        if not task.ood:
            whole = _whole(task, settings, seed)
            empty = (whole.train[:0], whole.labels[:0], whole.val[:0], whole.val_labels[:0])
            yield SuiteDraw(seed, *empty, failure=f"the task has no part {OOD}<name>")
            continue
        yield _whole(task, settings, seed)
        for k in settings.shots:
            yield _shots(task, k, seed)
