"""Probe problems that share features and differ in labels, and the probes fitted to them.

Refuses what no problem could be learned from (features that are not finite, shapes that do not
match) with an error; what ails one problem among many is a reason in `Probes.failures`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

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
    reads: Literal["features", "positive"] = "features"
    """What the weights are multiplied with: features as they came, or what of them is above 0."""

    def __len__(self) -> int:
        return len(self.weight)

    def inputs(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return what the weights are multiplied with."""
        return x.clamp_min(0) if self.reads == "positive" else x

    def predict(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "p n c"]:
        """Return log-probabilities of the classes."""
        p, c, d = self.weight.shape
        logits = self.inputs(x).to(self.weight.dtype) @ self.weight.reshape(p * c, d).T
        logits = logits.reshape(len(x), p, c).transpose(0, 1) + self.bias[:, None]
        return logits.log_softmax(dim=-1)

    def accuracy(self, x: Float[Tensor, "n d"], labels: Int64[Tensor, "n"]) -> Float[Tensor, "p"]:
        """Return the share of rows that each probe puts in their class; NaN where it failed."""
        right = (self.predict(x).argmax(dim=-1) == labels).double().mean(dim=1)
        right[[failure is not None for failure in self.failures]] = torch.nan
        return right


def choose(
    log_probabilities: Float[Tensor, "p l m c"],
    labels: Int64[Tensor, "p m"],
    rows: Bool[Tensor, "p m"],
) -> Int64[Tensor, "p"]:
    """Return the index of the best of l candidates of each problem.

    Best is the most accurate on the problem's validation rows, among equals the one of least
    log-loss, among those the first: candidates come from strong penalties to weak.
    """
    p, n_candidates, m, _ = log_probabilities.shape
    at = labels[:, None, :, None].expand(p, n_candidates, m, 1)
    n = rows.sum(dim=1, keepdim=True).clamp_min(1)
    # clamped: -inf times the 0 of a row left out is NaN
    loss = -(log_probabilities.gather(-1, at)[..., 0].clamp_min(-1e4) * rows[:, None]).sum(-1) / n
    right = (log_probabilities.argmax(dim=-1) == labels[:, None]) & rows[:, None]
    n_right = right.sum(dim=-1)
    loss[n_right < n_right.amax(dim=1, keepdim=True)] = torch.inf
    return loss.argmin(dim=1)


def empty_probes(problems: Problems, faults: tuple[str | None, ...]) -> Probes:
    """Return probes that are NaN, to be filled where there is no fault."""
    p, c, d = len(problems), problems.n_classes, problems.x.shape[1]
    new = problems.x.new_full
    return Probes(
        new((p, c, d), torch.nan), new((p, c), torch.nan), torch.full((p,), torch.nan), faults
    )


def same_rows(
    problems: Problems, faults: Sequence[str | None]
) -> Iterator[tuple[Int64[Tensor, "rows"], Int64[Tensor, "members"]]]:
    """Yield the training rows and the members of each set of problems that use the same rows."""
    at = torch.tensor([i for i, fault in enumerate(faults) if fault is None], dtype=torch.long)
    if not len(at):
        return
    masks, group = torch.unique(problems.rows[at], dim=0, return_inverse=True)
    for i, mask in enumerate(masks):
        yield mask.nonzero()[:, 0], at[group == i]
