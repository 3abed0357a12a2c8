"""The explanations that a job scores, and those of other units that it scores as controls."""

from typing import Any

from lmmono.clients.client import Usage
from lmmono.errors import ExplainError
from lmmono.explanations.explanation import Explanation, Failure, Program
from lmmono.explanations.explanation_controls import other_units
from lmmono.explanations.stored_explanations import kept_explanations, read_densities
from lmmono.scores.scorer_registry import Job

UNSCORED: tuple[Failure, ...] = ("unparsed", "refused", "no_answer")
"""Failures of a judge or a writer. A unit that is silent or fires too rarely counts as chance."""


def explanations_of(job: Job, units: list[int]) -> dict[str | None, list[Explanation]]:
    """Return each unit's explanation, then by name of the control those it is compared with.

    random_explanation: that of another unit of the hook. matched_density: that of one of the units
    whose density is nearest.

    Raises:
        ExplainError: The units are not explained, or fewer than two are and controls are wanted.
    """
    assert job.explainer is not None
    stored = kept_explanations(job.reader, job.hook, job.explainer)
    found: dict[str | None, list[Explanation]] = {None: [stored[unit] for unit in units]}
    if job.controls:
        good = sorted(unit for unit, each in stored.items() if each.failure is None)
        densities = read_densities(job.store, job.hook)
        for name, by in (("random_explanation", None), ("matched_density", densities)):
            others = other_units(units, good, job.hook, job.seed, by)
            found[name] = [stored[unit] for unit in others]
    return found


def program_of(explanation: Explanation) -> Program:
    """Return an explanation's program.

    Raises:
        ExplainError: It has none, so that only a language model can judge by it.
    """
    if explanation.program is None:
        raise ExplainError(
            f"{explanation.hook}: explanations by {explanation.explainer} have no program, so a "
            f"language model must judge by their text; pass client="
        )
    return explanation.program


def undefined(failure: str, chance: float | None) -> dict[str, Any]:
    """Return the columns of a unit without a score: chance, not defined; nothing if a judge failed.

    >>> undefined("silent", 0.5)
    {'value': 0.5, 'nan_fraction': 1.0, 'failure': 'silent'}
    """
    if failure in UNSCORED:
        return {"value": None, "n_failures": 1, "failure": failure}
    return {"value": chance, "nan_fraction": 1.0, "failure": failure}


def spent(usage: Usage) -> dict[str, Any]:
    """Return the columns of table `scores` that say what asking took."""
    return {
        "n_calls": usage.n_calls,
        "n_prompt_tokens": usage.n_prompt_tokens,
        "n_completion_tokens": usage.n_completion_tokens,
        "cost_usd": usage.cost_usd,
        "seconds": usage.seconds,
    }
