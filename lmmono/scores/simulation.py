"""The simulation scorers: predict a unit's activations from its explanation, and compare.

`simulation_tar` scores top and random records together, `simulation_random` the random ones alone.
Bills et al. 2023, "Language models can explain neurons in language models".
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from lmmono.clients.client import Failed, Usage
from lmmono.errors import ExplainError
from lmmono.explanations.llm_simulation import Simulation
from lmmono.explanations.protocols import Protocol, find_protocol
from lmmono.explanations.stored_explanations import read_maxima
from lmmono.records.corpus_excerpts import left_out_cells
from lmmono.records.sampler import Records
from lmmono.records.seeds import stream
from lmmono.registry.scorer_settings import SimulationSettings
from lmmono.scores.score_job import Row, ScoreJob, over_documents, undefined, usage_columns
from lmmono.scores.simulators import UNCALIBRATED, predictions
from lmmono.scores.two_sided import sided_rows
from lmmono.stats.agreement import AGREEMENTS, record_sums
from lmmono.stats.intervals import unit_intervals, unit_method

UNITS_AT_ONCE = 256
"""Units whose series are held together: 0.1 GB of double precision at 40 records of 64 tokens."""


def score_top_and_random(job: ScoreJob) -> list[Row]:
    """Score units on top and random records together."""
    return _rows(job, "simulation_tar", ("top", "random"))


def score_random(job: ScoreJob) -> list[Row]:
    """Score units on random records alone, firing or not."""
    return _rows(job, "simulation_random", ("random",))


@dataclass(frozen=True, slots=True)
class Series:
    """True and predicted activations of some units, summed by record."""

    places: Int[ndarray, " units"]
    """Which units of the records these are."""
    sums: Float[ndarray, "units records sums"]
    """Sums of each record; see `agreement.record_sums`."""
    present: Bool[ndarray, "units records"]
    """Which records there are."""
    answers: Sequence[Simulation | Failed]
    """What each unit's simulation took, or why it has none."""
    control: str | None = None
    """Name of the control; None for the score itself."""


def scored_records(job: ScoreJob, kinds: tuple[str, ...]) -> Records:
    """Return the records that a job scores, of some kinds."""
    settings = job.settings_as(SimulationSettings)
    if settings.protocol is not None:
        protocol = find_protocol(settings.protocol)
    else:
        top, random = tuple(range(settings.top)), tuple(range(settings.random))
        protocol = Protocol("", {"top": top, "random": random}, window=settings.window)
    records = job.reader.ranked(
        job.hook,
        protocol.score_split,
        protocol.score,
        window=protocol.window,
        units=job.units,
        token_centred=protocol.token_centred,
    )
    wanted = [i for i, kind in enumerate(records.kinds) if kind in kinds]
    return records if len(wanted) == len(records.kinds) else records.take(wanted)


def simulated(job: ScoreJob, records: Records) -> Iterator[Series]:
    """Yield the series of some units at a time: the score's own, then those of the controls."""
    units = [int(unit) for unit in records.units]
    by_control = job.explanations(units)
    largest = read_maxima(job.store, job.hook)
    left_out = left_out_cells(job.store, job.hook, records.excerpts.grid)
    for first in range(0, len(units), UNITS_AT_ONCE):
        places = np.arange(first, min(first + UNITS_AT_ONCE, len(units)))
        index, truth = records.index[places], records.acts[places]
        present = index >= 0
        ids = np.where(present[:, :, None], records.excerpts.token_ids[index], np.int32(-1))
        counts = ids >= 0
        if left_out is not None:
            counts &= ~left_out[records.excerpts.cells_of(index)]
        for control, of_all_units in by_control.items():
            explanations = [of_all_units[i] for i in places]
            predicted, answers = predictions(job, explanations, ids)
            # what another unit's explanation says is read on the scale of this unit
            scale = [
                largest[units[i]] / (largest[explanation.unit] or 1.0)
                for i, explanation in zip(places, explanations, strict=True)
            ]
            predicted *= np.array(scale)[:, None, None]
            sums = record_sums(truth, predicted, counts)
            yield Series(places, sums, present, answers, control)
            if control is None and job.controls:
                partner = _partners(job, records, places)[:, :, None]
                other = np.take_along_axis(truth, partner, axis=1)
                both = counts & np.take_along_axis(counts, partner, axis=1)
                sums = record_sums(other, predicted, both)
                # what it took is counted once, with the score itself
                free: list[Simulation | Failed] = [
                    answer if isinstance(answer, Failed) else replace(answer, usage=Usage())
                    for answer in answers
                ]
                yield Series(places, sums, present, free, "shuffled_pairing")


