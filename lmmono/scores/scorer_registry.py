"""What a scorer is asked to do, and the rows it gives back."""

from dataclasses import dataclass, field
from typing import Any

import activation_store as astore
from lmmono.clients.client import Client
from lmmono.records.record_reader import RecordReader
from lmmono.registry.metrics import METRICS
from lmmono.stats.estimate import LEVEL
from lmmono.types import Progress, Split, silent

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
