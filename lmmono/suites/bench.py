"""One task with its features, and the rows of table `robustness` that say how probes did on it.

A row is known by its key; `settings.digest` says of what it was computed: features, texts, labels,
learner. A row that is there with the same digest is not computed again.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

from lmmono.data.tasks.task import Task
from lmmono.recipe.robustness_settings import Robustness
from lmmono.registry.metrics import METRICS
from lmmono.registry.robustness import Suite
from lmmono.suites.consistency import semantic_consistency
from lmmono.suites.suite import Draw
from lmmono.suites.text_codes import Encoded, Encoder, Feature, origin_of

METRIC = "accuracy"
CI_LEVEL = 0.95
CI_METHOD = "Wilson over texts"
NORMAL = 1.959963984540054
"""Quantile of the normal distribution at (1 + CI_LEVEL) / 2."""

VERSION = 1
"""Part of every digest: raised whenever equal inputs would give other values."""

Key = tuple[Any, ...]
"""Task, feature, corruption, level, probe, n_shots, seed, split, metric of a suite's row."""

Encode = Callable[[Encoder, Sequence[str], str], Encoded]


@runtime_checkable
class Entrant(Protocol):
    """What rows are held against each other: a code with a learner, or a model that is tuned."""

    @property
    def label(self) -> str:
        """Name in column `feature`."""
        ...

    @property
    def learner(self) -> str:
        """Name in column `probe`."""
        ...

    @property
    def identity(self) -> tuple[list[Any], list[Any]]:
        """What decides its values beside model, task and draw: what it reads, how it learns."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says of it, in `settings`."""
        ...