def _partners(
    job: ScoreJob, records: Records, places: Int[ndarray, " units"]
) -> Int[ndarray, "units records"]:
    """Return, for each record, another one of the same kind whose truth it is paired with."""
    present = records.index[places] >= 0
    partner = np.broadcast_to(np.arange(present.shape[1]), present.shape).copy()
    for i, unit in enumerate(records.units[places]):
        rng = stream("shuffled pairing", job.seed, job.hook, int(unit))
        for kind in sorted(set(records.kinds)):
            columns = records.columns(kind)
            filled = columns[present[i, columns]]
            if len(filled) > 1:
                partner[i, filled] = np.roll(filled, rng.integers(1, len(filled)))
    return partner


def _rows(job: ScoreJob, scorer: str, kinds: tuple[str, ...]) -> list[Row]:
    """Return a row per unit, measure and control."""
    started, rows = time.perf_counter(), list[Row]()
    records = scored_records(job, kinds)
    of_kind = np.unique(np.array(records.kinds), return_inverse=True)[1]
    documents = records.excerpts.doc_ids[records.index]
    for series in simulated(job, records):
        facts = _facts(records, series, of_kind)
        for name, agreement in AGREEMENTS.items():
            value = agreement.of(series.sums.sum(axis=1))
            low, high = unit_intervals(
                series.sums, series.present, of_kind, agreement, documents[series.places]
            )
            metric = scorer if name == "pearson" else f"{scorer}_{name}"
            for i, answer in enumerate(series.answers):
                numbers = _numbers(answer, float(value[i]), float(low[i]), float(high[i]))
                if (
                    agreement.scale == "explained"
                    and job.settings_as(SimulationSettings).simulator in UNCALIBRATED
                ):
                    numbers = {"value": None, "failure": "uncalibrated", "ci_method": None}
                # what the answer took is said once, with the headline
                took = _usage(answer) if name == "pearson" else {}
                took["prompt_hash"] = None if isinstance(answer, Failed) else answer.prompt_hash
                unit = int(records.units[series.places[i]])
                split = records.excerpts.split
                rows.append(job.row(metric, unit, split, **facts[i] | numbers | took))
    settings = job.settings_as(SimulationSettings)
    if settings.sides:
        if settings.simulator != "program" or settings.protocol is not None:
            raise ExplainError("sides want simulator='program' and no protocol")
        sides = settings.sides, settings.per_side, settings.window
        rows += sided_rows(job, scorer, *sides, counted="tokens")
    seconds = (time.perf_counter() - started) / max(len(rows), 1)
    return [{"seconds": seconds, **row} for row in rows]


def _numbers(answer: Simulation | Failed, value: float, low: float, high: float) -> Row:
    """Return value and interval; 0 where the value is not defined, none where a judge failed."""
    if isinstance(answer, Failed):
        return {**undefined(answer, 0.0), "ci_method": None}
    if np.isnan(value):
        return {"value": 0.0, "nan_fraction": 1.0, "ci_method": None}
    if np.isnan(low):
        return {"value": value, "nan_fraction": 0.0, "ci_method": None}
    return {"value": value, "nan_fraction": 0.0, "ci_low": low, "ci_high": high}


def _usage(answer: Simulation | Failed) -> Row:
    if isinstance(answer, Failed) or answer.usage == Usage():
        return {}
    fallback = {"fallback_fraction": answer.fallback_fraction}
    return {**usage_columns(answer.usage), "details": fallback}


def _facts(records: Records, series: Series, of_kind: Int[ndarray, " records"]) -> list[Row]:
    """Return what all measures of a unit have in common."""
    doc_ids = records.excerpts.doc_ids[records.index[series.places]]
    doc_ids = np.sort(np.where(series.present, doc_ids, -1))
    n_documents = (np.diff(doc_ids, axis=1, prepend=-1) != 0).sum(axis=1)
    by_kind = [series.present[:, of_kind == kind].sum(axis=1) for kind in np.unique(of_kind)]
    fewest, firing = np.min(by_kind, axis=0), (series.sums[..., 7] > 0).sum(axis=1)
    n_records, n_tokens = series.present.sum(axis=1), series.sums[..., 0].sum(axis=1)
    return [
        {
            "control": series.control,
            "n": int(n_records[i]),
            "n_records": int(n_records[i]),
            "n_documents": int(n_documents[i]),
            "n_tokens": int(n_tokens[i]),
            "n_failures": 0,
            "ci_method": over_documents(
                unit_method(int(fewest[i]), int(firing[i])), int(n_documents[i])
            ),
        }
        for i in range(len(series.places))
    ]
