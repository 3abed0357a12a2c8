"""Probe problems that share features and differ in labels, and the probes fitted to them.

Refuses what no problem could be learned from (features that are not finite, shapes that do not
match) with an error; what ails one problem among many is a reason in `Probes.failures`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lmmono.errors import RobustnessError

NO_VALIDATION = "no validation example to choose settings on"
"""Why nothing can be learned from training texts alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Problems:
    """p classification problems over the same n training and m validation rows.

    Raises:
        RobustnessError: Shapes, labels or features that cannot be used.
    """

    x: Float[Tensor, "n d"]
    """Training features; a learner standardises them by the rows that a problem uses."""
    y: Int64[Tensor, "p n"]
    """Training labels, noisy where the study says so."""
    x_val: Float[Tensor, "m d"]
    """Validation features."""
    y_val: Int64[Tensor, "p m"]
    """Validation labels, as noisy as the training labels: what settings are chosen on."""
    n_classes: int
    seeds: tuple[int, ...]
    """One seed per problem, for learners that draw."""
    w: Bool[Tensor, "p n"] | None = None
    """Training rows that each problem may use; None: all."""
    w_val: Bool[Tensor, "p m"] | None = None
    """Validation rows that each problem may use; None: all."""
    clean_val: Int64[Tensor, "m"] | None = None
    """True validation labels, for learners named `oracle_*` only."""
    noise: Float[Tensor, "p c c"] | None = None
    """P(given label = column | true label = row) where it is known, for `forward`; else estimated.
    """

    def __post_init__(self) -> None:
        p = len(self.y)
        shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
            "x": (tuple(self.x.shape), (self.y.shape[1], self.x_val.shape[1])),
            "y_val": (tuple(self.y_val.shape), (p, len(self.x_val))),
            "seeds": ((len(self.seeds),), (p,)),
        }
        optional = {"w": (p, len(self.x)), "w_val": (p, len(self.x_val))}
        optional |= {"clean_val": (len(self.x_val),), "noise": (p, self.n_classes, self.n_classes)}
        for name, wanted in optional.items():
            value = getattr(self, name)
            if value is not None:
                shapes[name] = (tuple(value.shape), wanted)
        for name, (got, wanted) in shapes.items():
            if got != wanted:
                raise RobustnessError(f"problems: {name} has shape {got}, want {wanted}")
        self._check_values()

    def _check_values(self) -> None:
        if self.n_classes < 2:
            raise RobustnessError(f"problems: {self.n_classes} classes, want at least 2")
        for name in ("x", "x_val"):
            bad = ~torch.isfinite(getattr(self, name)).all(dim=1)
            if bad.any():
                raise RobustnessError(
                    f"problems: {name} has {int(bad.sum())} rows that are not finite, the first is "
                    f"row {int(bad.int().argmax())}; drop them or mend the features"
                )
        for name in ("y", "y_val", "clean_val"):
            labels = getattr(self, name)
            if labels is not None and labels.numel():
                low, high = int(labels.min()), int(labels.max())
                if low < 0 or high >= self.n_classes:
                    raise RobustnessError(
                        f"problems: {name} has labels {low} to {high}, want 0 to "
                        f"{self.n_classes - 1}"
                    )

    def __len__(self) -> int:
        return len(self.y)

    @property
    def rows(self) -> Bool[Tensor, "p n"]:
        """Training rows that each problem may use."""
        return torch.ones_like(self.y, dtype=torch.bool) if self.w is None else self.w

    @property
    def val_rows(self) -> Bool[Tensor, "p m"]:
        """Validation rows that each problem may use."""
        return torch.ones_like(self.y_val, dtype=torch.bool) if self.w_val is None else self.w_val

    def subset(self, which: Sequence[int]) -> "Problems":
        """Return some of the problems, in the order given."""
        at = torch.tensor(list(which), dtype=torch.long)
        per_problem = ("y", "y_val", "w", "w_val", "noise")
        values = {name: getattr(self, name) for name in per_problem}
        kept = {name: None if value is None else value[at] for name, value in values.items()}
        return replace(self, seeds=tuple(self.seeds[i] for i in which), **kept)

    def faults(self) -> tuple[str | None, ...]:
        """Return why each problem cannot be learned; None where it can."""
        rows, counts = self.rows, torch.zeros(len(self), self.n_classes, dtype=torch.long)
        counts.scatter_add_(1, self.y, rows.long())
        val_counts = self.val_rows.sum(dim=1)
        return tuple(
            _fault(of_classes, n_val)
            for of_classes, n_val in zip(counts.tolist(), val_counts.tolist(), strict=True)
        )


def _fault(counts: list[int], n_val: int) -> str | None:
    n, n_classes = sum(counts), len(counts)
    if n < n_classes:
        return f"{n} training examples for {n_classes} classes"
    missing = [c for c, count in enumerate(counts) if not count]
    if len(missing) == n_classes - 1:
        return f"all {n} training labels are class {counts.index(n)}"
    if missing:
        return f"no training label is of class {', '.join(map(str, missing))}"
    return None if n_val else NO_VALIDATION


@dataclass(frozen=True, slots=True, eq=False)
class Probes:
    """One linear probe per problem, on features as they came; a probe that failed is NaN."""

    weight: Float[Tensor, "p c d"]
    bias: Float[Tensor, "p c"]
    chosen_l2: Float[Tensor, "p"]
    """L2 of each probe, as `1 / C` of scikit-learn's LogisticRegression; NaN where none was chosen.
    """
    failures: tuple[str | None, ...]
    """Why a problem has no probe; None where it has one."""
    notes: tuple[str | None, ...] = ()
    """What a reader of the row must know, such as a fit stopped before it converged; may be empty.
    """

    def __len__(self) -> int:
        return len(self.weight)

    def predict(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "p n c"]:
        """Return log-probabilities of the classes."""
        p, c, d = self.weight.shape
        logits = x.to(self.weight.dtype) @ self.weight.reshape(p * c, d).T
        logits = logits.reshape(len(x), p, c).transpose(0, 1) + self.bias[:, None]
        return logits.log_softmax(dim=-1)

    def accuracy(self, x: Float[Tensor, "n d"], labels: Int64[Tensor, "n"]) -> Float[Tensor, "p"]:
        """Return the share of rows that each probe puts in their class; NaN where it failed."""
        right = (self.predict(x).argmax(dim=-1) == labels).double().mean(dim=1)
        right[[failure is not None for failure in self.failures]] = torch.nan
        return right
