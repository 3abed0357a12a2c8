"""The simulation scorers: predict a unit's activations from its explanation, and compare.

`simulation_tar` scores top and random records together, `simulation_random` the random ones alone.
Bills et al. 2023, "Language models can explain neurons in language models".
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from lmmono.clients.client import Usage
from lmmono.explanations.explanation import Explanation, Failure
from lmmono.explanations.llm_simulation import Simulation
from lmmono.explanations.protocols import Protocol, find_protocol
from lmmono.explanations.stored_explanations import read_maxima
from lmmono.records.sampler import Records
from lmmono.scores.explained import UNSCORED, explanations_of, program_of, spent
from lmmono.scores.scorer_registry import Job, Row
from lmmono.stats.agreement import AGREEMENTS, record_sums
from lmmono.stats.intervals import unit_intervals, unit_method

UNITS_AT_ONCE = 256
"""Units whose series are held together: 0.1 GB of double precision at 40 records of 64 tokens."""

Simulated = Float[ndarray, "records window"] | Simulation | Failure
"""Predicted activations, or why there are none."""

Simulator = Callable[
    [Job, Sequence[Explanation], Int[ndarray, "units records window"]], Sequence[Simulated]
]
"""Predicts for each explanation the activations on its tokens; 0 on padding."""

SIMULATORS: dict[str, str] = {
    "program": "lmmono.scores.simulation:run_programs",
    "llm": "lmmono.scores.judged_simulation:simulate_by_reading",
    "llm_calibrated": "lmmono.scores.judged_simulation:simulate_calibrated",
}
"""`module:function` by the name that setting `simulator` takes."""


def run_programs(
    job: Job,  # noqa: ARG001  as every simulator
    explanations: Sequence[Explanation],
    token_ids: Int[ndarray, "units records window"],
) -> list[ndarray]:
    """Let each explanation's program predict.

    Raises:
        ExplainError: An explanation has no program.
    """
    pairs = zip(explanations, token_ids, strict=True)
    return [program_of(explanation).simulate(ids) for explanation, ids in pairs]


def score_top_and_random(job: Job) -> list[Row]:
    """Score units on top and random records together."""
    return _rows(job, "simulation_tar", ("top", "random"))


def score_random(job: Job) -> list[Row]:
    """Score units on random records alone, firing or not."""
    return _rows(job, "simulation_random", ("random",))


@dataclass(frozen=True, slots=True)
class Series:
    """True and predicted activations of some units, summed by record."""

    mine: Int[ndarray, " units"]
    """Which units of the records these are."""
    sums: Float[ndarray, "units records sums"]
    """Sums of each record; see `agreement.record_sums`."""
    present: Bool[ndarray, "units records"]
    """Which records there are."""
    answers: Sequence[Simulation | Failure]
    """What each unit's simulation took, or why it has none."""
    control: str | None = None
    """Name of the control; None for the score itself."""


def protocol_of(job: Job) -> Protocol:
    """Return the records that a job's settings ask for."""
    if job.settings["protocol"] is not None:
        return find_protocol(job.settings["protocol"])
    top, random = tuple(range(job.settings["top"])), tuple(range(job.settings["random"]))
    return Protocol("", {"top": top, "random": random}, window=job.settings["window"])


def scored_records(job: Job, kinds: tuple[str, ...]) -> Records:
    """Return the records that a job scores, of some kinds."""
    protocol = protocol_of(job)
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


def simulated(job: Job, records: Records) -> Iterator[Series]:
    """Yield the series of some units at a time: the score's own, then those of the controls."""
    units = [int(unit) for unit in records.units]
    explained = explanations_of(job, units)
    largest = read_maxima(job.store, job.hook)
    for first in range(0, len(units), UNITS_AT_ONCE):
        mine = np.arange(first, min(first + UNITS_AT_ONCE, len(units)))
        index, truth = records.index[mine], records.acts[mine]
        present = index >= 0
        ids = np.where(present[:, :, None], records.excerpts.token_ids[index], np.int32(-1))
        for control, explanations in explained.items():
            asked = [explanations[i] for i in mine]
            predicted, answers = predictions(job, asked, ids)
            # what another unit's explanation says is read on the scale of this unit
            ratio = [largest[units[i]] / (largest[explanations[i].unit] or 1.0) for i in mine]
            predicted *= np.array(ratio)[:, None, None]
            sums = record_sums(truth, predicted, ids >= 0)
            yield Series(mine, sums, present, answers, control)
            if control is None and job.controls:
                partner = _partners(job, records, mine)[:, :, None]
                other = np.take_along_axis(truth, partner, axis=1)
                both = (ids >= 0) & np.take_along_axis(ids >= 0, partner, axis=1)
                sums = record_sums(other, predicted, both)
                # what it took is counted once, with the score itself
                free: list[Simulation | Failure] = [
                    each if isinstance(each, str) else replace(each, usage=Usage())
                    for each in answers
                ]
                yield Series(mine, sums, present, free, "shuffled_pairing")


