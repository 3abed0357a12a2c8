"""What an explainer is asked to do."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import activation_store as astore
from lmmono.clients.client import Client
from lmmono.explanations.explanation import Explanation, Failure, Program
from lmmono.records.sampler import Records
from lmmono.types import Progress, silent

MIN_FIRING_RECORDS = 5
"""A unit that fires in fewer of its records is not explained: `too_few_records`."""


@dataclass(frozen=True, slots=True)
class ExplainTask:
    """What an explainer is asked to do: the units of some records of one hook."""

    records: Records
    """What is shown; an explainer sees nothing else of the activations."""
    vocabulary: tuple[str, ...]
    """String of each token id; empty where the store has none."""
    explainer: str
    """Name under which the explanations are stored."""
    seed: int = 0
    """Seed of all that is drawn."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the explainer."""
    store: astore.Store | None = None
    """The store, for explainers that reuse what is explained there."""
    client: Client | None = None
    """Language model that writes; None for explainers that ask none."""
    progress: Progress = silent
    """Told how far the work is."""

    def explain_each(self, explain: Callable[[int], Explanation]) -> list[Explanation]:
        """Return the explanation of every unit: why it cannot be explained, or what `explain` says.

        Units are passed by their place among the records.
        """
        return [self.refused(i) or explain(i) for i in range(len(self.records.units))]

    def refused(self, i: int) -> Explanation | None:
        """Return why the i-th unit cannot be explained, or None."""
        if self.records.max_act[i] == 0:
            return self.failed(i, "silent")
        n_firing = int((self.records.acts[i] > 0).any(axis=1).sum())
        return self.failed(i, "too_few_records") if n_firing < MIN_FIRING_RECORDS else None

    def failed(self, i: int, failure: Failure, **facts: Any) -> Explanation:
        """Return the explanation of a unit that has none."""
        return self._explanation(i, failure=failure, **facts)

    def explained(self, i: int, text: str, program: Program | None, **facts: Any) -> Explanation:
        """Return the explanation of the i-th unit."""
        return self._explanation(i, text=text, program=program, **facts)

    def _explanation(self, i: int, **facts: Any) -> Explanation:
        records = self.records
        return Explanation(
            hook=records.hook,
            unit=int(records.units[i]),
            explainer=self.explainer,
            split=records.excerpts.split,
            n_records=int((records.index[i] >= 0).sum()),
            seed=self.seed,
            model=None if self.client is None else self.client.name,
            **facts,
        )
