"""One task with its codes, and the rows of table `robustness` that say how probes did on it.

A row is known by its key; `settings.digest` says of what it was computed: codes, texts, labels,
learner. A row that is stored with the same digest is not computed again.
"""

import base64
import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64

import activation_store as astore
from lmmono.data.tasks.task import Task
from lmmono.recipe.robustness_settings import Robustness
from lmmono.registry.metrics import METRICS
from lmmono.registry.suites import Suite
from lmmono.stats.estimate import LEVEL
from lmmono.stats.formulas import (
    MIN_SUPPORT,
    N_SHUFFLES,
    beyond_chance,
    consistency,
    fires,
)
from lmmono.stats.intervals import wilson
from lmmono.suites.suite_draws import SuiteDraw
from lmmono.suites.text_codes import ProbedCode, TextCodes, TextEncoder, origin_of

METRIC = "accuracy"
CI_METHOD = "Wilson over texts"

VERSION = 2
"""Part of every digest: raised whenever equal inputs would give other values."""

Key = tuple[Any, ...]
"""Suite, task, feature, corruption, level, probe, n_shots, seed, split, metric of a row."""

Encode = Callable[[TextEncoder, Sequence[str], str], TextCodes]
Rows = list[dict[str, Any]]


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
class ProbeArm:
    """What a probe reads and how it learns: families are compared arm by arm."""

    code: ProbedCode
    """The code."""
    learner: str
    """Name of the learner."""
    budget: int | None
    """Coordinates that the probe may read; None for all."""

    @property
    def label(self) -> str:
        """The code in tables: with a budget, its name and that, as `sae@16`."""
        return self.code.name if self.budget is None else f"{self.code.name}@{self.budget}"

    @property
    def identity(self) -> tuple[list[Any], list[Any]]:
        """Hook and pooling; family, learner and budget."""
        code = self.code
        return [code.hook, code.pooling], [code.family.digest, self.learner, self.budget]

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says of the code."""
        code, family = self.code, self.code.family
        facts: dict[str, Any] = {
            "budget": "full" if self.budget is None else str(self.budget),
            "hook": code.hook,
            "pooling": code.pooling,
            "d": family.d,
            "l0": round(family.l0, 4),
            "n_parameters": family.n_parameters,
        }
        return {**facts, "dictionary": family.name} if family.hook else facts


@dataclass(frozen=True, slots=True)
class LabelledCodes:
    """Codes of some texts of a part, with their clean labels."""

    codes: Mapping[str, Float32[np.ndarray, "n _"]]
    """By the name of the code."""
    labels: Int64[np.ndarray, " n"]
    """Clean labels."""
    n_truncated: int
    """Texts cut at the context's length."""
    n_tokenless: int
    """Texts without a token."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says of the texts that it is about."""
        return {"n_truncated": self.n_truncated, "n_tokenless": self.n_tokenless}


