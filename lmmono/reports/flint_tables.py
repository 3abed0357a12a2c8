"""Tables of suite `flint`: what classifiers and interpreters came to, one table per task."""

from collections.abc import Mapping

import activation_store as astore
from lmmono.reports.seed_means import difference, over_seeds
from lmmono.reports.table import ReportTable
from lmmono.suites.results import FLINT

SHOWN = {
    "accuracy": "accuracy",
    "fidelity": "agrees",
    "fidelity_noisy": "agrees, noisy",
    "conciseness_3": "attributes per text",
    "attribute_effective": "in use",
    "attribute_exclusivity": "exclusive",
    "attribute_stability": "stable",
    "comprehensiveness": "taken out",
    "comprehensiveness_random": "random out",
    "mcc": "planted",
    "mcc_untrained": "planted, untrained",
    "gradient_agreement": "gradients",
    "attribute_flips": "flips",
}
"""Metrics that are shown, by their column heads."""

BLACK_BOX = "black_box"

_VALUES = """SELECT task, feature, probe, metric, seed, value FROM robustness
    WHERE suite = $suite AND seed IS NOT NULL AND value IS NOT NULL ORDER BY ALL"""


def flint_tables(store: astore.Store) -> list[ReportTable]:
    """Return a table per task; none where the suite was not run.

    Means over seeds with their 95 % intervals. The difference of a classifier's accuracy from that
    of the one tuned without an interpreter is over seeds that both have.
    """
    values: dict[str, dict[tuple[str, str], dict[str, dict[int, float]]]] = {}
    for task, feature, probe, metric, seed, value in store.sql(_VALUES, suite=FLINT).fetchall():
        rows = values.setdefault(task, {})
        rows.setdefault((feature, probe), {}).setdefault(metric, {})[seed] = value
    return [_table(task, rows) for task, rows in values.items()]


def _table(
    task: str, rows: Mapping[tuple[str, str], Mapping[str, Mapping[int, float]]]
) -> ReportTable:
    shown = [name for name in SHOWN if any(name in metrics for metrics in rows.values())]
    plain = rows.get((BLACK_BOX, "classifier"), {}).get("accuracy", {})
    order = sorted(rows, key=lambda key: (key[0] != BLACK_BOX, key))
    return ReportTable(
        title=f"Interpreters by attributes, {task}",
        columns=("", "whose", *(SHOWN[name] for name in shown), "accuracy - black box"),
        rows=tuple(
            (
                feature,
                probe,
                *(over_seeds(rows[feature, probe].get(name, {}).values(), name) for name in shown),
                difference(rows[feature, probe].get("accuracy", {}), plain)
                if probe == "classifier" and feature != BLACK_BOX
                else None,
            )
            for feature, probe in order
        ),
        note="Means over seeds with their 95 % intervals (Student t). Attributes per text: those "
        "with more than a third of the largest relevance. Taken out: by how much the classifier's "
        "probability falls without the tokens where relevant attributes act. Gradients: agreement "
        "with integrated gradients.",
        spare=tuple(SHOWN[name] for name in reversed(shown[3:])),
    )
