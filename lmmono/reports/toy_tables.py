"""Tables of the toy study: how codes spend their dimensions, their errors, their moment scores."""

from collections.abc import Iterable

from lmmono.reports.robustness_tables import comparison_table, level_tables
from lmmono.reports.table import ReportTable
from lmmono.studies.comparisons import compare_families
from lmmono.toy.separability import (
    MONO,
    POLY,
    TwoFeatureErrors,
    two_feature_errors,
    two_feature_ratio,
)
from lmmono.toy.superposition import Superposition

PROBABILITIES = (1.0, 0.5, 0.2, 0.05)
"""Shares of features there for which the two-feature code is worked out."""

LABEL_NOISE = (0.0, 0.25, 0.4, 0.45)


def superposition_tables(
    study: Superposition, baseline: str = "poly", *, draws: int = 20
) -> list[ReportTable]:
    """Return the tables of a toy study; differences are from the polysemantic code.

    Args:
        study: The study.
        baseline: Code that the others are held against.
        draws: Training sets of the probes of two features.
    """
    of = {
        metric: [row for row in study.results if row.metric == metric]
        for metric in ("accuracy", "fisher_ratio")
    }
    compared = compare_families(of["accuracy"], baseline)
    ordered = [
        comparison
        for shots in dict.fromkeys(comparison.condition[4] for comparison in compared)
        for comparison in compared
        if comparison.condition[4] == shots
    ]
    return [
        _capacity_table(study),
        *level_tables(of["accuracy"]),
        comparison_table(ordered, title=f"Accuracy less that of {baseline}"),
        *level_tables(of["fisher_ratio"]),
        two_feature_table(two_feature_errors(PROBABILITIES, LABEL_NOISE, draws=draws), draws),
    ]


def _capacity_table(study: Superposition) -> ReportTable:
    rows = tuple(
        (code.arm, f"{code.alone:.1f}", f"{code.shared:.1f}", f"{code.dropped:.1f}", code.about)
        for code in study.capacities
    )
    settings = study.settings
    return ReportTable(
        title=f"Codes of 40 features in 20 dimensions, {settings.seeds} seeds",
        columns=("code", "alone", "shared", "dropped", "how it comes about"),
        rows=rows,
        note="Features with D_i = |w_i|^4 / sum_j (w_i . w_j)^2 above 0.9, between, below 0.01; "
        "means over seeds.",
    )


def two_feature_table(errors: Iterable[TwoFeatureErrors], draws: int) -> ReportTable:
    """Return closed forms of the two-feature code beside what a probe on it achieves."""
    rows = tuple(
        (
            f"{error.p:g}",
            f"{error.label_noise:g}",
            *(f"{_ratio(error, code):.3f}" for code in (MONO, POLY)),
            *(_tied_ratio(error, code) for code in (MONO, POLY)),
            f"{error.mono:.3f}",
            f"{error.poly:.3f}",
        )
        for error in errors
    )
    return ReportTable(
        title="Two features: the moment score J of x1 and of x1 - x2, and the accuracy of a probe",
        columns=(
            *("p", "label noise", "J mono", "J poly"),
            *("J mono, ties as 0", "J poly, ties as 0", "accuracy mono", "accuracy poly"),
        ),
        rows=rows,
        note="y = [x1 > x2]; samples with neither feature are dropped, but for the columns that "
        "count them as y = 0. J in closed form; accuracy on clean labels, a logistic probe on 200 "
        f"noisy labels, mean over {draws} draws.",
    )


def _ratio(error: TwoFeatureErrors, code: tuple[float, float]) -> float:
    return two_feature_ratio(error.p, code, label_noise=error.label_noise)


def _tied_ratio(error: TwoFeatureErrors, code: tuple[float, float]) -> str:
    if error.label_noise:
        return "-"
    return f"{two_feature_ratio(error.p, code, ties='negative'):.3f}"