@dataclass(frozen=True, slots=True)
class Arm:
    """What a probe reads and how it learns: families are compared arm by arm."""

    feature: Feature
    """The feature."""
    learner: str
    """Name of the learner."""
    budget: int | None
    """Coordinates that the probe may read; None for all."""

    @property
    def label(self) -> str:
        """The feature in tables: with a budget, its name and that, as `sae@16`."""
        name = self.feature.name
        return name if self.budget is None else f"{name}@{self.budget}"

    @property
    def identity(self) -> tuple[list[Any], list[Any]]:
        """Hook and pooling; family, learner and budget."""
        feature = self.feature
        return (
            [feature.hook, feature.pooling],
            [feature.family.digest, self.learner, self.budget],
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says of the code."""
        feature, family = self.feature, self.feature.family
        said: dict[str, Any] = {
            "budget": "full" if self.budget is None else str(self.budget),
            "hook": feature.hook,
            "pooling": feature.pooling,
            "d": family.d,
            "l0": round(family.l0, 4),
            "n_parameters": family.n_parameters,
        }
        return {**said, "dictionary": family.name} if family.hook else said


@dataclass(frozen=True, slots=True)
class Texts:
    """Features of some texts of a part, computed once and remembered."""

    features: Mapping[str, Float32[np.ndarray, "n _"]]
    """By the name of the feature."""
    labels: Int64[np.ndarray, " n"]
    """Clean labels."""
    n_truncated: int
    """Texts cut at the context's length."""
    n_tokenless: int
    """Texts without a token."""
    n_classes: int
    """Classes of the task."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says of the texts that it is about."""
        return {"n_truncated": self.n_truncated, "n_tokenless": self.n_tokenless}

    def consistency(self, name: str) -> dict[str, Any]:
        """Return what a row says of how monosemantic a feature is, on these texts."""
        value, n = semantic_consistency(self.features[name], self.labels, n_classes=self.n_classes)
        rounded = None if np.isnan(value) else round(value, 4)
        return {"semantic_consistency": rounded, "n_consistent": n}


class Bench:
    """A task with a fitted encoder.

    Attributes:
        task: The task.
        settings: What is asked for.
        encoder: The features.
        arms: All families, poolings, budgets and learners.
    """

    def __init__(self, task: Task, encoder: Encoder, settings: Robustness, encode: Encode) -> None:
        self.task, self.encoder, self.settings = task, encoder, settings
        self._encode = encode
        self.arms = [
            Arm(feature, learner, budget)
            for feature in encoder.features.values()
            for learner in settings.learners
            for budget in (None, *settings.budgets)
        ]
        self._task_digest = task_digest(task)

    def with_arms(self, arms: Sequence[Arm]) -> "Bench":
        """Return the same task and features with other arms."""
        other = copy.copy(self)
        other.arms = list(arms)
        return other

    def texts(self, part: str, indices: Int64[np.ndarray, " n"]) -> Texts:
        """Return the features of some texts of a part."""
        labelled = self.task.part(part)
        if not len(indices):
            widths = {name: f.family.d for name, f in self.encoder.features.items()}
            none = {name: np.zeros((0, d), np.float32) for name, d in widths.items()}
            return Texts(none, labelled.labels[indices], 0, 0, self.task.n_classes)
        chosen = [labelled.texts[i] for i in indices.tolist()]
        made = self._encode(self.encoder, chosen, part)
        labels = labelled.labels[indices]
        counts = (made.n_truncated, made.n_tokenless)
        return Texts(made.features, labels, *counts, self.task.n_classes)

    def digest(self, arm: Entrant, draw: Draw, judged: str) -> str:
        """Return the hash of everything that decides a value beside its key.

        Args:
            arm: What is read, and how it is learned from.
            draw: What it learns from.
            judged: Says which texts it is judged on.
        """
        reads, learns = arm.identity
        drawn = hashlib.sha256()
        for part in (draw.train, draw.labels, draw.val, draw.val_labels):
            drawn.update(np.ascontiguousarray(part, np.int64).tobytes() + b"/")
        parts: list[Any] = [
            VERSION,
            [self.encoder.model_digest, self.encoder.n_ctx, *reads],
            learns,
            [self._task_digest, drawn.hexdigest(), draw.failure, judged],
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def row(
        self,
        suite: Suite,
        arm: Entrant,
        draw: Draw,
        split: str,
        *,
        digest: str,
        n_right: int,
        n: int,
        failure: str | None,
        seconds: float,
        corruption: str | None = None,
        level: float | None = None,
        facts: Mapping[str, Any] | None = None,
        metric: str = METRIC,
    ) -> dict[str, Any]:
        """Return one row: a share of texts with its interval, or why there is none."""
        failure = failure or (None if n else f"part {split} has no text")
        value = None if failure else n_right / n
        low, high = (None, None) if failure else wilson(n_right, n)
        return {
            "suite": suite.name,
            "task": self.task.name,
            "feature": arm.label,
            "corruption": draw.corruption if corruption is None else corruption,
            "level": draw.level if level is None else level,
            "probe": arm.learner,
            "n_shots": draw.n_shots,
            "metric": metric,
            "metric_version": METRICS[metric].version,
            "seed": draw.seed,
            "split": split,
            "value": value,
            "ci_low": low,
            "ci_high": high,
            "ci_level": None if failure else CI_LEVEL,
            "ci_method": None if failure else CI_METHOD,
            "n": n,
            "failure": failure,
            "settings": {"digest": digest, **self._facts(arm, draw), **(facts or {})},
            "seconds": seconds,
        }

    def _facts(self, arm: Entrant, draw: Draw) -> dict[str, Any]:
        sizes = {"n_train": len(draw.train), "n_val": len(draw.val)}
        return {"draw": 0, "n_classes": self.task.n_classes, **arm.facts, **sizes, **draw.facts}


def key_of(row: Mapping[str, Any]) -> Key:
    """Return what tells a row of a suite from the others."""
    names = ("task", "feature", "corruption", "level", "probe", "n_shots", "seed", "split")
    return (row["suite"], *(row[name] for name in names), row["metric"])


def wilson(n_right: int, n: int) -> tuple[float, float]:
    """Return Wilson's interval of a share of n texts.

    >>> [round(end, 4) for end in wilson(20, 20)]
    [0.8389, 1.0]
    """
    share, z = n_right / n, NORMAL
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def task_digest(task: Task) -> str:
    """Return the SHA-256 (hex) of a task's texts and labels."""
    whole = hashlib.sha256(task.name.encode())
    for name, part in sorted(task.parts.items()):
        whole.update(f"{name} {origin_of(part.texts)}".encode())
        for labels in (part.labels, part.noisy):
            whole.update(b"none" if labels is None else labels.astype(np.int64).tobytes())
    return whole.hexdigest()


class Remembered:
    """Features by text, kept in memory: what stands in for a store of features."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], Float32[np.ndarray, " d"]] = {}

    def encode(self, encoder: Encoder, texts: Sequence[str], part: str) -> Encoded:
        """Return the features of texts; each text is encoded once.

        Raises:
            RobustnessError: A feature is not finite.
        """
        del part
        keys = {
            name: f"{f.hook} {f.pooling} {f.family.digest} {encoder.model_digest}"
            for name, f in encoder.features.items()
        }
        fresh = dict.fromkeys(
            t for t in texts if any((k, t) not in self._rows for k in keys.values())
        )
        if fresh:
            made = encoder.encode(list(fresh)).features
            for name, key in keys.items():
                self._rows.update(
                    ((key, text), row) for text, row in zip(fresh, made[name], strict=True)
                )
        _, n_truncated, n_tokenless = encoder.count(texts)
        found = {name: np.stack([self._rows[key, t] for t in texts]) for name, key in keys.items()}
        return Encoded(found, n_truncated, n_tokenless)
