"""`anthropic_intervals`: predictions on short records from all levels of a unit's activation.

Bricken et al. 2023, Towards Monosemanticity: 60 records of 9 tokens, 6 around the strongest
tokens, 2 from each of 11 even intervals between 0 and the maximum and 2 from zero, 10 random ones
and 20 of the strongest tokens in other contexts. The value is Spearman's correlation of all
predictions with the truth; a constant prediction counts as 0, and a unit with fewer than 20 firing
records is not defined. Here the records come from other documents than the explanation, never
cross a document, and no text is shown twice.
"""

from dataclasses import replace
from importlib import import_module

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from lmmono.explanations.explanation import Explanation
from lmmono.explanations.llm_simulation import Simulation
from lmmono.records.corpus_excerpts import PADDING
from lmmono.records.sampler import (
    HALF,
    INTERVAL_KINDS,
    IntervalRecords,
    read_interval_records,
)
from lmmono.records.seeds import stream
from lmmono.scores.explained import explanations_of, spent, undefined
from lmmono.scores.scorer_registry import Job, Row
from lmmono.scores.simulation import SIMULATORS
from lmmono.stats.agreement import AGREEMENTS, record_sums
from lmmono.stats.intervals import unit_intervals, unit_method

MIN_FIRING = 20
"""A unit with fewer firing records is not defined."""


def score_intervals(job: Job) -> list[Row]:
    """Score units by Spearman's correlation over the records' tokens, controls included."""
    records = read_interval_records(job.store, job.hook, units=job.units, seed=job.seed)
    units = records.units.tolist()
    rows: list[Row] = []
    for control, explanations in explanations_of(job, units).items():
        predicted, failures, took = _predicted(job, explanations, records.token_ids)
        mine = _rows(job, records, predicted, failures, control)
        rows += [row | columns for row, columns in zip(mine, took, strict=True)]
        if control is None and job.controls:
            moved = replace(records, acts=_misplaced(records.acts, job.seed))
            rows += _rows(job, moved, predicted, failures, "shuffled_pairing")
            centre = np.zeros(predicted.shape)
            centre[..., HALF] = 1.0
            nothing: list[str | None] = [None] * len(units)
            rows += _rows(job, records, centre, nothing, "centre_token")
    return rows


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


def _predicted(
    job: Job, explanations: list[Explanation], token_ids: Int[ndarray, "units records window"]
) -> tuple[Float[ndarray, "units records window"], list[str | None], list[Row]]:
    module, _, name = SIMULATORS[job.settings["simulator"]].partition(":")
    simulate = getattr(import_module(module), name)
    failures: list[str | None] = [each.failure for each in explanations]
    good = [i for i, failure in enumerate(failures) if failure is None]
    took: list[Row] = [{} for _ in explanations]
    predicted = np.zeros(token_ids.shape)
    answers = simulate(job, [explanations[i] for i in good], token_ids[good])
    for i, answer in zip(good, answers, strict=True):
        if isinstance(answer, str):
            failures[i] = answer
        elif isinstance(answer, Simulation):
            predicted[i], failures[i] = answer.acts, answer.failure
            took[i] = {**spent(answer.usage), "prompt_hash": answer.prompt_hash}
        else:
            predicted[i] = answer
    return predicted, failures, took


def _rows(
    job: Job,
    records: IntervalRecords,
    predicted: Float[ndarray, "units records window"],
    failures: list[str | None],
    control: str | None,
) -> list[Row]:
    present = records.cells >= 0
    there = records.token_ids != PADDING
    sums, agreement = record_sums(records.acts, predicted, there), AGREEMENTS["spearman"]
    value = agreement.of(sums.sum(axis=1))
    low, high = unit_intervals(sums, present, INTERVAL_KINDS, agreement)
    firing = (records.acts > 0).any(axis=2).sum(axis=1)
    rows: list[Row] = []
    for i, unit in enumerate(records.units.tolist()):
        n = int(present[i].sum())
        documents = records.grid.doc_ids[records.cells[i][present[i]]]
        known: Row = {"n": n, "n_records": n, "n_tokens": int(there[i].sum()), "control": control}
        known["n_documents"] = len(np.unique(documents))
        failure = failures[i] or ("too_few_records" if firing[i] < MIN_FIRING else None)
        if failure is not None:
            known |= undefined(failure, 0.0)
        else:
            undefined_here = bool(np.isnan(value[i]))
            known |= {"value": 0.0 if undefined_here else float(value[i])}
            known |= {"nan_fraction": float(undefined_here), "n_failures": 0}
            if not np.isnan(low[i]) and not undefined_here:
                fewest = int(
                    min(
                        present[i][kind == INTERVAL_KINDS].sum()
                        for kind in np.unique(INTERVAL_KINDS)
                    )
                )
                known |= {"ci_low": float(low[i]), "ci_high": float(high[i])}
                known["ci_method"] = unit_method(fewest, int(firing[i]))
        rows.append(job.row("anthropic_intervals", unit, **known))
    return rows
