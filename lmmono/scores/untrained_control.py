"""The untrained control: the same explainers and scorers on a model that has learned nothing.

What explanations of its units score is owed to architecture, tokens and records alone (Heap et al.
2025, arXiv 2501.17727). Unit i of it is no partner of unit i: the two are compared as means.
"""

from collections.abc import Sequence

import activation_store as astore
from lmmono.registry.scorers import Scorer

CONTROL = "untrained_model"
"""Name of the control in table `scores`."""


def add_control(store: astore.Store, other: astore.Store, scorers: Sequence[Scorer]) -> None:
    """Copy the scores of units, and those that are of hooks alone, as rows of the control."""
    query = """FROM scores WHERE control IS NULL
        AND (unit IS NOT NULL OR list_contains($of_hooks, metric))"""
    of_hooks = [metric for each in scorers if each.per == "hook" for metric in each.metrics]
    rows = other.sql(query, of_hooks=of_hooks).to_arrow_table().to_pylist()
    store.append("scores", [row | {"control": CONTROL} for row in rows])
