"""`anthropic_intervals`: predictions on short records from all levels of a unit's activation.

Bricken et al. 2023, Towards Monosemanticity: 60 records of 9 tokens, 6 around the strongest
tokens, 2 from each of 11 even intervals between 0 and the maximum and 2 from zero, 10 random ones
and 20 of the strongest tokens in other contexts. The value is Spearman's correlation of all
predictions with the truth; a constant prediction counts as 0, and a unit with fewer than 20 firing
records is not defined. Here the records come from other documents than the explanation, never
cross a document, and no text is shown twice.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from lmmono.clients.client import Failed
from lmmono.errors import ExplainError
from lmmono.explanations.llm_simulation import Simulation
from lmmono.records.corpus_excerpts import PADDING
from lmmono.records.sampler import (
    HALF,
    INTERVAL_KINDS,
    IntervalRecords,
    read_interval_records,
)
from lmmono.records.seeds import stream
from lmmono.registry.scorer_settings import IntervalSettings
from lmmono.scores.score_job import Row, ScoreJob, undefined, usage_columns
from lmmono.scores.simulators import predictions
from lmmono.scores.two_sided import sided_rows
from lmmono.stats.agreement import AGREEMENTS, record_sums
from lmmono.stats.intervals import unit_intervals, unit_method

MIN_FIRING = 20
"""A unit with fewer firing records is not defined."""


def score_intervals(job: ScoreJob) -> list[Row]:
    """Score units by Spearman's correlation over the records' tokens, controls included."""
    records = read_interval_records(job.store, job.hook, units=job.units, seed=job.seed)
    units = records.units.tolist()
    rows: list[Row] = []
    for control, explanations in job.explanations(units).items():
        predicted, answers = predictions(job, explanations, records.token_ids)
        failures = [answer if isinstance(answer, Failed) else None for answer in answers]
        scored = _rows(job, records, predicted, failures, control)
        rows += [row | _usage(answer) for row, answer in zip(scored, answers, strict=True)]
        if control is None and job.controls:
            moved = replace(records, acts=_misplaced(records.acts, job.seed))
            rows += _rows(job, moved, predicted, failures, "shuffled_pairing")
            centre = np.zeros(predicted.shape)
            centre[..., HALF] = 1.0
            no_failures: list[Failed | None] = [None] * len(units)
            rows += _rows(job, records, centre, no_failures, "centre_token")
    settings = job.settings_as(IntervalSettings)
    if settings.sides:
        if settings.simulator != "program":
            raise ExplainError("sides want simulator='program'")
        sides = settings.sides, settings.per_side, 2 * HALF + 1
        rows += sided_rows(job, "anthropic_intervals", *sides, counted="tokens")
    return rows


def _usage(answer: Simulation | Failed) -> Row:
    if isinstance(answer, Failed) or answer.prompt_hash is None:
        return {}
    return {**usage_columns(answer.usage), "prompt_hash": answer.prompt_hash}


def _misplaced(
    acts: Float[ndarray, "units records window"], seed: int
) -> Float[ndarray, "units records window"]:
    """Return the activations of other records, moved round by 1 to 8 tokens.

    Examples are centred on tokens that fire, so another example alone would be partly right.
    """
    rng = stream("misplaced intervals", seed)
    n = len(INTERVAL_KINDS)
    order, shifts = rng.permutation(n), rng.integers(1, 2 * HALF + 1, n)
    rolled = [np.roll(acts[:, at], shift, axis=1) for at, shift in zip(order, shifts, strict=True)]
    return np.stack(rolled, axis=1)


def _rows(
    job: ScoreJob,
    records: IntervalRecords,
    predicted: Float[ndarray, "units records window"],
    failures: list[Failed | None],
    control: str | None,
) -> list[Row]:
    present, is_token = records.cells >= 0, records.token_ids != PADDING
    sums, agreement = record_sums(records.acts, predicted, is_token), AGREEMENTS["spearman"]
    value = agreement.of(sums.sum(axis=1))
    doc_ids = records.grid.doc_ids[records.cells]
    low, high = unit_intervals(sums, present, INTERVAL_KINDS, agreement, doc_ids)
    firing = (records.acts > 0).any(axis=2).sum(axis=1)
    rows: list[Row] = []
    for i, unit in enumerate(records.units.tolist()):
        n = int(present[i].sum())
        documents = records.grid.doc_ids[records.cells[i][present[i]]]
        columns: Row = {
            "n": n,
            "n_records": n,
            "n_tokens": int(is_token[i].sum()),
            "control": control,
        }
        columns["n_documents"] = len(np.unique(documents))
        failed = failures[i]
        if failed is None and firing[i] < MIN_FIRING:
            failed = Failed("too_few_records")
        if failed is not None:
            columns |= undefined(failed, 0.0)
        else:
            undefined_here = bool(np.isnan(value[i]))
            columns |= {"value": 0.0 if undefined_here else float(value[i])}
            columns |= {"nan_fraction": float(undefined_here), "n_failures": 0}
            if not np.isnan(low[i]) and not undefined_here:
                of_kind = [present[i][k == INTERVAL_KINDS] for k in np.unique(INTERVAL_KINDS)]
                fewest = min(int(kind.sum()) for kind in of_kind)
                columns |= {"ci_low": float(low[i]), "ci_high": float(high[i])}
                columns["ci_method"] = unit_method(fewest, int(firing[i]))
        rows.append(job.row("anthropic_intervals", unit, **columns))
    return rows