@dataclass(frozen=True, slots=True)
class Condition:
    """What a row is about."""

    suite: Suite
    entrant: Entrant
    draw: SuiteDraw
    """What was learned from."""
    split: str
    """Part of the task that is judged."""
    judged: str
    """Hash of which of its texts are judged, of `judged_texts`."""
    corruption: str | None
    """Kind of corruption; None for none."""
    level: float | None
    """Its strength."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What came out: right texts, or why there are none."""

    n_right: int = 0
    n: int = 0
    """Texts that were judged."""
    failure: str | None = None
    """Why there is no value."""
    seconds: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the row says beside, in `settings`."""
    right: Bool[np.ndarray, " n"] | None = None
    """Which texts are right, where that is known of each."""

    @classmethod
    def of(
        cls,
        right: Bool[np.ndarray, " n"],
        failure: str | None,
        facts: Mapping[str, Any],
        seconds: float = 0.0,
    ) -> "Measurement":
        """Return what comes of knowing which texts are right."""
        return cls(int(right.sum()), len(right), failure, seconds, facts, right)


class Bench:
    """A task with a fitted encoder.

    Attributes:
        task: The task.
        settings: What is asked for.
        encoder: The codes.
        arms: All families, poolings, budgets and learners.
        store: Where rows go, for suites that keep files beside it; None where all is in memory.
    """

    def __init__(
        self,
        task: Task,
        encoder: TextEncoder,
        settings: Robustness,
        encode: Encode,
        store: astore.Store | None = None,
    ) -> None:
        self.task, self.encoder, self.settings, self.store = task, encoder, settings, store
        self._encode = encode
        self.arms = [
            ProbeArm(code, learner, budget)
            for code in encoder.codes.values()
            for learner in settings.learners
            for budget in (None, *settings.budgets)
        ]
        self._task_digest = task_digest(task)

    def with_arms(self, arms: Sequence[ProbeArm]) -> "Bench":
        """Return the same task and codes with other arms."""
        other = copy.copy(self)
        other.arms = list(arms)
        return other

    def codes(self, part: str, indices: Int64[np.ndarray, " n"]) -> LabelledCodes:
        """Return the codes of some texts of a part."""
        labelled = self.task.part(part)
        if not len(indices):
            widths = {name: code.family.d for name, code in self.encoder.codes.items()}
            none = {name: np.zeros((0, d), np.float32) for name, d in widths.items()}
            return LabelledCodes(none, labelled.labels[indices], 0, 0)
        texts = [labelled.texts[i] for i in indices.tolist()]
        encoded = self._encode(self.encoder, texts, part)
        labels = labelled.labels[indices]
        return LabelledCodes(encoded.codes, labels, encoded.n_truncated, encoded.n_tokenless)

    def key(self, about: Condition) -> Key:
        """Return what tells the row of a condition from others."""
        entrant, draw = about.entrant, about.draw
        return (
            *(about.suite.name, self.task.name, entrant.label, about.corruption, about.level),
            *(entrant.learner, draw.n_shots, draw.seed, about.split, METRIC),
        )

    def digest(self, about: Condition) -> str:
        """Return the hash of everything that decides a value beside its key."""
        draw, (reads, learns) = about.draw, about.entrant.identity
        drawn = hashlib.sha256()
        for part in (draw.train, draw.labels, draw.val, draw.val_labels):
            drawn.update(np.ascontiguousarray(part, np.int64).tobytes() + b"/")
        parts: list[Any] = [
            VERSION,
            [self.encoder.model_digest, self.encoder.n_ctx, *reads],
            learns,
            [self._task_digest, drawn.hexdigest(), draw.failure, about.judged],
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def lacks(self, about: Condition, stored: Mapping[Key, str]) -> bool:
        """Say whether the row of a condition is missing, or was computed of something else."""
        return stored.get(self.key(about)) != self.digest(about)

    def row(self, about: Condition, measured: Measurement) -> dict[str, Any]:
        """Return one row: a share of texts with its interval, or why there is none."""
        entrant, draw = about.entrant, about.draw
        failure = measured.failure or (None if measured.n else f"part {about.split} has no text")
        low, high = (None, None) if failure else wilson(float(measured.n_right), measured.n)
        sizes = {"n_train": len(draw.train), "n_val": len(draw.val)}
        facts = {"draw": 0, "n_classes": self.task.n_classes, **entrant.facts, **sizes}
        return {
            "suite": about.suite.name,
            "task": self.task.name,
            "feature": entrant.label,
            "corruption": about.corruption,
            "level": about.level,
            "probe": entrant.learner,
            "n_shots": draw.n_shots,
            "metric": METRIC,
            "metric_version": METRICS[METRIC].version,
            "seed": draw.seed,
            "split": about.split,
            "value": None if failure else measured.n_right / measured.n,
            "ci_low": low,
            "ci_high": high,
            "ci_level": None if failure else LEVEL,
            "ci_method": None if failure else CI_METHOD,
            "n": measured.n,
            "failure": failure,
            "settings": {
                "digest": self.digest(about),
                **facts,
                **draw.facts,
                **measured.facts,
                **({} if failure or measured.right is None else {"right": packed(measured.right)}),
            },
            "seconds": measured.seconds,
        }


def packed(right: Bool[np.ndarray, " n"]) -> str:
    """Return which texts are right as text: eight to a byte, in base64; `unpacked` reads it."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def judged_texts(part: str, indices: Int64[np.ndarray, " n"]) -> str:
    """Return which texts of a part are judged, as a hash."""
    return origin_of(part, [str(i) for i in indices.tolist()])


