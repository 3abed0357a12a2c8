"""The scorers by name: what each needs, measures and cites. One record per scorer.

Holds no scorer: a record names the module and function that scores, imported when it is used.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

import activation_store as astore
from lmmono.clients.client import Client
from lmmono.errors import ExplainError, nearest
from lmmono.records.acts_reader import RecordReader
from lmmono.registry.metrics import METRICS
from lmmono.stats.unit_intervals import LEVEL
from lmmono.types import Progress, Split, silent

Need = Literal["explanation", "program", "client", "model", "labels", "encoder"]
"""What a scorer wants besides a store."""

Row = dict[str, Any]
"""A row of table `scores`; columns that are not named are NULL."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a scorer is asked to do: units of one hook of one store."""

    store: astore.Store
    """Open store; scorers only read it."""
    hook: str
    """Hook stored as rows."""
    reader: RecordReader
    """Where records come from; shared by the scorers of a hook, so that it is read once."""
    units: tuple[int, ...] | None = None
    """Units; None takes all."""
    settings: dict[str, Any] = field(default_factory=dict)
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
    """Told how far the work is."""

    def row(
        self, metric: str, unit: int | None, split: Split | None = "score", **columns: Any
    ) -> Row:
        """Return a row of table `scores` with what this job knows already filled in."""
        known = {
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
        return {**known, **columns}


@dataclass(frozen=True, slots=True)
class Scorer:
    """One scorer."""

    name: str
    """Name in tables, recipes and on the command line."""
    metrics: tuple[str, ...]
    """Names in `lmmono.registry.metrics.METRICS` that it writes; the first is the headline."""
    home: str
    """`module:function`; takes a `Job`, returns rows of table `scores`."""
    needs: tuple[Need, ...]
    """What must be there."""
    chance: float | None
    """Value that guessing gets; None where it depends on the data, see the controls."""
    citation: str
    """Where the algorithm comes from."""
    about: str
    """What it measures, in a sentence."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Every setting with its default; a preset or a caller may change these and no others."""
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Changed settings by name, such as `openai`."""
    seeded: bool = True
    """Whether it draws; the rows of one that does not have no seed."""
    per: Literal["unit", "hook"] = "unit"
    """Whether it writes rows of units, which are summed up, or only rows of hooks."""

    def load(self) -> Callable[[Job], Sequence[Row]]:
        """Import and return the function that scores."""
        module, _, function = self.home.partition(":")
        return getattr(import_module(module), function)


SCORERS: dict[str, Scorer] = {}
"""Filled by `lmmono.scores.scorers`."""


def find_scorer(name: str) -> Scorer:
    """Return the scorer of a name.

    Raises:
        ExplainError: There is none; says which are near.
    """
    import_module("lmmono.scores.scorers")  # fills the table

    if name not in SCORERS:
        raise ExplainError(f"scorer {name!r} is not known; {nearest(name, sorted(SCORERS))}")
    return SCORERS[name]
