"""The simulation scorers: predict a unit's activations from its explanation, and compare.

`simulation_tar` scores top and random records together, `simulation_random` the random ones alone.
Bills et al. 2023, "Language models can explain neurons in language models".
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from lmmono.errors import ExplainError
from lmmono.explaining.controls import other_units
from lmmono.explaining.explanation import Explanation, Failure
from lmmono.explaining.protocols import Protocol, find_protocol
from lmmono.explaining.records import Records
from lmmono.explaining.stored import read_densities, read_explanations
from lmmono.scoring.agreement import AGREEMENTS, record_sums
from lmmono.scoring.intervals import unit_intervals, unit_method
from lmmono.scoring.registry import Job, Row

UNITS_AT_ONCE = 256
"""Units whose series are held together: 0.1 GB of double precision at 40 records of 64 tokens."""

UNSCORED: tuple[Failure, ...] = ("unparsed", "refused", "no_answer")
"""Failures of a judge. A unit that is silent or fires too rarely has a score: 0, not defined."""

Simulated = Float[ndarray, "records window"] | Failure
"""Predicted activations, or why there are none."""

Simulator = Callable[
    [Job, Sequence[Explanation], Int[ndarray, "units records window"]], Sequence[Simulated]
]
"""Predicts for each explanation the activations on its tokens; 0 on padding."""

SIMULATORS: dict[str, str] = {
    "program": "simulation:run_programs",
    "llm": "judged_simulation:simulate_by_reading",
    "llm_calibrated": "judged_simulation:simulate_calibrated",
}
"""`module:function` under `lmmono.scoring` by the name that setting `simulator` takes."""


def run_programs(
    job: Job,
    explanations: Sequence[Explanation],
    token_ids: Int[ndarray, "units records window"],
) -> list[Simulated]:
    """Let each explanation's program predict.

    Raises:
        ExplainError: An explanation has no program.
    """
    predicted: list[Simulated] = []
    for explanation, ids in zip(explanations, token_ids, strict=True):
        if explanation.program is None:
            raise ExplainError(
                f"{job.hook}: explanations by {explanation.explainer} have no program; "
                f"name a simulator that reads text: simulator={sorted(SIMULATORS)}"
            )
        predicted.append(explanation.program.simulate(ids))
    return predicted


def score_top_and_random(job: Job) -> list[Row]:
    """Score units on top and random records together."""
    return _Simulation(job, "simulation_tar", ("top", "random")).rows()


def score_random(job: Job) -> list[Row]:
    """Score units on random records alone, firing or not."""
    return _Simulation(job, "simulation_random", ("random",)).rows()


@dataclass(frozen=True, slots=True)
class Series:
    """True and predicted activations of some units, by record."""

    sums: Float[ndarray, "units records sums"]
    """Sums of each record; see `agreement.record_sums`."""
    present: Bool[ndarray, "units records"]
    """Which records there are."""
    failures: list[Failure | None]
    """Why a unit has no prediction."""
    control: str | None = None
    """Name of the control; None for the score itself."""


def protocol_of(job: Job) -> Protocol:
    """Return the records that a job's settings ask for."""
    if job.settings["protocol"] is not None:
        return find_protocol(job.settings["protocol"])
    top, random = tuple(range(job.settings["top"])), tuple(range(job.settings["random"]))
    return Protocol("", {"top": top, "random": random}, window=job.settings["window"])


