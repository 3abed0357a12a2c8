"""Rows of scorers whose value is the AUROC of one number per record."""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from lmmono.scores.classification import CHANCE, MIN_RECORDS
from lmmono.scores.explained import undefined
from lmmono.scores.scorer_registry import Job, Row
from lmmono.stats.rates import AUROC_METHOD, auroc, auroc_interval


def present_classes(index: Int[ndarray, " records"], n_classes: int) -> list[ndarray]:
    """Return the places of the records that there are, by class; classes are equally long."""
    return [each[index[each] >= 0] for each in np.split(np.arange(len(index)), n_classes)]


def area_row(
    job: Job,
    metric: str,
    unit: int,
    firing: Float[ndarray, " firing"],
    other: Float[ndarray, " other"],
    failure: str | None,
) -> Row:
    """Return the row of one unit; a record without a number is told and ties with all others."""
    n = len(firing) + len(other)
    known: Row = {"n": n, "n_records": n}
    unanswered = int(np.isnan(firing).sum() + np.isnan(other).sum())
    if failure is None and min(len(firing), len(other)) < MIN_RECORDS:
        failure = "too_few_records"
    if failure is None and unanswered == n:
        failure = "no_answer"
    if failure is not None:
        return job.row(metric, unit, **known, **undefined(failure, CHANCE))
    value = auroc(firing, other)
    low, high = auroc_interval(value, len(firing), len(other))
    known |= {"value": value, "ci_low": low, "ci_high": high, "ci_method": AUROC_METHOD}
    return job.row(metric, unit, **known, nan_fraction=0.0, n_failures=unanswered)
