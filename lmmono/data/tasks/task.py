"""A labelled text task, checked when it is made: no part of it can be used that does not fit.

Parts are `train`, `val` and `test`, and out-of-domain test sets called `ood:<name>`. Only the
training part must hold every class; the others hold classes of the same list.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from lmmono.errors import DataError, nearest

PARTS = ("train", "val", "test")
"""Parts that every task has."""

OOD = "ood:"
"""What the names of out-of-domain parts begin with."""

NO_PARTNER = -1
"""Stands in `Labelled.pairs` for a text without a partner."""


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """Texts with one class each.

    Raises:
        DataError: Another number of labels than of texts, or a text that is empty or blank.
    """

    texts: tuple[str, ...]
    """The texts, none of them blank."""
    labels: Int64[np.ndarray, "n"]
    """Class of each text, the true one as far as the set knows it."""
    noisy: Int64[np.ndarray, "_"] | None = None
    """Class that real annotators or rules gave, where the set has both."""
    pairs: Int64[np.ndarray, "_"] | None = None
    """Index of each text's contrast partner in this part; `NO_PARTNER` where it has none."""

    def __post_init__(self) -> None:
        for name in ("labels", "noisy", "pairs"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.texts):
                raise DataError(f"{len(self.texts)} texts but {len(column)} {name}: want one each")
        empty = [i for i, text in enumerate(self.texts) if not text.strip()]
        if empty:
            raise DataError(
                f"{len(empty)} of {len(self.texts)} texts are empty, the first is text {empty[0]}; "
                "drop them with their labels"
            )

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"Labelled({len(self)} texts)"

    def take(self, indices: Int64[np.ndarray, "k"]) -> "Labelled":
        """Return some of the texts in the order asked for; partners left behind are none."""
        pairs = None
        if self.pairs is not None:
            place = np.full(len(self) + 1, NO_PARTNER, np.int64)  # the last stands for NO_PARTNER
            place[indices] = np.arange(len(indices))
            pairs = place[self.pairs[indices]]
        return Labelled(
            tuple(self.texts[i] for i in indices.tolist()),
            self.labels[indices],
            None if self.noisy is None else self.noisy[indices],
            pairs,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A classification task with its parts.

    Raises:
        DataError: A part is missing or has another name, there are fewer than two classes, the
            training part has one class only, fewer texts than classes or lacks a class, or a label
            is none of the classes.
    """

    name: str
    """Name in tables and recipes."""
    about: str
    """What is told apart, in a sentence."""
    licence: str
    """Licence of the texts as their source states it."""
    source: str
    """Where the texts come from."""
    label_names: tuple[str, ...]
    """Name of each class, in the order of the labels."""
    parts: Mapping[str, Labelled]
    """`train`, `val`, `test` and out-of-domain parts."""

    def __post_init__(self) -> None:
        self._check_names()
        for name, part in self.parts.items():
            for kind, labels in (("label", part.labels), ("noisy label", part.noisy)):
                self._check_range(name, kind, labels)
        self._check_train()

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(part)}" for name, part in self.parts.items())
        return f"Task({self.name}: {self.n_classes} classes; {sizes})"

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    @property
    def ood(self) -> tuple[str, ...]:
        """Names of the out-of-domain parts."""
        return tuple(name for name in self.parts if name.startswith(OOD))

    def part(self, name: str) -> Labelled:
        """Return a part.

        Raises:
            DataError: There is none of this name; says which are near.
        """
        if name not in self.parts:
            raise DataError(f"task {self.name}: no part {name!r}; {nearest(name, self.parts)}")
        return self.parts[name]

    def draw(
        self, part: str, n: int, *, seed: int, balanced: bool = True
    ) -> Int64[np.ndarray, "n"]:
        """Return the indices of `n` texts of a part, every class of it among them.

        The draw of fewer is the beginning of the draw of more at one seed, so a grid over `n` adds
        texts and never exchanges them.

        Args:
            part: Name of the part.
            n: Number of texts; at least one per class.
            seed: Seed of the draw.
            balanced: Take equally many of each class, to within one; else in the part's shares.

        Raises:
            DataError: Fewer texts asked for than there are classes, more than the part has, or
                more than it has of some class.
        """
        labels = self.part(part).labels
        present = np.unique(labels).tolist()
        where = f"task {self.name}, part {part}"
        if n < len(present):
            raise DataError(f"{where}: {n} texts of {len(present)} classes: want one each or more")
        if n > len(labels):
            raise DataError(f"{where}: {n} texts asked for, it has {len(labels)}")
        rng = np.random.default_rng((seed, len(labels)))
        keys = np.empty(len(labels))
        for label in present:
            members = np.flatnonzero(labels == label)
            rank = np.empty(len(members))
            rank[rng.permutation(len(members))] = np.arange(len(members))
            share = (rank + rng.random()) / (1 if balanced else len(members))
            keys[members] = np.where(rank == 0, share - len(labels), share)
        chosen = np.argsort(keys, kind="stable")[:n].astype(np.int64)
        if balanced:
            self._check_balance(where, labels, labels[chosen])
        return chosen

    def subset(self, part: str, n: int, *, seed: int, balanced: bool = True) -> Labelled:
        """Return `n` texts of a part with their labels; see `draw`."""
        return self.part(part).take(self.draw(part, n, seed=seed, balanced=balanced))

    def _check_names(self) -> None:
        missing = [name for name in PARTS if name not in self.parts]
        if missing:
            raise DataError(
                f"task {self.name}: no part {missing[0]!r}; it has "
                f"{', '.join(self.parts) or 'none'}, want {', '.join(PARTS)}"
            )
        for name in self.parts:
            if name not in PARTS and not (name.startswith(OOD) and len(name) > len(OOD)):
                raise DataError(
                    f"task {self.name}: part {name!r}: want {', '.join(PARTS)} or {OOD}<name>"
                )
        if len(self.label_names) < 2 or len(set(self.label_names)) < len(self.label_names):
            raise DataError(
                f"task {self.name}: want two or more classes of different names, got "
                f"{', '.join(self.label_names) or 'none'}"
            )

    def _check_range(self, name: str, kind: str, labels: Int64[np.ndarray, "n"] | None) -> None:
        if labels is None or not len(labels):
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.n_classes:
            wrong = low if low < 0 else high
            raise DataError(
                f"task {self.name}, part {name}: {kind} {wrong} is no class; want 0 to "
                f"{self.n_classes - 1} for {', '.join(self.label_names)}"
            )

    def _check_train(self) -> None:
        where = f"task {self.name}, part train"
        labels = self.parts["train"].labels
        if len(labels) < self.n_classes:
            raise DataError(
                f"{where}: {len(labels)} texts of {self.n_classes} classes: want one each or more"
            )
        counts = np.bincount(labels, minlength=self.n_classes)
        absent = [self.label_names[i] for i in np.flatnonzero(counts == 0).tolist()]
        if len(absent) == self.n_classes - 1:
            only = self.label_names[int(counts.argmax())]
            raise DataError(f"{where}: every text is of class {only}; want two classes or more")
        if absent:
            raise DataError(
                f"{where}: labels with gaps, no text of class {', '.join(absent)}; number the "
                "classes that occur from 0 without gaps"
            )

    def _check_balance(
        self, where: str, labels: Int64[np.ndarray, "m"], chosen: Int64[np.ndarray, "n"]
    ) -> None:
        present = np.unique(labels)
        least = len(chosen) // len(present)
        for label in present.tolist():
            if np.count_nonzero(chosen == label) < least:
                raise DataError(
                    f"{where}: {least} texts of each class asked for, class "
                    f"{self.label_names[label]} has {np.count_nonzero(labels == label)}; "
                    "ask for fewer, or for the part's own shares"
                )