class _Simulation:
    """One scorer at work on one hook."""

    def __init__(self, job: Job, metric: str, kinds: tuple[str, ...]) -> None:
        assert job.explainer is not None
        self._job, self._metric = job, metric
        self._protocol = protocol_of(job)
        self._records = self._read(kinds)
        self._explained = read_explanations(job.store, job.hook, job.explainer, job.seed)
        module, _, name = SIMULATORS[job.settings["simulator"]].partition(":")
        self._simulate: Simulator = getattr(import_module(f"lmmono.scoring.{module}"), name)
        self._others = self._draw_others()

    def _read(self, kinds: tuple[str, ...]) -> Records:
        job, protocol = self._job, self._protocol
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

    def _draw_others(self) -> dict[str, list[int]]:
        """Return, for each control that takes another unit's explanation, that unit."""
        if not self._job.controls:
            return {}
        job, units = self._job, [int(unit) for unit in self._records.units]
        good = sorted(u for u, found in self._explained.items() if found.failure is None)
        densities = read_densities(job.store, job.hook)
        return {
            "random_explanation": other_units(units, good, job.hook, job.seed),
            "matched_density": other_units(units, good, job.hook, job.seed, densities),
        }

    def rows(self) -> list[Row]:
        """Return the rows of all units, controls included."""
        started, rows = time.perf_counter(), list[Row]()
        n_units = len(self._records.units)
        for first in range(0, n_units, UNITS_AT_ONCE):
            mine = np.arange(first, min(first + UNITS_AT_ONCE, n_units))
            for series in self.series(mine):
                rows += self._rows(mine, series)
        each_took = (time.perf_counter() - started) / max(len(rows), 1)
        return [row | {"seconds": each_took} for row in rows]

    def series(self, mine: Int[ndarray, " units"]) -> list[Series]:
        """Return the series of some units: the score's own, then the controls'."""
        records = self._records
        index, truth = records.index[mine], records.acts[mine]
        there = (index >= 0)[:, :, None]
        ids = np.where(there, records.excerpts.token_ids[index], np.int32(-1))
        units = [int(unit) for unit in records.units[mine]]
        predicted, failures = self._predicted(units, ids)
        present, is_token = index >= 0, ids >= 0
        found = [Series(record_sums(truth, predicted, is_token), present, failures)]
        if self._job.controls:
            shift = self._partners(present)
            other = np.take_along_axis(truth, shift[:, :, None], axis=1)
            both = is_token & np.take_along_axis(is_token, shift[:, :, None], axis=1)
            sums = record_sums(other, predicted, both)
            found.append(Series(sums, present, failures, "shuffled_pairing"))
        for control, others in self._others.items():
            predicted, _ = self._predicted([others[i] for i in mine], ids)
            found.append(
                Series(record_sums(truth, predicted, is_token), present, failures, control)
            )
        return found

    def _predicted(
        self, units: list[int], ids: Int[ndarray, "units records window"]
    ) -> tuple[Float[ndarray, "units records window"], list[Failure | None]]:
        explained = [self._explained[unit] for unit in units]
        failures = [found.failure for found in explained]
        good = [i for i, failure in enumerate(failures) if failure is None]
        asked = [explained[i] for i in good]
        predicted = np.zeros(ids.shape)
        for i, answer in zip(good, self._simulate(self._job, asked, ids[good]), strict=True):
            if isinstance(answer, str):
                failures[i] = answer
            else:
                predicted[i] = answer
        return predicted, failures

    def _partners(self, present: Bool[ndarray, "units records"]) -> Int[ndarray, "units records"]:
        """Return, for each record, another one of the same kind whose truth it is paired with."""
        partner = np.broadcast_to(np.arange(present.shape[1]), present.shape).copy()
        rng = np.random.default_rng((self._job.seed, *self._job.hook.encode()))
        draws = rng.random(present.shape[0])
        for kind in set(self._records.kinds):
            columns = self._records.columns(kind)
            for i, draw in enumerate(draws):
                mine = columns[present[i, columns]]
                if len(mine) > 1:
                    partner[i, mine] = np.roll(mine, 1 + int(draw * (len(mine) - 1)))
        return partner

    def _rows(self, mine: Int[ndarray, " units"], series: Series) -> list[Row]:
        """Return a row per unit and measure."""
        kinds = np.unique(np.array(self._records.kinds), return_inverse=True)[1]
        facts = self._facts(mine, series, kinds)
        rows: list[Row] = []
        for name, agreement in AGREEMENTS.items():
            value = agreement.of(series.sums.sum(axis=1))
            low, high = unit_intervals(series.sums, series.present, kinds, agreement)
            metric = self._metric if name == "pearson" else f"{self._metric}_{name}"
            for i, fact in enumerate(facts):
                rows.append(self._row(metric, fact, value[i], low[i], high[i]))
        return rows

    def _row(self, metric: str, fact: Row, value: float, low: float, high: float) -> Row:
        failure, unit = fact["failure"], fact["unit"]
        undefined = bool(np.isnan(value)) or failure is not None
        failed = failure in UNSCORED
        bounded = not (undefined or np.isnan(low))
        numbers = {
            "value": None if failed else 0.0 if undefined else float(value),
            "nan_fraction": None if failed else float(undefined),
            "n_failures": int(failed),
            "ci_low": float(low) if bounded else None,
            "ci_high": float(high) if bounded else None,
            "ci_method": fact["ci_method"] if bounded else None,
        }
        rest = {key: each for key, each in fact.items() if key not in ("unit", "ci_method")}
        return self._job.row(metric, unit, self._protocol.score_split, **numbers, **rest)

    def _facts(
        self, mine: Int[ndarray, " units"], series: Series, kinds: Int[ndarray, " records"]
    ) -> list[Row]:
        """Return what all measures of a unit have in common."""
        records = self._records
        doc_ids = records.excerpts.doc_ids[records.index[mine]]
        doc_ids = np.sort(np.where(series.present, doc_ids, -1))
        n_documents = (np.diff(doc_ids, axis=1, prepend=-1) != 0).sum(axis=1)
        fewest = np.min([series.present[:, kinds == k].sum(axis=1) for k in set(kinds)], axis=0)
        n_tokens = series.sums[..., 0].sum(axis=1)
        return [
            {
                "unit": int(records.units[at]),
                "control": series.control,
                "failure": series.failures[i],
                "n": int(series.present[i].sum()),
                "n_records": int(series.present[i].sum()),
                "n_documents": int(n_documents[i]),
                "n_tokens": int(n_tokens[i]),
                "ci_method": unit_method(int(fewest[i])),
            }
            for i, at in enumerate(mine)
        ]