def predictions(
    job: Job, explanations: Sequence[Explanation], ids: Int[ndarray, "units records window"]
) -> tuple[Float[ndarray, "units records window"], list[Simulation | Failure]]:
    """Return what each explanation predicts on its tokens, and what that took or why it failed."""
    module, _, name = SIMULATORS[job.settings["simulator"]].partition(":")
    simulate: Simulator = getattr(import_module(module), name)
    good = [i for i, each in enumerate(explanations) if each.failure is None]
    found = simulate(job, [explanations[i] for i in good], ids[good])
    nothing = Simulation(np.zeros((0, 0)))
    answers: list[Simulation | Failure] = [each.failure or nothing for each in explanations]
    predicted = np.zeros(ids.shape)
    for i, answer in zip(good, found, strict=True):
        if isinstance(answer, str):
            answers[i] = answer
            continue
        predicted[i] = answer
        answers[i] = answer if isinstance(answer, Simulation) else nothing
    return predicted, answers


def _partners(
    job: Job, records: Records, mine: Int[ndarray, " units"]
) -> Int[ndarray, "units records"]:
    """Return, for each record, another one of the same kind whose truth it is paired with."""
    present = records.index[mine] >= 0
    partner = np.broadcast_to(np.arange(present.shape[1]), present.shape).copy()
    for i, unit in enumerate(records.units[mine]):
        rng = np.random.default_rng((job.seed, *job.hook.encode(), int(unit), 11))
        for kind in sorted(set(records.kinds)):
            columns = records.columns(kind)
            there = columns[present[i, columns]]
            if len(there) > 1:
                partner[i, there] = np.roll(there, rng.integers(1, len(there)))
    return partner


def _rows(job: Job, scorer: str, kinds: tuple[str, ...]) -> list[Row]:
    """Return a row per unit, measure and control."""
    started, rows = time.perf_counter(), list[Row]()
    records = scored_records(job, kinds)
    of_kind = np.unique(np.array(records.kinds), return_inverse=True)[1]
    for series in simulated(job, records):
        facts = _facts(records, series, of_kind)
        for name, agreement in AGREEMENTS.items():
            value = agreement.of(series.sums.sum(axis=1))
            low, high = unit_intervals(series.sums, series.present, of_kind, agreement)
            metric = scorer if name == "pearson" else f"{scorer}_{name}"
            for i, answer in enumerate(series.answers):
                numbers = _numbers(answer, float(value[i]), float(low[i]), float(high[i]))
                # what the answer took is said once, with the headline
                took = _took(answer) if name == "pearson" else {}
                took["prompt_hash"] = None if isinstance(answer, str) else answer.prompt_hash
                unit = int(records.units[series.mine[i]])
                split = records.excerpts.split
                rows.append(job.row(metric, unit, split, **facts[i] | numbers | took))
    each_took = (time.perf_counter() - started) / max(len(rows), 1)
    return [{"seconds": each_took, **row} for row in rows]


def _numbers(answer: Simulation | Failure, value: float, low: float, high: float) -> Row:
    """Return value and interval; 0 where the value is not defined, none where a judge failed."""
    if isinstance(answer, str) and answer in UNSCORED:
        return {"n_failures": 1, "failure": answer, "ci_method": None}
    if isinstance(answer, str) or np.isnan(value):
        failure = answer if isinstance(answer, str) else None
        return {"value": 0.0, "nan_fraction": 1.0, "failure": failure, "ci_method": None}
    if np.isnan(low):
        return {"value": value, "nan_fraction": 0.0, "ci_method": None}
    return {"value": value, "nan_fraction": 0.0, "ci_low": low, "ci_high": high}


def _took(answer: Simulation | Failure) -> Row:
    if isinstance(answer, str) or answer.usage == Usage():
        return {}
    return {**spent(answer.usage), "details": {"fallback_fraction": answer.fallback_fraction}}


def _facts(records: Records, series: Series, of_kind: Int[ndarray, " records"]) -> list[Row]:
    """Return what all measures of a unit have in common."""
    doc_ids = records.excerpts.doc_ids[records.index[series.mine]]
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
            "ci_method": unit_method(int(fewest[i]), int(firing[i])),
        }
        for i in range(len(series.mine))
    ]
