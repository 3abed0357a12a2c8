"""Simulators: what predicts a unit's activations on given tokens from its explanation.

A program predicts in units of the hook. A language model that reads the explanation (all tokens at
once, Bills et al. 2023) expects activations between 0 and 10: a correlation does not mind, other
measures do. For those the calibrated simulator maps them onto the hook's units by a straight line
per explanation, fitted on records of split `explain`.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from lmmono.clients.client import Failed
from lmmono.errors import ExplainError
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.llm_simulation import Simulation, simulate
from lmmono.explanations.stored_explanations import read_vocabulary
from lmmono.records.sampler import Ranks
from lmmono.registry.scorer_settings import IntervalSettings, SimulationSettings
from lmmono.scores.score_job import ScoreJob, program_of

N_TOP, N_RANDOM = 5, 5
"""Records that a line is fitted on, of each kind."""

Simulated = Float[ndarray, "records window"] | Simulation | Failed
"""Predicted activations, or why there are none."""

Simulator = Callable[
    [ScoreJob, Sequence[Explanation], Int[ndarray, "units records window"]], Sequence[Simulated]
]
"""Predicts for each explanation the activations on its tokens; 0 on padding."""


def run_programs(
    job: ScoreJob,  # noqa: ARG001  as every simulator
    explanations: Sequence[Explanation],
    token_ids: Int[ndarray, "units records window"],
) -> list[ndarray]:
    """Let each explanation's program predict.

    Raises:
        ExplainError: An explanation has no program.
    """
    pairs = zip(explanations, token_ids, strict=True)
    return [program_of(explanation).simulate(ids) for explanation, ids in pairs]


def simulate_by_reading(
    job: ScoreJob,
    explanations: Sequence[Explanation],
    token_ids: Int[ndarray, "units records window"],
) -> list[Simulation | Failed]:
    """Let the job's client read each explanation; expected activations between 0 and 10.

    Raises:
        ExplainError: The job has no client, or the store has no strings of tokens.
        ClientError: The client gives no log-probabilities of its prompt.
    """
    simulations = _read_by_client(job, explanations, list(token_ids))
    return [simulation.failed or simulation for simulation in simulations]


def simulate_calibrated(
    job: ScoreJob,
    explanations: Sequence[Explanation],
    token_ids: Int[ndarray, "units records window"],
) -> list[Simulation | Failed]:
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
    on_explain = _read_by_client(job, explanations, [records.token_ids(row) for row in rows])
    on_score = _read_by_client(job, explanations, list(token_ids))
    calibrated: list[Simulation | Failed] = []
    for row, fitted, scored, ids in zip(rows, on_explain, on_score, token_ids, strict=True):
        is_token = records.token_ids(row) >= 0
        intercept, slope = straight_line(fitted.acts[is_token], records.acts[row][is_token])
        acts = np.where(ids >= 0, intercept + slope * scored.acts, 0.0)
        failed = fitted.failed or scored.failed
        usage = fitted.usage + scored.usage
        calibrated.append(
            failed
            or Simulation(acts, scored.n_slots, scored.n_fallback, None, usage, scored.prompt_hash)
        )
    return calibrated


def straight_line(expected: ndarray, true: ndarray) -> tuple[float, float]:
    """Return intercept and slope of least squares; the mean and 0 where nothing varies."""
    x, y = expected.astype(np.float64), true.astype(np.float64)
    variation = float(np.square(x - x.mean()).sum()) if len(x) else 0.0
    if variation <= 1e-12:  # a constant up to rounding of expected values between 0 and 10
        return (float(y.mean()) if len(y) else 0.0), 0.0
    slope = float((x - x.mean()) @ (y - y.mean())) / variation
    return float(y.mean() - slope * x.mean()), slope


def _read_by_client(
    job: ScoreJob, explanations: Sequence[Explanation], token_ids: list[ndarray]
) -> list[Simulation]:
    if job.client is None:
        raise ExplainError("this simulator asks a language model; pass client=")
    texts = [explanation.text or "" for explanation in explanations]
    return simulate(job.client, texts, token_ids, read_vocabulary(job.store))


SIMULATORS: dict[str, Simulator] = {
    "program": run_programs,
    "llm": simulate_by_reading,
    "llm_calibrated": simulate_calibrated,
}
"""By the name that setting `simulator` takes."""

UNCALIBRATED = ("llm",)
"""Simulators that do not predict in units of the hook: a squared error of theirs means nothing, at
maxima near 1 an R2 is about -100."""


def predictions(
    job: ScoreJob, explanations: Sequence[Explanation], ids: Int[ndarray, "units records window"]
) -> tuple[Float[ndarray, "units records window"], list[Simulation | Failed]]:
    """Return what each explanation predicts on its tokens, and what that took or why it failed.

    Predictions by the simulator of the job's settings; 0 where an explanation failed.

    Raises:
        ExplainError: There is no such simulator, or it lacks a client or a program.
    """
    settings = job.settings
    assert isinstance(settings, SimulationSettings | IntervalSettings)
    name = settings.simulator
    if name not in SIMULATORS:
        raise ExplainError(f"simulator: want one of {', '.join(SIMULATORS)}, got {name!r}")
    explained = [i for i, explanation in enumerate(explanations) if explanation.failed is None]
    simulated = SIMULATORS[name](job, [explanations[i] for i in explained], ids[explained])
    nothing = Simulation(np.zeros((0, 0)))
    answers: list[Simulation | Failed] = [
        explanation.failed or nothing for explanation in explanations
    ]
    predicted = np.zeros(ids.shape)
    for i, simulation in zip(explained, simulated, strict=True):
        if isinstance(simulation, Failed):
            answers[i] = simulation
            continue
        predicted[i] = simulation
        answers[i] = simulation if isinstance(simulation, Simulation) else nothing
    return predicted, answers
