"""Texts that stand in two parts of a task: the same to a reader, whatever case and punctuation."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lmmono.data.splits import normalised
from lmmono.data.tasks.task import Labelled, Task

_MARKS = re.compile(r"[\W_]+")


@dataclass(frozen=True, slots=True)
class Shared:
    """One text in several parts."""

    text: str
    """The text as its first part has it."""
    places: tuple[tuple[str, int], ...]
    """Part and index in it, part by part, at least two parts."""


@dataclass(frozen=True, slots=True)
class Leakage:
    """What the parts of a task share."""

    task: str
    """Name of the task."""
    shared: tuple[Shared, ...]
    """Every text that more than one part has."""
    between: Mapping[tuple[str, str], int]
    """Number of such texts for every two parts that share any."""

    def __str__(self) -> str:
        if not self.between:
            return f"task {self.task}: no text in two parts"
        counts = ", ".join(f"{a} and {b} share {n}" for (a, b), n in self.between.items())
        return f"task {self.task}: {counts}; such as {self.shared[0].text[:60]!r}"


def text_key(text: str) -> bytes:
    """Return the hash that two texts share which differ in case, white space or marks only.

    >>> text_key("It's  GOOD!") == text_key("it s good")
    True
    """
    plain = normalised(text)
    # a text of marks only is compared with its marks
    kept = _MARKS.sub(" ", plain).strip() or plain
    return hashlib.sha256(kept.encode("utf-8", "surrogatepass")).digest()[:16]


def leakage(task: Task) -> Leakage:
    """Return which texts stand in more than one part."""
    places: dict[bytes, list[tuple[str, int]]] = {}
    for name, part in task.parts.items():
        for i, text in enumerate(part.texts):
            places.setdefault(text_key(text), []).append((name, i))
    names = list(task.parts)
    shared: list[Shared] = []
    between: dict[tuple[str, str], int] = {}
    for copies in places.values():
        holding = sorted({name for name, _ in copies}, key=names.index)
        if len(holding) > 1:
            part, first = copies[0]
            shared.append(Shared(task.parts[part].texts[first], tuple(copies)))
        for pair in combinations(holding, 2):
            between[pair] = between.get(pair, 0) + 1
    return Leakage(task.name, tuple(shared), between)


def without_leakage(task: Task) -> Task:
    """Return the task without the texts of `train` and `val` that another part has too.

    Test parts stay as they are, so that results compare with those of others; a text of both
    `train` and `val` stays in `val`.
    """
    held_out = {
        text_key(text)
        for name, part in task.parts.items()
        if name not in ("train", "val")
        for text in part.texts
    }
    val = _without(task.parts["val"], held_out)
    train = _without(task.parts["train"], held_out | {text_key(text) for text in val.texts})
    parts = {**task.parts, "train": train, "val": val}
    return Task(task.name, task.about, task.licence, task.source, task.label_names, parts)


def _without(part: Labelled, keys: set[bytes]) -> Labelled:
    kept = [i for i, text in enumerate(part.texts) if text_key(text) not in keys]
    return part if len(kept) == len(part) else part.take(np.array(kept, np.int64))
