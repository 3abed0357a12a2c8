"""Explanations that say nothing of their unit: the floors that a score must rise above."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from lmmono.errors import ExplainError
from lmmono.explanations.explain_task import ExplainTask
from lmmono.explanations.explanation import Explanation, Program
from lmmono.explanations.stored_explanations import read_densities, read_explanations
from lmmono.records.seeds import stream

NEAREST = 10
"""A density-matched unit is one of this many whose density is nearest: the seed draws
among them."""


@dataclass(frozen=True, slots=True)
class Constant(Program):
    """The same activation on every token."""

    kind: ClassVar[str] = "constant"
    reads_one_token: ClassVar[bool] = True
    act: float
    """Predicted activation, in units of the hook."""

    def simulate(
        self, token_ids: Int[ndarray, "records window"]
    ) -> Float[ndarray, "records window"]:
        """Return the constant on every token."""
        return np.where(token_ids >= 0, self.act, 0.0)

    def to_json(self) -> dict[str, Any]:
        """Return the constant."""
        return {"act": self.act}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Constant":
        """Return the constant that was described."""
        return cls(float(values["act"]))


def explain_by_a_constant(task: ExplainTask) -> list[Explanation]:
    """Explain each unit by its mean activation over its records."""
    n_tokens = (task.records.all_token_ids() >= 0).sum(axis=(1, 2))
    means = task.records.acts.sum(axis=(1, 2)) / np.maximum(n_tokens, 1)
    return task.explain_each(
        lambda i: task.explained(i, "every token", Constant(float(means[i])), complexity=1.0)
    )


def explain_by_others(task: ExplainTask) -> list[Explanation]:
    """Explain each unit by what is stored for another unit of the hook.

    Settings: `of`, the explainer whose explanations are taken; `matched_density`, take one of the
    units whose density is nearest.

    Raises:
        ExplainError: Fewer than two units of the hook are explained by `of`.
    """
    assert task.store is not None
    hook, of = task.records.hook, task.settings["of"]
    stored = read_explanations(task.store, hook, of, task.seed)
    stored = {unit: own for unit, own in stored.items() if own.failure is None}
    densities = read_densities(task.store, hook) if task.settings["matched_density"] else None
    units = [int(unit) for unit in task.records.units]
    others = other_units(units, sorted(stored), hook, task.seed, densities)
    explanations: list[Explanation] = []
    for i, other in enumerate(others):
        taken = stored[other]
        assert taken.text is not None
        facts = {"complexity": taken.complexity}
        explanations.append(task.explained(i, taken.text, taken.program, **facts))
    return explanations


def other_units(
    units: list[int],
    explained: list[int],
    hook: str,
    seed: int,
    densities: dict[int, float] | None = None,
) -> list[int]:
    """Return another explained unit for each unit, drawn by seed, hook and unit.

    Args:
        units: The units.
        explained: Units with an explanation.
        hook: Hook of the units.
        seed: Seed of the draws.
        densities: Draw among the `NEAREST` units in density; None draws among all.

    Raises:
        ExplainError: Fewer than two units are explained.
    """
    if len(explained) < 2:
        raise ExplainError(
            f"{hook}: {len(explained)} explained units; explanations of other units need two or "
            f"more: explain more units, or pass controls=False"
        )
    candidates = np.array(explained)
    logs = None
    if densities is not None:
        # densities differ by factors; a silent unit has density 0
        logs = np.log([max(densities[unit], 1e-12) for unit in explained])
    drawn: list[int] = []
    for unit in units:
        rng = stream("explanation of another unit", seed, hook, unit)
        among = candidates[candidates != unit]
        if logs is not None and densities is not None:
            gap = np.abs(logs[candidates != unit] - np.log(max(densities[unit], 1e-12)))
            among = among[np.argsort(gap, kind="stable")[:NEAREST]]
        drawn.append(int(rng.choice(among)))
    return drawn
