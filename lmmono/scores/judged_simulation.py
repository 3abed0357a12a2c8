"""Simulation by a language model that reads the explanation: the all-at-once simulator.

Expected activations lie between 0 and 10; a correlation does not mind. For measures that do, the
calibrated simulator maps them onto the hook's units by a straight line per explanation, fitted on
records of split `explain`.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from lmmono.errors import ExplainError
from lmmono.explanations.explanation import Explanation, Failure
from lmmono.explanations.llm_simulation import Simulation, simulate
from lmmono.explanations.stored_explanations import read_vocabulary
from lmmono.records.sampler import Ranks
from lmmono.scores.scorer_registry import Job

N_TOP, N_RANDOM = 5, 5
"""Records that a line is fitted on."""


def simulate_by_reading(
    job: Job, explanations: Sequence[Explanation], token_ids: Int[ndarray, "units records window"]
) -> list[Simulation | Failure]:
    """Let the job's client read each explanation; expected activations between 0 and 10.

    Raises:
        ExplainError: The job has no client, or the store has no strings of tokens.
        ClientError: The client gives no log-probabilities of its prompt.
    """
    return [found.failure or found for found in _simulations(job, explanations, list(token_ids))]


def simulate_calibrated(
    job: Job, explanations: Sequence[Explanation], token_ids: Int[ndarray, "units records window"]
) -> list[Simulation | Failure]:
    """As `simulate_by_reading`, in units of the hook by a straight line per explanation.

    Raises:
        ExplainError: The job has no client, or the store has no strings of tokens.
        ClientError: The client gives no log-probabilities of its prompt.
    """
    units = sorted({explanation.unit for explanation in explanations})
    ranks: Ranks = {"top": tuple(range(N_TOP)), "random": tuple(range(N_RANDOM))}
    window = token_ids.shape[2]
    records = job.reader.ranked(job.hook, "explain", ranks, window=window, units=units)
    row_of = {unit: row for row, unit in enumerate(units)}
    rows = [row_of[explanation.unit] for explanation in explanations]
    known = _simulations(job, explanations, [records.token_ids(row) for row in rows])
    found = _simulations(job, explanations, list(token_ids))
    calibrated: list[Simulation | Failure] = []
    for row, fitted, each, ids in zip(rows, known, found, token_ids, strict=True):
        there = records.token_ids(row) >= 0
        line = straight_line(fitted.acts[there], records.acts[row][there])
        acts = np.where(ids >= 0, line[0] + line[1] * each.acts, 0.0)
        failure = fitted.failure or each.failure
        usage, asked = fitted.usage + each.usage, each.prompt_hash
        new = Simulation(acts, each.n_slots, each.n_fallback, failure, usage, asked)
        calibrated.append(failure or new)
    return calibrated


def straight_line(expected: ndarray, true: ndarray) -> tuple[float, float]:
    """Return intercept and slope of least squares; the mean and 0 where nothing varies."""
    x, y = expected.astype(np.float64), true.astype(np.float64)
    variation = float(np.square(x - x.mean()).sum()) if len(x) else 0.0
    if variation <= 1e-12:
        return (float(y.mean()) if len(y) else 0.0), 0.0
    slope = float((x - x.mean()) @ (y - y.mean())) / variation
    return float(y.mean() - slope * x.mean()), slope


def _simulations(
    job: Job, explanations: Sequence[Explanation], token_ids: list[ndarray]
) -> list[Simulation]:
    if job.client is None:
        raise ExplainError("this simulator asks a language model; pass client=")
    texts = [explanation.text or "" for explanation in explanations]
    return simulate(job.client, texts, token_ids, read_vocabulary(job.store))