def key_of(row: Mapping[str, Any]) -> Key:
    """Return what tells a row of a suite from the others."""
    names = ("task", "feature", "corruption", "level", "probe", "n_shots", "seed", "split")
    return (row["suite"], *(row[name] for name in names), row["metric"])


def task_digest(task: Task) -> str:
    """Return the SHA-256 (hex) of a task's texts and labels."""
    whole = hashlib.sha256(task.name.encode())
    for name, part in sorted(task.parts.items()):
        whole.update(f"{name} {origin_of(part.texts)}".encode())
        for labels in (part.labels, part.noisy):
            whole.update(b"none" if labels is None else labels.astype(np.int64).tobytes())
    return whole.hexdigest()


def semantic_consistency(
    x: Float[np.ndarray, "n d"],
    labels: Int64[np.ndarray, "n"],
    *,
    n_classes: int,
    seed: int = 0,
    strongest: float | None = None,
) -> tuple[float, int, float]:
    """Return the mean corrected consistency of a code's coordinates, and how many counted.

    Third comes the mean share of the texts on which these are active: near 1, the consistency says
    nothing of the code. The formula is that of `lmmono.stats.formulas`, items being texts. NaN
    where no coordinate counted, or one class is all there is.

    With `strongest`, only that share of the texts counts for each coordinate, those on which it is
    strongest: a mean over tokens leaves a sparse coordinate active on nearly all texts.

    >>> x = np.repeat(np.eye(2), 30, axis=0)  # each coordinate is active on one class alone
    >>> semantic_consistency(x, np.repeat([0, 1], 30), n_classes=2)
    (1.0, 2, 0.5)
    """
    active = fires(x)
    if strongest is not None and len(x):
        n_kept = min(len(x), max(MIN_SUPPORT, math.ceil(strongest * len(x))))
        size = np.abs(x)
        active &= size >= np.partition(size, len(x) - n_kept, axis=0)[len(x) - n_kept]
    active = active[:, active.sum(axis=0) >= MIN_SUPPORT]
    if not active.shape[1]:
        return float("nan"), 0, float("nan")
    random = np.random.default_rng((seed, 29))  # 29: a stream of its own
    is_of = np.eye(n_classes, dtype=bool)
    shuffles = [is_of[random.permutation(labels)] for _ in range(N_SHUFFLES)]
    chance = np.mean([consistency(active, shuffled) for shuffled in shuffles], axis=0)
    corrected = beyond_chance(consistency(active, is_of[labels]), chance)
    return float(corrected.mean()), active.shape[1], float(active.mean())


class CodesInMemory:
    """Codes by text, kept in memory: what stands in for a store of codes."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], Float32[np.ndarray, " d"]] = {}

    def encode(self, encoder: TextEncoder, texts: Sequence[str], part: str) -> TextCodes:
        """Return the codes of texts; each text is encoded once.

        Raises:
            RobustnessError: A code is not finite.
        """
        del part
        keys = {
            name: f"{code.hook} {code.pooling} {code.family.digest} {encoder.model_digest}"
            for name, code in encoder.codes.items()
        }
        fresh = dict.fromkeys(
            t for t in texts if any((k, t) not in self._rows for k in keys.values())
        )
        if fresh:
            fresh_codes = encoder.encode(list(fresh)).codes
            for name, key in keys.items():
                self._rows.update(
                    ((key, text), row) for text, row in zip(fresh, fresh_codes[name], strict=True)
                )
        _, n_truncated, n_tokenless = encoder.reader.read(texts)
        codes = {name: np.stack([self._rows[key, t] for t in texts]) for name, key in keys.items()}
        return TextCodes(codes, n_truncated, n_tokenless)
