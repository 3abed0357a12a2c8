"""What a scorer is asked to do, and the parts of a row that all scorers write alike."""

from dataclasses import dataclass, field
from typing import Any, TypeVar

import activation_store as astore
from lmmono.clients.client import Client, Failed, Usage
from lmmono.errors import ExplainError
from lmmono.explanations.explanation import Explanation, Failure, Program
from lmmono.explanations.explanation_controls import other_units
from lmmono.explanations.stored_explanations import kept_explanations, read_densities
from lmmono.records.record_reader import RecordReader
from lmmono.registry.metrics import METRICS
from lmmono.registry.scorer_settings import ScorerSettings
from lmmono.stats.estimate import LEVEL
from lmmono.stats.intervals import FEW_DOCUMENTS
from lmmono.types import Progress, Split, silent

Row = dict[str, Any]
"""A row of table `all_scores`; columns that are not named are NULL."""

Settings = TypeVar("Settings", bound=ScorerSettings)

UNSCORED: tuple[Failure, ...] = ("unparsed", "refused", "no_answer")
"""Failures of a judge or a writer. A unit that is silent or fires too rarely counts as chance."""


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """What a scorer is asked to do: units of one hook of one store."""

    store: astore.Store
    """Open store; scorers only read it."""
    hook: str
    """Hook stored as rows."""
    reader: RecordReader
    """Where records come from; shared by the scorers of a hook, so that it is read once."""
    units: tuple[int, ...] | None = None
    """Units; None takes all."""
    settings: ScorerSettings = field(default_factory=ScorerSettings)
    """Settings of the scorer, its preset's and the caller's together."""
    preset: str | None = None
    """Name of the preset and the settings that the caller changed, as stored."""
    explainer: str | None = None
    """Explainer whose stored explanations are scored, as stored."""
    controls: bool = True
    """Score the controls too."""
    seed: int = 0
    """Seed of all that is drawn."""
    client: Client | None = None
    """Language model that judges."""
    model: Any = None
    """Model that the activations come from, for causal scorers."""
    labels: Any = None
    """What supervised scorers compare with."""
    progress: Progress = silent
    """Called with how far the work is."""

    def settings_as(self, kind: type[Settings]) -> Settings:
        """Return the settings, which are of the kind that the scorer's record names."""
        assert isinstance(self.settings, kind), f"want {kind.__name__}, got {self.settings}"
        return self.settings

    def row(
        self, metric: str, unit: int | None, split: Split | None = "score", **columns: Any
    ) -> Row:
        """Return a row of table `all_scores` with what this job knows already filled in."""
        shared = {
            "metric": metric,
            "metric_version": METRICS[metric].version,
            "preset": self.preset,
            "hook": self.hook,
            "unit": unit,
            "ci_level": LEVEL,
            "seed": self.seed,
            "split": split,
            "explainer": self.explainer,
            "judge": None if self.client is None else self.client.name,
        }
        return {**shared, **columns}

    def explanations(self, units: list[int]) -> dict[str | None, list[Explanation]]:
        """Return each unit's explanation, then by name of the control those it is compared with.

        random_explanation: that of another unit of the hook. matched_density: that of one of the
        units whose density is nearest.

        Raises:
            ExplainError: The units are not explained, or fewer than two are and controls are
                wanted.
        """
        assert self.explainer is not None
        stored = kept_explanations(self.reader, self.hook, self.explainer)
        by_control: dict[str | None, list[Explanation]] = {None: [stored[unit] for unit in units]}
        if self.controls:
            explained = sorted(unit for unit in stored if stored[unit].failure is None)
            densities = read_densities(self.store, self.hook)
            for name, by in (("random_explanation", None), ("matched_density", densities)):
                others = other_units(units, explained, self.hook, self.seed, by)
                by_control[name] = [stored[unit] for unit in others]
        return by_control


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


def undefined(failed: Failed, chance: float | None) -> Row:
    """Return the columns of a unit without a score: chance, not defined; nothing if a judge failed.

    >>> undefined(Failed("silent"), 0.5)
    {'value': 0.5, 'nan_fraction': 1.0, 'failure': 'silent', 'reason': None}
    """
    why = failed._asdict()
    if failed.failure in UNSCORED:
        return {"value": None, "n_failures": 1, **why}
    return {"value": chance, "nan_fraction": 1.0, **why}


def over_documents(method: str, n_documents: int) -> str:
    """Return the name of an interval, which says so where few documents stand behind it.

    >>> over_documents("Wilson", 8)
    'Wilson; approximate: 8 documents'
    """
    few = n_documents < FEW_DOCUMENTS
    return f"{method}; approximate: {n_documents} documents" if few else method


def usage_columns(usage: Usage) -> Row:
    """Return the columns of table `all_scores` that say what asking took."""
    return {
        "n_calls": usage.n_calls,
        "n_prompt_tokens": usage.n_prompt_tokens,
        "n_completion_tokens": usage.n_completion_tokens,
        "cost_usd": usage.cost_usd,
        "seconds": usage.seconds,
    }
